//! How bytes of objects travel: a request goes to a peer, waits for its disk and its uplink, and
//! comes back in pieces that share both lines. No payload is carried; what a peer sends is right
//! or wrong, and whoever receives it finds out group by group, as the shard client does.

use doppler_ids::{ByteRange, ShardId};
use doppler_mesh::core::planted::{self, Plant};
use doppler_mesh::core::{Answer, Ask, Event, Failure, FailureKind, Proved, RequestId};
use doppler_store::verified::GROUP_BYTES;

use crate::disk::Look;
use crate::faults::{Kind, Lie};
use crate::node::{Part, Reply};
use crate::options::{MS, SECOND};
use crate::queue::{Key, Next};
use crate::world::World;

/// An answer on its way out.
#[derive(Debug, Clone, Copy)]
pub struct Upload {
    pub to: usize,
    pub to_boot: u32,
    pub key: Key,
    pub shard: ShardId,
    pub next: u64,
    pub end: u64,
    /// The object's size.
    pub size: u64,
}

/// Bytes that leave at once; a multiple of a group.
const PIECE: u64 = 16 * GROUP_BYTES;
/// Answers that a node has open; more are refused.
const UPLOADS_MAX: usize = 64;
/// Silence after which a request is given up: `Timing::idle`.
const IDLE: u64 = 5 * SECOND;
/// How often the core is told that bytes come.
const HEARD_EVERY: u64 = 50 * MS;
/// When a cut line is tried again.
const RESEND: u64 = 200 * MS;

impl World {
    pub(crate) fn ask(&mut self, node: usize, ask: Ask, may_relay: bool) {
        let Ask { read, request, peer, range } = ask;
        let (key, boot, now) = ((read, request), self.nodes[node].boot, self.now);
        let Some(from) = self.by_peer.get(&peer).copied() else { return };
        let link = self.link(node, from);
        let shard = self.nodes[node].reads.get(&read).map(|reading| reading.shard);
        let Some(shard) = shard else {
            return self.violate("asks", format!("node {node} asks for a read that has ended"));
        };
        let size = self.objects.get(&shard).map_or(0, |object| object.size);
        let lie = if self.nodes[from].lies(Lie::Size) { GROUP_BYTES } else { 0 };
        let reply = Reply {
            from,
            range,
            proved: 0,
            is_wrong: false,
            said: size + lie,
            size,
            last: now,
            heard: now,
        };
        self.nodes[node].replies.0.insert(key, reply);
        let fails = match link {
            None => Some(FailureKind::Lost),
            Some(link) if link.relay.is_some() && !may_relay => Some(FailureKind::Relayed),
            Some(_) => None,
        };
        if let Some(kind) = fails {
            let kind = Some(kind);
            self.queue.push(now + MS, Next::Answer { node, boot, key, kind });
            return;
        }
        self.queue.push(now + IDLE, Next::Idle { node, boot, key });
        if let Some(delay) = self.delay(node, from) {
            let (next, end) = (range.start(), range.end());
            let upload = Upload { to: node, to_boot: boot, key, shard, next, end, size };
            self.queue.push(now + delay, Next::Request { to: from, upload: Box::new(upload) });
        }
    }

    fn refuse(&mut self, node: usize, upload: &Upload, kind: FailureKind) {
        if let Some(delay) = self.delay(node, upload.to) {
            let (key, boot) = (upload.key, upload.to_boot);
            let answer = Next::Answer { node: upload.to, boot, key, kind: Some(kind) };
            self.queue.push(self.now + delay, answer);
        }
    }

    pub(crate) fn on_request(&mut self, node: usize, upload: Upload) {
        let this = &self.nodes[node];
        if !this.is_up() || this.lies(Lie::Stall) && this.boot.is_multiple_of(2) {
            return;
        }
        if this.uploads.len() >= UPLOADS_MAX {
            return self.refuse(node, &upload, FailureKind::Overloaded);
        }
        let slow = self.active.values().find_map(|fault| match fault.kind {
            Kind::SlowDisk { node: slow, by } if slow == node => Some(by),
            _ => None,
        });
        let wait = slow.unwrap_or(0) + self.nodes[node].rng.between(MS / 10, 5 * MS);
        let boot = self.nodes[node].boot;
        self.queue.push(self.now + wait, Next::Ready { node, boot, upload: Box::new(upload) });
    }

    pub(crate) fn on_ready(&mut self, node: usize, upload: Upload) {
        let Some(range) = ByteRange::new(upload.next, upload.end.min(upload.size)) else {
            return self.refuse(node, &upload, FailureKind::Violation);
        };
        match self.nodes[node].disk.look(upload.shard, range) {
            Look::Held => {
                self.nodes[node].uploads.push_back(upload);
                self.pump(node);
            }
            Look::Missing => self.refuse(node, &upload, FailureKind::NotFound),
            Look::Damaged => {
                self.holdings_changed(node);
                self.refuse(node, &upload, FailureKind::Refused);
                self.repair(node, upload.shard);
            }
        }
    }

    /// Sends the next piece of whoever waits longest.
    fn pump(&mut self, node: usize) {
        if self.nodes[node].sending.is_some() {
            return;
        }
        while let Some(upload) = self.nodes[node].uploads.pop_front() {
            let asker = &self.nodes[upload.to];
            let is_wanted =
                asker.boot == upload.to_boot && asker.replies.0.contains_key(&upload.key);
            if !is_wanted {
                continue;
            }
            let bytes = PIECE.min(upload.end - upload.next);
            let time = self.transit(node, bytes, self.nodes[node].up);
            let boot = self.nodes[node].boot;
            self.nodes[node].sending = Some(upload);
            self.queue.push(self.now + time, Next::Pump { node, boot });
            return;
        }
    }

    /// A piece has left.
    pub(crate) fn on_pump(&mut self, node: usize) {
        let Some(upload) = self.nodes[node].sending.take() else { return };
        let boot = self.nodes[node].boot;
        // A staller that starts to answer does not end.
        let stalls = self.nodes[node].lies(Lie::Stall) && upload.next > 0;
        if self.link(node, upload.to).is_some() && !stalls {
            match self.delay(node, upload.to) {
                Some(delay) => self.send_piece(node, upload, delay),
                // Sent again and again, until the connection is found dead.
                None => self
                    .queue
                    .push(self.now + RESEND, Next::Ready { node, boot, upload: Box::new(upload) }),
            }
        }
        self.pump(node);
    }

    fn send_piece(&mut self, node: usize, upload: Upload, delay: u64) {
        let end = (upload.next + PIECE).min(upload.end);
        let bytes = end - upload.next;
        let time = self.transit(upload.to, bytes, self.nodes[upload.to].down);
        let lies = self.nodes[node].lies(Lie::Bytes) && self.nodes[node].rng.percent(30);
        let is_too_long = self.nodes[node].lies(Lie::Size) && end >= upload.size;
        let other = &mut self.nodes[upload.to];
        other.down_free = other.down_free.max(self.now + delay) + time;
        let chunk = Next::Chunk {
            node: upload.to,
            boot: upload.to_boot,
            key: upload.key,
            end,
            is_wrong: lies || is_too_long,
        };
        let at = other.down_free;
        self.queue.push(at, chunk);
        let peer = self.nodes[upload.to].id;
        self.tell(node, Event::Sent { peer, bytes });
        if end < upload.end {
            self.nodes[node].uploads.push_back(Upload { next: end, ..upload });
        }
    }

    pub(crate) fn on_chunk(&mut self, node: usize, key: Key, end: u64, is_wrong: bool) {
        let now = self.now;
        let Some(reply) = self.nodes[node].replies.0.get_mut(&key) else { return };
        // The shard client: bytes that do not match their hash are not taken.
        if is_wrong && !planted::is(Plant::HashCheck) {
            return self.answer(node, key, Some(FailureKind::Wrong));
        }
        reply.is_wrong |= is_wrong;
        reply.proved = end;
        reply.last = now;
        if end >= reply.range.end() {
            return self.answer(node, key, None);
        }
        if now >= reply.heard + HEARD_EVERY {
            reply.heard = now;
            let from = reply.from;
            let peer = self.nodes[from].id;
            self.tell(node, Event::Heard { peer });
        }
    }

    pub(crate) fn on_idle(&mut self, node: usize, key: Key) {
        let Some(reply) = self.nodes[node].replies.0.get(&key) else { return };
        let (due, boot) = (reply.last + IDLE, self.nodes[node].boot);
        if due <= self.now {
            self.answer(node, key, Some(FailureKind::Stalled));
        } else {
            self.queue.push(due, Next::Idle { node, boot, key });
        }
    }

    /// A request ends, and the core is told.
    pub(crate) fn answer(&mut self, node: usize, key: Key, kind: Option<FailureKind>) {
        let Some(reply) = self.nodes[node].replies.0.remove(&key) else { return };
        let keeps = kind.is_none_or(FailureKind::keeps);
        let end = reply.proved.max(reply.range.start());
        // The last group comes whole.
        let end = if end == reply.range.end() {
            end.next_multiple_of(GROUP_BYTES).min(reply.size)
        } else {
            end
        };
        let proved =
            (keeps && end > reply.range.start()).then_some(Proved { end, size: reply.said });
        if proved.is_some() {
            self.ended.insert((node, key), reply);
        }
        let outcome = match kind {
            None => Ok(()),
            Some(kind) => Err(Failure { kind, bytes: GROUP_BYTES, detail: format!("{kind:?}") }),
        };
        let peer = self.nodes[reply.from].id;
        let (read, request) = key;
        let answer = Answer { outcome, proved };
        self.tell(node, Event::Answered { read, request, peer, answer });
        self.ended.remove(&(node, key));
    }

    /// The core keeps what a request brought up to `end`.
    pub(crate) fn keep(&mut self, node: usize, read: u64, request: RequestId, end: u64) {
        let Some(reply) = self.ended.get(&(node, (read, request))).copied() else {
            return self.violate("keeps", format!("node {node} keeps what did not come"));
        };
        let range = ByteRange::new(reply.range.start(), end);
        let reading = self.nodes[node].reads.get_mut(&read);
        if let (Some(range), Some(reading)) = (range, reading) {
            self.stats.bytes += range.len();
            reading.parts.insert(request, Part { range, is_wrong: reply.is_wrong });
        }
    }
}
