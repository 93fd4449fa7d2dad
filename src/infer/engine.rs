//! A model loaded on a device, and the one way to run a step of it.
//!
//! Owns the trunk, the expert slots with their pager, and the blocks of the KV caches. Outlives the
//! sequences that run on it. [`Engine::step`] is the whole story of a token: the device runs until
//! a layer's experts are needed, the pager makes them resident wave by wave, they run, and so on to
//! the logits. A step that fails leaves its sequences where they were and can be tried again.
//!
//! Where the device chooses tokens by itself, several tokens of one sequence may be in flight
//! ([`Engine::next`]). Any other call to the engine drops them first.

mod adapters;
mod many;
mod prefix;
mod recall;
mod stretch;

use std::sync::Arc;

use serde::Serialize;

use super::backend::{
    Backend, BackendError, Capacity, Counters, Device, Fed, KvFormat, LogitRows, Progress, Report,
    Want,
};
use super::error::SessionError;
use super::graph::{Graph, MoeId, WeightId};
use super::kv::{self, BLOCK, Pool};
use super::model::Model;
use super::odds::REFUSED;
use super::pager::{Pager, PagerStats};
use super::reader::Run;
use super::sequence::Sequence;
use super::slots::{SlotBudget, SlotPlan, settle, trunk_bytes};
use super::trace::Trace;
use adapters::Adapters;
use doppler_store::PolicyKind;
pub use many::Next;
pub use prefix::BlockId;
pub use stretch::Formed;

/// Sizes chosen when a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// Positions that the caches hold at first; they grow later. `None` means the model's own
    /// maximum, but at most 4096.
    pub context: Option<usize>,
    /// The most tokens of a step. Longer prompts are split into steps of this size.
    pub batch: usize,
    pub slots: SlotBudget,
    pub kv: KvFormat,
    /// Decides which expert loses its slot.
    pub policy: PolicyKind,
    /// Bytes of host memory for experts that lost their slots, if the device has memory of its own.
    pub host_bytes: u64,
}

impl Default for LoadOptions {
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

/// The default context, unless the model's is shorter.
pub(super) const CONTEXT_DEFAULT: usize = 4096;

/// The smallest batch to which a tight device budget shrinks an engine's.
const BATCH_MIN: usize = 8;

/// An engine's memory, and what its pager has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct EngineStats {
    pub pager: PagerStats,
    pub slots: usize,
    pub resident: usize,
    /// Device bytes of expert slots.
    pub slot_bytes: u64,
    /// Device bytes of everything else: trunk, activations, KV caches.
    pub trunk_bytes: u64,
}

impl EngineStats {
    /// Device bytes of all that is loaded.
    pub const fn device_bytes(&self) -> u64 {
        self.slot_bytes + self.trunk_bytes
    }
}

/// Tokens of one sequence that run in a step.
#[derive(Debug)]
pub struct Rows<'a> {
    pub sequence: &'a mut Sequence,
    /// 1..=batch tokens, appended to the sequence.
    pub tokens: &'a [u32],
    /// Which of them get logits.
    pub logits: LogitRows,
}

/// Steps queued on a device that chooses tokens by itself.
#[derive(Debug, Default)]
struct Flight {
    /// The sequences that they belong to: one, or the rows of a step.
    sequences: Vec<u64>,
    /// How many steps there are. The oldest is at the sequences' ends.
    ahead: usize,
    /// The input tokens of the oldest.
    expected: Option<Vec<u32>>,
}

impl Flight {
    /// Whether its oldest step is the next of these sequences, with these tokens.
    fn is(&mut self, sequences: &[u64], tokens: &[u32]) -> bool {
        let expected = self.expected.take();
        self.sequences == sequences && expected.is_some_and(|expected| expected == tokens)
    }
}

/// A loaded model.
pub struct Engine {
    backend: Box<dyn Backend>,
    pager: Pager,
    pool: Pool,
    /// Places for the recurrent states of sequences. Empty if the model has none.
    states: Pool,
    batch: usize,
    vocab: usize,
    /// The elements of a row of a step's result: the vocabulary's, or those of states.
    width: usize,
    /// What is computed: the model, with the adapters that are attached.
    graph: Arc<Graph>,
    /// The model without adapters.
    base: Arc<Graph>,
    adapters: Adapters,
    /// The length beyond which a sequence's keys have another form.
    stretches_from: Option<usize>,
    /// The longest context that the model was made for.
    context_max: usize,
    plan: SlotPlan,
    /// Device bytes of weights and slots.
    loaded_bytes: u64,
    /// Device bytes that everything together may take.
    budget: u64,
    flight: Flight,
    /// Whether the last token missed an expert, so that queueing more behind the next does not pay.
    halting: bool,
    /// Whether a token's experts are guessed a layer ahead and read while the current layer is
    /// computed.
    read_ahead: bool,
    /// Whether the user has been told that the caches clamped values.
    told: bool,
}

impl Engine {
    /// Loads the trunk and allocates slots. Experts are loaded when they are needed.
    ///
    /// # Errors
    /// If the context or the budget does not fit, the device has no room, or weights cannot be
    /// read.
    pub fn load(
        model: &Model,
        device: &dyn Device,
        options: &LoadOptions,
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
        let mut pool = Pool::default();
        pool.grow(kv::blocks(context));
        let mut states = Pool::default();
        states.grow(usize::from(!model.graph.states.is_empty()));
        Ok(Self {
            pager: Pager::new(model, &plan, options.policy),
            pool,
            states,
            batch: capacity.batch,
            vocab: model.graph.vocab,
            width: model.graph.result_width(),
            graph: model.graph.clone(),
            base: model.graph.clone(),
            adapters: Adapters::default(),
            stretches_from: model.graph.stretches_from(),
            context_max: max,
            loaded_bytes: trunk_bytes - backend.fixed_bytes() + plan.bytes,
            budget: match options.slots {
                SlotBudget::Device(bytes) => bytes,
                SlotBudget::All | SlotBudget::Bytes(_) | SlotBudget::Experts(_) => u64::MAX,
            },
            read_ahead: backend.guesses(),
            backend,
            plan,
            flight: Flight::default(),
            halting: false,
            told: false,
        })
    }

    /// Runs rows of one or several sequences, one sequence after another. Returns the requested
    /// logits of each, `[rows, vocab]`.
    ///
    /// # Errors
    /// If any of them fails. All sequences then stay where they were.
    pub fn step(&mut self, rows: &mut [Rows<'_>]) -> Result<Vec<Vec<f32>>, SessionError> {
        for Rows { sequence, tokens, .. } in rows.iter() {
            self.check(sequence, tokens)?;
        }
        self.land()?;
        let mut all = Vec::with_capacity(rows.len());
        for at in 0..rows.len() {
            let Rows { sequence, tokens, logits } = &mut rows[at];
            match self.run(sequence, tokens, *logits) {
                Ok(logits) => all.push(logits),
                Err(error) => {
                    let done = &mut rows[..at];
                    done.iter_mut().for_each(|row| row.sequence.unfeed(row.tokens.len()));
                    return Err(error);
                }
            }
        }
        Ok(all)
    }

    /// One sequence's tokens, in one step of the device.
    fn run(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        logits: LogitRows,
    ) -> Result<Vec<f32>, SessionError> {
        let position = sequence.len();
        self.stretch(sequence, position, position + tokens.len())?;
        self.recall(sequence, position)?;
        if tokens.len() == 1 {
            self.make_room();
        }
        self.prepare(sequence, position, position + tokens.len())?;
        self.backend.queue(Fed::Tokens(tokens), position, Want::Logits(logits))?;
        self.finish(tokens.len())?;
        let logits = match logits {
            LogitRows::None => Vec::new(),
            LogitRows::Last | LogitRows::All => self.backend.logits()?,
        };
        let first = position + tokens.len() - logits.len() / self.width;
        let logits = finite(logits, first, self.width)?;
        sequence.feed(tokens);
        self.tell_clamped();
        Ok(logits)
    }

    /// Appends `token` to the sequence, runs it, and returns the token that its sampler chooses
    /// next. Where the device can choose, up to `more` tokens are queued ahead; to go on, the
    /// caller passes each token that it was given.
    pub fn next(
        &mut self,
        sequence: &mut Sequence,
        token: u32,
        more: usize,
    ) -> Result<u32, SessionError> {
        if self.graph.embeds() {
            return Err(SessionError::NotText);
        }
        self.check(sequence, &[token])?;
        if !self.flight.is(&[sequence.number()], &[token]) {
            self.land()?;
        }
        sequence.feed(&[token]);
        let next = self.choose(sequence, token, more);
        if next.is_err() {
            sequence.unfeed(1);
        }
        next
    }

    /// Chooses what follows `token`, the sequence's last token, whose keys and values are not
    /// computed yet.
    fn choose(
        &mut self,
        sequence: &mut Sequence,
        token: u32,
        more: usize,
    ) -> Result<u32, SessionError> {
        let position = sequence.len() - 1;
        if self.flight.ahead == 0 {
            self.stretch(sequence, position, position + 1)?;
            self.recall(sequence, position)?;
            sequence.sampler.rewind(sequence.len());
            // What kernels do not know is chosen here, from the logits.
            let plain = sequence.sampler.is_plain();
            if !plain || !self.backend.choose(&sequence.sampler)? {
                sequence.unfeed(1);
                let logits = self.run(sequence, &[token], LogitRows::Last)?;
                return sequence.try_choose(&logits);
            }
            self.make_room();
            self.flight.sequences = vec![sequence.number()];
        }
        // Tokens queued ahead have the form of the first.
        sequence.formed.count = position + 1;
        let room = sequence.limit() - position;
        let most = if self.halting { 1 } else { more.clamp(1, room) };
        while self.flight.ahead < most && self.backend.room() > 0 {
            let at = position + self.flight.ahead;
            let other_form = self.wants_other_form(sequence, at + 1);
            if self.flight.ahead > 0 && (other_form || !self.has_state_for(sequence)) {
                break;
            }
            if !self.fits(sequence, at, at + 1) {
                // One token is in flight; its result matters more than queueing another behind it.
                if self.flight.ahead > 0 {
                    break;
                }
                self.grow(sequence, at, at + 1)?;
            }
            self.prepare(sequence, at, at + 1)?;
            let fed = if self.flight.ahead == 0 { Fed::Tokens(&[token]) } else { Fed::Chosen };
            self.backend.queue(fed, at, Want::Choice)?;
            self.flight.ahead += 1;
        }
        let report = self.finish(1)?;
        self.flight.ahead -= 1;
        if report.token == REFUSED {
            self.land()?;
            return Err(SessionError::Output { position });
        }
        self.flight.expected = Some(vec![report.token]);
        sequence.sampler.follow(report.token);
        self.tell_clamped();
        Ok(report.token)
    }

    /// How long each kernel takes for `token` at the sequence's end: names in order, and seconds.
    /// Leaves the sequence as it is. Every expert must be in a slot.
    ///
    /// # Errors
    /// If the device does not run single tokens fused, or has no timestamps within a pass.
    pub fn profile(
        &mut self,
        sequence: &mut Sequence,
        token: u32,
    ) -> Result<Vec<(&'static str, f64)>, SessionError> {
        self.check(sequence, &[token])?;
        self.land()?;
        let position = sequence.len();
        self.stretch(sequence, position, position + 1)?;
        self.recall(sequence, position)?;
        self.prepare(sequence, position, position + 1)?;
        Ok(self.backend.profile(token, position)?)
    }

    /// Runs any number of tokens, batch by batch. Returns the logits of the last one, `[vocab]`;
    /// nothing if there are no tokens.
    ///
    /// # Errors
    /// If any batch fails. The sequence then stays where it was.
    pub fn prefill(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
    ) -> Result<Vec<f32>, SessionError> {
        let mut logits = Vec::new();
        let batches = tokens.chunks(self.batch);
        let last = batches.len().saturating_sub(1);
        sequence.expect(sequence.len() + tokens.len());
        for (i, batch) in batches.enumerate() {
            let rows = if i == last { LogitRows::Last } else { LogitRows::None };
            let mut rows = [Rows { sequence: &mut *sequence, tokens: batch, logits: rows }];
            match self.step(&mut rows) {
                Ok(mut all) => logits = all.pop().unwrap_or_default(),
                Err(error) => {
                    sequence.unfeed(i * self.batch);
                    sequence.expect(0);
                    return Err(error);
                }
            }
        }
        sequence.expect(0);
        Ok(logits)
    }

    fn check(&self, sequence: &Sequence, tokens: &[u32]) -> Result<(), SessionError> {
        if !(1..=self.batch).contains(&tokens.len()) {
            return Err(SessionError::Batch { tokens: tokens.len(), batch: self.batch });
        }
        if !sequence.table.is_of(&self.pool) {
            return Err(SessionError::Foreign);
        }
        let (position, context) = (sequence.len(), sequence.limit().min(self.context_max));
        if tokens.len() > context.saturating_sub(position) {
            return Err(SessionError::Full { position, context, tokens: tokens.len() });
        }
        if position > 0 && !self.graph.causal() {
            return Err(SessionError::Whole);
        }
        match tokens.iter().find(|token| !self.graph.admits(**token)) {
            Some(token) => Err(SessionError::Token { token: *token, vocab: self.vocab }),
            None => Ok(()),
        }
    }

    /// Makes room for this many positions of a sequence in advance, so that its steps need not.
    /// Changes nothing if they do not fit.
    ///
    /// # Errors
    /// If the device or its budget has no room.
    pub fn reserve(&mut self, sequence: &Sequence, positions: usize) -> Result<(), SessionError> {
        if self.fits(sequence, sequence.len(), positions) {
            return Ok(());
        }
        self.land()?;
        self.grow(sequence, sequence.len(), positions)
    }

    /// Whether enough blocks are free to write these positions.
    fn fits(&self, sequence: &Sequence, start: usize, end: usize) -> bool {
        sequence.table.wants(start, end) <= self.pool.free()
    }

    /// Grows the caches for these positions, by at least half if the budget allows it.
    fn grow(&mut self, sequence: &Sequence, start: usize, end: usize) -> Result<(), SessionError> {
        let count = self.pool.count();
        let lacks = sequence.table.wants(start, end).saturating_sub(self.pool.free());
        let least = count + lacks;
        let fixed = self.loaded_bytes + self.backend.fixed_bytes();
        let left = self.budget.saturating_sub(fixed) / self.backend.block_bytes().max(1);
        let most = count.saturating_add(usize::try_from(left).unwrap_or(usize::MAX));
        if least > most {
            let bytes = (least - most) as u64 * self.backend.block_bytes();
            return Err(SessionError::Room { positions: end, bytes, budget: self.budget });
        }
        let wanted = least.max((count + count / 2).min(most));
        let grown = match self.backend.grow(wanted) {
            // Growing by half may be too much where growing by what is needed is not.
            Err(BackendError::OutOfMemory { .. }) if least < wanted => {
                self.backend.grow(least).map(|()| least)
            }
            grown => grown.map(|()| wanted),
        };
        self.pool.grow(grown?);
        Ok(())
    }

    /// Gives the sequence blocks that it may write at these positions, and tells the device which
    /// they are.
    fn prepare(
        &mut self,
        sequence: &mut Sequence,
        start: usize,
        end: usize,
    ) -> Result<(), SessionError> {
        self.give_blocks(sequence, start, end)?;
        self.backend.set_blocks(sequence.table.indices());
        self.prepare_state(sequence, start, end)
    }

    /// Gives the sequence blocks that it may write at these positions.
    fn give_blocks(
        &mut self,
        sequence: &mut Sequence,
        start: usize,
        end: usize,
    ) -> Result<(), SessionError> {
        if !self.fits(sequence, start, end) {
            self.grow(sequence, start, end)?;
        }
        let Some(copies) = sequence.table.prepare(&self.pool, start, end) else {
            let what = format!("blocks for positions {start} to {end}");
            return Err(BackendError::OutOfMemory { what, bytes: 0 }.into());
        };
        for copy in copies {
            self.backend.copy_block(copy)?;
        }
        Ok(())
    }

    /// Call when no token is in flight. Empties slots for the experts that the next token will
    /// probably miss, if the device brings them in by itself.
    fn make_room(&mut self) {
        if self.backend.brings() {
            self.pager.spare(self.backend.as_mut());
            self.backend.offer(&self.pager.free());
        }
    }

    /// Drops the tokens queued ahead.
    fn land(&mut self) -> Result<(), SessionError> {
        self.flight.expected = None;
        while self.flight.ahead > 0 {
            self.flight.ahead -= 1;
            if let Progress::Report(Report { halted: Some(_), .. }) = self.backend.advance(false)? {
                self.backend.give_up();
                self.flight.ahead = 0;
            }
        }
        Ok(())
    }

    /// Runs the oldest step in flight, of this many tokens, to its end. Wherever it waits for
    /// experts, loads them and continues.
    fn finish(&mut self, tokens: usize) -> Result<Report, SessionError> {
        let finished = self.follow(tokens);
        if finished.is_err() {
            self.flight.ahead = 0;
            self.backend.give_up();
        }
        finished
    }

    fn follow(&mut self, tokens: usize) -> Result<Report, SessionError> {
        self.pager.begin(tokens);
        self.halting = false;
        // MoE layers before this one have been counted.
        let mut counted = 0;
        loop {
            let guess = self.read_ahead && tokens == 1 && self.pager.misses();
            match self.backend.advance(guess)? {
                Progress::Guess { moe, likely } => self.pager.read_ahead(moe, &likely),
                Progress::Experts { moe, chosen } => self.waves(moe, chosen)?,
                Progress::Report(report) => {
                    self.count(&report, counted)?;
                    let Some(moe) = report.halted else { return Ok(report) };
                    counted = usize::from(moe.0) + 1;
                    self.bring(moe, report)?;
                }
            }
        }
    }

    /// One layer's experts: wave after wave until all have run.
    fn waves(&mut self, moe: MoeId, mut waiting: Vec<u32>) -> Result<(), SessionError> {
        let Self { backend, pager, .. } = self;
        waiting.sort_unstable();
        waiting.dedup();
        while !waiting.is_empty() {
            let backend = backend.as_mut();
            let slots = pager.next_wave(moe, &mut waiting, backend, |backend, resident| {
                Ok(backend.run_wave(resident)?)
            })?;
            backend.run_wave(slots)?;
        }
        Ok(())
    }

    /// Counts the experts that the device found by itself, from layer `from` on.
    fn count(&mut self, report: &Report, from: usize) -> Result<(), SessionError> {
        let reached = report.halted.map_or(report.experts.len(), |moe| usize::from(moe.0));
        let layers = (0..).zip(report.experts.iter().zip(&report.brought));
        for (layer, (experts, brought)) in layers.take(reached).skip(from) {
            self.pager.found(MoeId(layer), experts, brought, self.backend.as_mut())?;
            self.halting |= !brought.is_empty();
        }
        Ok(())
    }

    /// Loads the experts at which a token halted, and resumes it.
    fn bring(&mut self, moe: MoeId, mut report: Report) -> Result<(), SessionError> {
        // The tokens queued behind it were dropped.
        self.flight.ahead = self.flight.ahead.min(1);
        self.halting = true;
        let mut waiting = std::mem::take(&mut report.experts[usize::from(moe.0)]);
        waiting.sort_unstable();
        let backend = self.backend.as_mut();
        self.pager.next_wave(moe, &mut waiting, backend, |_, _| Ok(()))?;
        if !waiting.is_empty() {
            let what = format!("{} experts of one token without a slot", waiting.len());
            return Err(BackendError::Unsupported(what).into());
        }
        self.backend.offer(&self.pager.free());
        Ok(self.backend.resume(moe)?)
    }

    /// Warns, once, that keys or values did not fit the cache's format.
    fn tell_clamped(&mut self) {
        if !self.told && self.backend.clamped() > 0 {
            self.told = true;
            tracing::warn!(
                "some keys or values were out of the range of f16 and were clamped: the output may differ \
                 from the model's own; run with --kv f32"
            );
        }
    }

    /// Elements of keys and values that were clamped to the cache's format since the model was
    /// loaded.
    pub fn clamped(&self) -> u64 {
        self.backend.clamped()
    }

    /// Loads every expert into its slot.
    ///
    /// # Errors
    /// If there are fewer slots than experts, or an expert cannot be read.
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

    /// Sets whether experts that the device finds by itself are counted and count as used. For
    /// measuring what that costs while every expert is in its slot.
    pub const fn switch_pager(&mut self, counts: bool) {
        self.pager.switch(counts);
    }

    /// Sets whether experts are guessed and read ahead from now on. Returns false if this device
    /// does not guess.
    pub fn switch_read_ahead(&mut self, ahead: bool) -> bool {
        self.read_ahead = ahead && self.backend.guesses();
        self.backend.guesses()
    }

    /// Sets the device bytes that everything together may take from now on. What is held stays.
    pub const fn set_budget(&mut self, bytes: u64) {
        self.budget = bytes;
    }

    /// From now on records into `trace` which experts each step asks for.
    pub fn record(&mut self, trace: Trace) {
        self.pager.record(trace);
    }

    /// Ends recording and returns what was recorded.
    pub fn take_trace(&mut self) -> Option<Trace> {
        self.pager.take_trace()
    }

    /// Device bytes of a block of the caches, over all layers.
    pub fn block_bytes(&self) -> u64 {
        self.backend.block_bytes()
    }

    /// Whether going back to any beginning of a sequence costs nothing. Where it doesn't, its tokens
    /// run again.
    pub const fn goes_back(&self) -> bool {
        self.states.count() == 0
    }

    /// Positions that the caches can hold now, over all sequences.
    pub const fn positions(&self) -> usize {
        self.pool.count() * BLOCK
    }

    /// The longest context that the model was made for.
    pub const fn context_max(&self) -> usize {
        self.context_max
    }

    /// The most tokens of a step.
    pub const fn batch(&self) -> usize {
        self.batch
    }

    /// Whether a text can be run in several steps.
    pub fn causal(&self) -> bool {
        self.graph.causal()
    }

    pub const fn vocab(&self) -> usize {
        self.vocab
    }

    /// The device, for people.
    pub fn describe(&self) -> String {
        self.backend.describe()
    }

    /// What the device has done so far, including loading.
    pub fn counters(&self) -> Counters {
        self.backend.counters()
    }

    pub fn stats(&self) -> EngineStats {
        EngineStats {
            pager: self.pager.stats(),
            slots: self.plan.slots(),
            resident: self.pager.resident(),
            slot_bytes: self.plan.bytes,
            trunk_bytes: self.loaded_bytes - self.plan.bytes + self.backend.fixed_bytes(),
        }
    }
}

/// The logits, if all of them are finite. Otherwise an error with the position of the first row
/// that is not; the first row belongs to `position`.
fn finite(logits: Vec<f32>, position: usize, vocab: usize) -> Result<Vec<f32>, SessionError> {
    // Each row is checked as a whole, so that the loop is vectorised.
    let odd = |row: &[f32]| row.iter().fold(false, |any, logit| any | !logit.is_finite());
    match logits.chunks(vocab).position(odd) {
        None => Ok(logits),
        Some(row) => Err(SessionError::Output { position: position + row }),
    }
}

/// A backend, its slots, and its sizes.
type Placed = (Box<dyn Backend>, SlotPlan, Capacity);

/// Makes a backend with room for the experts that the budget must hold. If a budget for the whole
/// device is tight, the batch shrinks first, because that only costs speed on prompts. A batch
/// longer than the first context serves later ones; it is used only if it costs no slot.
fn place(
    model: &Model,
    device: &dyn Device,
    options: &LoadOptions,
    context: usize,
) -> Result<Placed, SessionError> {
    let whole = matches!(options.slots, SlotBudget::Device(_));
    let place = |batch| {
        let positions = kv::blocks(context) * BLOCK;
        let capacity = Capacity { batch, context: positions, kv: options.kv };
        let backend = device.backend(model.graph.clone(), capacity)?;
        let plan = SlotPlan::new(model, backend.as_ref(), options.slots)?;
        Ok((backend, plan, capacity))
    };
    let now = options.batch.clamp(1, context);
    let mut batch = now;
    let first: Placed = loop {
        match place(batch) {
            Err(SessionError::BudgetTooSmall { .. }) if whole && batch > BATCH_MIN => {
                batch = (batch / 2).max(BATCH_MIN);
            }
            placed => break placed?,
        }
    };
    let mut longer = options.batch.clamp(1, model.graph.context_max);
    if batch < now || longer <= now {
        return Ok(first);
    }
    let slots = first.1.slots();
    drop(first);
    while longer > now {
        match place(longer) {
            Ok(placed) if placed.1.slots() == slots => return Ok(placed),
            Ok(_)
            | Err(
                SessionError::BudgetTooSmall { .. }
                | SessionError::Backend(BackendError::OutOfMemory { .. }),
            ) => longer = (longer / 2).max(now),
            Err(error) => return Err(error),
        }
    }
    place(now)
}

/// Reads all trunk tensors concurrently and gives each to the backend once it is complete.
fn load_trunk(model: &Model, backend: &mut dyn Backend) -> Result<(), SessionError> {
    let runs = model.trunk.iter().map(|tensor| Run { pieces: &tensor.pieces, begun: None });
    for run in model.reader.runs(runs) {
        let (tensor, bytes, _) = run?;
        model.check_trunk(tensor, &bytes)?;
        backend.load_weight(WeightId(tensor as u32), &model.trunk[tensor].spec, &bytes)?;
    }
    Ok(())
}
