//! One run of a session, timed and counted.

use std::time::Instant;

use serde::Serialize;

use doppler_infer::backend::Counters;
use doppler_infer::error::SessionError;
use doppler_infer::graph::{Op, WeightId};
use doppler_infer::model::Model;
use doppler_infer::pager::{PagerStats, TierHits};
use doppler_infer::session::Session;

/// The cost of one run, or of several together, without loading and unmeasured parts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sample {
    pub tokens: usize,
    pub seconds: f64,
    pub counters: Counters,
    pub pager: PagerStats,
}

impl Sample {
    /// Decodes greedily, as a generation does, `decoded` tokens after the rest of the passage. If
    /// `decoded` is 0, measures the passage as a prompt.
    pub fn generate(
        session: &mut Session,
        passage: &[u32],
        decoded: usize,
    ) -> anyhow::Result<Self> {
        if decoded == 0 {
            return Self::take(session, passage, 0);
        }
        session.reset();
        let logits = session.prefill(&passage[..passage.len() - decoded])?;
        let mut token = session.choose(&logits);
        Self::measure(session, decoded, |session| {
            for i in 0..decoded {
                token = session.next(token, decoded - i)?;
            }
            Ok(())
        })
    }

    /// Runs a passage from an empty cache. Measures one step, with the choice of a token, for each
    /// of the last `decoded` tokens, so that all slots and policies get the same tokens. If
    /// `decoded` is 0, measures the passage as a prompt.
    pub fn take(session: &mut Session, passage: &[u32], decoded: usize) -> anyhow::Result<Self> {
        session.reset();
        let (prompt, rest) = passage.split_at(passage.len() - decoded);
        if decoded > 0 {
            session.prefill(prompt)?;
        }
        Self::measure(session, if decoded > 0 { decoded } else { prompt.len() }, |session| {
            if decoded == 0 {
                session.prefill(prompt)?;
            }
            for token in rest {
                session.next(*token, 1)?;
            }
            Ok(())
        })
    }

    fn measure(
        session: &mut Session,
        tokens: usize,
        run: impl FnOnce(&mut Session) -> Result<(), SessionError>,
    ) -> anyhow::Result<Self> {
        let (counters, pager) = (session.counters(), session.stats().pager);
        let started = Instant::now();
        run(session)?;
        Ok(Self {
            tokens,
            seconds: started.elapsed().as_secs_f64(),
            counters: session.counters().since(&counters),
            pager: since(&session.stats().pager, &pager),
        })
    }

    pub fn tok_s(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }

    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.seconds += other.seconds;
        let (a, b) = (&mut self.counters, &other.counters);
        a.dispatches += b.dispatches;
        a.submissions += b.submissions;
        a.readbacks += b.readbacks;
        a.uploaded_bytes += b.uploaded_bytes;
        if let Some(seconds) = b.device_seconds {
            *a.device_seconds.get_or_insert(0.0) += seconds;
        }
        let (a, b) = (&mut self.pager, &other.pager);
        a.demands += b.demands;
        a.hits.vram += b.hits.vram;
        a.hits.ram += b.hits.ram;
        a.hits.disk += b.hits.disk;
        a.hits.peer += b.hits.peer;
        a.evictions += b.evictions;
        a.filled_bytes += b.filled_bytes;
        a.extra_waves += b.extra_waves;
        a.read_ahead += b.read_ahead;
        a.read_ahead_used += b.read_ahead_used;
    }

    /// The sum of several.
    pub fn sum(samples: &[Self]) -> Self {
        let mut sum = Self::default();
        samples.iter().for_each(|sample| sum.add(sample));
        sum
    }

    pub fn per_token(&self) -> PerToken {
        let of = |n: u64| n as f64 / self.tokens.max(1) as f64;
        PerToken {
            dispatches: of(self.counters.dispatches),
            submissions: of(self.counters.submissions),
            readbacks: of(self.counters.readbacks),
            uploaded_bytes: of(self.counters.uploaded_bytes),
            device_seconds: self.counters.device_seconds.map(|s| s / self.tokens.max(1) as f64),
            demands: of(self.pager.demands),
            missed_bytes: of(self.pager.filled_bytes),
        }
    }

    /// The percentage of needed experts that were in a slot. `None` if none was needed.
    pub fn hit_percent(&self) -> Option<f64> {
        let PagerStats { demands, hits, .. } = self.pager;
        (demands > 0).then(|| hits.vram as f64 * 100.0 / demands as f64)
    }
}

/// Means over the measured tokens.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PerToken {
    pub dispatches: f64,
    pub submissions: f64,
    pub readbacks: f64,
    pub uploaded_bytes: f64,
    pub device_seconds: Option<f64>,
    /// Experts asked for.
    pub demands: f64,
    /// Stored bytes of the experts that had no slot.
    pub missed_bytes: f64,
}

fn since(now: &PagerStats, before: &PagerStats) -> PagerStats {
    PagerStats {
        demands: now.demands - before.demands,
        hits: TierHits {
            vram: now.hits.vram - before.hits.vram,
            ram: now.hits.ram - before.hits.ram,
            disk: now.hits.disk - before.hits.disk,
            peer: now.hits.peer - before.hits.peer,
        },
        evictions: now.evictions - before.evictions,
        filled_bytes: now.filled_bytes - before.filled_bytes,
        extra_waves: now.extra_waves - before.extra_waves,
        read_ahead: now.read_ahead - before.read_ahead,
        read_ahead_used: now.read_ahead_used - before.read_ahead_used,
    }
}

/// Stored bytes of all weights that a step of one token reads: those of the trunk and of the chosen
/// experts.
pub fn weight_bytes_a_token(model: &Model) -> u64 {
    let weight = |id: WeightId| &model.trunk[id.0 as usize].spec;
    let bytes = model.graph.ops.iter().map(|op| match op {
        Op::Embed { table, .. } => weight(*table).dtype.row_bytes(weight(*table).cols),
        Op::RmsNorm { weight: id, .. }
        | Op::Logits { weight: id, .. }
        | Op::Scale { weight: id, .. }
        | Op::Conv { filter: id, .. } => weight(*id).bytes(),
        Op::Delta { decays, shifts, .. } => weight(*decays).bytes() + weight(*shifts).bytes(),
        Op::LayerNorm { weight: id, bias, .. } => {
            weight(*id).bytes() + bias.map_or(0, |bias| weight(bias).bytes())
        }
        Op::Linear { weight: id, bias, .. } => {
            weight(*id).bytes() + bias.map_or(0, |bias| weight(bias).bytes())
        }
        Op::Experts { moe, .. } => {
            let layout = &model.moe[usize::from(moe.0)].layout;
            let expert = layout.gate.bytes() + layout.up.bytes() + layout.down.bytes();
            model.graph.moe_spec(*moe).top_k * expert
        }
        _ => 0,
    });
    bytes.sum::<usize>() as u64
}
