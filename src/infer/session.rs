//! One sequence on one device: load the trunk, then token after token.
//!
//! [`Session::step`] is the whole story of a token: ops run on the backend up to
//! a layer's experts, the router says which, the pager makes them resident wave
//! by wave, they run, and so on to the logits. A step that fails leaves the
//! position where it was and can be tried again.

use std::ops::Range;

use serde::Serialize;

use super::backend::{
    Backend, BackendError, Capacity, Counters, Device, Fed, KvFormat, LogitRows, Report, Step, Want,
};
use super::error::SessionError;
use super::graph::{Buf, Graph, MoeId, Op, WeightId};
use super::model::Model;
use super::odds::REFUSED;
use super::pager::{Pager, PagerStats};
use super::reader::Run;
use super::sampler::Sampler;
use super::slots::{SlotBudget, SlotPlan, settle, trunk_bytes};
use super::trace::Trace;
use doppler_store::PolicyKind;

/// Sizes chosen when a session is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionOptions {
    /// Positions the cache holds; `None` is the model's own maximum, at most 4096.
    pub context: Option<usize>,
    /// The most tokens a step carries; prompts are cut into steps of this.
    pub batch: usize,
    pub slots: SlotBudget,
    pub kv: KvFormat,
    /// Which expert gives up its slot.
    pub policy: PolicyKind,
    /// Bytes of the host's memory for experts that lost their slots, where the device has memory
    /// of its own.
    pub host_bytes: u64,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            context: None,
            batch: 512,
            slots: SlotBudget::All,
            kv: KvFormat::default(),
            policy: PolicyKind::default(),
            host_bytes: 0,
        }
    }
}

/// The context when none is asked for, unless the model's is shorter.
const CONTEXT_DEFAULT: usize = 4096;

/// The smallest batch that a short device budget shrinks a session's to.
const BATCH_MIN: usize = 8;

/// A session's memory and what its pager did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SessionStats {
    pub pager: PagerStats,
    pub slots: usize,
    pub resident: usize,
    /// Device bytes of expert slots.
    pub slot_bytes: u64,
    /// Device bytes of everything else: trunk, activations, KV cache.
    pub trunk_bytes: u64,
}

/// A stretch of the graph between two decisions of the host.
#[derive(Debug, Clone)]
enum Part {
    Run(Range<usize>),
    /// `ops` choose the next layer's experts from what is the state here; as a guess, and for nothing else.
    Guess {
        ops: Range<usize>,
        op: usize,
        moe: MoeId,
    },
    Experts {
        op: usize,
        moe: MoeId,
    },
}

/// One sequence of a model on a device.
pub struct Session {
    backend: Box<dyn Backend>,
    pager: Pager,
    parts: Vec<Part>,
    capacity: Capacity,
    vocab: usize,
    position: usize,
    plan: SlotPlan,
    trunk_bytes: u64,
    /// Tokens queued on a device that chooses by itself; the oldest is at `position`.
    ahead: usize,
    /// The token that the oldest of them was fed.
    expected: Option<u32>,
    /// The last of them missed an expert: it is not worth queueing more behind the next.
    halting: bool,
    /// A token's experts are guessed a layer ahead, and read while that layer is computed.
    read_ahead: bool,
}

impl Session {
    /// Loads the trunk and allocates slots; experts come when they are needed.
    pub fn new(
        model: &Model,
        device: &dyn Device,
        options: &SessionOptions,
    ) -> Result<Self, SessionError> {
        model.runs_on(device)?;
        let max = model.graph.context_max;
        let context = options.context.unwrap_or(CONTEXT_DEFAULT.min(max));
        if context == 0 || context > max {
            return Err(SessionError::Context { context, max });
        }
        let (mut backend, plan, capacity) = place(model, device, options, context)?;
        let trunk_bytes = trunk_bytes(model, backend.as_ref());
        load_trunk(model, backend.as_mut())?;
        let plan = settle(
            backend.as_mut(),
            plan,
            |backend, bytes| match SlotPlan::new(model, backend, SlotBudget::Bytes(bytes)) {
                Err(SessionError::BudgetTooSmall { smallest_bytes, .. }) => {
                    SlotPlan::new(model, backend, SlotBudget::Bytes(smallest_bytes)).ok()
                }
                plan => plan.ok(),
            },
            |backend, plan| backend.alloc_slots(&plan.classes, &plan.class_of),
        )?;
        if plan.slots() < model.experts() {
            backend.set_aside(options.host_bytes);
        }
        Ok(Self {
            pager: Pager::new(model, &plan, options.policy),
            parts: parts(&model.graph),
            vocab: model.graph.vocab,
            read_ahead: backend.guesses(),
            backend,
            capacity,
            position: 0,
            plan,
            trunk_bytes,
            ahead: 0,
            expected: None,
            halting: false,
        })
    }

    /// Runs 1..=batch tokens at the present position and returns the logits
    /// asked for, `[rows, vocab]`.
    pub fn step(&mut self, tokens: &[u32], logits: LogitRows) -> Result<Vec<f32>, SessionError> {
        self.check(tokens)?;
        self.land()?;
        if tokens.len() == 1 {
            self.make_room()?;
        }
        if let [token] = tokens
            && let Some(decoder) = self.backend.decoder()?
        {
            let want = if logits == LogitRows::None { Want::Nothing } else { Want::Logits };
            decoder.submit(Fed::Token(*token), self.position, want)?;
            self.finish_token()?;
            let logits = match (logits, self.backend.decoder()?) {
                (LogitRows::None, _) | (_, None) => Vec::new(),
                (_, Some(decoder)) => decoder.logits()?,
            };
            let logits = finite(logits, self.position, self.vocab)?;
            self.position += 1;
            return Ok(logits);
        }
        self.backend.begin(&Step { tokens, position: self.position, logits })?;
        self.pager.begin(tokens.len());
        for part in &self.parts {
            match part {
                Part::Run(ops) => self.backend.run(ops.clone())?,
                Part::Guess { ops, op, moe } => {
                    if self.read_ahead && tokens.len() == 1 && self.pager.misses() {
                        self.backend.run(ops.clone())?;
                        self.pager.read_ahead(*moe, &self.backend.routing(*op)?);
                    }
                }
                Part::Experts { op, moe } => {
                    experts(self.backend.as_mut(), &mut self.pager, *op, *moe)?;
                }
            }
        }
        let logits = self.backend.logits()?;
        let first = self.position + tokens.len() - logits.len() / self.vocab;
        let logits = finite(logits, first, self.vocab)?;
        self.position += tokens.len();
        Ok(logits)
    }

    /// Runs `token` at the present position and returns the one that `sampler` chooses after it.
    /// Where the device can choose, up to `more` tokens are queued ahead: a caller that goes
    /// on is to feed each token it was given. The sampler is left as if it had chosen.
    pub fn next(
        &mut self,
        token: u32,
        sampler: &mut Sampler,
        more: usize,
    ) -> Result<u32, SessionError> {
        self.check(&[token])?;
        if self.expected.take() != Some(token) {
            self.land()?;
        }
        if self.ahead == 0 {
            let chooses = match self.backend.decoder()? {
                Some(decoder) => decoder.choose(sampler)?,
                None => false,
            };
            if !chooses {
                let logits = self.step(&[token], LogitRows::Last)?;
                let next = sampler.sample(&logits);
                sampler.accept(next);
                return Ok(next);
            }
        }
        if self.ahead == 0 {
            self.make_room()?;
        }
        let room = self.capacity.context - self.position;
        let most = if self.halting { 1 } else { more.clamp(1, room) };
        if let Some(decoder) = self.backend.decoder()? {
            while self.ahead < most && decoder.room() > 0 {
                let fed = if self.ahead == 0 { Fed::Token(token) } else { Fed::Chosen };
                decoder.submit(fed, self.position + self.ahead, Want::Choice)?;
                self.ahead += 1;
            }
        }
        let report = self.finish_token()?;
        self.ahead -= 1;
        if report.token == REFUSED {
            self.land()?;
            return Err(SessionError::Output { position: self.position });
        }
        self.position += 1;
        self.expected = Some(report.token);
        sampler.follow(report.token);
        Ok(report.token)
    }

    /// How long each kernel takes for `token` at the present position, which stays: names
    /// in order, and seconds. Every expert must be in a slot.
    ///
    /// # Errors
    /// A device that does not run single tokens fused, or cannot tell the time within a pass.
    pub fn profile(&mut self, token: u32) -> Result<Vec<(&'static str, f64)>, SessionError> {
        self.check(&[token])?;
        self.land()?;
        match self.backend.decoder()? {
            Some(decoder) => Ok(decoder.profile(token, self.position)?),
            None => {
                let what = "timing the kernels of a token on this backend".into();
                Err(BackendError::Unsupported(what).into())
            }
        }
    }

    /// Before a token behind which none is under way: empties slots for what it is likely to miss, where the
    /// device brings experts by itself.
    fn make_room(&mut self) -> Result<(), SessionError> {
        if self.backend.decoder()?.is_some_and(|decoder| decoder.brings()) {
            self.pager.spare(self.backend.as_mut());
            if let Some(decoder) = self.backend.decoder()? {
                decoder.offer(&self.pager.free());
            }
        }
        Ok(())
    }

    /// Drops the tokens queued ahead.
    fn land(&mut self) -> Result<(), SessionError> {
        let Some(decoder) = self.backend.decoder()? else { return Ok(()) };
        while self.ahead > 0 {
            self.ahead -= 1;
            if decoder.take()?.halted.is_some() {
                decoder.drop_halted();
                self.ahead = 0;
            }
        }
        Ok(())
    }

    /// Waits for the oldest token under way; wherever it halted, its experts are brought and it
    /// goes on from there.
    fn finish_token(&mut self) -> Result<Report, SessionError> {
        let finished = self.follow_token();
        if finished.is_err() {
            self.ahead = 0;
            if let Ok(Some(decoder)) = self.backend.decoder() {
                decoder.drop_halted();
            }
        }
        finished
    }

    fn follow_token(&mut self) -> Result<Report, SessionError> {
        let backend = self.backend.as_mut();
        self.pager.begin(1);
        self.halting = false;
        // MoE layers before this one are counted.
        let mut counted = 0;
        loop {
            let Some(decoder) = backend.decoder()? else {
                return Err(BackendError::Unsupported("a backend without a decoder".into()).into());
            };
            let report = decoder.take()?;
            let reached = report.halted.map_or(report.experts.len(), |moe| usize::from(moe.0));
            let layers = (0..).zip(report.experts.iter().zip(&report.brought));
            for (layer, (experts, brought)) in layers.take(reached).skip(counted) {
                self.pager.found(MoeId(layer), experts, brought, backend)?;
                self.halting |= !brought.is_empty();
            }
            let Some(moe) = report.halted else { return Ok(report) };
            // Those queued behind it are gone.
            self.ahead = self.ahead.min(1);
            self.halting = true;
            let mut waiting = report.experts[reached].clone();
            waiting.sort_unstable();
            self.pager.next_wave(moe, &mut waiting, backend, |_, _| Ok(()))?;
            if !waiting.is_empty() {
                let what = format!("{} experts of one token without a slot", waiting.len());
                return Err(BackendError::Unsupported(what).into());
            }
            counted = reached + 1;
            if let Some(decoder) = backend.decoder()? {
                decoder.offer(&self.pager.free());
                decoder.resume(moe)?;
            }
        }
    }

    /// Runs any number of tokens, batch by batch; logits of the last one, `[vocab]`.
    /// Empty if there are no tokens.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>, SessionError> {
        let mut logits = Vec::new();
        let batches = tokens.chunks(self.capacity.batch);
        let last = batches.len().saturating_sub(1);
        for (i, batch) in batches.enumerate() {
            let rows = if i == last { LogitRows::Last } else { LogitRows::None };
            logits = self.step(batch, rows)?;
        }
        Ok(logits)
    }

    fn check(&self, tokens: &[u32]) -> Result<(), SessionError> {
        let Capacity { batch, context, .. } = self.capacity;
        if !(1..=batch).contains(&tokens.len()) {
            return Err(SessionError::Batch { tokens: tokens.len(), batch });
        }
        if tokens.len() > context - self.position {
            let (position, tokens) = (self.position, tokens.len());
            return Err(SessionError::Full { position, context, tokens });
        }
        match tokens.iter().find(|token| **token as usize >= self.vocab) {
            Some(token) => Err(SessionError::Token { token: *token, vocab: self.vocab }),
            None => Ok(()),
        }
    }

    /// Brings every expert into its slot.
    ///
    /// # Errors
    /// Fewer slots than experts, or one that cannot be read.
    pub fn settle_all(&mut self) -> Result<(), SessionError> {
        self.land()?;
        for (moe, experts) in (0..).map(MoeId).zip(self.pager.experts()) {
            let mut waiting: Vec<u32> = (0..experts as u32).collect();
            self.pager.next_wave(moe, &mut waiting, self.backend.as_mut(), |_, _| Ok(()))?;
            if !waiting.is_empty() {
                let what = format!("{} experts without a slot", waiting.len());
                return Err(BackendError::Unsupported(what).into());
            }
        }
        Ok(())
    }

    /// Whether experts that the device finds by itself are counted and count as used. To measure what that costs,
    /// while every expert is in its slot.
    pub const fn switch_pager(&mut self, counts: bool) {
        self.pager.switch(counts);
    }

    /// Whether tokens' experts are guessed and read ahead from now on. False, if this device does not guess.
    pub fn switch_read_ahead(&mut self, ahead: bool) -> bool {
        self.read_ahead = ahead && self.backend.guesses();
        self.backend.guesses()
    }

    /// Records which experts each step asks for, from now on, into `trace`.
    pub fn record(&mut self, trace: Trace) {
        self.pager.record(trace);
    }

    /// What was recorded; recording ends.
    pub fn take_trace(&mut self) -> Option<Trace> {
        self.pager.take_trace()
    }

    /// Forgets the sequence; experts stay resident.
    pub const fn reset(&mut self) {
        self.position = 0;
        self.expected = None;
    }

    /// Tokens in the cache.
    pub const fn position(&self) -> usize {
        self.position
    }

    /// Positions the cache holds.
    pub const fn context(&self) -> usize {
        self.capacity.context
    }

    /// The most tokens a step carries.
    pub const fn batch(&self) -> usize {
        self.capacity.batch
    }

    pub const fn vocab(&self) -> usize {
        self.vocab
    }

    /// The device, for people.
    pub fn describe(&self) -> String {
        self.backend.describe()
    }

    /// What the device did so far, loading included.
    pub fn counters(&self) -> Counters {
        self.backend.counters()
    }

    pub fn stats(&self) -> SessionStats {
        SessionStats {
            pager: self.pager.stats(),
            slots: self.plan.slots(),
            resident: self.pager.resident(),
            slot_bytes: self.plan.bytes,
            trunk_bytes: self.trunk_bytes,
        }
    }
}

/// The logits, if all of them are finite; else an error with the position of the first row
/// that is not, the first row being that of `position`.
fn finite(logits: Vec<f32>, position: usize, vocab: usize) -> Result<Vec<f32>, SessionError> {
    // By rows, each as a whole, so that it is vectorised.
    let odd = |row: &[f32]| row.iter().fold(false, |any, logit| any | !logit.is_finite());
    match logits.chunks(vocab).position(odd) {
        None => Ok(logits),
        Some(row) => Err(SessionError::Output { position: position + row }),
    }
}

/// A backend with room for the experts that the budget must hold. Where the whole device's
/// budget is short, activations give way: a smaller batch costs a prompt's speed only.
fn place(
    model: &Model,
    device: &dyn Device,
    options: &SessionOptions,
    context: usize,
) -> Result<(Box<dyn Backend>, SlotPlan, Capacity), SessionError> {
    let mut batch = options.batch.clamp(1, context);
    loop {
        let capacity = Capacity { batch, context, kv: options.kv };
        let backend = device.backend(model.graph.clone(), capacity)?;
        match SlotPlan::new(model, backend.as_ref(), options.slots) {
            Ok(plan) => return Ok((backend, plan, capacity)),
            Err(SessionError::BudgetTooSmall { .. })
                if matches!(options.slots, SlotBudget::Device(_)) && batch > BATCH_MIN =>
            {
                batch = (batch / 2).max(BATCH_MIN);
            }
            Err(error) => return Err(error),
        }
    }
}

/// One layer's experts: who is needed, then wave after wave until all have run.
fn experts(
    backend: &mut dyn Backend,
    pager: &mut Pager,
    op: usize,
    moe: MoeId,
) -> Result<(), SessionError> {
    let mut waiting = backend.routing(op)?;
    waiting.sort_unstable();
    waiting.dedup();
    while !waiting.is_empty() {
        let slots = pager.next_wave(moe, &mut waiting, backend, |backend, resident| {
            Ok(backend.run_experts(op, resident)?)
        })?;
        backend.run_experts(op, slots)?;
    }
    Ok(backend.finish_experts(op)?)
}

/// Cuts the graph at its `Experts` ops, and before a layer's choice where the next one's can be guessed.
fn parts(graph: &Graph) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut start = 0;
    let layers = graph.ops.iter().enumerate().filter_map(|(op, kind)| match kind {
        Op::Experts { moe, .. } => Some((op, *moe)),
        _ => None,
    });
    let mut layers = layers.peekable();
    while let Some((op, moe)) = layers.next() {
        let next =
            layers.peek().and_then(|(op, moe)| Some((*op, *moe, Choice::before(graph, *op)?)));
        if let (Some(choice), Some((op, moe, guess))) = (Choice::before(graph, op), next)
            && guess.buffers == choice.buffers
        {
            parts.push(Part::Run(start..choice.ops.start));
            parts.push(Part::Guess { ops: guess.ops, op, moe });
            start = choice.ops.start;
        }
        parts.push(Part::Run(start..op));
        parts.push(Part::Experts { op, moe });
        start = op + 1;
    }
    parts.push(Part::Run(start..graph.ops.len()));
    parts
}

/// The ops that choose a layer's experts from the state: a norm, the router, the choice. Where two layers' use the same
/// buffers, the one run just before the other changes nothing that the other reads.
struct Choice {
    ops: Range<usize>,
    /// State, normed state, router's logits.
    buffers: [Buf; 3],
}

impl Choice {
    /// Those before the `Experts` op at `op`, if they are just these.
    fn before(graph: &Graph, op: usize) -> Option<Self> {
        let ops = op.checked_sub(3)?..op;
        let [
            Op::RmsNorm { x, out: normed, .. },
            Op::Linear { x: input, out, .. },
            Op::Route { logits, .. },
        ] = &graph.ops[ops.clone()]
        else {
            return None;
        };
        let alone = x != normed && x != out && normed != out;
        (alone && input == normed && out == logits)
            .then_some(Self { ops, buffers: [*x, *normed, *out] })
    }
}

/// Reads every trunk tensor concurrently and gives each to the backend once it is whole.
fn load_trunk(model: &Model, backend: &mut dyn Backend) -> Result<(), SessionError> {
    let runs = model.trunk.iter().map(|tensor| Run { pieces: &tensor.pieces, begun: None });
    for run in model.reader.runs(runs) {
        let (tensor, bytes, _) = run?;
        model.check_trunk(tensor, &bytes)?;
        backend.load_weight(WeightId(tensor as u32), &model.trunk[tensor].spec, &bytes)?;
    }
    Ok(())
}
