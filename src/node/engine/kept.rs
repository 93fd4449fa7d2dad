//! Ended generations' sequences, kept so that a prompt which begins as one of them does need not be
//! computed again.
//!
//! A kept sequence is shared, not used up: whoever goes on from it forks it, and blocks are copied
//! only where one is written. Bounded by number and by the bytes that the caller allows; the one not
//! used for longest goes first. One that a longer one begins with holds nothing of its own, and goes
//! at once.

use std::collections::VecDeque;

use doppler_infer::sequence::Sequence;

/// The most sequences kept.
pub const KEPT_MAX: usize = 32;

/// What begins with tokens.
pub(super) trait Begun {
    fn tokens(&self) -> &[u32];
}

impl Begun for Sequence {
    fn tokens(&self) -> &[u32] {
        Self::tokens(self)
    }
}

/// How many tokens of a prompt `tokens` begin with. At least the prompt's last one remains.
pub(super) fn alike(tokens: &[u32], prompt: &[u32]) -> usize {
    let alike = tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    alike.min(prompt.len().saturating_sub(1))
}

/// The kept ones, that used last at the end.
pub(super) struct Kept<S>(VecDeque<S>);

impl<S> Default for Kept<S> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<S: Begun> Kept<S> {
    /// The one that the longest beginning of a prompt is known of. With `whole`, all of its tokens
    /// must be part of it.
    pub fn longest(&mut self, prompt: &[u32], whole: bool) -> Option<&S> {
        let fits = |kept: &&(usize, usize)| {
            kept.0 > 0 && (!whole || kept.0 == self.0[kept.1].tokens().len())
        };
        let all: Vec<(usize, usize)> = self
            .0
            .iter()
            .enumerate()
            .map(|(at, kept)| (alike(kept.tokens(), prompt), at))
            .collect();
        let (_, at) = *all.iter().filter(fits).max()?;
        let found = self.0.remove(at)?;
        self.0.push_back(found);
        self.0.back()
    }

    /// Keeps one. `most` is how many tokens all of them may have together. Returns those that go for it.
    pub fn keep(&mut self, new: S, most: usize) -> Vec<S> {
        self.0.retain(|kept| !new.tokens().starts_with(kept.tokens()));
        self.0.push_back(new);
        let mut gone = Vec::new();
        while self.0.len() > KEPT_MAX || self.tokens() > most {
            gone.extend(self.0.pop_front());
        }
        gone
    }

    /// Tokens of all of them.
    fn tokens(&self) -> usize {
        self.0.iter().map(|kept| kept.tokens().len()).sum()
    }

    /// Gives up the one not used for longest.
    pub fn drop_one(&mut self) -> Option<S> {
        self.0.pop_front()
    }

    /// Gives up all, the one used last first.
    pub fn drop_all(&mut self) -> Vec<S> {
        self.0.drain(..).rev().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Begun for Vec<u32> {
        fn tokens(&self) -> &[u32] {
            self
        }
    }

    const MANY: usize = usize::MAX;

    #[test]
    fn the_longest_beginning_is_found_and_stays() {
        let mut kept = Kept::default();
        for tokens in [vec![1, 2, 3], vec![1, 2, 9, 9], vec![7]] {
            kept.keep(tokens, MANY);
        }
        for _ in 0..2 {
            assert_eq!(kept.longest(&[1, 2, 9, 5], false), Some(&vec![1, 2, 9, 9]));
        }
        assert_eq!(kept.longest(&[1, 2, 9, 5], true), None, "none is whole");
        assert_eq!(kept.longest(&[1, 2, 3, 4], true), Some(&vec![1, 2, 3]));
        assert_eq!(kept.longest(&[1, 2, 3], true), None, "the last token must be computed");
        assert_eq!(kept.longest(&[8, 7], false), None);
        assert_eq!(alike(&[1, 2], &[1, 2]), 1);
    }

    #[test]
    fn what_a_longer_one_begins_with_goes_and_otherwise_the_one_not_used_for_longest() {
        let mut kept = Kept::default();
        kept.keep(vec![1, 2], MANY);
        kept.keep(vec![1, 2, 3], MANY);
        assert_eq!(kept.0, [vec![1, 2, 3]]);
        kept.keep(vec![4, 4], MANY);
        kept.longest(&[1, 2, 3, 4], false);
        assert_eq!(kept.keep(vec![5, 5], 5), [vec![4, 4]]);
        assert_eq!(kept.0, [vec![1, 2, 3], vec![5, 5]], "4, 4 was used before");
        kept.keep(vec![6; 9], 5);
        assert!(kept.0.is_empty() && kept.drop_one().is_none(), "it is too long by itself");
        for number in 0..KEPT_MAX as u32 + 3 {
            kept.keep(vec![number], MANY);
        }
        assert_eq!((kept.0.len(), &kept.0[0]), (KEPT_MAX, &vec![3]));
        assert_eq!(kept.drop_one(), Some(vec![3]));
        let all = kept.drop_all();
        assert_eq!((all.len(), &all[0]), (KEPT_MAX - 1, &vec![KEPT_MAX as u32 + 2]));
    }
}
