//! Full blocks of a sequence as bytes: read from the device, and appended to another sequence that
//! begins with the same tokens, also in a later run of the program.
//!
//! A block's id names what it was computed from: the model, the adapters, the numeric class, the
//! block before it and its tokens. Two blocks of one id hold the same bytes, up to how a prompt was
//! cut into steps. Refuses models whose later tokens need more than keys and values (recurrent
//! states), or whose keys depend on the length of the text.

use doppler_store::ModelId;

use super::Engine;
use crate::adapter::SetId;
use crate::backend::BackendError;
use crate::error::SessionError;
use crate::kv::BLOCK;
use crate::sequence::Sequence;

/// What identifies a full block: the BLAKE3 hash of all that it was computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId([u8; 32]);

impl BlockId {
    /// The id that a sequence's first block follows.
    fn root(model: ModelId, adapters: SetId, class: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("doppler block of keys and values, 1");
        hasher.update(model.as_bytes()).update(adapters.as_bytes()).update(class.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    fn next(&self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Engine {
    /// The ids of the full blocks of these tokens, in order. None if blocks of this model cannot be
    /// read: there is more to a sequence than its blocks.
    pub fn block_ids(&self, model: ModelId, tokens: &[u32]) -> impl Iterator<Item = BlockId> {
        let whole = self.goes_back() && self.stretches_from.is_none() && self.causal();
        let mut id = BlockId::root(model, self.adapters(), &self.backend.class());
        let count = if whole { tokens.len() / BLOCK } else { 0 };
        tokens.chunks_exact(BLOCK).take(count).map(move |tokens| {
            id = id.next(tokens);
            id
        })
    }

    /// The bytes of a sequence's full block: [`Engine::stored_bytes`] of them.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If the sequence has fewer tokens.
    pub fn read_block(&mut self, sequence: &Sequence, at: usize) -> Result<Vec<u8>, SessionError> {
        assert!((at + 1) * BLOCK <= sequence.len(), "block {at} of {} tokens", sequence.len());
        self.land()?;
        Ok(self.backend.read_block(sequence.table.indices()[at])?)
    }

    /// Appends a block of tokens whose keys and values are known. If it fails, the sequence is what
    /// it was.
    ///
    /// # Errors
    /// If the device or its budget has no room, or the bytes are not a block's.
    ///
    /// # Panics
    /// If the sequence ends within a block, or the tokens are not a block's.
    pub fn append_block(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        bytes: &[u8],
    ) -> Result<(), SessionError> {
        let start = sequence.len();
        assert!(start.is_multiple_of(BLOCK) && tokens.len() == BLOCK, "not a whole block");
        if bytes.len() as u64 != self.backend.stored_bytes() {
            let what = format!("a block of {} bytes", bytes.len());
            return Err(BackendError::Unsupported(what).into());
        }
        self.land()?;
        self.give_blocks(sequence, start, start + BLOCK)?;
        self.backend.write_block(sequence.table.indices()[start / BLOCK], bytes)?;
        if sequence.is_empty() {
            sequence.formed.adapters = self.adapters();
        }
        sequence.feed(tokens);
        sequence.formed.count = sequence.len();
        Ok(())
    }

    /// Bytes of a block as it is read.
    pub fn stored_bytes(&self) -> u64 {
        self.backend.stored_bytes()
    }
}
