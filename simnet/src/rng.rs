//! The simulator's random numbers: xoshiro256++, seeded by SplitMix64.
//!
//! Written here so that a seed means the same for ever, whatever a library changes. Every node,
//! fault and pair of nodes has a generator of its own, forked from the seed by name, so that
//! taking one away leaves the numbers of the others as they were.

/// A generator.
#[derive(Debug, Clone, Default)]
pub struct Rng([u64; 4]);

/// SplitMix64: a number that looks unrelated to its neighbours.
pub const fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        let mut next = || {
            state = mix(state);
            state
        };
        Self([next(), next(), next(), next()])
    }

    /// The generator of one thing: `what` names its kind, `index` tells it from others.
    pub fn fork(seed: u64, what: &str, index: u64) -> Self {
        let name = what.bytes().fold(mix(seed), |hash, byte| mix(hash ^ u64::from(byte)));
        Self::new(mix(name ^ index))
    }

    pub fn next(&mut self) -> u64 {
        let [a, b, c, d] = self.0;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (mut a, mut b, mut c, mut d, t) = (a, b, c, d, b << 17);
        c ^= a;
        d ^= b;
        b ^= c;
        a ^= d;
        c ^= t;
        d = d.rotate_left(45);
        self.0 = [a, b, c, d];
        result
    }

    /// Less than `end`; 0 if that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        let product = u128::from(self.next()) * u128::from(end);
        (product >> 64) as u64
    }

    /// From `first` to `last`, both included.
    pub fn between(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last - first + 1)
    }

    /// True so many times out of a hundred.
    pub fn percent(&mut self, of_hundred: u64) -> bool {
        self.below(100) < of_hundred
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_what_they_are() {
        let mut rng = Rng::fork(1, "node", 2);
        let first: Vec<u64> = (0..3).map(|_| rng.next()).collect();
        let known =
            [17_994_487_097_188_823_334, 9_523_440_447_591_701_029, 15_440_693_517_397_387_770];
        assert_eq!(first, known);
        let mut same = Rng::fork(1, "node", 2);
        let mut other = Rng::fork(1, "node", 3);
        assert_eq!(same.next(), first[0]);
        assert_ne!(other.next(), first[0]);
        assert!((0..1000).all(|_| (5..=9).contains(&rng.between(5, 9))));
        assert_eq!(rng.below(0), 0);
        let often = (0..10_000).filter(|_| rng.percent(30)).count();
        assert!((2700..3300).contains(&often), "{often}");
    }
}
