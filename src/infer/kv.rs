//! Blocks of the KV caches: which blocks of a pool hold a sequence's positions.
//!
//! A block is [`BLOCK`] positions of every layer's cache. A [`Table`] lists a sequence's blocks in
//! order; position `p` lies in block `p / BLOCK` of the list, row `p % BLOCK`. Blocks are
//! reference-counted: tables that begin with the same tokens share them, and a block is free again
//! when the last table that lists it is dropped. A shared block is never written: a table that
//! needs to write one gets a copy first.
//!
//! A full block has an id derived from what it was computed from (`engine/prefix.rs`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Positions of one block: two tiles of the decode kernels, one of `attention.wgsl`
/// (kernels/shared/blocks.wgsl has the same number).
pub const BLOCK: usize = 64;

/// Blocks needed for this many positions.
pub const fn blocks(positions: usize) -> usize {
    positions.div_ceil(BLOCK)
}

/// The row of a position in a cache made of blocks.
pub const fn row(blocks: &[u32], position: usize) -> usize {
    blocks[position / BLOCK] as usize * BLOCK + position % BLOCK
}

/// Indices of blocks that nobody holds.
#[derive(Debug, Default)]
struct FreeList {
    /// The last one is used next.
    indices: Vec<u32>,
}

type SharedFreeList = Arc<Mutex<FreeList>>;

fn lock(free: &Mutex<FreeList>) -> MutexGuard<'_, FreeList> {
    // A panic cannot leave a list of numbers half-changed.
    free.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The blocks of a device's caches.
#[derive(Debug, Default)]
pub struct Pool {
    free: SharedFreeList,
    count: usize,
}

/// One block, held by every clone.
#[derive(Debug, Clone)]
pub(super) struct Block(Arc<Held>);

impl Block {
    pub fn index(&self) -> u32 {
        self.0.index
    }

    /// Whether somebody else holds it, too.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

#[derive(Debug)]
struct Held {
    index: u32,
    free: SharedFreeList,
}

impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.free).indices.push(self.index);
    }
}

impl Pool {
    /// All blocks of the pool, held or free.
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> usize {
        lock(&self.free).indices.len()
    }

    /// From now on the device has `count` blocks. Their number never shrinks.
    pub fn grow(&mut self, count: usize) {
        let added = self.count as u32..count as u32;
        // New blocks are used in ascending order, after those that were free before.
        lock(&self.free).indices.splice(0..0, added.rev());
        self.count = self.count.max(count);
    }

    /// A block, if one is free.
    pub(super) fn take(&self) -> Option<Block> {
        let index = lock(&self.free).indices.pop()?;
        Some(Block(Arc::new(Held { index, free: self.free.clone() })))
    }
}

/// A copy to make on the device before a table may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: u32,
    pub to: u32,
}

/// A sequence's blocks, in order. A clone shares them.
#[derive(Debug, Clone, Default)]
pub struct Table {
    blocks: Vec<Block>,
    indices: Vec<u32>,
}

impl Table {
    /// The blocks' indices, in order.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// Whether its blocks, if any, belong to this pool.
    pub fn is_of(&self, pool: &Pool) -> bool {
        self.blocks.iter().all(|block| Arc::ptr_eq(&block.0.free, &pool.free))
    }

    /// How many free blocks are needed to write positions `start..end`: new blocks, and copies of
    /// shared ones.
    pub fn wants(&self, start: usize, end: usize) -> usize {
        let shared = self.shared_from(start);
        blocks(end).saturating_sub(self.blocks.len()) + shared.count()
    }

    /// Shared blocks, from the one that holds position `start` on.
    fn shared_from(&self, start: usize) -> impl Iterator<Item = usize> + '_ {
        let shared = |at: &usize| Arc::strong_count(&self.blocks[*at].0) > 1;
        (start / BLOCK..self.blocks.len()).filter(shared)
    }

    /// Makes room to write positions `start..end`: adds missing blocks and replaces shared ones by
    /// copies. `None`, with nothing changed, if too few blocks are free.
    pub fn prepare(&mut self, pool: &Pool, start: usize, end: usize) -> Option<Vec<BlockCopy>> {
        let wants = self.wants(start, end);
        if wants == 0 {
            return Some(Vec::new());
        }
        let mut taken: Vec<Block> = (0..wants).map_while(|_| pool.take()).collect();
        if taken.len() < wants {
            return None;
        }
        taken.reverse();
        let shared: Vec<usize> = self.shared_from(start).collect();
        let mut copies = Vec::with_capacity(shared.len());
        for at in shared {
            let block = taken.pop()?;
            copies.push(BlockCopy { from: self.indices[at], to: block.0.index });
            self.indices[at] = block.0.index;
            self.blocks[at] = block;
        }
        while let Some(block) = taken.pop() {
            self.indices.push(block.0.index);
            self.blocks.push(block);
        }
        Some(copies)
    }

    /// Releases all blocks beyond the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        self.blocks.truncate(blocks(positions));
        self.indices.truncate(blocks(positions));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(count: usize) -> Pool {
        let mut pool = Pool::default();
        pool.grow(count);
        pool
    }

    #[test]
    fn blocks_are_taken_in_order_and_come_back_when_the_last_holder_goes() {
        let pool = pool(4);
        let mut table = Table::default();
        assert_eq!(table.prepare(&pool, 0, 1), Some(vec![]));
        assert_eq!(table.prepare(&pool, 1, BLOCK), Some(vec![]), "it is there");
        assert_eq!(table.prepare(&pool, BLOCK, 2 * BLOCK + 1), Some(vec![]));
        assert_eq!(table.indices(), [0, 1, 2]);
        let fork = table.clone();
        drop(table);
        assert_eq!(pool.free(), 1);
        drop(fork);
        assert_eq!(pool.free(), 4);
    }

    #[test]
    fn a_shared_block_is_copied_by_whoever_writes_it_first() {
        let pool = pool(4);
        let mut table = Table::default();
        table.prepare(&pool, 0, BLOCK + 5).unwrap();
        let mut fork = table.clone();
        let copies = fork.prepare(&pool, BLOCK + 5, BLOCK + 6).unwrap();
        assert_eq!(copies, [BlockCopy { from: 1, to: 2 }]);
        assert_eq!((table.indices(), fork.indices()), (&[0, 1][..], &[0, 2][..]));
        // Now only the first table holds the block. The block before it is only read.
        assert_eq!(table.prepare(&pool, BLOCK + 5, 2 * BLOCK), Some(vec![]));
        // A full block that is rewritten is copied, too.
        let copies = table.prepare(&pool, BLOCK - 1, BLOCK).unwrap();
        assert_eq!(copies, [BlockCopy { from: 0, to: 3 }]);
    }

    #[test]
    fn too_few_free_blocks_change_nothing_and_growth_keeps_what_is_held() {
        let mut pool = pool(2);
        let mut table = Table::default();
        table.prepare(&pool, 0, BLOCK).unwrap();
        assert_eq!(table.wants(BLOCK, 3 * BLOCK), 2);
        assert_eq!(table.prepare(&pool, BLOCK, 3 * BLOCK), None);
        assert_eq!((table.indices(), pool.free()), (&[0][..], 1));
        pool.grow(3);
        assert_eq!(table.prepare(&pool, BLOCK, 3 * BLOCK), Some(vec![]));
        assert_eq!((table.indices(), pool.free()), (&[0, 1, 2][..], 0));
    }

    #[test]
    fn a_cut_table_keeps_the_block_of_its_last_position() {
        let pool = pool(3);
        let mut table = Table::default();
        table.prepare(&pool, 0, 3 * BLOCK).unwrap();
        table.truncate(BLOCK + 1);
        assert_eq!((table.indices(), pool.free()), (&[0, 1][..], 1));
        table.truncate(0);
        assert_eq!((table.indices(), pool.free()), (&[][..], 3));
    }
}
