//! Prompts that go on from blocks on disk, and kept sequences that go there.
//!
//! A block is read only while that is quicker than computing it, by what was measured of both. A turn
//! reads a bounded part of a prompt, so that others' tokens do not wait for all of it.

use std::time::Instant;

use doppler_infer::kv::BLOCK;
use doppler_infer::sequence::Sequence;

use super::Worker;
use crate::api::Traffic;
use crate::engine::prefixes::Prefixes;
use crate::engine::schedule::{Id, follow};
use crate::engine::shelf::Loaded;

/// Blocks of a prompt that are read in one turn.
const BLOCKS_MAX: usize = 16;

/// Which blocks of a prompt are worth reading: the first, and how many. `computed` tokens of `prompt`
/// have run, and the blocks up to `known` are on disk. At least the prompt's last token is computed,
/// for its logits.
fn worth_reading(computed: usize, prompt: usize, known: usize) -> Option<(usize, usize)> {
    let first = computed / BLOCK;
    let end = known.min(prompt.saturating_sub(1) / BLOCK);
    (end > first).then(|| (first, (end - first).min(BLOCKS_MAX)))
}

impl<T: Fn() -> Traffic> Worker<T> {
    /// Lets a prompt go on from blocks on disk, if reading them is quicker than computing them.
    /// Returns whether it did.
    pub(super) fn restore(&mut self, id: Id) -> bool {
        let (Some(prefixes), Some(loaded)) = (&self.prefixes, &mut self.loaded) else {
            return false;
        };
        let Some(running) = self.running.get_mut(&id) else { return false };
        let Some(prompt) = running.shares() else { return false };
        if loaded.restores.zip(self.schedule.speed()).is_some_and(|(read, run)| read < run) {
            return false;
        }
        let ids: Vec<_> = loaded.engine.block_ids(loaded.model, prompt).collect();
        let computed = running.tokens().len();
        let first = computed / BLOCK;
        let there = ids.iter().skip(first).take_while(|id| prefixes.has(id)).count();
        let Some((first, count)) = worth_reading(computed, prompt.len(), first + there) else {
            return false;
        };
        let started = Instant::now();
        let blocks: Vec<Vec<u8>> =
            ids[first..first + count].iter().map_while(|id| prefixes.get(id)).collect();
        if blocks.is_empty() {
            return false;
        }
        match running.restore(&mut loaded.engine, first, &blocks) {
            Ok(0) => false,
            Ok(tokens) => {
                let speed = tokens as f64 / started.elapsed().as_secs_f64().max(1e-9);
                loaded.restores = Some(follow(loaded.restores, speed));
                true
            }
            Err(error) => {
                self.end(id, Err(error));
                true
            }
        }
    }

    /// Lets models go. Their kept sequences go to disk; with `wait`, all of them, however long that
    /// takes.
    pub(super) fn let_go(&self, models: impl IntoIterator<Item = Loaded>, wait: bool) {
        for mut loaded in models {
            let kept = loaded.kept.drop_all();
            spill(self.prefixes.as_ref(), &mut loaded, &kept, wait);
        }
    }
}

/// Writes the full blocks of sequences to disk, unless they are there.
pub(super) fn spill(
    prefixes: Option<&Prefixes>,
    loaded: &mut Loaded,
    sequences: &[Sequence],
    wait: bool,
) {
    let Some(prefixes) = prefixes else { return };
    for sequence in sequences {
        if !loaded.engine.has_keys_of(sequence) {
            continue;
        }
        let ids: Vec<_> = loaded.engine.block_ids(loaded.model, sequence.tokens()).collect();
        for (at, id) in ids.into_iter().enumerate().filter(|(_, id)| !prefixes.has(id)) {
            match loaded.engine.read_block(sequence, at) {
                Ok(bytes) => prefixes.put(id, bytes, wait),
                Err(error) => {
                    tracing::warn!("a prefix is not kept: {error}");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_from_the_first_that_is_not_computed_and_a_token_remains() {
        assert_eq!(worth_reading(0, 10 * BLOCK, 3), Some((0, 3)));
        assert_eq!(worth_reading(BLOCK + 9, 10 * BLOCK, 3), Some((1, 2)));
        assert_eq!(worth_reading(3 * BLOCK, 10 * BLOCK, 3), None);
        assert_eq!(worth_reading(3 * BLOCK, 10 * BLOCK, 0), None);
        assert_eq!(worth_reading(0, 100 * BLOCK, 99), Some((0, BLOCKS_MAX)));
        // Of a prompt that ends with a block, that block is computed.
        assert_eq!(worth_reading(0, 3 * BLOCK, 3), Some((0, 2)));
        assert_eq!(worth_reading(0, 3 * BLOCK + 1, 3), Some((0, 3)));
        assert_eq!(worth_reading(0, 0, 0), None);
    }
}
