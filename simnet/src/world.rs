//! The loop: takes what is next, tells it to whom it concerns, does what cores say.
//!
//! Invariants: nothing in here looks at a clock, at the order of a hash map or at an address; so
//! the same options give the same schedule.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppler_ids::{ModelId, PeerId, ShardId};
use doppler_mesh::Timing;
use doppler_mesh::core::{Action, Config, Core, Event, FailureKind, Replicas, model_topic};
use doppler_store::signature::SignedModel;

use crate::check::{Schedule, Stats, Violation};
use crate::crew::{Crew, Passed};
use crate::crowd::News;
use crate::faults::{self, Fault, Kind, Lie};
use crate::heal::Healed;
use crate::models::Interests;
use crate::net::{Link, TOPIC, latency_min};
use crate::node::{Node, Reply};
use crate::options::{MS, Options, SECOND, Scenario};
use crate::queue::{Key, Message, Next, Queue};
use crate::rng::Rng;
use crate::topics::Topics;
use doppler_mesh::core::planted::{self, Plant};

/// A published model.
#[derive(Debug, Clone)]
pub struct Model {
    pub id: ModelId,
    pub signed: SignedModel,
    /// Objects in the list's order, without the manifest.
    pub objects: Vec<ShardId>,
    pub publisher: usize,
}

/// An object of a model, or a manifest.
#[derive(Debug, Clone, Copy)]
pub struct Object {
    pub size: u64,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub violation: Option<Violation>,
    pub schedule: u64,
    pub stats: Stats,
    pub healed: Healed,
    pub news: News,
}

pub struct World {
    pub(crate) options: Options,
    base: Instant,
    pub(crate) now: u64,
    pub(crate) queue: Queue,
    pub(crate) nodes: Vec<Node>,
    /// The life of each node, beside it: looked up with each copy of each message.
    pub(crate) boots: Vec<u32>,
    pub(crate) by_peer: BTreeMap<PeerId, usize>,
    pub(crate) links: BTreeMap<(usize, usize), Link>,
    pub(crate) gossip: Topics,
    pub(crate) models: Vec<Model>,
    pub(crate) objects: BTreeMap<ShardId, Object>,
    faults: Vec<Fault>,
    /// Faults in force, by their number.
    pub(crate) active: BTreeMap<usize, Fault>,
    pub(crate) topic: Arc<str>,
    /// The names of the models' topics, and the models by them.
    pub(crate) topic_names: Vec<Arc<str>>,
    by_topic: BTreeMap<Arc<str>, usize>,
    /// The message that a core is being told, and who sent it.
    pub(crate) hearing: Option<(Rc<Message>, usize)>,
    /// And what its node passes on of it, if that was worked out ahead.
    pub(crate) passed: Option<Passed>,
    /// Requests that have just ended, while the core is told.
    pub(crate) ended: BTreeMap<(usize, Key), Reply>,
    /// Names things that are never named twice.
    pub(crate) numbers: u64,
    pub(crate) stats: Stats,
    pub(crate) schedule: Schedule,
    pub(crate) violation: Option<Violation>,
    pub(crate) replicas: Replicas,
    pub(crate) healed: Healed,
    /// Who is interested in which models, and what lies where at the start for that.
    pub(crate) interests: Interests,
    pub(crate) seats: BTreeMap<ShardId, BTreeSet<usize>>,
    /// When nodes learned of models that are watched.
    pub(crate) watched: BTreeMap<ModelId, Vec<u64>>,
    /// When a read for a token ended, and how long it took, in the scenario `busy`.
    pub(crate) token_times: Vec<(u64, u64)>,
    pub(crate) news: News,
    /// Since when an object has too few copies, and a node one too many, without a break.
    pub(crate) lacking: BTreeMap<ShardId, u64>,
    pub(crate) surplus: BTreeMap<(usize, ShardId), u64>,
    /// Empty: room for what a core says.
    scratch: Vec<Action>,
}

/// Wall-clock milliseconds at the start.
const EPOCH_MS: i64 = 1_800_000_000_000;
/// How long a read looks for a holder.
pub const FIND_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks at everything.
const CHECK_EVERY: u64 = SECOND;

impl World {
    /// Runs it to its end, or to the first violation.
    pub fn run(options: &Options, plant: Option<Plant>) -> Outcome {
        planted::plant(plant);
        let mut world = Self::new(options);
        world.run_until_with(options.end(), 1);
        world.finish()
    }

    /// The same with so many threads. What comes of it does not depend on their number.
    pub fn run_with(options: &Options, threads: usize) -> Outcome {
        Self::run_telling(options, threads, |_| {})
    }

    /// The same, and `told` hears of each virtual minute that has passed.
    pub fn run_telling(options: &Options, threads: usize, told: impl Fn(u64)) -> Outcome {
        let mut world = Self::new(options);
        for minute in 1..=options.seconds / 60 {
            world.run_until_with(minute * 60 * SECOND, threads);
            told(minute);
        }
        world.run_until_with(options.end(), threads);
        world.finish()
    }

    fn finish(mut self) -> Outcome {
        let world = &mut self;
        if world.violation.is_none() {
            world.check_end();
        }
        planted::plant(None);
        self.outcome()
    }

    /// [`Self::run_until`] with so many threads.
    pub(crate) fn run_until_with(&mut self, end: u64, threads: usize) {
        if !self.is_calm() {
            return self.run_until(end);
        }
        let crew = Crew::new(threads.max(1) - 1);
        std::thread::scope(|scope| {
            for helper in 0..threads.max(1) - 1 {
                let crew = &crew;
                scope.spawn(move || crew.help(helper));
            }
            // Helpers are sent home whatever happens.
            let result = catch_unwind(AssertUnwindSafe(|| self.run_batches(end, &crew)));
            crew.end();
            if let Err(panic) = result {
                resume_unwind(panic);
            }
        });
    }

    /// Everything up to a time, or to the first violation.
    pub(crate) fn run_until(&mut self, end: u64) {
        while self.violation.is_none() && self.queue.next_at().is_some_and(|at| at <= end) {
            let Some((at, next)) = self.queue.pop() else { break };
            self.now = at;
            self.stats.events += 1;
            self.step(next);
        }
        if self.violation.is_none() {
            self.now = end;
        }
    }

    pub(crate) fn outcome(self) -> Outcome {
        let Self { violation, schedule, stats, healed, news, .. } = self;
        Outcome { violation, schedule: schedule.value(), stats, healed, news }
    }

    pub(crate) fn new(options: &Options) -> Self {
        let mut world = Self {
            options: options.clone(),
            base: Instant::now(),
            now: 0,
            queue: Queue::default(),
            nodes: Vec::new(),
            boots: Vec::new(),
            by_peer: BTreeMap::new(),
            links: BTreeMap::new(),
            gossip: Topics::new(options.seed, options.nodes),
            models: Vec::new(),
            objects: BTreeMap::new(),
            faults: faults::plan(options),
            active: BTreeMap::new(),
            topic: TOPIC.into(),
            topic_names: Vec::new(),
            by_topic: BTreeMap::new(),
            hearing: None,
            passed: None,
            ended: BTreeMap::new(),
            numbers: 0,
            stats: Stats::default(),
            schedule: Schedule::default(),
            violation: None,
            replicas: match options.scenario {
                Scenario::Kill | Scenario::KillSmall | Scenario::Busy => {
                    Replicas { min: 4, max: 5 }
                }
                _ => Replicas::default(),
            },
            healed: Healed::default(),
            news: News::default(),
            interests: Interests::default(),
            seats: BTreeMap::new(),
            watched: BTreeMap::new(),
            token_times: Vec::new(),
            lacking: BTreeMap::new(),
            surplus: BTreeMap::new(),
            scratch: Vec::new(),
        };
        world.furnish();
        let name = |model: &Model| Arc::<str>::from(model_topic(TOPIC, model.id));
        world.topic_names = world.models.iter().map(name).collect();
        let names = world.topic_names.iter().enumerate();
        world.by_topic = names.map(|(model, name)| (Arc::clone(name), model)).collect();
        world.boots = vec![0; world.nodes.len()];
        for (index, fault) in world.faults.iter().enumerate() {
            world.queue.push(fault.from, Next::FaultBegins { fault: index });
            world.queue.push(fault.until, Next::FaultEnds { fault: index });
        }
        world.stats.faults = world.faults.len() as u64;
        world.queue.push(CHECK_EVERY, Next::Check);
        if options.scenario == Scenario::Crowd {
            world.plan_news();
        }
        let settled = options.safety() + crate::work::SETTLE;
        world.queue.push(settled, Next::Probe);
        world
    }

    pub(crate) fn instant(&self, at: u64) -> Instant {
        self.base + Duration::from_nanos(at)
    }

    /// The first broken rule ends the run.
    pub(crate) fn violate(&mut self, rule: &'static str, what: String) {
        let at = self.now;
        self.violation.get_or_insert(Violation { at, rule, what });
    }

    /// Tells a node's core what happened, and does what it says.
    pub(crate) fn tell(&mut self, node: usize, event: Event) {
        let at = self.instant(self.now);
        let this = &mut self.nodes[node];
        let Some(core) = this.core.as_mut() else { return };
        let mut actions = std::mem::take(&mut self.scratch);
        core.on_into(at, event, &this.replies, &mut actions);
        self.told(node, &mut actions);
        self.scratch = actions;
    }

    /// Does what a node's core has said. Leaves `actions` empty.
    pub(crate) fn told(&mut self, node: usize, actions: &mut Vec<Action>) {
        self.schedule.fold(actions.len() as u64);
        for action in actions.drain(..) {
            self.perform(node, action);
        }
        let this = &mut self.nodes[node];
        let Some(core) = this.core.as_ref() else { return };
        let wake = core.next_wake().saturating_duration_since(self.base);
        let wake = u64::try_from(wake.as_nanos()).unwrap_or(u64::MAX).max(self.now);
        if wake < this.armed {
            this.armed = wake;
            self.queue.push(wake, Next::Wake { node });
        }
    }

    fn perform(&mut self, node: usize, action: Action) {
        let (now, boot) = (self.now, self.nodes[node].boot);
        match action {
            Action::Publish(data) => {
                self.check_word(node, &data);
                self.schedule.fold_bytes(&data);
                self.publish(node, None, data);
            }
            Action::Tell { topic, data } => {
                self.check_word(node, &data);
                self.schedule.fold_bytes(&data);
                let model = self.by_topic.get(&topic).copied();
                if model.is_some() {
                    self.publish(node, model, data);
                }
            }
            Action::Join { topic, .. } => self.subscribe(node, &topic, true),
            Action::Leave(topic) => self.subscribe(node, &topic, false),
            Action::Judge { is_sound, .. } => {
                if is_sound {
                    self.pass_on(node);
                } else {
                    self.check_judgement(node);
                }
            }
            Action::Dial { peer, .. } => {
                if let Some(to) = self.by_peer.get(&peer).copied() {
                    self.dial(node, to);
                }
            }
            Action::Ban { peer, until, detail, .. } => {
                let Some(other) = self.by_peer.get(&peer).copied() else { return };
                self.stats.bans += 1;
                self.check_ban(node, other, &detail);
                let until = until.saturating_duration_since(self.base).as_nanos();
                let until = u64::try_from(until).unwrap_or(u64::MAX);
                self.nodes[node].refused.insert(other, until);
                self.queue.push(now, Next::HangUp { node, other });
            }
            Action::Warn(twin) => self.check_twin(node, &twin),
            Action::ForgetStreams(_) | Action::TellTwins(_) | Action::Changed => {}
            Action::Ask { ask, may_relay } => {
                self.schedule.fold(ask.range.start() ^ ask.request.rotate_left(32));
                self.ask(node, ask, may_relay);
            }
            Action::Keep { read, request, end } => self.keep(node, read, request, end),
            Action::Stop { read, request } => {
                let kind = Some(FailureKind::Stopped);
                self.queue.push(now, Next::Answer { node, boot, key: (read, request), kind });
            }
            Action::Abandon { read, request } => {
                self.nodes[node].replies.0.remove(&(read, request));
            }
            Action::Discard { read, request } => {
                if let Some(reading) = self.nodes[node].reads.get_mut(&read) {
                    reading.parts.remove(&request);
                }
            }
            Action::End { read, result } => self.on_end(node, read, &result),
            Action::Learned { is_own: true, .. } => {}
            Action::Learned { signed, .. } => {
                self.news.learned(now, &signed);
                if let Some(times) = self.watched.get_mut(&signed.model) {
                    times.push(now);
                }
            }
            // What its holdings mean goes with it; it is registered again as long as it is here.
            Action::Forgot(id) => {
                if let Some(model) = self.models.iter().position(|model| model.id == id) {
                    self.nodes[node].registered.remove(&model);
                }
            }
            Action::Refuse(refused) => {
                self.violate("refused", format!("node {node}: {refused}"));
            }
        }
    }

    /// A node takes part in a model's topic from now on, or no more; its peers hear of it a little later.
    fn subscribe(&mut self, node: usize, topic: &str, joins: bool) {
        let Some(model) = self.by_topic.get(topic).copied() else { return };
        let (at, boot) = (self.now + latency_min(self.nodes.len()), self.nodes[node].boot);
        self.queue.push(at, Next::Topic { node, boot, model, joins });
    }

    /// Whether an event belongs to a node that lives no more.
    fn is_stale(&self, next: &Next) -> bool {
        let of = |node: &usize, boot: &u32| {
            let node = &self.nodes[*node];
            node.boot != *boot || !node.is_up()
        };
        match next {
            Next::Bootstrap { node, boot, .. }
            | Next::Dialled { node, boot, .. }
            | Next::Ready { node, boot, .. }
            | Next::Pump { node, boot }
            | Next::Chunk { node, boot, .. }
            | Next::Answer { node, boot, .. }
            | Next::Idle { node, boot, .. }
            | Next::Stored { node, boot, .. }
            | Next::Work { node, boot }
            | Next::Topic { node, boot, .. }
            | Next::Look { node, boot }
            | Next::Heal { node, boot }
            | Next::Flood { node, boot } => of(node, boot),
            _ => false,
        }
    }

    pub(crate) fn step(&mut self, next: Next) {
        if self.is_stale(&next) {
            return;
        }
        self.schedule.fold(self.now);
        match next {
            Next::Wake { node } => self.on_wake(node),
            Next::Boot { node } => self.boot(node),
            Next::FaultBegins { fault } => self.on_fault(fault, true),
            Next::FaultEnds { fault } => self.on_fault(fault, false),
            Next::Bootstrap { node, boot, to, wait } => self.on_bootstrap(node, boot, to, wait),
            Next::Dialled { node, to, .. } => self.on_dialled(node, to),
            Next::Notice { one, other, link } => self.on_notice(one, other, link),
            Next::Upgrade { one, other, link } => self.on_upgrade(one, other, link),
            Next::HangUp { node, other } => self.disconnect(node, other),
            Next::Gossip { to, from, message, is_replay } => {
                self.on_gossip(to, from, message, is_replay);
            }
            Next::Request { to, upload } => self.on_request(to, *upload),
            Next::Ready { node, upload, .. } => self.on_ready(node, *upload),
            Next::Pump { node, .. } => self.on_pump(node),
            Next::Chunk { node, key, end, is_wrong, .. } => {
                self.on_chunk(node, key, end, is_wrong);
            }
            Next::Answer { node, key, kind, .. } => self.answer(node, key, kind),
            Next::Idle { node, key, .. } => self.on_idle(node, key),
            Next::Stored { node, job, .. } => self.on_stored(node, job),
            Next::Work { node, .. } => self.work(node),
            Next::Look { node, .. } => self.look(node),
            Next::Heal { node, .. } => {
                self.nodes[node].looks.is_due = false;
                self.heal(node);
            }
            Next::Flood { node, .. } => self.flood(node),
            Next::News { node, number } => self.publish_in_crowd(node, number),
            Next::Topic { node, model, joins, .. } => self.on_topic(node, model, joins),
            Next::Probe => self.probe(),
            Next::Check => {
                self.check();
                self.queue.push(self.now + CHECK_EVERY, Next::Check);
            }
        }
    }

    fn on_wake(&mut self, node: usize) {
        if self.nodes[node].armed > self.now {
            return;
        }
        self.nodes[node].armed = u64::MAX;
        self.tell(node, Event::Time);
    }

    /// The number of a node's next run: its clock's, or one more than the one on its disk.
    fn begin_epoch(&mut self, node: usize) -> u64 {
        let this = &mut self.nodes[node];
        let wall = EPOCH_MS + (self.now / MS) as i64 + this.skew_ms;
        this.epoch = u64::try_from(wall).unwrap_or(0).max(this.epoch + 1);
        this.epoch
    }

    /// A node starts, with what its disk holds.
    pub(crate) fn boot(&mut self, node: usize) {
        let this = &self.nodes[node];
        if this.is_up() || this.is_gone || !this.down_by.is_empty() {
            return;
        }
        // Connections of its former life end when it answers that it knows nothing of them.
        self.drop_links(node);
        self.gossip.begin(self.now, node);
        let now = self.instant(self.now);
        let epoch = self.begin_epoch(node);
        let this = &mut self.nodes[node];
        let (own, topic) = (this.id, TOPIC.to_owned());
        let timing = Timing::default();
        this.boot += 1;
        self.boots[node] = this.boot;
        let run = u64::from(this.boot);
        let config = Config { own, run, epoch, topic, timing, find_timeout: FIND_TIMEOUT };
        this.core = Some(Box::new(Core::new(config, now)));
        (this.armed, this.down_free) = (u64::MAX, 0);
        this.registered.clear();
        (this.leaves_since, this.down_since, this.looks.is_due) = (None, None, false);
        let boot = this.boot;
        let address = self.nodes[node].address.clone();
        self.tell(node, Event::Addresses(address));
        self.nodes[node].healing = Some(self.new_healing(node));
        self.holdings_changed(node);
        self.register_held(node);
        for model in 0..self.models.len() {
            if self.models[model].publisher == node {
                let signed = self.models[model].signed.clone();
                self.tell(node, Event::Publish(signed));
            }
        }
        self.start_bootstrap(node);
        let rng: &mut Rng = &mut self.nodes[node].rng;
        let (work, look) = (rng.between(SECOND, 10 * SECOND), rng.between(0, SECOND));
        self.queue.push(self.now + work, Next::Work { node, boot });
        self.queue.push(self.now + look, Next::Look { node, boot });
        if self.nodes[node].lies(Lie::Flood) {
            self.queue.push(self.now, Next::Flood { node, boot });
        }
    }

    /// A node goes: killed, or in good order.
    pub(crate) fn stop(&mut self, node: usize, in_order: bool) {
        if in_order {
            self.tell(node, Event::Stop);
        }
        let this = &mut self.nodes[node];
        if this.core.take().is_none() {
            return;
        }
        this.down_since = Some(self.now);
        this.healing = None;
        this.replies.0.clear();
        this.reads.clear();
        this.uploads.clear();
        this.sending = None;
        this.refused.clear();
        this.pull = None;
        this.disk.crash();
        self.notice_gone(node, in_order);
    }

    fn on_fault(&mut self, index: usize, begins: bool) {
        let fault = self.faults[index];
        if begins {
            self.active.insert(fault.number, fault);
        } else {
            self.active.remove(&fault.number);
        }
        let number = fault.number;
        match fault.kind {
            Kind::Crash { node } | Kind::Leave { node } if begins => {
                self.nodes[node].down_by.insert(number);
                self.stop(node, matches!(fault.kind, Kind::Leave { .. }));
            }
            Kind::Crash { node } | Kind::Leave { node } => {
                self.nodes[node].down_by.remove(&number);
                self.queue.push(self.now, Next::Boot { node });
            }
            Kind::Drain { node } if begins => self.drain(node),
            Kind::Die { node } if begins => self.die(node),
            Kind::Partition { .. } | Kind::Isolate { .. } if begins => self.notice_cuts(),
            Kind::FullDisk { node } => self.nodes[node].disk.is_full = begins,
            Kind::Flip { node, pick } if begins => self.flip(node, pick),
            Kind::Skew { node, by_ms } if begins => self.nodes[node].skew_ms += by_ms,
            Kind::Lie { node, lie } => self.on_lie(node, lie, number, begins),
            _ => {}
        }
    }

    fn on_lie(&mut self, node: usize, lie: Lie, number: usize, begins: bool) {
        let this = &mut self.nodes[node];
        if begins {
            this.lies.insert(number, lie);
            this.was_dishonest = true;
        } else {
            this.lies.remove(&number);
        }
        let boot = this.boot;
        if lie == Lie::Holdings {
            self.holdings_changed(node);
        }
        if lie == Lie::Flood && begins && self.nodes[node].is_up() {
            self.queue.push(self.now, Next::Flood { node, boot });
        }
    }
}
