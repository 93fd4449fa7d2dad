// The parameters of decode_pack and decode_unpack, which convert one row.
struct Params {
    cols: u32,
    // Pieces of the packed vector.
    pieces: u32,
}
