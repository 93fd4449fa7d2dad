//! What nodes do of their own accord: read what tokens need, learn models, pull all of one, mend
//! what their disk lost; and how the swarm is furnished at the start.

use std::collections::{BTreeMap, BTreeSet};

use doppler_ids::{ByteRange, ModelId, PeerId, ShardId};
use doppler_mesh::core::{Event, Healing, ReadId};
use doppler_mesh::wire::{Envelope, Holdings, ModelHoldings, Stamp};
use doppler_mesh::{Pull, PullAction, PullEvent, Wanted};
use doppler_store::PolicyKind;
use doppler_store::signature::SignedModel;
use doppler_store::verified::{GROUP_BYTES, OBJECT_BYTES_MAX};
use doppler_store::{Priority, ReadError, ReadRequest};

use crate::crowd::NODES_PER_MODEL;
use crate::disk::{Disk, Job};
use crate::faults::{KEEPERS, Lie};
use crate::models::{self, Interests};
use crate::net::address_of;
use crate::node::{Looks, Node, Purpose, Reading, Replies};
use crate::options::{MS, SECOND, Scenario};
use crate::queue::Next;
use crate::rng::{Rng, mix};
use crate::world::{Model, Object, World};

/// After the faults have stopped, what leases and dials need to find their way back.
pub const SETTLE: u64 = 100 * SECOND;
/// How long a read may take once that has passed.
pub const REACH: u64 = 60 * SECOND;
/// Objects that each node must reach then.
const PROBES: usize = 8;
/// Reads that a node has open for its own work.
const WORK_MAX: usize = 32;
/// Objects that a pull fetches at a time.
const AT_ONCE: usize = 4;
/// How often a node looks that has nothing to do, as the running node does (`node::healing`); and the
/// largest swarm in which it looks each second in any case.
const IDLE_LOOK: u64 = 30 * SECOND;
pub const FEW: usize = 255;
/// Nodes that start in a second, at most.
pub const STARTS: u64 = 50;
/// Messages that a flooder says a second.
const FLOOD: u64 = 100;
const MIB: u64 = 1 << 20;
/// Mixtral-8x7B in Q4_K_M, 26.4 GB, in shards of 64 MiB.
const MIXTRAL_OBJECTS: u64 = 394;
/// The model that comes with the program, in shards of 1 MiB, and its tokenizer.
const EMBEDDED_OBJECTS: u64 = 10;
/// Bytes a second of 1 Gbit/s.
const GIGABIT: u64 = 125_000_000;

/// 32 bytes that look unrelated for different numbers.
fn bytes(seed: u64, what: u64) -> [u8; 32] {
    let mut rng = Rng::new(mix(seed) ^ mix(what.wrapping_add(1 << 40)));
    let mut out = [0; 32];
    for chunk in out.chunks_mut(8) {
        chunk.copy_from_slice(&rng.next().to_le_bytes());
    }
    out
}

impl World {
    /// Models, nodes, and who holds what at the start.
    pub(crate) fn furnish(&mut self) {
        let (seed, scenario) = (self.options.seed, self.options.scenario);
        let mut rng = Rng::fork(seed, "models", 0);
        let models = match scenario {
            Scenario::Crowd => (self.options.nodes / NODES_PER_MODEL).max(1),
            Scenario::Models => (self.options.nodes / models::NODES_PER_MODEL).max(1),
            Scenario::ColdStart => 1,
            _ if scenario.is_placed() => 1,
            _ => 2,
        };
        for number in 0..models {
            let is_small = scenario == Scenario::KillSmall;
            let is_large = scenario.kills() && !is_small;
            let count = match (is_large, is_small) {
                (true, _) => MIXTRAL_OBJECTS,
                (_, true) => EMBEDDED_OBJECTS,
                _ if scenario == Scenario::Models => rng.between(2, 4),
                _ => rng.between(6, 20),
            };
            let name = |index: u64| bytes(seed, (number as u64) << 20 | index);
            let objects: Vec<ShardId> = (1..=count).map(|index| name(index).into()).collect();
            for shard in &objects {
                let size = match (is_large, is_small) {
                    (true, _) => OBJECT_BYTES_MAX,
                    (_, true) => MIB,
                    _ => rng.between(MIB, 12 * MIB),
                };
                self.objects.insert(*shard, Object { size });
            }
            let id = ModelId::from(name(0));
            let size = rng.between(2_000, 60_000);
            self.objects.insert(id.manifest(), Object { size });
            let signed = SignedModel::sign(&bytes(seed, 1 << 32), id, "model", size);
            let Ok(signed) = signed else { continue };
            let is_crowd = matches!(scenario, Scenario::Crowd | Scenario::Models);
            let publisher = if is_crowd { number } else { number % KEEPERS };
            self.models.push(Model { id, signed, objects, publisher });
        }
        self.interests = Interests::new(&self.options, self.models.len());
        self.seats = self.seats();
        let placed = if scenario.is_placed() { self.placement() } else { BTreeMap::new() };
        for index in 0..self.options.nodes {
            self.furnish_node(index, &placed);
        }
    }

    fn furnish_node(&mut self, index: usize, placed: &BTreeMap<ShardId, u64>) {
        let (seed, scenario) = (self.options.seed, self.options.scenario);
        let mut rng = Rng::fork(seed, "node", index as u64);
        let id = PeerId::from_seed(bytes(seed, 2 << 32 | index as u64));
        let total: u64 = self.objects.values().map(|object| object.size).sum();
        let is_cold = scenario == Scenario::ColdStart;
        let (is_placed, is_crowd) = (scenario.is_placed(), scenario == Scenario::Crowd);
        let is_still = is_placed || is_crowd || scenario == Scenario::Models;
        let is_keeper = !is_still && index < if is_cold { 1 } else { KEEPERS };
        let wants_all = is_cold || is_keeper || !is_still && rng.percent(20);
        let is_small = !wants_all && !is_still && rng.percent(50);
        let budget = if is_small { total / 4 * 3 + 13 * MIB } else { 2 * total };
        let kind = PolicyKind::ALL[rng.below(3) as usize];
        let mut disk = Disk::new(budget, kind.make());
        let share = rng.below(70);
        for (shard, object) in &self.objects {
            let starts_here = match scenario {
                _ if is_placed => {
                    placed.get(shard).is_none_or(|first| self.order(*shard, index) <= *first)
                }
                Scenario::Models => self.is_seated(*shard, index),
                Scenario::Crowd => self.is_furnished(*shard, index, rng.percent(5)),
                // Only what healing copies stands between a drain and a loss.
                Scenario::ColdStart | Scenario::Drain => is_keeper,
                _ => is_keeper || rng.percent(share),
            };
            let fits = || disk.victims(object.size, &|_| true) == Some(Vec::new());
            if let Some(range) = ByteRange::new(0, object.size)
                && starts_here
                && fits()
            {
                let purpose = if is_placed { Purpose::Heal } else { Purpose::Pull };
                let (shard, size, is_pinned) = (*shard, object.size, is_keeper);
                disk.put(Job { shard, size, range, is_pinned, purpose });
            }
        }
        let hides = matches!(scenario, Scenario::Mixed | Scenario::Partition);
        self.by_peer.insert(id, index);
        let latest = if is_cold { 20 } else { 3 }.max(self.options.nodes as u64 / STARTS);
        let starts = if is_keeper { 0 } else { rng.below(latest * SECOND) };
        let starts = if is_crowd { self.joins_at(index) } else { starts };
        let (up, down) = (rng.between(10, 125) * 1_000_000, rng.between(10, 125) * 1_000_000);
        let (up, down) = if is_placed { (GIGABIT, GIGABIT) } else { (up, down) };
        self.nodes.push(Node {
            id,
            is_nat: hides && index > KEEPERS && rng.percent(25),
            rng,
            core: None,
            boot: 0,
            epoch: 0,
            armed: u64::MAX,
            replies: Replies::default(),
            reads: BTreeMap::new(),
            dropped: BTreeSet::new(),
            next_read: 1,
            disk,
            registered: BTreeSet::new(),
            wants_all,
            pull: None,
            healing: None,
            looks: Looks::default(),
            replica_budget: if is_small { total / 4 } else { total },
            leaves_since: None,
            is_gone: false,
            down_since: None,
            up,
            down,
            uploads: std::collections::VecDeque::new(),
            sending: None,
            down_free: 0,
            contacts: BTreeSet::new(),
            refused: BTreeMap::new(),
            address: address_of(index),
            skew_ms: 0,
            lies: BTreeMap::new(),
            down_by: BTreeSet::new(),
            was_dishonest: false,
        });
        self.queue.push(starts, Next::Boot { node: index });
    }

    /// A node's place among those that may hold an object before the killing.
    fn order(&self, shard: ShardId, node: usize) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&shard.as_bytes()[..8]);
        mix(u64::from_le_bytes(first) ^ mix(node as u64))
    }

    /// Where each object lies before the killing: on as many nodes as it should be, up to this place in
    /// its order. The manifest is everywhere, and not named.
    fn placement(&self) -> BTreeMap<ShardId, u64> {
        let objects = self.models.iter().flat_map(|model| model.objects.iter().copied());
        let last = |shard: ShardId| {
            let nodes = 0..self.options.nodes;
            let mut order: Vec<u64> = nodes.map(|node| self.order(shard, node)).collect();
            order.sort_unstable();
            let last = self.replicas.min.min(order.len()).saturating_sub(1);
            (shard, order.get(last).copied().unwrap_or(0))
        };
        objects.map(last).collect()
    }

    /// Whether an object, or a manifest, lies on a node of a crowd at the start: everybody has the
    /// manifest of one model and a few of its objects; one has all.
    fn is_furnished(&self, shard: ShardId, index: usize, is_lucky: bool) -> bool {
        let number = index % self.models.len().max(1);
        let Some(model) = self.models.get(number) else { return false };
        let is_listed = is_lucky || index == model.publisher;
        model.id.manifest() == shard || is_listed && model.objects.contains(&shard)
    }

    /// Of each object, and manifest, the nodes on which it lies at the start if each is interested in a few
    /// models.
    fn seats(&self) -> BTreeMap<ShardId, BTreeSet<usize>> {
        let mut seats = BTreeMap::new();
        if self.options.scenario != Scenario::Models {
            return seats;
        }
        for (number, model) in self.models.iter().enumerate() {
            let interested = self.interests.of_model[number].iter().copied();
            seats.insert(model.id.manifest(), interested.collect());
            let holders = self.interests.holders(self.options.seed, number);
            seats.extend(model.objects.iter().map(|shard| (*shard, holders.clone())));
        }
        seats
    }

    fn is_seated(&self, shard: ShardId, node: usize) -> bool {
        self.seats.get(&shard).is_some_and(|nodes| nodes.contains(&node))
    }

    pub(crate) fn size(&self, shard: ShardId) -> u64 {
        self.objects.get(&shard).map_or(1, |object| object.size)
    }

    /// The core is told what the disk holds whole; a liar's says that it is everything.
    pub(crate) fn holdings_changed(&mut self, node: usize) {
        let this = &self.nodes[node];
        let whole = if this.lies(Lie::Holdings) {
            self.objects.keys().copied().collect()
        } else {
            this.disk.whole().clone()
        };
        self.tell(node, Event::Whole(whole));
        self.parts_changed(node);
    }

    fn parts_changed(&mut self, node: usize) {
        let parts = self.nodes[node].disk.chunks();
        self.tell(node, Event::Parts(parts));
    }

    /// Models whose manifest is here are registered.
    pub(crate) fn register_held(&mut self, node: usize) {
        for model in 0..self.models.len() {
            let id = self.models[model].id;
            let this = &mut self.nodes[node];
            if this.disk.is_whole(id.manifest()) && this.registered.insert(model) {
                let objects = self.models[model].objects.clone();
                self.tell(node, Event::Register { model: id, objects });
                self.help(node);
            }
        }
    }

    pub(crate) fn begin(&mut self, node: usize, request: ReadRequest, purpose: Purpose) -> ReadId {
        let this = &mut self.nodes[node];
        let read = this.next_read;
        this.next_read += 1;
        let ReadRequest { shard, range, priority, .. } = request;
        let is_token = priority == Priority::Token;
        let parts = BTreeMap::new();
        let reading = Reading { shard, range, purpose, is_token, began: self.now, parts };
        this.reads.insert(read, reading);
        self.stats.reads += 1;
        self.tell(node, Event::Read { read, request });
        read
    }

    pub(crate) fn begin_whole(
        &mut self,
        node: usize,
        shard: ShardId,
        priority: Priority,
        purpose: Purpose,
    ) {
        if let Some(range) = ByteRange::new(0, self.size(shard)) {
            self.begin(node, ReadRequest { shard, range, priority, deadline: None }, purpose);
        }
    }

    /// A node reads something that it lacks, and sometimes thinks better of it.
    pub(crate) fn work(&mut self, node: usize) {
        let is_busy = match self.options.scenario {
            Scenario::Kill | Scenario::KillSmall | Scenario::Quiet | Scenario::Crowd => return,
            Scenario::Models => return,
            other => other == Scenario::Busy,
        };
        let boot = self.nodes[node].boot;
        let longest = if is_busy { SECOND } else { 8 * SECOND };
        let next = self.now + self.nodes[node].rng.between(SECOND / 2, longest);
        self.queue.push(next, Next::Work { node, boot });
        if self.nodes[node].reads.len() >= WORK_MAX {
            return;
        }
        if self.nodes[node].rng.percent(5) {
            let mine = |(read, reading): (&ReadId, &Reading)| {
                (reading.purpose == Purpose::Work).then_some(*read)
            };
            if let Some(read) = self.nodes[node].reads.iter().find_map(mine) {
                self.drop_read(node, read);
            }
        }
        let registered: Vec<usize> = self.nodes[node].registered.iter().copied().collect();
        let rng = &mut self.nodes[node].rng;
        let Some(model) = registered.get(rng.below(registered.len() as u64) as usize) else {
            return;
        };
        let objects = &self.models[*model].objects;
        // Some objects are read more often than others.
        let among = if rng.percent(30) && !is_busy { 2 } else { objects.len() as u64 };
        let shard = objects[rng.below(among) as usize];
        let size = self.objects.get(&shard).map_or(1, |object| object.size);
        let (is_token, is_all, is_patient) = (rng.percent(70), rng.percent(30), rng.percent(80));
        let (is_token, is_all) = (is_token || is_busy, is_all && !is_busy);
        let start = if is_all { 0 } else { rng.below(size) };
        let len = if is_all { size } else { rng.between(1, if is_busy { 8 * MIB } else { MIB }) };
        let wait = rng.between(SECOND, 30 * SECOND);
        let Some(range) = ByteRange::new(start, (start + len).min(size)) else { return };
        if self.nodes[node].disk.holds(shard, range) {
            return;
        }
        let priority = if is_token { Priority::Token } else { Priority::Bulk };
        let deadline = (!is_patient).then(|| self.instant(self.now + wait));
        self.begin(node, ReadRequest { shard, range, priority, deadline }, Purpose::Work);
    }

    /// A node looks at what it lacks: manifests of models that it heard of, objects of a pull.
    pub(crate) fn look(&mut self, node: usize) {
        let boot = self.nodes[node].boot;
        let is_crowd = matches!(self.options.scenario, Scenario::Crowd | Scenario::Models);
        let is_idle = is_crowd || self.options.scenario == Scenario::Quiet;
        let is_large = self.nodes.len() > FEW;
        let every = if is_idle && is_large && !self.is_stirred(node) { IDLE_LOOK } else { SECOND };
        self.queue.push(self.now + every, Next::Look { node, boot });
        self.parts_changed(node);
        self.register_held(node);
        if is_crowd {
            return self.heal(node);
        }
        let announced: BTreeSet<ModelId> = self.nodes[node]
            .core
            .as_ref()
            .map(|core| core.announced().into_iter().map(|signed| signed.model).collect())
            .unwrap_or_default();
        for model in 0..self.models.len() {
            let id = self.models[model].id;
            let purpose = Purpose::Manifest(model);
            let this = &self.nodes[node];
            let is_wanted = announced.contains(&id) && !this.disk.is_whole(id.manifest());
            let is_coming = this.reads.values().any(|reading| reading.purpose == purpose)
                || this.disk.jobs.values().any(|job| job.shard == id.manifest());
            if is_wanted && !is_coming {
                self.begin_whole(node, id.manifest(), Priority::Token, purpose);
            }
        }
        let this = &self.nodes[node];
        if this.wants_all && this.pull.is_none() && this.leaves_since.is_none() {
            self.start_pull(node);
        }
        self.heal(node);
    }

    /// Whether a node has something to copy or drop, or a peer is lost or doubted; a crowd without deaths is
    /// not looked at so closely.
    fn is_stirred(&self, node: usize) -> bool {
        let this = &self.nodes[node];
        let is_pending = || this.healing.as_ref().is_some_and(Healing::is_pending);
        let is_in_doubt = || this.core.as_ref().is_some_and(|core| core.is_anybody_in_doubt());
        self.options.scenario == Scenario::Models && (is_pending() || is_in_doubt())
    }

    fn start_pull(&mut self, node: usize) {
        let this = &self.nodes[node];
        let objects = this.registered.iter().flat_map(|model| &self.models[*model].objects);
        let missing: Vec<Wanted> = objects
            .filter(|shard| !this.disk.is_whole(**shard))
            .map(|shard| Wanted {
                shard: *shard,
                size: self.size(*shard),
                held: this.disk.held_bytes(*shard),
            })
            .collect();
        if missing.is_empty() {
            return;
        }
        let now = self.instant(self.now);
        self.nodes[node].pull = Some(Pull::new(now, missing, AT_ONCE));
        self.on_pull(node, PullEvent::Begin);
    }

    fn on_pull(&mut self, node: usize, event: PullEvent) {
        let now = self.instant(self.now);
        let this = &mut self.nodes[node];
        let Some((pull, core)) = this.pull.as_mut().zip(this.core.as_ref()) else { return };
        let rarity = |shard: ShardId| {
            let holders = core.holders(now, shard);
            holders.ready.len() + holders.away.len()
        };
        for action in pull.on(event, &rarity) {
            match action {
                PullAction::Fetch(wanted) => {
                    self.begin_whole(node, wanted.shard, Priority::Bulk, Purpose::Pull);
                }
                PullAction::Done => self.nodes[node].pull = None,
                PullAction::GiveUp { .. } => {
                    self.nodes[node].pull = None;
                    let mine = |(read, reading): (&ReadId, &Reading)| {
                        (reading.purpose == Purpose::Pull).then_some(*read)
                    };
                    let reads: Vec<ReadId> =
                        self.nodes[node].reads.iter().filter_map(mine).collect();
                    for read in reads {
                        self.drop_read(node, read);
                    }
                }
            }
        }
    }

    /// What a read had asked for is not waited for any more.
    fn forget_read(&mut self, node: usize, read: ReadId) -> Option<Reading> {
        let this = &mut self.nodes[node];
        this.replies.0.retain(|(other, _), _| *other != read);
        this.reads.remove(&read)
    }

    pub(crate) fn drop_read(&mut self, node: usize, read: ReadId) {
        self.forget_read(node, read);
        self.nodes[node].dropped.insert(read);
        self.tell(node, Event::Dropped { read });
    }

    pub(crate) fn on_end(&mut self, node: usize, read: ReadId, result: &Result<(), ReadError>) {
        let Some(reading) = self.forget_read(node, read) else {
            // It ended in the very moment in which it was dropped.
            if self.nodes[node].dropped.remove(&read) {
                return;
            }
            return self.violate("ends", format!("node {node}: read {read} ends twice"));
        };
        let purpose = reading.purpose;
        if let Err(error) = result {
            self.stats.failed_reads += 1;
            if purpose == Purpose::Probe {
                self.violate("reach", format!("node {node}: {error}"));
            }
            self.over(node, reading.shard, purpose, false);
            return;
        }
        if purpose == Purpose::Work && self.options.scenario == Scenario::Busy {
            self.token_times.push((self.now, self.now - reading.began));
        }
        self.check_read(node, &reading);
        let rng = &mut self.nodes[node].rng;
        let is_kept = match purpose {
            Purpose::Work => {
                rng.percent(60)
                    && !matches!(self.options.scenario, Scenario::Drain | Scenario::Busy)
            }
            Purpose::Probe => false,
            Purpose::Manifest(_) | Purpose::Pull | Purpose::Heal | Purpose::Repair => true,
        };
        if !is_kept {
            return;
        }
        let wait = rng.between(MS, 200 * MS);
        let size = self.size(reading.shard);
        let start = reading.range.start() / GROUP_BYTES * GROUP_BYTES;
        let end = reading.range.end().next_multiple_of(GROUP_BYTES).min(size);
        let Some(range) = ByteRange::new(start, end) else { return };
        let is_pinned = purpose == Purpose::Pull || self.nodes[node].disk.is_pinned(reading.shard);
        self.numbers += 1;
        let (job, boot) = (self.numbers, self.nodes[node].boot);
        let write = Job { shard: reading.shard, size, range, is_pinned, purpose };
        self.nodes[node].disk.jobs.insert(job, write);
        self.queue.push(self.now + wait, Next::Stored { node, boot, job });
    }

    pub(crate) fn on_stored(&mut self, node: usize, job: u64) {
        let Some(job) = self.nodes[node].disk.jobs.remove(&job) else { return };
        let disk = &self.nodes[node].disk;
        // What too few others hold is not evicted for something else.
        let needs_room = disk.used() + job.range.len() > disk.budget();
        let spared = if needs_room { self.spared(node) } else { BTreeSet::new() };
        let is_spared = |shard| shard == job.shard || spared.contains(&shard);
        let victims = disk.victims(job.range.len(), &is_spared);
        let stored = match victims {
            Some(victims) if !disk.is_full => {
                for victim in &victims {
                    self.evict(node, *victim);
                }
                let became = self.nodes[node].disk.put(job);
                if became || !victims.is_empty() {
                    self.holdings_changed(node);
                }
                self.nodes[node].disk.is_whole(job.shard)
            }
            _ => false,
        };
        self.register_held(node);
        self.over(node, job.shard, job.purpose, stored);
    }

    /// What was read for a pull or for healing is durable, or did not come.
    fn over(&mut self, node: usize, shard: ShardId, purpose: Purpose, is_stored: bool) {
        let now = self.instant(self.now);
        match (purpose, self.nodes[node].healing.as_mut()) {
            (Purpose::Pull, _) if is_stored => self.on_pull(node, PullEvent::Fetched(shard)),
            (Purpose::Pull, _) => self.on_pull(node, PullEvent::Failed(shard)),
            (Purpose::Heal, Some(healing)) if is_stored => {
                healing.copied(shard);
                self.healed.moved += self.objects.get(&shard).map_or(0, |object| object.size);
                self.healed.healed = self.now;
            }
            (Purpose::Heal, Some(healing)) => healing.failed(now, shard),
            _ => {}
        }
        if purpose == Purpose::Heal {
            self.heal_soon(node);
        }
    }

    pub(crate) fn evict(&mut self, node: usize, shard: ShardId) {
        self.check_last_copy(node, shard);
        self.nodes[node].disk.evict(shard);
    }

    /// Bit rot hits one pinned copy of an object at a time: two at once nobody can mend.
    pub(crate) fn flip(&mut self, node: usize, pick: u64) {
        let others: Vec<&Disk> = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != node)
            .map(|(_, other)| &other.disk)
            .collect();
        let spare: BTreeSet<ShardId> = self
            .objects
            .keys()
            .copied()
            .filter(|shard| others.iter().any(|d| d.is_sound(*shard) && d.is_pinned(*shard)))
            .collect();
        self.nodes[node].disk.flip(pick, |shard| spare.contains(&shard));
    }

    /// What damage took from the disk is fetched again.
    pub(crate) fn repair(&mut self, node: usize, shard: ShardId) {
        self.begin_whole(node, shard, Priority::Bulk, Purpose::Repair);
    }

    /// Each node reads some of what it lacks and somebody in reach has.
    pub(crate) fn probe(&mut self) {
        if matches!(self.options.scenario, Scenario::Crowd | Scenario::Models) {
            return;
        }
        let sound: Vec<ShardId> = self
            .objects
            .keys()
            .copied()
            .filter(|shard| {
                let has = |node: &Node| node.is_up() && !node.is_nat && node.disk.is_sound(*shard);
                self.nodes.iter().any(has)
            })
            .collect();
        for node in 0..self.nodes.len() {
            if self.nodes[node].is_gone {
                continue;
            }
            if !self.nodes[node].is_up() {
                self.violate("harness", format!("node {node} is down after the faults"));
                return;
            }
            if self.nodes[node].registered.len() < self.models.len() {
                self.violate("gossip", format!("node {node} has not learned of every model"));
                return;
            }
            let mut missing = sound.clone();
            missing.retain(|shard| !self.nodes[node].disk.is_whole(*shard));
            for _ in 0..PROBES.min(missing.len()) {
                let pick = self.nodes[node].rng.below(missing.len() as u64) as usize;
                let shard = missing.swap_remove(pick);
                self.stats.probes += 1;
                self.begin_whole(node, shard, Priority::Token, Purpose::Probe);
            }
        }
    }

    /// A flooder speaks: nonsense, others' names, models that nobody has.
    pub(crate) fn flood(&mut self, node: usize) {
        if !self.nodes[node].lies(Lie::Flood) {
            return;
        }
        let boot = self.nodes[node].boot;
        self.queue.push(self.now + SECOND, Next::Flood { node, boot });
        for _ in 0..FLOOD {
            let rng = &mut self.nodes[node].rng;
            let (what, model) = (rng.below(4), rng.next());
            let victim = rng.below(self.options.nodes as u64) as usize;
            let mut data: Vec<u8> = (0..rng.between(1, 60)).map(|_| rng.next() as u8).collect();
            if what > 0 {
                let speaker = if what == 1 { victim } else { node };
                let entry = ModelHoldings {
                    model: ModelId::from(bytes(model, 0)),
                    manifest: true,
                    objects: vec![0xff; 40],
                    parts: Vec::new(),
                    helps: true,
                    hot: (0..16).collect(),
                    pins: true,
                };
                let holdings = Holdings {
                    peer: self.nodes[speaker].id.to_bytes(),
                    stamp: Stamp {
                        epoch: self.nodes[speaker].epoch,
                        sequence: u64::MAX - model % 1000,
                    },
                    lease: std::time::Duration::from_secs(300),
                    next: std::time::Duration::from_secs(model % 30),
                    room: u64::MAX,
                    is_leaving: false,
                    addresses: vec!["/ip4/10.9.9.9/tcp/1".into(); 16],
                    models: vec![entry],
                    run: model,
                };
                data = Envelope::Holdings(holdings).encode();
            }
            if what == 3 {
                data = Envelope::Doubt(self.nodes[victim].id.to_bytes()).encode();
            }
            self.publish(node, None, data);
        }
    }
}
