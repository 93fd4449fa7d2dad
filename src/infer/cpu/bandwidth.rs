//! The bandwidth of this machine's memory, with which the CPU backend is compared.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use crate::backend::Bandwidth;

/// Larger than any cache.
const BYTES: usize = 256 << 20;
/// Words that one thread reads at a time.
const PART_WORDS: usize = 1 << 17;
/// Measurements. The best one counts, because disturbances only ever slow one down.
const ROUNDS: usize = 4;

/// Measures reads by all threads, and copies by one thread, which is how a slot is filled.
pub fn bandwidth() -> Bandwidth {
    let mut words = vec![1_u64; BYTES / 8];
    let (mut read, mut copied) = (0.0_f64, 0.0_f64);
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let parts = words.par_chunks(PART_WORDS);
        let sum = parts.map(|part| part.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word)));
        black_box(sum.reduce(|| 0, u64::wrapping_add));
        read = read.max(BYTES as f64 / started.elapsed().as_secs_f64());
        let started = Instant::now();
        let (to, from) = words.split_at_mut(BYTES / 16);
        to.copy_from_slice(black_box(from));
        copied = copied.max((BYTES / 2) as f64 / started.elapsed().as_secs_f64());
    }
    Bandwidth { copy_bytes_s: read, upload_bytes_s: copied }
}
