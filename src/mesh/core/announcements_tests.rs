//! Announcements: which are believed, which give way to which, which are sent again and forgotten.

use super::*;
use doppler_store::Replicas;

const NOBODY: Holding = &|_, _| false;
const ANYBODY: Holding = &|_, _| true;
const QUIET: Duration = Duration::from_secs(10);
const ALL: usize = usize::MAX;

impl Announcements {
    fn learn(
        &mut self,
        now: Instant,
        signed: SignedModel,
        source: Origin,
        holding: Holding,
    ) -> Learned {
        self.learn_if(now, &signed, source, holding, &|| signed.verify())
    }
}

fn peer(byte: u8) -> PeerId {
    PeerId::from_seed([byte; 32])
}

fn by(publisher: u8, index: usize) -> SignedModel {
    SignedModel::sign(&[publisher; 32], ModelId::of(&index.to_le_bytes()), "m", 9).unwrap()
}

fn signed(index: usize) -> SignedModel {
    by(1, index)
}

fn said(byte: u8) -> Origin {
    Origin::Peer(peer(byte))
}

/// Fills the table with announcements of peer 1.
fn full(now: Instant, holding: Holding) -> Announcements {
    let mut all = Announcements::default();
    for index in 0..ANNOUNCEMENTS_MAX {
        let later = now + Duration::from_millis(index as u64);
        assert_eq!(all.learn(later, signed(index), said(1), holding), Learned::New);
    }
    all
}

#[test]
fn only_verified_announcements_are_kept_and_once() {
    let now = Instant::now();
    let mut all = Announcements::default();
    let good = signed(0);
    let bad = SignedModel { name: "other".into(), ..good.clone() };
    assert!(matches!(all.learn(now, bad.clone(), said(1), ANYBODY), Learned::Bad(_)));
    assert_eq!(all.learn(now, good.clone(), said(1), ANYBODY), Learned::New);
    assert_eq!(all.learn(now, good.clone(), said(1), ANYBODY), Learned::Known);
    // A known key does not let a changed announcement slip in.
    assert!(matches!(all.learn(now, bad, said(1), ANYBODY), Learned::Bad(_)));
    assert_eq!(all.all(), std::slice::from_ref(&good));
    // Another name by the same publisher takes its place.
    let renamed = SignedModel::sign(&[1; 32], good.model, "new name", 9).unwrap();
    assert_eq!(all.learn(now, renamed.clone(), said(1), ANYBODY), Learned::New);
    assert_eq!(all.all(), [renamed]);
}

#[test]
fn what_a_publisher_signed_earlier_does_not_come_back() {
    let now = Instant::now();
    let mut all = Announcements::default();
    let sign = |max, at| {
        let replicas = Replicas { min: 2, max };
        SignedModel::sign_at(&[1; 32], ModelId::of(b"m"), "m", 9, replicas, at).unwrap()
    };
    assert_eq!(all.learn(now, sign(5, 10), Origin::Own, NOBODY), Learned::New);
    assert_eq!(
        all.learn(now, sign(7, 9), said(2), NOBODY),
        Learned::Known,
        "of a node that was away"
    );
    assert_eq!(all.learn(now, sign(4, 0), Origin::Kept, NOBODY), Learned::Known);
    assert_eq!(all.all(), [sign(5, 10)]);
    // It still has to be said: nobody has repeated it.
    assert_eq!(all.take_due(now, QUIET, ALL, |_| true), (vec![sign(5, 10)], false));
    assert_eq!(all.learn(now, sign(3, 11), said(2), NOBODY), Learned::New);
    assert_eq!(all.all(), [sign(3, 11)]);
    assert!(all.is_protected(ModelId::of(b"m")), "it is this node's own as before");
}

#[test]
fn a_manifest_is_known_by_its_hash_and_its_least_size() {
    let mut all = Announcements::default();
    let (model, now) = (ModelId::of(b"model"), Instant::now());
    assert_eq!(all.manifest_size(model.manifest()), None);
    for (publisher, size) in [([1; 32], 700), ([2; 32], 500), ([3; 32], 600)] {
        let signed = SignedModel::sign(&publisher, model, "m", size).unwrap();
        assert_eq!(all.learn(now, signed, said(1), ANYBODY), Learned::New);
    }
    all.learn(now, signed(0), said(1), ANYBODY);
    assert_eq!(all.manifest_size(model.manifest()), Some(500));
    assert_eq!(all.manifest_size(ShardId::of(b"shard")), None);
}

#[test]
fn what_nobody_holds_and_then_what_is_untrusted_gives_way_first() {
    let now = Instant::now();
    // Junk that a peer says it holds stays, except where something better comes.
    let mut all = full(now, ANYBODY);
    let idle = by(2, 9990);
    let all_others = |model, _| model != idle.model;
    assert_eq!(all.learn(now, idle.clone(), said(2), &all_others), Learned::Full, "held by nobody");
    all.trust([by(3, 0).publisher].into());
    let trusted = by(3, 9999);
    assert_eq!(all.learn(now, trusted.clone(), said(1), ANYBODY), Learned::New);
    assert_eq!(all.learn(now, by(2, 9998), said(1), ANYBODY), Learned::Full, "of the same peer");
    assert!(all.all().contains(&trusted) && !all.all().contains(&signed(0)), "the oldest went");

    // Once nobody holds the junk, whatever is held has room.
    let held = by(2, 9997);
    let holding = |model, _| model == held.model;
    let mut all = full(now, NOBODY);
    assert_eq!(all.learn(now, held.clone(), said(2), &holding), Learned::New);
    for index in 0..2 * ANNOUNCEMENTS_MAX {
        let junk = by(4, 10_000 + index);
        assert_eq!(all.learn(now, junk, said(4), &holding), Learned::New, "{index}");
    }
    assert!(all.all().contains(&held));
    assert_eq!(all.all().len(), ANNOUNCEMENTS_MAX);
}

#[test]
fn one_peers_flood_of_held_models_keeps_nobody_else_out() {
    let now = Instant::now();
    let mut all = full(now, ANYBODY);
    for index in 0..100 {
        assert_eq!(all.learn(now, by(2, index), said(2), ANYBODY), Learned::New, "{index}");
        assert_eq!(all.learn(now, by(5, 20_000 + index), said(1), ANYBODY), Learned::Full);
    }
    let others = all.all().iter().filter(|one| one.publisher == by(2, 0).publisher).count();
    assert_eq!(others, 100);
    assert_eq!(all.all().len(), ANNOUNCEMENTS_MAX);
}

#[test]
fn own_and_kept_models_always_have_room_and_stay() {
    let now = Instant::now();
    let mut all = full(now, ANYBODY);
    for index in 0..ANNOUNCEMENTS_MAX + 1 {
        let own = by(7, index);
        assert_eq!(all.learn(now, own, Origin::Own, NOBODY), Learned::New);
    }
    assert_eq!(all.learn(now, by(8, 0), Origin::Kept, NOBODY), Learned::New);
    assert_eq!(all.all().len(), 2 * ANNOUNCEMENTS_MAX + 2, "and nothing gave way to them");
    let much_later = now + Duration::from_secs(3600);
    all.forget(much_later, Duration::ZERO, None, NOBODY);
    assert_eq!(all.all().len(), ANNOUNCEMENTS_MAX + 2, "all others are held by nobody");
    assert!(all.is_protected(by(8, 0).model) && all.is_protected(by(7, 3).model));
    // Later announcements of a kept model are not kept with it.
    assert_eq!(all.learn(much_later, by(9, 0), said(1), NOBODY), Learned::New);
    all.forget(much_later, Duration::ZERO, None, NOBODY);
    assert!(!all.all().contains(&by(9, 0)) && all.all().contains(&by(8, 0)));
}

#[test]
fn signers_of_one_model_are_bounded_and_the_better_known_stay() {
    let now = Instant::now();
    let model = ModelId::of(b"m");
    let sign =
        |seed: u8| SignedModel::sign(&[seed; 32], model, &format!("name {seed}"), 9).unwrap();
    let mut all = Announcements::default();
    for seed in 0..SIGNERS_MAX as u8 {
        assert_eq!(all.learn(now, sign(seed), said(1), ANYBODY), Learned::New);
    }
    let (trusted, holder, stranger) = (sign(101), sign(102), sign(103));
    all.trust([trusted.publisher].into());
    let holding = |_, by: Option<PeerId>| by.is_none_or(|by| by == PeerId::from_seed([102; 32]));
    assert_eq!(all.learn(now, stranger, said(2), &holding), Learned::Full);
    assert_eq!(all.learn(now, holder.clone(), said(2), &holding), Learned::New);
    assert_eq!(all.learn(now, trusted.clone(), said(2), &holding), Learned::New);
    assert_eq!(all.learn(now, sign(104), Origin::Own, &holding), Learned::New);
    assert_eq!(all.all().len(), SIGNERS_MAX + 1, "and this node's own");
    assert!(all.all().contains(&trusted) && all.all().contains(&holder));
}

#[test]
fn what_was_withdrawn_and_nobody_holds_is_forgotten() {
    let now = Instant::now();
    let mut all = Announcements::default();
    all.learn(now, signed(0), said(1), NOBODY);
    all.learn(now, by(2, 0), said(1), NOBODY);
    all.learn(now, signed(1), Origin::Own, NOBODY);
    all.learn(now, signed(2), Origin::Kept, NOBODY);
    assert_eq!(all.forget(now + QUIET / 2, QUIET, None, NOBODY), []);
    all.learn(now + QUIET / 2, by(2, 0), said(1), NOBODY);
    assert_eq!(all.forget(now + QUIET, QUIET, None, ANYBODY), [], "somebody holds it");
    assert_eq!(all.forget(now + QUIET, QUIET, None, NOBODY), [], "another signer still says it");
    assert_eq!(all.all().len(), 3);
    assert_eq!(all.forget(now + 2 * QUIET, QUIET, None, NOBODY), [signed(0).model]);
    // Its own publisher withdraws it and stops keeping it.
    all.release(signed(1).model, false);
    assert!(all.is_protected(signed(1).model), "it is still this node's own");
    all.release(signed(1).model, true);
    all.release(signed(2).model, false);
    assert_eq!(all.forget(now, Duration::ZERO, Some(signed(1).model), NOBODY), [signed(1).model]);
    assert_eq!(all.all(), [signed(2)]);
}

#[test]
fn holders_repeat_what_nobody_said_lately() {
    let now = Instant::now();
    let mut all = Announcements::default();
    all.learn(now, signed(0), Origin::Own, NOBODY);
    all.learn(now, signed(1), said(1), NOBODY);
    let held = signed(1).model;
    assert_eq!(all.take_due(now, QUIET, ALL, |_| true), (vec![signed(0)], false), "never said");
    assert_eq!(all.take_due(now + QUIET / 2, QUIET, ALL, |_| true).0, []);
    assert_eq!(all.take_due(now + QUIET, QUIET, ALL, |_| false).0, [signed(0)]);
    assert_eq!(all.take_due(now + QUIET, QUIET, ALL, |model| model == held).0, [signed(1)]);
    assert_eq!(all.take_due(now + QUIET, QUIET, ALL, |_| true).0, []);
    all.owe_all();
    assert_eq!(all.take_due(now + QUIET, QUIET, ALL, |_| true).0.len(), 2);
    assert_eq!(all.take_due(now + QUIET, QUIET, ALL, |_| true).0, []);
}

#[test]
fn much_is_said_in_turns_and_none_is_left_out() {
    let now = Instant::now();
    let mut all = Announcements::default();
    for index in 0..10 {
        all.learn(now, signed(index), Origin::Own, NOBODY);
    }
    all.owe_all();
    let mut heard = BTreeSet::new();
    for turn in 1..=2 {
        let (say, more) = all.take_due(now, QUIET, 4, |_| false);
        heard.extend(say.into_iter().map(|signed| signed.model));
        assert_eq!((heard.len(), more), (4 * turn, true));
        // What must be sent again does not delay what has not been sent at all.
        all.owe_all();
    }
    heard.extend(all.take_due(now, QUIET, 4, |_| false).0.into_iter().map(|signed| signed.model));
    assert_eq!(heard.len(), 10);
    let (rest, more) = all.take_due(now, QUIET, 6, |_| false);
    assert_eq!((rest.len(), more), (6, false));
}
