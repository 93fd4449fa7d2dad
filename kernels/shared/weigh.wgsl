// Adds the weight of a rank to its coarse bin.
fn weigh(rank: u32) {
    let bin = rank >> FINE_BITS;
    let weight = weight_of(rank);
    let before = atomicAdd(&bins[MASS_LOW + bin], weight);
    if (before + weight < before) {
        atomicAdd(&bins[MASS_HIGH + bin], 1u);
    }
}
