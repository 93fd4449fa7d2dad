//! Known peers in virtual time: which are dialled, when, and which give way.

use super::*;

fn peer(number: u16) -> PeerId {
    let mut seed = [7; 32];
    seed[..2].copy_from_slice(&number.to_le_bytes());
    PeerId::from_seed(seed)
}

fn at(number: u16) -> Vec<Address> {
    vec![format!("/ip4/10.0.0.1/tcp/{}", number + 1).parse().unwrap()]
}

impl Known {
    fn due(
        &mut self,
        now: Instant,
        room: usize,
        may: impl Fn(PeerId) -> bool,
    ) -> Vec<(PeerId, Vec<Address>)> {
        self.round(now, room, may).0
    }

    fn next(&mut self, now: Instant) -> Option<Instant> {
        self.round(now, 0, |_| false).1
    }
}

fn known() -> Known {
    Known::new(peer(u16::MAX))
}

/// The peers dialled in this time, and after how many seconds.
fn dials(known: &mut Known, from: Instant, time: Duration) -> BTreeMap<PeerId, Vec<f64>> {
    let mut dials: BTreeMap<PeerId, Vec<f64>> = BTreeMap::new();
    let mut now = from;
    while now < from + time {
        for (peer, _) in known.due(now, 0, |_| true) {
            dials.entry(peer).or_default().push((now - from).as_secs_f64());
        }
        now = known.next(now).unwrap_or(from + time).max(now + DIAL_RETRY_FIRST / 10);
    }
    dials
}

fn contacts(peers: &[u16], listens: bool) -> BTreeMap<PeerId, Contact> {
    let contact =
        |number| Contact { is_direct: true, listens, reached: at(number), topics: Vec::new() };
    peers.iter().map(|number| (peer(*number), contact(*number))).collect()
}

#[test]
fn whoever_is_away_is_dialled_for_ever_with_growing_pauses() {
    let start = Instant::now();
    for source in [Source::Found, Source::Remembered] {
        let mut known = known();
        known.learn(start, peer(1), source, at(1));
        let hour = Duration::from_secs(3600);
        let dials = dials(&mut known, start, hour);
        let times = &dials[&peer(1)];
        assert_eq!(times[0], 0.0, "at once");
        let pauses: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        for (index, pause) in pauses.iter().enumerate() {
            let most = (0.5 * f64::powi(2.0, index as i32)).min(15.0);
            assert!(*pause <= most + 0.06 && *pause >= 0.74 * most, "{index}: {pause}");
        }
        assert!(times[times.len() - 1] > 3580.0, "{times:?}");
        let late = &pauses[10..];
        assert!(late.iter().any(|pause| (pause - late[0]).abs() > 0.5), "in step: {late:?}");
    }
}

#[test]
fn the_most_useful_are_dialled_often_and_the_others_seldom() {
    let start = Instant::now();
    let mut known = known();
    for number in 0..40 {
        known.hear(start, peer(number), at(number), (start + Duration::from_secs(35), false));
    }
    // Peers that were connected come before those that were only heard of.
    let met: Vec<u16> = (36..40).collect();
    known.contacts(start, &contacts(&met, true));
    known.contacts(start + STEADY, &BTreeMap::new());
    let hour = Duration::from_secs(3600);
    let from = start + Duration::from_secs(60);
    let dials = dials(&mut known, from, hour);
    let often = dials.values().filter(|times| times.len() > 200).count();
    assert_eq!((dials.len(), often), (40, NEAR_MAX));
    assert!(met.iter().all(|number| dials[&peer(*number)].len() > 200));
    for times in dials.values() {
        let longest = times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
        assert!(longest <= 600.1 && times[times.len() - 1] > 2990.0, "{longest}");
    }
}

#[test]
fn a_lost_peer_is_dialled_at_once_and_one_that_does_not_stay_ever_more_seldom() {
    let start = Instant::now();
    let mut known = known();
    known.contacts(start, &contacts(&[1], true));
    let lost = start + STEADY;
    assert_eq!(known.due(lost, 9, |_| true), [], "it is connected");
    known.contacts(lost, &BTreeMap::new());
    assert_eq!(known.due(lost + DIAL_AGAIN, 0, |_| true), [(peer(1), at(1))]);
    // It answers and leaves again at once, ten times.
    let mut now = lost + DIAL_AGAIN;
    for _ in 0..10 {
        known.contacts(now, &contacts(&[1], true));
        known.contacts(now, &BTreeMap::new());
        now = known.next(now).unwrap();
        assert_eq!(known.due(now, 0, |_| true).len(), 1);
    }
    assert!(now - lost > Duration::from_secs(30), "{:?}", now - lost);
    // Another network: at once.
    known.network_changed(now);
    assert_eq!(known.due(now + DIAL_RETRY_FIRST, 0, |_| true).len(), 1);
}

#[test]
fn who_is_alive_is_connected_only_while_there_is_room() {
    let start = Instant::now();
    let mut known = known();
    let until = start + Duration::from_secs(35);
    for number in 0..5 {
        assert!(known.hear(start, peer(number), at(number), (until, false)));
        assert!(!known.hear(start, peer(number), at(number), (until, false)), "nothing new");
    }
    let dialled = known.due(start, 2, |_| true);
    assert_eq!(dialled.len(), 2);
    assert_eq!(known.due(start, 0, |_| true).len(), 0);
    let is_left = |number: &u16| dialled.iter().all(|(other, _)| *other != peer(*number));
    let needed = (0..5).find(is_left).unwrap();
    assert_eq!(known.take(start, peer(needed)), Some(at(needed)));
    assert_eq!(known.take(start, peer(needed)), None, "it was dialled just now");
    let next = known.next_of(start, [peer(needed)].into_iter()).unwrap();
    assert!(next > start && next <= start + DIAL_RETRY_FIRST);
    // Silent since then: they are lost, and are looked for regardless of the room.
    assert_eq!(known.due(until, 0, |_| true).len(), 5);
    assert_eq!(known.due(until + DIAL_NEAR_MAX, 0, |_| false).len(), 0, "banned");
}

#[test]
fn who_cannot_be_dialled_or_is_connected_is_not_looked_for() {
    let start = Instant::now();
    let mut known = known();
    let until = start + Duration::from_secs(35);
    // A page: it says what it holds, and listens nowhere.
    let page = Contact { is_direct: true, listens: true, reached: Vec::new(), topics: Vec::new() };
    known.contacts(start, &BTreeMap::from([(peer(1), page.clone())]));
    known.hear(start, peer(1), Vec::new(), (until, false));
    known.contacts(start + STEADY, &BTreeMap::new());
    assert_eq!(known.report(start + STEADY), []);
    // One that dialled this node and said later where it listens.
    known.contacts(start, &BTreeMap::from([(peer(2), page)]));
    known.hear(start, peer(2), at(2), (until, false));
    assert_eq!((known.report(start), known.due(start, 9, |_| true)), (vec![], vec![]));
    known.contacts(start + STEADY, &BTreeMap::new());
    assert_eq!(known.report(start + STEADY).len(), 1);
}

#[test]
fn strangers_are_dialled_seldom_and_say_why() {
    let start = Instant::now();
    let mut known = known();
    known.contacts(start, &contacts(&[1, 2], false));
    known.contacts(start + STRANGER_AFTER, &BTreeMap::new());
    known.learn(start, peer(3), Source::Found, at(3));
    known.failed(peer(3), "it has no key".into(), true);
    let hour = Duration::from_secs(3600);
    for times in dials(&mut known, start + STRANGER_AFTER, hour).values() {
        assert!(times.len() < 20, "{times:?}");
    }
    let away = known.report(start + hour);
    let reason = away.iter().find(|away| away.peer == peer(3)).unwrap().failure.clone();
    assert_eq!(reason.as_deref(), Some("it has no key"));
    // A peer that speaks in this swarm is not a stranger.
    known.hear(start + hour, peer(1), at(1), (start + hour, false));
    assert_eq!(known.report(start + hour)[0].peer, peer(1));
}

#[test]
fn the_table_is_bounded_and_who_was_met_stays() {
    let start = Instant::now();
    let mut known = known();
    known.contacts(start, &contacts(&[0], true));
    known.contacts(start + STEADY, &BTreeMap::new());
    for number in 1..2 * KNOWN_PEERS_MAX as u16 {
        let now = start + STEADY + Duration::from_millis(u64::from(number));
        known.hear(now, peer(number), at(number), (now + Duration::from_secs(35), false));
    }
    let away = known.report(start);
    assert_eq!(away.len(), 1 + KNOWN_HEARD_MAX);
    assert_eq!(away[0].peer, peer(0));
    assert!(!away.iter().any(|away| away.peer == peer(1)), "the first heard of gave way");
    // Whoever is found comes before them, and a stranger's place is free.
    for number in 5000..5000 + 2 * KNOWN_PEERS_MAX as u16 {
        known.learn(start, peer(number), Source::Found, at(number));
    }
    let away = known.report(start);
    assert_eq!((away.len(), known.heard), (KNOWN_PEERS_MAX, 0));
    assert_eq!(away[0].peer, peer(0));
    // So are one peer's addresses, from any source, and the dials that it can cause.
    let mut known = Known::new(peer(9));
    let mut dialled = 0;
    for round in 0..1000 {
        let now = start + Duration::from_millis(round);
        let found = at(round as u16);
        known.learn(now, peer(1), Source::Found, found.clone());
        known.hear(now, peer(1), found, (now, false));
        dialled += known.due(now, 9, |_| true).len();
    }
    assert!(known.report(start)[0].addresses.len() <= KNOWN_ADDRESSES_MAX);
    assert!(dialled <= 3, "{dialled} dials in a second");
    known.learn(start, peer(9), Source::Found, at(1));
    assert_eq!(known.report(start).len(), 1, "not of itself");
}

/// The same said of all peers in order: when each is dialled next by its place among the lost or the living.
fn due_in_order(known: &Known, now: Instant) -> Vec<(PeerId, Instant)> {
    let away = known.peers.iter().map(|(peer, entry)| (peer, &**entry));
    let mut away: Vec<(&PeerId, &Entry)> =
        away.filter(|(_, entry)| entry.may_be_dialled()).collect();
    away.sort_by_key(|(peer, entry)| (entry.usefulness(), **peer));
    let mut ranks = [0, 0];
    let at = |(peer, entry): (&PeerId, &Entry)| {
        let rank = &mut ranks[usize::from(entry.is_alive(now))];
        *rank += 1;
        (*peer, entry.due_at(*rank <= NEAR_MAX && !entry.is_stranger))
    };
    away.into_iter().map(at).collect()
}

#[test]
fn the_most_useful_are_dialled_first_and_most_often_among_many() {
    let start = Instant::now();
    let mut known = known();
    for number in 0..300u16 {
        let (until, seen) = (
            start + Duration::from_secs(100),
            start + Duration::from_millis(7) * u32::from(number % 90),
        );
        match number % 3 {
            0 => known.learn(seen, peer(number), Source::Remembered, at(number)),
            1 => known.learn(seen, peer(number), Source::Found, at(number)),
            _ => {
                known.hear(seen, peer(number), at(number), (until, number % 2 == 0));
            }
        }
        known.failed(peer(number), "refused".to_owned(), number % 50 == 3);
    }
    let mut now = start + Duration::from_secs(1);
    let mut dialled = 0;
    while now < start + Duration::from_secs(200) {
        let expected = due_in_order(&known, now);
        assert_eq!(known.away(now), expected);
        let is_due = |(peer, at): &&(PeerId, Instant)| {
            *at <= now && !known.peers.get(peer).is_some_and(|entry| entry.is_alive(now))
        };
        let due: Vec<PeerId> =
            expected.iter().filter(is_due).map(|(peer, _)| *peer).take(DIALS_AT_ONCE).collect();
        let (round, next) = known.round(now, 0, |_| true);
        assert_eq!(round.into_iter().map(|(peer, _)| peer).collect::<Vec<_>>(), due);
        let at = due_in_order(&known, now).into_iter().map(|(_, at)| at);
        assert_eq!(next, at.filter(|at| *at > now).min());
        dialled += due.len();
        now += Duration::from_millis(300);
    }
    assert!(dialled > 1000, "{dialled}");
}
