//! A core of a crowd joins topics of models, speaks there, and dials those that it should.

use super::super::limits::{MEMBERS_MAX, TOPIC_STAY};
use super::super::{Config, Event, ReadId, RequestId, Sight, Word};
use super::*;
use crate::wire::{Envelope, Stamp};

struct Blind;

impl Sight for Blind {
    fn proved(&self, _: ReadId, _: RequestId) -> u64 {
        0
    }

    fn is_throttled(&self, _: Instant) -> bool {
        false
    }
}

const SWARM: &str = "/doppler/swarm/t/1";

fn peer(number: u32) -> PeerId {
    let mut key = [7; 32];
    key[..4].copy_from_slice(&number.to_le_bytes());
    PeerId::from_public_key(key)
}

fn model(number: u32) -> ModelId {
    let mut id = [9; 32];
    id[..4].copy_from_slice(&number.to_le_bytes());
    ModelId::from(id)
}

fn shard(number: u32) -> ShardId {
    ShardId::from(*model(number + 1000).as_bytes())
}

struct Node {
    now: Instant,
    core: Core,
    sequence: u64,
    said: Vec<Action>,
}

impl Node {
    /// It holds the models of these numbers, whose list is one object each.
    fn new(models: &[u32]) -> Self {
        let now = Instant::now();
        let (timing, find_timeout) = (Timing::default(), Duration::from_secs(30));
        let (own, topic) = (peer(0), SWARM.to_owned());
        let config = Config { own, run: 1, epoch: 1, topic, timing, find_timeout };
        let mut this = Self { now, core: Core::new(config, now), sequence: 0, said: Vec::new() };
        let held = models.iter().flat_map(|number| [shard(*number), model(*number).manifest()]);
        this.tell(Event::Whole(held.collect()));
        for number in models {
            let objects = vec![shard(*number)];
            this.tell(Event::Register { model: model(*number), objects });
        }
        this
    }

    fn tell(&mut self, event: Event) {
        let said = self.core.on(self.now, event, &Blind);
        self.said.extend(said);
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.core.next_wake() <= end {
            self.now = self.now.max(self.core.next_wake());
            self.tell(Event::Time);
        }
        self.now = end;
    }

    /// A peer says on a topic that it holds a model.
    fn hear(&mut self, topic: &str, author: PeerId, of: Option<u32>, next: Duration) {
        self.sequence += 1;
        let entry = |number| ModelHoldings {
            manifest: true,
            objects: vec![1],
            helps: true,
            ..ModelHoldings::nothing(model(number))
        };
        let holdings = Holdings {
            peer: author.to_bytes(),
            stamp: Stamp { epoch: 1, sequence: self.sequence },
            lease: Duration::from_secs(3600),
            next,
            room: 1 << 30,
            is_leaving: false,
            addresses: vec!["/ip4/10.0.0.1/tcp/1".to_owned()],
            models: of.map(entry).into_iter().collect(),
            run: 1,
        };
        let word = Word::from(Envelope::Holdings(holdings).encode());
        let (message, topic) = (self.sequence, topic.into());
        self.tell(Event::Gossip { message, topic, author, word });
    }

    /// So many members of a crowd speak, of whom nobody shares a model with it.
    fn fill(&mut self, members: u32) {
        let next = Timing::default().beat(members as usize);
        for number in 0..members {
            self.hear(SWARM, peer(10_000 + number), None, next);
        }
        self.pass(Duration::from_secs(2));
    }

    fn joined(&mut self) -> Vec<ModelId> {
        let joined = self.said.iter().filter_map(|action| match action {
            Action::Join { model, .. } => Some(*model),
            _ => None,
        });
        joined.collect()
    }

    fn dialled(&self) -> Vec<PeerId> {
        let dialled = self.said.iter().filter_map(|action| match action {
            Action::Dial { peer, .. } => Some(*peer),
            _ => None,
        });
        dialled.collect()
    }

    /// What it has said on topics of models.
    fn told(&self, number: u32) -> usize {
        let name = model_topic(SWARM, model(number));
        let is_told =
            |action: &&Action| matches!(action, Action::Tell { topic, .. } if **topic == *name);
        self.said.iter().filter(is_told).count()
    }
}

#[test]
fn a_small_swarm_has_no_topics_of_models() {
    let mut node = Node::new(&[1, 2]);
    node.fill(CROWD as u32 - 1);
    node.pass(Duration::from_secs(60));
    assert_eq!((node.joined(), node.core.topics()), (vec![], 0));
    assert!(node.core.follows(model(1)) && node.core.follows(model(99)));
}

#[test]
fn a_member_of_a_crowd_joins_the_topics_of_what_it_holds_and_leaves_with_the_crowd() {
    let mut node = Node::new(&[1, 2]);
    node.fill(CROWD as u32 + 50);
    assert_eq!(node.joined(), [model(1), model(2)]);
    assert!(node.core.follows(model(1)) && !node.core.follows(model(99)));
    node.said.clear();
    node.pass(Duration::from_secs(35));
    for number in [1, 2] {
        assert!((3..=5).contains(&node.told(number)), "{}", node.told(number));
    }
    // What is said there is heard by those that share the model; on the swarm's topic nothing changes.
    let (topic, next) = (model_topic(SWARM, model(1)), Duration::from_secs(10));
    let size = node.core.size();
    node.hear(&topic, peer(5), Some(1), next);
    assert_eq!(node.core.holders(node.now, shard(1)).away.len(), 1);
    assert!(node.core.size() <= size + 1);
    // All leases end, and few speak any more.
    node.pass(Duration::from_secs(2 * 3600));
    for _ in 0..3 {
        node.hear(SWARM, peer(6), None, Duration::from_secs(3));
        node.pass(Duration::from_secs(31));
    }
    assert_eq!(node.core.topics(), 0);
}

#[test]
fn topics_are_bounded_and_what_is_held_comes_first() {
    let all: Vec<u32> = (0..TOPICS_MAX as u32 + 20).collect();
    let mut node = Node::new(&all);
    node.tell(Event::Whole([shard(7), model(7).manifest()].into()));
    node.tell(Event::Help(all.iter().map(|number| model(*number)).collect()));
    node.fill(CROWD as u32 + 50);
    let joined = node.joined();
    assert_eq!(joined.len(), TOPICS_MAX);
    assert!(joined.contains(&model(7)));
    let holdings = node.core.own_holdings(node.now, |_| true);
    let helps = holdings.iter().filter(|entry| entry.helps).count();
    assert_eq!(helps, TOPICS_MAX, "it helps only where it knows how many copies there are");
}

#[test]
fn of_many_that_share_a_model_a_few_dial_a_newcomer() {
    let next = Timing::default().beat(1000);
    let ushers = |sharers: u32, newcomer: u32| -> usize {
        let dials = |own: u32| {
            let mut node = Node::new(&[1]);
            // All know all of the topic; this one is one of them.
            node.core.config.own = peer(own);
            node.fill(CROWD as u32 + 50);
            let topic = model_topic(SWARM, model(1));
            for other in (1..=sharers).filter(|other| *other != own) {
                node.hear(&topic, peer(other), Some(1), Duration::from_secs(40));
            }
            node.said.clear();
            node.hear(SWARM, peer(newcomer), Some(1), next);
            node.dialled().contains(&peer(newcomer))
        };
        (1..=sharers).filter(|own| dials(*own)).count()
    };
    for newcomer in [500, 501] {
        assert_eq!(ushers(20, newcomer), USHERS);
    }
    assert_eq!(ushers(2, 500), 2, "everybody, if there are no more");
}

#[test]
fn who_was_heard_on_a_topic_is_not_dialled_again_until_it_is_silent_there() {
    let mut node = Node::new(&[1]);
    node.fill(CROWD as u32 + 50);
    let (topic, next) = (model_topic(SWARM, model(1)), Duration::from_secs(10));
    node.hear(&topic, peer(5), Some(1), next);
    node.pass(Duration::from_secs(1));
    node.said.clear();
    node.hear(SWARM, peer(5), Some(1), Timing::default().beat(1000));
    assert_eq!(node.dialled(), []);
    node.pass(Duration::from_secs(60));
    node.said.clear();
    node.hear(SWARM, peer(5), Some(1), Timing::default().beat(1000));
    assert_eq!(node.dialled(), [peer(5)]);
}

#[test]
fn holders_of_a_rare_model_have_places_in_a_view_full_of_those_of_a_common_one() {
    let mut node = Node::new(&[1, 2]);
    node.fill(CROWD as u32 + 50);
    let next = Duration::from_secs(100);
    for number in 1..=2 * MEMBERS_MAX as u32 {
        node.hear(&model_topic(SWARM, model(1)), peer(number), Some(1), next);
    }
    for number in 1001..=1010 {
        node.hear(&model_topic(SWARM, model(2)), peer(number), Some(2), next);
    }
    let holders = node.core.holders(node.now, shard(2));
    assert_eq!(holders.away.len(), 10);
    assert!(node.core.holders(node.now, shard(1)).away.len() > MEMBERS_MAX / 2);
}

#[test]
fn a_read_of_something_unknown_introduces_its_reader() {
    let mut node = Node::new(&[1]);
    node.tell(Event::Register { model: model(3), objects: vec![shard(3)] });
    node.fill(CROWD as u32 + 50);
    assert_eq!(node.joined(), [model(1)], "it holds nothing of the other");
    node.said.clear();
    let range = doppler_store::ByteRange::new(0, 10).unwrap();
    let priority = doppler_store::Priority::Token;
    let request = doppler_store::ReadRequest { shard: shard(3), range, priority, deadline: None };
    node.tell(Event::Read { read: 1, request });
    node.pass(Duration::from_secs(1));
    assert_eq!(node.joined(), [model(3)]);
    node.pass(Duration::from_secs(31) + TOPIC_STAY + Duration::from_secs(40));
    assert_eq!(node.core.topics(), 1, "it has ended");
}
