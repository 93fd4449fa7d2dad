//! One token's step as recipes, independent of a device: rewrites where they match runs of ops, and
//! otherwise each op's own recipes for one row. All are in one list, which is one submission.
//!
//! If one kernel writes a value packed and another reads it plain (or the reverse), it is converted
//! where it is first read in that form. A standard layer needs no conversion: it takes eight
//! dispatches if dense, ten with experts, eleven if it fetches experts.
//!
//! If the fused kernels do not support a MoE layer, the whole graph runs op by op.

use super::layout::Layout;
use super::live::{Flow, Form, Resume, Value, resumes};
use super::params;
use super::rewrites::{Routing, rewrites, workgroups_of};
use crate::backend::{BackendError, Result};
use crate::cpu::pack::{packed_words, pieces};
use crate::gpu::buffers::stride;
use crate::gpu::dispatch::{Grid, Rows};
use crate::gpu::experts::Home;
use crate::gpu::lower::{Lower, Place, Recipe, recipe_grid, word};
use crate::graph::{Buf, Graph, Op};

/// Everything that a token's recipes depend on.
pub(in crate::gpu) struct Fuse<'a> {
    /// Lowers ops that no rewrite matches.
    pub lower: Lower<'a>,
    /// How the kernels' teams of 32 sum: the suffix of their names.
    pub team: &'static str,
    pub layout: &'a Layout,
    /// For each MoE layer, the single chunk that holds all its slots.
    pub homes: &'a [Option<Home>],
    /// For each MoE layer, whether experts may be in host memory.
    pub fetches: &'a [bool],
    /// Whether the step's rows are tokens of several sequences, one each.
    pub many: bool,
    /// The row that is at its other place at this op. None at the beginning.
    pub moved: Option<Buf>,
}

/// Bytes that are set aside when a layer halts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gpu) struct Aside<P> {
    /// Where they come from, and go back to before the layer is restarted.
    pub of: P,
    /// Where they are in [`Place::Aside`].
    pub at: usize,
    pub bytes: usize,
}

/// A MoE layer's points in a token's list of dispatches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gpu) struct Points<P> {
    /// Where a step that halted there restarts, once what was set aside is back.
    pub resume: usize,
    pub aside: Vec<Aside<P>>,
    /// Where a step that stopped after its routing continues.
    pub routed: usize,
}

/// One token's dispatches in order: as recipes over places, or bound to a device.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::gpu) struct TokenSteps<T, P> {
    pub steps: Vec<T>,
    /// By MoE layer.
    pub layers: Vec<Points<P>>,
    /// Where the dispatches that only serve the logits begin.
    pub tail: usize,
}

/// A run of ops as recipes.
pub(super) struct Rewritten {
    /// How many ops it replaces.
    pub ops: usize,
    pub recipes: Vec<Recipe>,
    pub flow: Flow,
    /// A routing, whose recipes are made once it is known what it sets aside.
    pub routing: Option<Routing>,
}

impl Rewritten {
    pub fn new(ops: usize, recipes: Vec<Recipe>, reads: &[Value], writes: &[Value]) -> Self {
        let flow = Flow { reads: reads.to_vec(), writes: writes.to_vec(), lasts: false };
        Self { ops, recipes, flow, routing: None }
    }

    /// Marks it as changing persistent state.
    pub const fn lasting(mut self) -> Self {
        self.flow.lasts = true;
        self
    }
}

/// The buffer that holds a value.
pub(super) const fn place((buf, form): Value) -> Place {
    match form {
        Form::Plain => Place::Activation(buf),
        Form::Packed => Place::Packed(buf),
        Form::Moved => Place::Moved(buf),
    }
}

/// Bytes of a value.
fn bytes_of(graph: &Graph, (buf, form): Value) -> usize {
    let width = graph.width(buf);
    4 * match form {
        Form::Plain | Form::Moved => stride(width),
        Form::Packed => packed_words(width),
    }
}

/// The most words that can be set aside: everything.
pub(super) fn aside_words(graph: &Graph) -> usize {
    graph.buffers.iter().map(|buffer| stride(buffer.width) + packed_words(buffer.width)).sum()
}

impl Fuse<'_> {
    /// The graph's step for one token. `None` if the kernels do not support one of its MoE layers,
    /// or its routings are not in the order of the layers.
    pub fn token(&mut self) -> Result<Option<TokenSteps<Recipe, Place>>> {
        let Some(groups) = self.groups()? else { return Ok(None) };
        let flows: Vec<Flow> = groups.iter().map(|group| group.flow.clone()).collect();
        let routings = groups.iter().enumerate().filter(|(_, group)| group.routing.is_some());
        let routings: Vec<usize> = routings.map(|(at, _)| at).collect();
        let mut resumes = resumes(&flows, &routings).into_iter();
        let (mut steps, mut starts, mut layers) = (Vec::new(), Vec::new(), Vec::new());
        let mut tail = 0;
        for group in groups {
            starts.push(steps.len());
            steps.extend(group.recipes);
            if let (Some(routing), Some(resume)) =
                (&group.routing, group.routing.as_ref().and_then(|_| resumes.next()))
            {
                let aside = self.aside(&resume);
                steps.extend(self.route(routing, &aside)?);
                let (resume, routed) = (starts[resume.from], steps.len());
                layers.push((routing.moe, Points { resume, aside, routed }));
            }
            if group.flow.lasts {
                tail = steps.len();
            }
        }
        // A step stops and continues by layer number.
        let in_order = layers.iter().zip(0..).all(|((moe, _), i)| moe.0 == i);
        if !in_order || layers.len() != self.lower.graph.moe.len() {
            return Ok(None);
        }
        let layers = layers.into_iter().map(|(_, points)| points).collect();
        Ok(Some(TokenSteps { steps, layers, tail }))
    }

    /// The graph's step for one token of each of several sequences. `None` if it has an op that
    /// cannot run for them together.
    pub fn rows(&mut self) -> Result<Option<Vec<Recipe>>> {
        let Some(groups) = self.groups()? else { return Ok(None) };
        let mut recipes = Vec::new();
        for group in groups {
            recipes.extend(group.recipes);
            if let Some(routing) = group.routing {
                recipes.extend(self.route(&routing, &[])?);
            }
        }
        Ok(Some(recipes))
    }

    /// The suffix of kernels that have a variant for tokens of several sequences.
    pub(super) const fn together(&self) -> &'static str {
        if self.many { "_together" } else { "" }
    }

    /// A grid of so many workgroups for each row.
    pub(super) fn grid(&self, count: usize) -> Result<Grid> {
        match self.many {
            true => Ok(Grid::Rows { each: word(count)? }),
            false => Ok(workgroups_of(count)),
        }
    }

    /// Where the values set aside for a layer are, one after another.
    fn aside(&self, resume: &Resume) -> Vec<Aside<Place>> {
        let mut end = 0;
        let aside = |value: &Value| {
            let at = end;
            let bytes = bytes_of(self.lower.graph, *value);
            end += bytes;
            Aside { of: place(*value), at, bytes }
        };
        resume.aside.iter().map(aside).collect()
    }

    /// The ops in order, rewritten where a rewrite matches, with the conversions that they need.
    fn groups(&mut self) -> Result<Option<Vec<Rewritten>>> {
        let graph = self.lower.graph;
        let mut forms = Forms::new(graph);
        let mut groups = Vec::new();
        let mut at = 0;
        while let Some(op) = graph.ops.get(at) {
            let mut found = None;
            for rewrite in rewrites(self.lower.reduction) {
                found = rewrite(self, at)?;
                if found.is_some() {
                    break;
                }
            }
            let Some(group) = (match found {
                Some(group) => Some(group),
                None => self.plain(op)?,
            }) else {
                return Ok(None);
            };
            for value in &group.flow.reads {
                groups.extend(forms.bring(self, *value)?);
            }
            forms.written(&group.flow.writes);
            at += group.ops;
            groups.push(group);
        }
        Ok(Some(groups))
    }

    /// An op's own recipes for one row.
    pub(super) fn one_row(&mut self, op: &Op) -> Result<Vec<Recipe>> {
        let mut recipes = self.lower.op(op)?;
        recipes.retain(|recipe| recipe.when.contains(&1));
        Ok(recipes)
    }

    /// An op's own recipes for one row. `None` for experts, which only fused kernels can look up.
    fn plain(&mut self, op: &Op) -> Result<Option<Rewritten>> {
        let refused = matches!(op, Op::Route { .. } | Op::Experts { .. });
        if refused || self.many && !of_each_row(op) {
            return Ok(None);
        }
        let mut recipes = self.one_row(op)?;
        if self.many {
            recipes.iter_mut().for_each(|recipe| recipe.when = 1..=u32::MAX);
        }
        let plain = |buf: Buf| (buf, Form::Plain);
        let reads: Vec<Value> = op.reads().map(plain).collect();
        let writes: Vec<Value> = op.writes().map(plain).into_iter().collect();
        let mut group = Rewritten::new(1, recipes, &reads, &writes);
        group.flow.lasts = op.lasts();
        Ok(Some(group))
    }
}

/// Whether an op does the same to each row, so that it does not matter which sequences they belong to.
const fn of_each_row(op: &Op) -> bool {
    match op {
        Op::Embed { .. }
        | Op::Linear { .. }
        | Op::RmsNorm { .. }
        | Op::LayerNorm { .. }
        | Op::Activate { .. }
        | Op::Scale { .. }
        | Op::WeighInput { .. }
        | Op::Heads { .. }
        | Op::Gated { .. }
        | Op::Add { .. }
        | Op::AddGated { .. } => true,
        // They depend on the position, on a cache or on a state.
        Op::EmbedMore { .. }
        | Op::States { .. }
        | Op::Rope { .. }
        | Op::KvWrite { .. }
        | Op::Attention { .. }
        | Op::AttendChunk { .. }
        | Op::AttendSinks { .. }
        | Op::Conv { .. }
        | Op::Delta { .. }
        | Op::Temper { .. } => false,
        // Their kernels for several rows have their own rewrites.
        Op::Logits { .. } | Op::Route { .. } | Op::Experts { .. } => false,
    }
}

/// For each buffer, the forms in which its value exists.
struct Forms {
    plain: Vec<bool>,
    packed: Vec<bool>,
    moved: Vec<bool>,
}

impl Forms {
    /// A buffer that no op has written contains zeros, in plain form.
    fn new(graph: &Graph) -> Self {
        let count = graph.buffers.len();
        Self { plain: vec![true; count], packed: vec![false; count], moved: vec![false; count] }
    }

    fn written(&mut self, values: &[Value]) {
        for (buf, _) in values {
            let at = usize::from(buf.0);
            (self.plain[at], self.packed[at], self.moved[at]) = (false, false, false);
        }
        for (buf, form) in values {
            *self.there(*buf, *form) = true;
        }
    }

    fn there(&mut self, buf: Buf, form: Form) -> &mut bool {
        let all = match form {
            Form::Plain => &mut self.plain,
            Form::Packed => &mut self.packed,
            Form::Moved => &mut self.moved,
        };
        &mut all[usize::from(buf.0)]
    }

    /// The conversion that makes a value from its other form, unless it already exists.
    fn bring(&mut self, fuse: &Fuse<'_>, (buf, form): Value) -> Result<Option<Rewritten>> {
        if std::mem::replace(self.there(buf, form), true) {
            return Ok(None);
        }
        let cols = fuse.lower.graph.width(buf);
        let params = params::Pack { cols: word(cols)?, pieces: word(pieces(cols))? };
        let (kernel, other) = match form {
            Form::Packed if !self.moved[usize::from(buf.0)] => ("decode_pack", Form::Plain),
            Form::Plain if !self.moved[usize::from(buf.0)] => ("decode_unpack", Form::Packed),
            _ => {
                let what = format!("buffer {} as {form:?} where it was moved", buf.0);
                return Err(BackendError::Unsupported(what));
            }
        };
        let storage = [place((buf, other)), place((buf, form))];
        let grid = fuse.grid(pieces(cols).div_ceil(32))?;
        let recipe = recipe_grid(kernel, &params, &storage, Rows::Tokens, grid);
        Ok(Some(Rewritten::new(0, vec![recipe], &[(buf, other)], &[(buf, form)])))
    }
}
