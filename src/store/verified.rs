//! Ranges of an object with their proof: the bao encoding over 16 KiB groups,
//! made by the provider and checked by the receiver.
//!
//! The tree is BLAKE3's own (chunks of 1 KiB, BLAKE3 paper section 2.1), with
//! groups of 16 chunks as its leaves, so an object's id is the tree's root. An
//! outboard is the list of inner nodes in pre-order, 64 bytes each (left hash,
//! right hash). An encoded range consists of the nodes on the paths to its groups
//! and the groups' bytes, in pre-order. Every item is checked before the next one
//! is read.
//!
//! Invariant: a [`VerifiedRange`] exists only if its bytes were checked against
//! the object's BLAKE3 root, group by group. The object's *size* is proved only if
//! the range covers the last group ([`VerifiedRange::proves_size`]): the hash tree
//! does not bind the length anywhere else.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bao_tree::iter::{BaoChunk, ResponseIter};
use bao_tree::{BaoTree, BlockSize, ChunkNum, ChunkRanges};
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{ByteRange, ShardId};

/// Bytes of a hash-tree group: the unit of proof.
pub const GROUP_BYTES: u64 = 16 * 1024;

/// The most bytes of an object that one call of `ShardServe::encode` or one wire request carries.
pub const SERVE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// The largest object: RDRR's shard size.
pub const OBJECT_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Bytes of one inner node of the hash tree: the hashes of its two children.
pub const NODE_BYTES: usize = 64;

/// The most bytes that one encoded range is decoded to: those of a full wire request
/// that starts and ends inside a group.
pub const DECODE_BYTES_MAX: u64 = SERVE_BYTES_MAX + 2 * GROUP_BYTES;

/// Groups of 2^4 chunks of 1 KiB.
const BLOCK: BlockSize = BlockSize::from_chunk_log(4);

/// Why bytes were not accepted as a range of an object.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A hash-tree node that does not belong to the object, or not to one of this size.
    #[error("shard {shard}: wrong hash-tree node at byte {at}")]
    Node { shard: ShardId, at: u64 },
    /// A group whose bytes do not match their hash.
    #[error("shard {shard}: wrong bytes in the group at byte {at}")]
    Group { shard: ShardId, at: u64 },
    /// The encoding ended before the range did.
    #[error("shard {shard}: the encoding ended early, before byte {at}")]
    Truncated { shard: ShardId, at: u64 },
    #[error("shard {shard}: {size} bytes is more than an object may have ({OBJECT_BYTES_MAX})")]
    TooLarge { shard: ShardId, size: u64 },
    #[error("shard {shard}: range {range} is outside its {size} bytes")]
    OutOfRange { shard: ShardId, range: ByteRange, size: u64 },
    #[error("shard {shard}: range {range} is longer than {DECODE_BYTES_MAX} bytes")]
    TooLong { shard: ShardId, range: ByteRange },
    /// An outboard whose length does not fit the object's size.
    #[error("shard {shard}: outboard of {got} bytes where {expected} are needed")]
    OutboardLength { shard: ShardId, got: usize, expected: usize },
    #[error("shard {shard}: reading its encoding: {source}")]
    Io { shard: ShardId, source: io::Error },
}

impl DecodeError {
    /// Whether the sender sent wrong bytes, rather than too few or none.
    pub const fn is_wrong_bytes(&self) -> bool {
        matches!(self, Self::Node { .. } | Self::Group { .. })
    }

    /// A stable name for metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Node { .. } => "wrong_node",
            Self::Group { .. } => "wrong_group",
            Self::Truncated { .. } => "truncated",
            Self::TooLarge { .. } => "too_large",
            Self::OutOfRange { .. } => "out_of_range",
            Self::TooLong { .. } => "too_long",
            Self::OutboardLength { .. } => "outboard_length",
            Self::Io { .. } => "io",
        }
    }
}

/// Extends `range` to whole groups; the last group ends at the end of the object.
/// `None` if the range lies outside the object.
pub const fn align(range: ByteRange, size: u64) -> Option<ByteRange> {
    if range.end() > size {
        return None;
    }
    let start = range.start() / GROUP_BYTES * GROUP_BYTES;
    let end = match range.end().checked_next_multiple_of(GROUP_BYTES) {
        Some(end) if end < size => end,
        _ => size,
    };
    ByteRange::new(start, end)
}

/// Bytes of the outboard of an object of `size` bytes: one node fewer than groups.
pub const fn outboard_bytes(size: u64) -> u64 {
    size.div_ceil(GROUP_BYTES).saturating_sub(1) * NODE_BYTES as u64
}

/// Bytes of the encoding of `range`, extended to whole groups, of an object of
/// `size` bytes. `None` if the range lies outside the object.
pub fn encoded_bytes(size: u64, range: ByteRange) -> Option<u64> {
    let range = align(range, size)?;
    let nodes = walk(size, range).filter(|item| matches!(item, BaoChunk::Parent { .. })).count();
    Some(range.len() + (nodes * NODE_BYTES) as u64)
}

/// A bao response: parents and leaves in pre-order, without the size prefix.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// The whole object's size in bytes.
    pub size: u64,
    pub bytes: Bytes,
}

impl Encoded {
    /// The object's bytes in `range`, as slices without the hash-tree nodes between them; copies
    /// nothing. `None` if `self` is not the encoding of that range.
    pub fn data(&self, range: ByteRange) -> Option<Vec<Bytes>> {
        let whole = align(range, self.size)?;
        let mut parts = Vec::with_capacity((whole.len() / GROUP_BYTES) as usize + 1);
        let mut place = 0;
        for item in walk(self.size, whole) {
            match item {
                BaoChunk::Parent { .. } => place += NODE_BYTES,
                BaoChunk::Leaf { start_chunk, size, .. } => {
                    let at = start_chunk.to_bytes();
                    let from = range.start().saturating_sub(at).min(size as u64) as usize;
                    let to = range.end().saturating_sub(at).min(size as u64) as usize;
                    if self.bytes.len() < place + size {
                        return None;
                    }
                    parts.push(self.bytes.slice(place + from..place + to));
                    place += size;
                }
            }
        }
        (place == self.bytes.len()).then_some(parts)
    }
}

/// An object's inner hash-tree nodes. They are not trusted: every use checks the
/// nodes that it needs against the root.
#[derive(Debug, Clone)]
pub struct Outboard {
    shard: ShardId,
    size: u64,
    nodes: Bytes,
}

impl Outboard {
    /// Hashes a whole object; the root becomes its id.
    pub fn of(data: &[u8]) -> Result<Self, DecodeError> {
        let size = data.len() as u64;
        if size > OBJECT_BYTES_MAX {
            return Err(DecodeError::TooLarge { shard: ShardId::of(data), size });
        }
        let made = bao_tree::io::outboard::PreOrderMemOutboard::create(data, BLOCK);
        Ok(Self {
            shard: ShardId::from(*made.root.as_bytes()),
            size,
            nodes: Bytes::from(made.data),
        })
    }

    /// Hashes the next `size` bytes of `reader`, one group at a time.
    pub fn of_reader(reader: impl io::Read, size: u64) -> io::Result<Self> {
        if size > OBJECT_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{size} bytes is more than an object may have ({OBJECT_BYTES_MAX})"),
            ));
        }
        let tree = BaoTree::new(size, BLOCK);
        let mut made = bao_tree::io::outboard::PreOrderMemOutboard {
            root: blake3::Hash::from_bytes([0; 32]),
            tree,
            data: vec![0; outboard_bytes(size) as usize],
        };
        let root = bao_tree::io::sync::outboard(reader, tree, &mut made)?;
        let shard = ShardId::from(*root.as_bytes());
        Ok(Self { shard, size, nodes: Bytes::from(made.data) })
    }

    /// Wraps stored nodes of an object of `size` bytes. Checks only their length.
    pub fn parse(shard: ShardId, size: u64, nodes: Bytes) -> Result<Self, DecodeError> {
        check_size(shard, size)?;
        let expected = outboard_bytes(size) as usize;
        if nodes.len() != expected {
            return Err(DecodeError::OutboardLength { shard, got: nodes.len(), expected });
        }
        Ok(Self { shard, size, nodes })
    }

    /// The root of the tree: the object's id.
    pub const fn shard(&self) -> ShardId {
        self.shard
    }

    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The nodes in pre-order, 64 bytes each.
    pub const fn nodes(&self) -> &Bytes {
        &self.nodes
    }

    fn node(&self, index: u64) -> Option<[u8; NODE_BYTES]> {
        let at = usize::try_from(index).ok()?.checked_mul(NODE_BYTES)?;
        self.nodes.get(at..at.checked_add(NODE_BYTES)?)?.try_into().ok()
    }

    /// Checks `bytes`, which must be exactly the whole groups of `range`, against
    /// the root, with this outboard's nodes.
    pub fn prove(&self, range: ByteRange, bytes: Bytes) -> Result<VerifiedRange, DecodeError> {
        let (shard, size) = (self.shard, self.size);
        let range = aligned(shard, range, size)?;
        if bytes.len() as u64 != range.len() {
            return Err(DecodeError::Truncated { shard, at: range.start() + bytes.len() as u64 });
        }
        let mut check = Check::new(shard, size);
        let mut nodes = Vec::new();
        for item in walk(size, range) {
            match item {
                BaoChunk::Parent { node, is_root, left, right, .. } => {
                    let (index, at) = check.place(node)?;
                    let pair = self.node(index).ok_or(DecodeError::Node { shard, at })?;
                    check.node(&pair, at, is_root, left, right)?;
                    nodes.push(ProofNode { index, pair });
                }
                BaoChunk::Leaf { start_chunk, size, is_root, .. } => {
                    let at = start_chunk.to_bytes();
                    let from = (at - range.start()) as usize;
                    check.group(&bytes[from..from + size], at, is_root)?;
                }
            }
        }
        Ok(VerifiedRange { shard, size, range, bytes, nodes: nodes.into() })
    }
}

/// A whole object in memory that this process has hashed, so its ranges need no further check.
#[derive(Debug, Clone)]
pub struct Hashed {
    bytes: Bytes,
    outboard: Outboard,
}

impl Hashed {
    pub fn of(bytes: Bytes) -> Result<Self, DecodeError> {
        let outboard = Outboard::of(&bytes)?;
        Ok(Self { bytes, outboard })
    }

    pub const fn shard(&self) -> ShardId {
        self.outboard.shard
    }

    pub const fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// `range`, extended to whole groups, with its proof. Copies nothing.
    pub fn range(&self, range: ByteRange) -> Result<VerifiedRange, DecodeError> {
        let Outboard { shard, size, .. } = self.outboard;
        let range = aligned(shard, range, size)?;
        let bytes = self.bytes.slice(range.start() as usize..range.end() as usize);
        let check = Check::new(shard, size);
        let mut nodes = Vec::new();
        for item in walk(size, range) {
            if let BaoChunk::Parent { node, .. } = item {
                let (index, at) = check.place(node)?;
                let pair = self.outboard.node(index).ok_or(DecodeError::Node { shard, at })?;
                nodes.push(ProofNode { index, pair });
            }
        }
        Ok(VerifiedRange { shard, size, range, bytes, nodes: nodes.into() })
    }
}

/// Encodes `range` of a whole object in memory, extended to whole groups. Checks
/// bytes and nodes, so damaged data gives an error and is never sent.
pub fn encode(data: &Bytes, outboard: &Outboard, range: ByteRange) -> Result<Encoded, DecodeError> {
    let (shard, size) = (outboard.shard, outboard.size);
    if data.len() as u64 != size {
        return Err(DecodeError::Truncated { shard, at: data.len() as u64 });
    }
    let range = aligned(shard, range, size)?;
    let bytes = data.slice(range.start() as usize..range.end() as usize);
    Ok(outboard.prove(range, bytes)?.encode())
}

/// Reads the encoding of `range`, extended to whole groups, of an object of `size`
/// bytes. Reads exactly the encoding and nothing after it, and stops at most one
/// group after the first wrong byte. Allocates one buffer for the range (at most
/// [`DECODE_BYTES_MAX`]) and its proof.
pub async fn decode(
    shard: ShardId,
    size: u64,
    range: ByteRange,
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<VerifiedRange, DecodeError> {
    Ok(decode_into(shard, size, range, reader, BytesMut::new()).await?.freeze())
}

/// As [`decode`], into the capacity of the empty buffer `bytes`, which is replaced if it is too
/// small. Results in one buffer can be joined without a copy ([`VerifiedBuf::join`]).
pub async fn decode_into(
    shard: ShardId,
    size: u64,
    range: ByteRange,
    reader: &mut (impl AsyncRead + Unpin),
    bytes: BytesMut,
) -> Result<VerifiedBuf, DecodeError> {
    let mut decoder = RangeDecoder::new(bytes);
    decoder.run(shard, size, range, reader).await?;
    // A complete decoding has at least one group.
    decoder.finish().ok_or(DecodeError::Truncated { shard, at: range.start() })
}

/// Decodes an encoded range. If it is interrupted, the groups verified so far are not lost.
#[derive(Debug)]
pub struct RangeDecoder {
    buffer: BytesMut,
    /// The requested range with the bytes read so far.
    piece: Option<VerifiedBuf>,
    /// Groups are verified up to this byte of the object; 0 before the first.
    proved: Arc<AtomicU64>,
}

impl RangeDecoder {
    /// Decodes into `buffer` as [`decode_into`] does.
    pub fn new(buffer: BytesMut) -> Self {
        Self { buffer, piece: None, proved: Arc::default() }
    }

    /// A shared counter: groups are verified up to this byte of the object; 0 before the first.
    pub fn proved(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.proved)
    }

    /// As [`decode`]. Whether it ends, fails or is dropped, [`Self::finish`] returns what was
    /// verified.
    pub async fn run(
        &mut self,
        shard: ShardId,
        size: u64,
        range: ByteRange,
        reader: &mut (impl AsyncRead + Unpin),
    ) -> Result<(), DecodeError> {
        check_size(shard, size)?;
        let range = aligned(shard, range, size)?;
        if range.len() > DECODE_BYTES_MAX {
            return Err(DecodeError::TooLong { shard, range });
        }
        let mut bytes = std::mem::take(&mut self.buffer);
        bytes.clear();
        if (bytes.capacity() as u64) < range.len() {
            bytes = BytesMut::with_capacity(range.len() as usize);
        }
        self.proved.store(0, Ordering::Relaxed);
        let piece = self.piece.insert(VerifiedBuf { shard, size, range, bytes, nodes: Vec::new() });
        let mut check = Check::new(shard, size);
        for item in walk(size, range) {
            match item {
                BaoChunk::Parent { node, is_root, left, right, .. } => {
                    let (index, at) = check.place(node)?;
                    let mut pair = [0; NODE_BYTES];
                    reader.read_exact(&mut pair).await.map_err(|e| read_error(shard, at, e))?;
                    check.node(&pair, at, is_root, left, right)?;
                    piece.nodes.push(ProofNode { index, pair });
                }
                BaoChunk::Leaf { start_chunk, size, is_root, .. } => {
                    let at = start_chunk.to_bytes();
                    let from = (at - range.start()) as usize;
                    piece.bytes.resize(from + size, 0);
                    let group = &mut piece.bytes[from..];
                    reader.read_exact(group).await.map_err(|e| read_error(shard, at, e))?;
                    check.group(group, at, is_root)?;
                    self.proved.store(at + size as u64, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    /// The groups that were verified, from the start of the range on; `None` if there are none.
    pub fn finish(self) -> Option<VerifiedBuf> {
        self.piece?.cut(self.proved.load(Ordering::Relaxed))
    }
}

/// Verified bytes in a mutable buffer, which can be joined with adjacent ones.
#[derive(Debug)]
pub struct VerifiedBuf {
    shard: ShardId,
    size: u64,
    range: ByteRange,
    bytes: BytesMut,
    nodes: Vec<ProofNode>,
}

impl VerifiedBuf {
    /// As [`VerifiedRange::range`].
    pub const fn range(&self) -> ByteRange {
        self.range
    }

    /// As [`VerifiedRange::size`].
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// As [`VerifiedRange::proves_size`].
    pub const fn proves_size(&self) -> bool {
        self.range.end() == self.size
    }

    /// Keeps only what lies before `end`, the start of a group; `None` if that is nothing.
    pub fn cut(mut self, end: u64) -> Option<Self> {
        if end >= self.range.end() {
            return Some(self);
        }
        let range = ByteRange::new(self.range.start(), end)?;
        let check = Check::new(self.shard, self.size);
        let index = |item| match item {
            BaoChunk::Parent { node, .. } => check.place(node).ok().map(|(index, _)| index),
            BaoChunk::Leaf { .. } => None,
        };
        // Both are in ascending order: the walk visits nodes in the outboard's order.
        let needed: Vec<u64> = walk(self.size, range).filter_map(index).collect();
        self.nodes.retain(|node| needed.binary_search(&node.index).is_ok());
        self.bytes.truncate(range.len() as usize);
        self.range = range;
        Some(self)
    }

    pub fn freeze(self) -> VerifiedRange {
        let Self { shard, size, range, bytes, nodes } = self;
        VerifiedRange { shard, size, range, bytes: bytes.freeze(), nodes: nodes.into() }
    }

    /// Joins adjacent pieces of one object, in order. Pieces that are adjacent in one buffer are
    /// not copied. The error returns the pieces if there are none, or if they are not adjacent
    /// or not of one object.
    pub fn join(pieces: Vec<Self>) -> Result<VerifiedRange, Vec<Self>> {
        let adjacent = |pair: &[Self]| {
            let (a, b) = (&pair[0], &pair[1]);
            (a.shard, a.size, a.range.end()) == (b.shard, b.size, b.range.start())
        };
        if !pieces.windows(2).all(adjacent) {
            return Err(pieces);
        }
        let mut pieces = pieces.into_iter();
        let Some(mut whole) = pieces.next() else { return Err(Vec::new()) };
        for piece in pieces {
            let end = piece.range.end();
            whole.bytes.unsplit(piece.bytes);
            whole.nodes.extend_from_slice(&piece.nodes);
            whole.range = ByteRange::new(whole.range.start(), end).unwrap_or(whole.range);
        }
        whole.nodes.sort_unstable_by_key(|node| node.index);
        whole.nodes.dedup_by_key(|node| node.index);
        Ok(whole.freeze())
    }
}

/// One inner node of an object's hash tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProofNode {
    /// Its place in the outboard: byte `index * 64`.
    pub index: u64,
    /// The hashes of its left and right child.
    pub pair: [u8; NODE_BYTES],
}

/// Verified bytes of one object and the hash-tree nodes on their paths to the root.
#[derive(Debug, Clone)]
pub struct VerifiedRange {
    shard: ShardId,
    size: u64,
    range: ByteRange,
    bytes: Bytes,
    /// Ascending by index, which is the order of the encoding.
    nodes: Arc<[ProofNode]>,
}

impl VerifiedRange {
    pub const fn shard(&self) -> ShardId {
        self.shard
    }

    /// The whole object's size in bytes, as claimed when the range was checked.
    /// Proved only if [`Self::proves_size`].
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether the range reaches the object's end, which proves the size.
    pub const fn proves_size(&self) -> bool {
        self.range.end() == self.size
    }

    /// The range covered: whole groups, of which the object's last may be short.
    pub const fn range(&self) -> ByteRange {
        self.range
    }

    /// The bytes of `range()`.
    pub const fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The nodes that prove the bytes, ascending by index.
    pub fn nodes(&self) -> &[ProofNode] {
        &self.nodes
    }

    /// The bytes of a range within this one; copies nothing. `None` if it is not contained.
    pub fn slice(&self, range: ByteRange) -> Option<Bytes> {
        if !self.range.contains(&range) {
            return None;
        }
        let from = (range.start() - self.range.start()) as usize;
        Some(self.bytes.slice(from..from + range.len() as usize))
    }

    /// The bao encoding of `range()`, to send to a peer.
    pub fn encode(&self) -> Encoded {
        let mut out = Vec::with_capacity(self.encoded_bytes());
        let mut encoder = self.encoder();
        while encoder.next(&mut out, usize::MAX) {}
        Encoded { size: self.size, bytes: out.into() }
    }

    /// Bytes of the encoding.
    pub fn encoded_bytes(&self) -> usize {
        self.nodes.len() * NODE_BYTES + self.bytes.len()
    }

    /// An encoder that writes the encoding in steps.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder { range: self, items: walk(self.size, self.range), nodes: self.nodes.iter() }
    }
}

/// Writes the encoding of a range in steps.
pub struct Encoder<'a> {
    range: &'a VerifiedRange,
    items: ResponseIter,
    nodes: std::slice::Iter<'a, ProofNode>,
}

impl Encoder<'_> {
    /// Appends to `out` until it has at least `enough` bytes, at most one group more. False once
    /// the encoding is complete.
    pub fn next(&mut self, out: &mut Vec<u8>, enough: usize) -> bool {
        let range = self.range;
        while out.len() < enough {
            match self.items.next() {
                None => return false,
                Some(BaoChunk::Parent { .. }) => {
                    // There are as many nodes as parents: both come from the same walk.
                    if let Some(node) = self.nodes.next() {
                        out.extend_from_slice(&node.pair);
                    }
                }
                Some(BaoChunk::Leaf { start_chunk, size, .. }) => {
                    let from = (start_chunk.to_bytes() - range.range.start()) as usize;
                    out.extend_from_slice(&range.bytes[from..from + size]);
                }
            }
        }
        true
    }
}

/// The nodes and groups of `range` (whole groups) in pre-order.
fn walk(size: u64, range: ByteRange) -> ResponseIter {
    let chunks =
        ChunkRanges::from(ChunkNum::full_chunks(range.start())..ChunkNum::chunks(range.end()));
    // A range that reaches the end is left open, so that a short last group counts as whole.
    let chunks = if range.end() == size {
        ChunkRanges::from(ChunkNum::full_chunks(range.start())..)
    } else {
        chunks
    };
    ResponseIter::new(BaoTree::new(size, BLOCK), chunks)
}

fn check_size(shard: ShardId, size: u64) -> Result<(), DecodeError> {
    if size > OBJECT_BYTES_MAX {
        return Err(DecodeError::TooLarge { shard, size });
    }
    Ok(())
}

fn aligned(shard: ShardId, range: ByteRange, size: u64) -> Result<ByteRange, DecodeError> {
    align(range, size).ok_or(DecodeError::OutOfRange { shard, range, size })
}

fn read_error(shard: ShardId, at: u64, source: io::Error) -> DecodeError {
    if source.kind() == io::ErrorKind::UnexpectedEof {
        return DecodeError::Truncated { shard, at };
    }
    DecodeError::Io { shard, source }
}

/// The hashes expected on the rest of a pre-order walk, the next one last.
struct Check {
    shard: ShardId,
    tree: BaoTree,
    expected: Vec<[u8; 32]>,
}

impl Check {
    fn new(shard: ShardId, size: u64) -> Self {
        Self { shard, tree: BaoTree::new(size, BLOCK), expected: vec![*shard.as_bytes()] }
    }

    /// A node's place in the outboard and the first byte below it.
    fn place(&self, node: bao_tree::TreeNode) -> Result<(u64, u64), DecodeError> {
        let at = node.chunk_range().start.to_bytes();
        let index =
            self.tree.pre_order_offset(node).ok_or(DecodeError::Node { shard: self.shard, at })?;
        Ok((index, at))
    }

    fn node(
        &mut self,
        pair: &[u8; NODE_BYTES],
        at: u64,
        is_root: bool,
        left: bool,
        right: bool,
    ) -> Result<(), DecodeError> {
        let [mut l, mut r] = [[0; 32]; 2];
        l.copy_from_slice(&pair[..32]);
        r.copy_from_slice(&pair[32..]);
        let hash = if is_root {
            *merge_subtrees_root(&l, &r, Mode::Hash).as_bytes()
        } else {
            merge_subtrees_non_root(&l, &r, Mode::Hash)
        };
        if self.expected.pop() != Some(hash) {
            return Err(DecodeError::Node { shard: self.shard, at });
        }
        if right {
            self.expected.push(r);
        }
        if left {
            self.expected.push(l);
        }
        Ok(())
    }

    fn group(&mut self, bytes: &[u8], at: u64, is_root: bool) -> Result<(), DecodeError> {
        let hash = if is_root {
            *blake3::hash(bytes).as_bytes()
        } else {
            blake3::Hasher::new().set_input_offset(at).update(bytes).finalize_non_root()
        };
        if self.expected.pop() != Some(hash) {
            return Err(DecodeError::Group { shard: self.shard, at });
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "verified_tests.rs"]
mod tests;
