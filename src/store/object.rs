//! The files of one object: verified reads, writes of verified ranges,
//! completion, checks, and demotion after damage. Everything here blocks. The
//! caller holds the object's lock, shared for reads and exclusive otherwise.
//!
//! Order of durability: bytes and outboard are synced first, then the have-file
//! is renamed into place. When all groups are held, the `.part` file is renamed
//! to its final name. So whatever a name claims is on disk, even after a crash.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use bytes::{Bytes, BytesMut};

use super::error::StoreError;
use super::files::{self, FileKind, Layout};
use super::groups::Groups;
use super::verified::{
    DecodeError, GROUP_BYTES, NODE_BYTES, Outboard, VerifiedRange, align, outboard_bytes,
};
use super::{ByteRange, ShardId, regular};

/// Bytes written to a `.part` file between two syncs.
pub(super) const SYNC_BATCH_BYTES: u64 = 8 * 1024 * 1024;

/// What is known of an object on disk. Guarded by its lock.
#[derive(Debug)]
pub(super) struct Held {
    /// Groups whose bytes and nodes are in the files, synced or not.
    pub groups: Groups,
    /// The file has its final name, without `.part`.
    pub whole: bool,
    /// Bytes written since the last write of the have-file.
    pub unsynced: u64,
    /// The files are deleted, and the entry is about to be; start over with a new one.
    pub dead: bool,
}

impl Held {
    pub fn empty(size: u64) -> Self {
        Self { groups: Groups::none(size), whole: false, unsynced: 0, dead: false }
    }

    pub fn whole(size: u64) -> Self {
        Self { groups: Groups::all(size), whole: true, unsynced: 0, dead: false }
    }

    /// Bytes that it counts against the budget: those held and the outboard.
    pub fn charge(&self) -> u64 {
        match self.groups.held_bytes() {
            0 if !self.whole => 0,
            held => held + outboard_bytes(self.groups.size()),
        }
    }
}

/// Why a range that should be held could not be read.
#[derive(Debug)]
pub(super) enum ReadFault {
    /// The bytes or nodes fail verification, or the file is too short.
    Damaged(DecodeError),
    /// The files have disappeared.
    Vanished,
    Io(StoreError),
}

/// Reads whole groups and verifies them against the root.
pub(super) fn read(
    layout: &Layout,
    shard: ShardId,
    held: &Held,
    range: ByteRange,
    outboard: Option<Outboard>,
) -> Result<(VerifiedRange, Outboard), ReadFault> {
    let path = layout.path(shard, if held.whole { FileKind::Whole } else { FileKind::Part });
    let fault = |e: io::Error| match is_gone(&e) {
        true => ReadFault::Vanished,
        false => ReadFault::Io(StoreError::io(path.display().to_string(), e)),
    };
    let size = held.groups.size();
    let range = align(range, size).ok_or(ReadFault::Damaged(DecodeError::OutOfRange {
        shard,
        range,
        size,
    }))?;
    let file = regular::open(&path).map_err(fault)?;
    let mut bytes = BytesMut::zeroed(range.len() as usize);
    files::read_at(&file, &mut bytes, range.start()).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            ReadFault::Damaged(DecodeError::Truncated { shard, at: range.start() })
        }
        // The file exists but cannot be read, as with a bad sector.
        _ => ReadFault::Damaged(DecodeError::Io { shard, source: e }),
    })?;
    let outboard = match outboard {
        Some(outboard) => outboard,
        None => read_outboard(layout, shard, size)?,
    };
    let verified = outboard.prove(range, bytes.freeze()).map_err(ReadFault::Damaged)?;
    Ok((verified, outboard))
}

/// Whether the file is no longer there, or something that is not a file has its name.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || regular::is_not_a_file(error)
}

fn read_outboard(layout: &Layout, shard: ShardId, size: u64) -> Result<Outboard, ReadFault> {
    let expected = outboard_bytes(size) as usize;
    let length = |got| ReadFault::Damaged(DecodeError::OutboardLength { shard, got, expected });
    if expected == 0 {
        return Outboard::parse(shard, size, Bytes::new()).map_err(ReadFault::Damaged);
    }
    let path = layout.path(shard, FileKind::Outboard);
    let mut nodes = BytesMut::zeroed(expected);
    match regular::open(&path).and_then(|file| files::read_at(&file, &mut nodes, 0)) {
        Ok(()) => Outboard::parse(shard, size, nodes.freeze()).map_err(ReadFault::Damaged),
        Err(e) if is_gone(&e) => Err(length(0)),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            Err(length(fs::metadata(&path).map_or(0, |meta| meta.len() as usize)))
        }
        Err(e) => Err(ReadFault::Io(StoreError::io(path.display().to_string(), e))),
    }
}

/// Writes a verified range of an object that is not whole. Syncs every
/// [`SYNC_BATCH_BYTES`], and completes the object when nothing is missing.
pub(super) fn write(
    layout: &Layout,
    held: &mut Held,
    range: &VerifiedRange,
) -> Result<(), StoreError> {
    let (shard, size) = (range.shard(), range.size());
    let part = layout.path(shard, FileKind::Part);
    let file = files::open_sized(&part, size).map_err(StoreError::file(&part))?;
    files::write_at(&file, range.bytes(), range.range().start())
        .map_err(StoreError::file(&part))?;
    if !range.nodes().is_empty() {
        let path = layout.path(shard, FileKind::Outboard);
        write_nodes(&path, range).map_err(StoreError::file(&path))?;
    }
    let before = held.groups.held_bytes();
    held.groups.set(range.range());
    held.unsynced += held.groups.held_bytes() - before;
    if held.groups.is_whole() {
        complete(layout, shard, held)
    } else if held.unsynced >= SYNC_BATCH_BYTES {
        sync(layout, shard, held)
    } else {
        Ok(())
    }
}

/// Writes nodes to their places, adjacent ones in one call.
fn write_nodes(path: &Path, range: &VerifiedRange) -> io::Result<()> {
    let file = files::open_sized(path, outboard_bytes(range.size()))?;
    let mut run: Vec<u8> = Vec::new();
    let mut first = 0;
    for node in range.nodes() {
        if first + (run.len() / NODE_BYTES) as u64 != node.index {
            files::write_at(&file, &run, first * NODE_BYTES as u64)?;
            run.clear();
        }
        if run.is_empty() {
            first = node.index;
        }
        run.extend_from_slice(&node.pair);
    }
    files::write_at(&file, &run, first * NODE_BYTES as u64)
}

/// Makes the held groups durable: bytes and outboard first, then the have-file.
pub(super) fn sync(layout: &Layout, shard: ShardId, held: &mut Held) -> Result<(), StoreError> {
    if held.whole || held.unsynced == 0 {
        return Ok(());
    }
    sync_contents(layout, shard, held.groups.size())?;
    let have = layout.path(shard, FileKind::Have);
    layout.write_atomic(&have, &held.groups.to_file(shard))?;
    let dir = layout.dir(shard);
    files::sync_dir(&dir).map_err(StoreError::file(&dir))?;
    held.unsynced = 0;
    Ok(())
}

fn sync_contents(layout: &Layout, shard: ShardId, size: u64) -> Result<(), StoreError> {
    let mut paths = vec![layout.path(shard, FileKind::Part)];
    if outboard_bytes(size) > 0 {
        paths.push(layout.path(shard, FileKind::Outboard));
    }
    for path in paths {
        regular::open(&path).and_then(|f| f.sync_all()).map_err(StoreError::file(&path))?;
    }
    Ok(())
}

/// Renames the `.part` file of an object whose groups are all held to its final name.
fn complete(layout: &Layout, shard: ShardId, held: &mut Held) -> Result<(), StoreError> {
    sync_contents(layout, shard, held.groups.size())?;
    let (part, whole) = (layout.path(shard, FileKind::Part), layout.path(shard, FileKind::Whole));
    fs::rename(&part, &whole).map_err(StoreError::file(&part))?;
    let dir = layout.dir(shard);
    files::sync_dir(&dir).map_err(StoreError::file(&dir))?;
    held.whole = true;
    held.unsynced = 0;
    // If a crash leaves it behind, the next start removes it.
    let _ = files::remove(&layout.path(shard, FileKind::Have));
    Ok(())
}

/// Moves a whole object into place from a temporary file, from whose bytes `outboard`
/// was computed. Syncs and renames the file; on failure the caller removes it.
pub(super) fn place(
    layout: &Layout,
    outboard: &Outboard,
    temp: &Path,
    held: &mut Held,
) -> Result<(), StoreError> {
    let shard = outboard.shard();
    File::open(temp).and_then(|f| f.sync_all()).map_err(StoreError::file(temp))?;
    if !outboard.nodes().is_empty() {
        layout.write_atomic(&layout.path(shard, FileKind::Outboard), outboard.nodes())?;
    }
    let whole = layout.path(shard, FileKind::Whole);
    fs::rename(temp, &whole).map_err(StoreError::file(&whole))?;
    let dir = layout.dir(shard);
    files::sync_dir(&dir).map_err(StoreError::file(&dir))?;
    for kind in [FileKind::Part, FileKind::Have] {
        let _ = files::remove(&layout.path(shard, kind));
    }
    *held = Held::whole(outboard.size());
    Ok(())
}

/// Removes an object's files. Those that claim bytes (the whole file, the have-file)
/// go first, so that after a crash the rest claims nothing.
pub(super) fn erase(layout: &Layout, shard: ShardId) -> io::Result<()> {
    erase_contents(layout, shard)?;
    files::remove(&layout.path(shard, FileKind::Replica))?;
    files::remove(&layout.path(shard, FileKind::Pin))
}

/// As [`erase`], but keeps the pin, and that it was a replica.
pub(super) fn erase_contents(layout: &Layout, shard: ShardId) -> io::Result<()> {
    use FileKind::{Have, Outboard, Part, Whole};
    for kind in [Whole, Have, Part, Outboard] {
        files::remove(&layout.path(shard, kind))?;
    }
    Ok(())
}

/// The result of [`survey`].
pub(super) enum Survey {
    /// Every group recorded as held is valid.
    Sound,
    /// The bytes are valid, but the stored outboard differs from this one, which is theirs.
    WrongOutboard(Outboard),
    /// Only these groups are valid.
    Damaged(Groups),
}

/// Checks every group recorded as held, without writing anything.
pub(super) fn survey(layout: &Layout, shard: ShardId, held: &Held) -> Result<Survey, StoreError> {
    let size = held.groups.size();
    let path = layout.path(shard, if held.whole { FileKind::Whole } else { FileKind::Part });
    let file = match regular::open(&path) {
        Ok(file) => file,
        Err(e) if is_gone(&e) => {
            return Ok(Survey::Damaged(Groups::none(size)));
        }
        Err(e) => return Err(StoreError::io(path.display().to_string(), e)),
    };
    let stored = match read_outboard(layout, shard, size) {
        Ok(outboard) => Some(outboard),
        Err(ReadFault::Io(e)) => return Err(e),
        Err(_) => None,
    };
    if held.whole
        && let Ok(own) = Outboard::of_reader(&file, size)
        && own.shard() == shard
    {
        let same = stored.is_some_and(|stored| stored.nodes() == own.nodes());
        return Ok(if same { Survey::Sound } else { Survey::WrongOutboard(own) });
    }
    // An empty object has no groups to check one by one.
    let Some(outboard) = stored.filter(|_| size > 0) else {
        return Ok(Survey::Damaged(Groups::none(size)));
    };
    let mut sound = Groups::none(size);
    for at in (0..size).step_by(GROUP_BYTES as usize) {
        let Some(group) = ByteRange::new(at, (at + GROUP_BYTES).min(size)) else { continue };
        if !held.groups.holds(group) {
            continue;
        }
        // A group that the disk cannot read counts as damaged, like one with wrong bytes.
        let mut bytes = BytesMut::zeroed(group.len() as usize);
        let proved = files::read_at(&file, &mut bytes, at).is_ok()
            && outboard.prove(group, bytes.freeze()).is_ok();
        if proved {
            sound.set(group);
        }
    }
    Ok(if sound == held.groups { Survey::Sound } else { Survey::Damaged(sound) })
}

/// The result of [`examine`].
pub(super) enum Health {
    /// Every group recorded as held is valid; the outboard may have been rewritten.
    Sound { outboard_rewritten: bool },
    /// Only these groups are valid.
    Damaged(Groups),
}

/// Checks every group recorded as held, and rewrites a wrong outboard.
pub(super) fn examine(layout: &Layout, shard: ShardId, held: &Held) -> Result<Health, StoreError> {
    match survey(layout, shard, held)? {
        Survey::Sound => Ok(Health::Sound { outboard_rewritten: false }),
        Survey::WrongOutboard(outboard) => {
            layout.write_atomic(&layout.path(shard, FileKind::Outboard), outboard.nodes())?;
            Ok(Health::Sound { outboard_rewritten: true })
        }
        Survey::Damaged(sound) => Ok(Health::Damaged(sound)),
    }
}

/// Turns a damaged object into a partial one that holds only the groups `sound`. A
/// file that is hard-linked to its import's source is copied first, so that a
/// repair never writes to the source. The damaged bytes stay in the file, but no
/// longer count as held, until valid ones are written over them.
pub(super) fn demote(
    layout: &Layout,
    shard: ShardId,
    held: &Held,
    sound: &Groups,
) -> Result<Held, StoreError> {
    layout.write_atomic(&layout.path(shard, FileKind::Have), &sound.to_file(shard))?;
    if held.whole {
        let (part, whole) =
            (layout.path(shard, FileKind::Part), layout.path(shard, FileKind::Whole));
        if let Ok(found) = fs::symlink_metadata(&whole)
            && !regular::is_file(&whole)
        {
            layout.set_aside(&whole, found.file_type());
        } else if files::is_foreign(&whole).unwrap_or(false) {
            let temp = layout.temp();
            let copied = files::copy(&whole, &temp)
                .and_then(|_| File::open(&temp)?.sync_all())
                .and_then(|()| fs::rename(&temp, &part))
                .and_then(|()| fs::remove_file(&whole));
            copied.map_err(|e| {
                let _ = fs::remove_file(&temp);
                StoreError::io(whole.display().to_string(), e)
            })?;
        } else if let Err(e) = fs::rename(&whole, &part)
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(StoreError::io(whole.display().to_string(), e));
        }
    }
    let dir = layout.dir(shard);
    files::sync_dir(&dir).map_err(StoreError::file(&dir))?;
    Ok(Held { groups: sound.clone(), whole: false, unsynced: 0, dead: false })
}
