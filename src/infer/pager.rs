//! The pager: brings the experts a layer needs into slots, wave by wave.
//!
//! `residency` decides, `reader` fetches, the backend's slots are filled. This file connects them,
//! counts, and records if asked to. Invariant: `demands` equals the sum of hits over all tiers, and
//! the number of experts recorded.

use serde::Serialize;

use super::ahead::Ahead;
use super::backend::{Backend, BackendError, Slot};
use super::error::SessionError;
use super::graph::MoeId;
use super::model::{Model, MoeLayer};
use super::reader::{Run, WeightReader};
use super::residency::{ExpertKey, Residency};
use super::slots::SlotPlan;
use super::trace::Trace;
use doppler_store::{PolicyKind, Tier};

/// Experts served, by where they were when they were needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TierHits {
    pub vram: u64,
    /// From the store's memory, or set aside by the device.
    pub ram: u64,
    pub disk: u64,
    pub peer: u64,
}

impl TierHits {
    pub const fn total(&self) -> u64 {
        self.vram + self.ram + self.disk + self.peer
    }

    fn count(&mut self, tier: Tier) {
        match tier {
            Tier::Vram => self.vram += 1,
            Tier::Ram => self.ram += 1,
            Tier::Disk => self.disk += 1,
            Tier::Peer => self.peer += 1,
        }
    }
}

/// What paging has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PagerStats {
    /// Experts asked for: each distinct expert of each layer of each step counts once.
    pub demands: u64,
    pub hits: TierHits,
    pub evictions: u64,
    /// Bytes put into slots.
    pub filled_bytes: u64,
    /// Waves after a layer's first one, needed because its experts did not fit the slots at once.
    pub extra_waves: u64,
    /// Experts read before their layer asked for them, and how many of those it did ask for.
    pub read_ahead: u64,
    pub read_ahead_used: u64,
}

/// The largest cost of keeping a slot free, in bytes. With even routing, one more free slot makes
/// one token in `experts / top_k` miss one more expert. Reading this many bytes takes about as long
/// as the halt that it may save (0.1 ms at 50 GB/s).
const SPARE_BYTES_MAX: usize = 5 << 20;

/// Expert slots and the way to fill them.
pub struct Pager {
    residency: Residency,
    layers: Vec<MoeLayer>,
    reader: WeightReader,
    stats: PagerStats,
    /// The slots of the current wave, by expert id.
    wave: Vec<Option<Slot>>,
    /// The experts served, if recording is on.
    trace: Option<Trace>,
    /// Whether emptying slots ahead is worth its cost, and whether it was done for the next step.
    spares: bool,
    spared: bool,
    /// Whether experts that the device finds by itself are counted and count as used.
    counts: bool,
    ahead: Ahead,
}

impl Pager {
    /// `policy` decides which expert is evicted, in every class of slots.
    pub fn new(model: &Model, plan: &SlotPlan, policy: PolicyKind) -> Self {
        let counts: Vec<usize> = plan.classes.iter().map(|class| class.count).collect();
        Self {
            residency: Residency::new(&counts, plan.class_of.clone(), || policy.make()),
            layers: model.moe.clone(),
            reader: model.reader.clone(),
            stats: PagerStats::default(),
            wave: Vec::new(),
            trace: None,
            spares: model.moe.iter().zip(&model.graph.moe).all(|(layer, moe)| {
                layer.layout.bytes * moe.top_k <= SPARE_BYTES_MAX * moe.experts.len()
            }),
            spared: false,
            counts: true,
            ahead: Ahead::default(),
        }
    }

    /// How many experts each MoE layer has.
    pub fn experts(&self) -> Vec<usize> {
        self.layers.iter().map(|layer| layer.places.len()).collect()
    }

    /// Sets whether experts that the device finds by itself are counted from now on.
    pub const fn switch(&mut self, counts: bool) {
        self.counts = counts;
    }

    /// From the next step on, records into `trace`.
    pub fn record(&mut self, trace: Trace) {
        self.trace = Some(trace);
    }

    /// Ends recording and returns what was recorded.
    pub fn take_trace(&mut self) -> Option<Trace> {
        self.trace.take()
    }

    /// Call when a step of this many tokens begins.
    pub fn begin(&mut self, tokens: usize) {
        self.ahead.clear();
        let spared = std::mem::take(&mut self.spared);
        if let Some(trace) = &mut self.trace {
            trace.begin(tokens, spared);
        }
    }

    /// Call before a token on a device that brings experts in by itself. Empties slots for the
    /// experts that the token will probably miss, unless experts are so large that a halt costs
    /// less than the misses that fewer slots cause.
    pub fn spare(&mut self, backend: &mut dyn Backend) {
        if !self.spares {
            return;
        }
        let evicted = self.residency.spare();
        self.stats.evictions += evicted.len() as u64;
        for ExpertKey { moe, expert } in evicted {
            backend.place(moe, expert, None);
        }
        self.spared = true;
    }

    /// Empty slots.
    pub fn free(&self) -> Vec<Slot> {
        self.residency.free()
    }

    pub const fn stats(&self) -> PagerStats {
        self.stats
    }

    /// Experts that have a slot now.
    pub fn resident(&self) -> usize {
        self.residency.resident()
    }

    /// Whether some experts have no slot.
    pub fn misses(&self) -> bool {
        self.residency.resident() < self.layers.iter().map(|layer| layer.places.len()).sum()
    }

    /// Starts to read the experts in `likely` (of one layer, likeliest first) that have no slot.
    pub fn read_ahead(&mut self, moe: MoeId, likely: &[u32]) {
        let missing =
            |expert: &u32| self.residency.slot(ExpertKey { moe, expert: *expert }).is_none();
        let missing = likely.iter().copied().filter(missing);
        let layer = &self.layers[usize::from(moe.0)];
        let begun = self.ahead.begin(moe, layer, missing, &self.reader);
        self.stats.read_ahead += begun as u64;
    }

    /// Makes as many of `waiting` (distinct experts of one layer) resident as fit at once, fetching
    /// missing ones concurrently. Returns their slots by expert id, and leaves the experts that did
    /// not fit in `waiting`.
    ///
    /// If some are resident and others must be read, `meanwhile` gets the resident ones while the
    /// others are being read, and only the others are returned.
    pub fn next_wave(
        &mut self,
        moe: MoeId,
        waiting: &mut Vec<u32>,
        backend: &mut dyn Backend,
        meanwhile: impl FnOnce(&mut dyn Backend, &[Option<Slot>]) -> Result<(), SessionError>,
    ) -> Result<&[Option<Slot>], SessionError> {
        let wave = self.residency.wave(moe, waiting);
        self.stats.evictions += wave.evicted.len() as u64;
        for ExpertKey { moe, expert } in &wave.evicted {
            backend.place(*moe, *expert, None);
        }
        self.stats.extra_waves += u64::from(!wave.waiting.is_empty());
        self.list(moe, &wave.hits);
        let filled =
            self.fill(moe, &wave.fills, backend, |backend, slots| match wave.hits.is_empty() {
                true => Ok(false),
                false => meanwhile(backend, slots).map(|()| true),
            });
        let told = match filled {
            Ok(told) => told,
            Err(error) => {
                for (expert, _) in &wave.fills {
                    self.residency.forget(ExpertKey { moe, expert: *expert });
                }
                return Err(error);
            }
        };
        for (expert, slot) in &wave.fills {
            backend.place(moe, *expert, Some(*slot));
        }
        let served = (wave.hits.len() + wave.fills.len()) as u64;
        self.stats.demands += served;
        self.stats.hits.vram += wave.hits.len() as u64;
        if told {
            self.list(moe, &[]);
        }
        for (expert, slot) in &wave.fills {
            self.wave[*expert as usize] = Some(*slot);
        }
        if let Some(trace) = &mut self.trace {
            trace.served(moe, wave.hits.iter().chain(&wave.fills).map(|(expert, _)| *expert));
        }
        *waiting = wave.waiting;
        Ok(&self.wave)
    }

    /// Sets `wave` to the slots of these experts.
    fn list(&mut self, moe: MoeId, experts: &[(u32, Slot)]) {
        self.wave.clear();
        self.wave.resize(self.layers[usize::from(moe.0)].places.len(), None);
        for (expert, slot) in experts {
            self.wave[*expert as usize] = Some(*slot);
        }
    }

    /// Counts the experts of one layer that the device found in their slots or `brought` into free
    /// ones.
    ///
    /// # Errors
    /// If a slot was not free.
    pub fn found(
        &mut self,
        moe: MoeId,
        experts: &[u32],
        brought: &[(u32, Slot)],
        backend: &mut dyn Backend,
    ) -> Result<(), SessionError> {
        if !self.counts {
            return Ok(());
        }
        let is_brought = |expert: &u32| brought.iter().any(|(other, _)| other == expert);
        let (mut came, mut there): (Vec<u32>, Vec<u32>) =
            experts.iter().partition(|e| is_brought(e));
        there.sort_unstable();
        came.sort_unstable();
        self.residency.touch(moe, &there);
        for expert in came {
            let Some((_, slot)) = brought.iter().find(|(other, _)| *other == expert) else {
                continue;
            };
            if !self.residency.adopt(ExpertKey { moe, expert }, *slot) {
                let what =
                    format!("the device put expert {expert} into {slot:?}, which is not free");
                return Err(BackendError::Lost(what).into());
            }
            backend.place(moe, expert, Some(*slot));
        }
        if let Some(trace) = &mut self.trace {
            trace.served(moe, experts.iter().copied());
        }
        self.stats.demands += experts.len() as u64;
        self.stats.hits.vram += (experts.len() - brought.len()) as u64;
        self.stats.hits.ram += brought.len() as u64;
        let bytes = self.layers[usize::from(moe.0)].layout.bytes as u64;
        self.stats.filled_bytes += bytes * brought.len() as u64;
        Ok(())
    }

    /// Puts experts into their slots: those that the device set aside at once, the others as they
    /// arrive. Meanwhile calls `meanwhile` with the wave's other slots, and returns its result.
    fn fill(
        &mut self,
        moe: MoeId,
        fills: &[(u32, Slot)],
        backend: &mut dyn Backend,
        meanwhile: impl FnOnce(&mut dyn Backend, &[Option<Slot>]) -> Result<bool, SessionError>,
    ) -> Result<bool, SessionError> {
        let layer = &self.layers[usize::from(moe.0)];
        let mut hits = self.stats.hits;
        let mut filled_bytes = 0;
        let mut read = Vec::new();
        for (expert, slot) in fills {
            if backend.bring(moe, *expert, *slot)? {
                hits.count(Tier::Ram);
                filled_bytes += layer.layout.bytes as u64;
            } else {
                read.push((*expert, *slot));
            }
        }
        let mut begun =
            self.ahead.take(moe, |expert| read.iter().any(|(other, _)| *other == expert));
        self.stats.read_ahead_used += begun.len() as u64;
        let runs = self.reader.runs(read.iter().map(|(expert, _)| {
            Run {
                pieces: &layer.places[*expert as usize],
                begun: begun
                    .extract_if(.., |(other, _)| other == expert)
                    .next()
                    .map(|(_, reading)| reading),
            }
        }));
        let told = !read.is_empty() && meanwhile(backend, &self.wave)?;
        for run in runs {
            let (i, bytes, tier) = run?;
            layer.check(read[i].0, &bytes)?;
            backend.fill_slot(read[i].1, &bytes)?;
            hits.count(tier);
            filled_bytes += bytes.len() as u64;
        }
        self.stats.hits = hits;
        self.stats.filled_bytes += filled_bytes;
        Ok(told)
    }
}
