// One row in both forms: decode_pack, decode_unpack.
struct Params {
    cols: u32,
    // Pieces of the packed vector.
    pieces: u32,
}
