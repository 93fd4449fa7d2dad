//! Which manifests are fetched before they are requested, and when. Pure: the time is an argument.
//!
//! Manifests of models that this node published or keeps are always fetched, then those that
//! trusted publishers signed, then those of strangers if they are small. All others wait until they
//! are requested, as do those that would exceed the budget of their class. So announcements from
//! anybody cost at most `STRANGE_TOTAL` bytes of memory and disk, times the overhead of a parsed
//! manifest. A manifest that nobody holds is not requested, and a failure delays the next attempt.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use doppler_store::ModelId;
use doppler_store::manifest::MANIFEST_BYTES_MAX;

/// Manifests fetched at once.
const AT_ONCE: usize = 4;
/// The largest manifest of a stranger that is fetched unasked, and all of them together, in bytes.
const STRANGE_MAX: u64 = 256 * 1024;
const STRANGE_TOTAL: u64 = 8 * 1024 * 1024;
/// All manifests that are fetched unasked because a trusted publisher signed them, in bytes.
const TRUSTED_TOTAL: u64 = 64 * 1024 * 1024;
/// Wait before a manifest that did not arrive is tried again; it doubles.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);

/// How well this node knows a model; better ones first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Published or kept by this node.
    Kept,
    Trusted,
    Stranger,
    /// All its signers were removed from the trusted ones: fetched only if requested.
    Refused,
}

/// A known model.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub model: ModelId,
    pub class: Class,
    /// The sizes of its manifest that its signers state, the best known signer first.
    pub sizes: Vec<u64>,
    /// Its manifest is known.
    pub is_learned: bool,
    /// Whether the manifest is here or a peer says that it holds it.
    pub is_reachable: bool,
}

/// Fetch this manifest, which should have this size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    pub model: ModelId,
    pub size: u64,
}

/// How a fetch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Learned,
    /// It did not arrive, or does not have that size.
    Failed,
    /// It arrived and is invalid, so further attempts are useless.
    Hopeless,
}

#[derive(Debug, Default)]
struct Tried {
    times: u32,
    next: Option<Instant>,
    is_hopeless: bool,
}

/// What was tried, and what is being fetched.
#[derive(Debug, Default)]
pub struct Manifests {
    under_way: BTreeSet<ModelId>,
    tried: BTreeMap<ModelId, Tried>,
    /// Bytes that each model's manifest may take here because it was fetched unasked, even if only
    /// a part arrived.
    fetched: BTreeMap<ModelId, u64>,
}

impl Manifests {
    /// What to fetch now. Each counts as being fetched until [`Self::ended`].
    pub fn choose(&mut self, now: Instant, known: &[Candidate]) -> Vec<Fetch> {
        let mut used: BTreeMap<Class, u64> = BTreeMap::new();
        for one in known {
            let fetched = self.fetched.get(&one.model).copied().unwrap_or_default();
            *used.entry(one.class).or_default() += fetched;
        }
        let times = |model: ModelId| self.tried.get(&model).map_or(0, |tried| tried.times);
        let mut wanted: Vec<&Candidate> =
            known.iter().filter(|one| self.is_due(now, one)).collect();
        wanted.sort_by_key(|one| (one.class, times(one.model)));
        let mut fetches = Vec::new();
        for one in wanted {
            if self.under_way.len() >= AT_ONCE {
                break;
            }
            let (largest, total) = match one.class {
                Class::Kept => (MANIFEST_BYTES_MAX as u64, u64::MAX),
                Class::Trusted => (MANIFEST_BYTES_MAX as u64, TRUSTED_TOTAL),
                Class::Stranger => (STRANGE_MAX, STRANGE_TOTAL),
                Class::Refused => continue,
            };
            let used = used.entry(one.class).or_default();
            let before = self.fetched.get(&one.model).copied().unwrap_or_default();
            let room = largest.min(total.saturating_sub(*used - before));
            let sizes: Vec<u64> = one.sizes.iter().copied().filter(|size| *size <= room).collect();
            // Signers may lie about the size: after a failure, the next signer's size is used.
            let turn = self.tried.get(&one.model).map_or(0, |tried| tried.times as usize);
            let Some(size) = sizes.get(turn % sizes.len().max(1)).copied() else { continue };
            *used += size.saturating_sub(before);
            self.fetched.insert(one.model, size.max(before));
            self.under_way.insert(one.model);
            fetches.push(Fetch { model: one.model, size });
        }
        fetches
    }

    fn is_due(&self, now: Instant, one: &Candidate) -> bool {
        let may_try =
            |tried: &Tried| !tried.is_hopeless && tried.next.is_none_or(|next| next <= now);
        !one.is_learned
            && one.is_reachable
            && !self.under_way.contains(&one.model)
            && self.tried.get(&one.model).is_none_or(may_try)
    }

    pub fn ended(&mut self, now: Instant, model: ModelId, outcome: Outcome) {
        self.under_way.remove(&model);
        if outcome == Outcome::Learned {
            self.tried.remove(&model);
            return;
        }
        let tried = self.tried.entry(model).or_default();
        let wait = RETRY_FIRST.saturating_mul(1 << tried.times.min(16)).min(RETRY_MAX);
        tried.times = tried.times.saturating_add(1);
        tried.next = Some(now + wait);
        tried.is_hopeless |= outcome == Outcome::Hopeless;
    }

    /// When the next failed manifest may be tried again, after `now`. Those due earlier wait for
    /// something else.
    pub fn next_try(&self, now: Instant) -> Option<Instant> {
        let open = self.tried.values().filter(|tried| !tried.is_hopeless);
        open.filter_map(|tried| tried.next).filter(|next| *next > now).min()
    }

    /// Forgets all models except these. Returns those of which something may be here because it was
    /// fetched unasked.
    pub fn forget_others(&mut self, known: &[Candidate]) -> Vec<ModelId> {
        let known: BTreeSet<ModelId> = known.iter().map(|one| one.model).collect();
        let stays = |model: &ModelId| known.contains(model) || self.under_way.contains(model);
        self.tried.retain(|model, _| stays(model));
        let gone: Vec<ModelId> =
            self.fetched.keys().filter(|model| !stays(model)).copied().collect();
        self.fetched.retain(|model, _| stays(model));
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn id(index: usize) -> ModelId {
        ModelId::of(&index.to_le_bytes())
    }

    fn candidate(index: usize, class: Class, size: u64) -> Candidate {
        let (is_learned, is_reachable) = (false, true);
        Candidate { model: id(index), class, sizes: vec![size], is_learned, is_reachable }
    }

    /// Fetches everything available, as if every fetch succeeded. Returns the total bytes.
    fn fetch_all(manifests: &mut Manifests, known: &mut [Candidate]) -> u64 {
        let (now, mut bytes) = (Instant::now(), 0);
        loop {
            let fetches = manifests.choose(now, known);
            assert!(fetches.len() <= AT_ONCE);
            if fetches.is_empty() {
                return bytes;
            }
            for fetch in fetches {
                bytes += fetch.size;
                manifests.ended(now, fetch.model, Outcome::Learned);
                let one = known.iter_mut().find(|one| one.model == fetch.model).unwrap();
                one.is_learned = true;
            }
        }
    }

    #[test]
    fn strangers_manifests_are_fetched_small_and_few_and_others_are_not_kept_out() {
        let mut manifests = Manifests::default();
        let mut known: Vec<Candidate> =
            (0..6).map(|index| candidate(index, Class::Stranger, 30 * MIB)).collect();
        assert_eq!(fetch_all(&mut manifests, &mut known), 0, "they wait until asked for");
        known.extend((10..500).map(|index| candidate(index, Class::Stranger, 200 * 1024)));
        let bytes = fetch_all(&mut manifests, &mut known);
        assert!(bytes > STRANGE_TOTAL - STRANGE_MAX && bytes <= STRANGE_TOTAL, "{bytes}");
        known.push(candidate(1000, Class::Trusted, 30 * MIB));
        known.push(candidate(1001, Class::Kept, 32 * MIB));
        known.push(candidate(1002, Class::Refused, 10));
        assert_eq!(fetch_all(&mut manifests, &mut known), 62 * MIB);
        // Forgotten models make room.
        assert_eq!(manifests.forget_others(&known), []);
        let gone = known.iter().position(|one| one.is_learned).unwrap();
        let gone = known.remove(gone).model;
        assert_eq!(manifests.forget_others(&known), [gone]);
        assert_eq!(manifests.forget_others(&known), []);
        assert!(fetch_all(&mut manifests, &mut known) > 0);
        // Of many models of trusted publishers, some wait, too; models that this node keeps do not.
        known.extend((2000..2010).map(|index| candidate(index, Class::Trusted, 30 * MIB)));
        assert_eq!(fetch_all(&mut manifests, &mut known), 30 * MIB);
        known.extend((3000..3010).map(|index| candidate(index, Class::Kept, 30 * MIB)));
        assert_eq!(fetch_all(&mut manifests, &mut known), 300 * MIB);
    }

    #[test]
    fn what_nobody_holds_or_does_not_come_blocks_nothing() {
        let start = Instant::now();
        let mut manifests = Manifests::default();
        let mut known: Vec<Candidate> =
            (0..20).map(|index| candidate(index, Class::Stranger, 10)).collect();
        for one in &mut known {
            one.is_reachable = false;
        }
        assert_eq!(manifests.choose(start, &known), []);
        for one in &mut known {
            one.is_reachable = true;
        }
        let first = manifests.choose(start, &known);
        assert_eq!(first.len(), AT_ONCE);
        assert_eq!(manifests.choose(start, &known), [], "enough are under way");
        for fetch in &first {
            manifests.ended(start, fetch.model, Outcome::Failed);
        }
        let second = manifests.choose(start, &known);
        assert!(second.iter().all(|fetch| !first.contains(fetch)), "others have their turn");
        for fetch in &second {
            manifests.ended(start, fetch.model, Outcome::Hopeless);
        }
        known.truncate(8);
        assert_eq!(manifests.choose(start, &known), []);
        assert_eq!(manifests.next_try(start), Some(start + RETRY_FIRST));
        assert_eq!(manifests.next_try(start + RETRY_FIRST), None, "it is never in the past");
        let again = manifests.choose(start + RETRY_FIRST, &known);
        assert_eq!(again.len(), AT_ONCE, "the failed ones, and never the hopeless ones");
        for fetch in &again {
            assert!(first.contains(fetch));
            manifests.ended(start + RETRY_FIRST, fetch.model, Outcome::Failed);
        }
        let now = start + RETRY_FIRST;
        assert_eq!(manifests.next_try(now), Some(start + 3 * RETRY_FIRST));
    }

    #[test]
    fn a_signer_who_lies_about_the_size_hides_nothing() {
        let mut now = Instant::now();
        let mut manifests = Manifests::default();
        let mut one = candidate(1, Class::Stranger, 0);
        one.sizes = vec![7, 30 * MIB, 1000];
        let mut tried = Vec::new();
        for _ in 0..3 {
            let fetch = manifests.choose(now, std::slice::from_ref(&one))[0];
            tried.push(fetch.size);
            manifests.ended(now, fetch.model, Outcome::Failed);
            now += RETRY_MAX;
        }
        assert_eq!(tried, [7, 1000, 7]);
    }
}
