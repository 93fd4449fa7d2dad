//! A token's experts: decode_route looks the choice up in a table, decode_fetch brings in experts
//! from host memory, decode_expert_gate_up and decode_expert_down run them and sum the results,
//! adding them to the residual if an `Add` follows.
//!
//! No other kernels look up experts within a submission. A layer with more than 1,024 experts or 64
//! choices, with slots in several buffers, or with gates and ups in two formats is not rewritten,
//! and then the graph's tokens are not single submissions. On a software adapter that fetches
//! nothing, the kernels of `rows` run the experts.

use super::super::live::Form;
use super::super::params::{self, Pieces};
use super::super::token::{Aside, Fuse, Rewritten};
use super::{Ops, rows, workgroups_of};
use crate::backend::Result;
use crate::cpu::pack::pieces;
use crate::gpu::dispatch::{Grid, Rows};
use crate::gpu::experts::{Home, SlotShape};
use crate::gpu::lower::{Place, Recipe, ScoringWords, activation_code, recipe_grid, refused, word};
use crate::gpu::pipelines::Reduction;
use crate::graph::{Buf, MoeId, Op, Scoring, WeightId};

/// kernels/decode_route.wgsl
const EXPERTS_MAX: usize = 1024;
const TOP_K_MAX: usize = 64;

/// Workgroups that copy one fetched expert, a part each.
const FETCH_PARTS: usize = 64;

/// A routing whose recipes have not been made yet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::gpu::decode) struct Routing {
    pub moe: MoeId,
    pub(super) logits: Buf,
    pub(super) scoring: Scoring,
    pub(super) bias: Option<WeightId>,
}

/// Where the kernels find a layer's experts, if they support the layer.
fn home<'a>(fuse: &Fuse<'a>, moe: MoeId) -> Option<&'a Home> {
    let spec = fuse.lower.graph.moe_spec(moe);
    let home = fuse.homes.get(usize::from(moe.0))?.as_ref()?;
    let SlotShape { gate, up, .. } = &home.shape;
    let fits = spec.experts.len() <= EXPERTS_MAX
        && (1..=TOP_K_MAX.min(spec.experts.len())).contains(&spec.top_k)
        && gate.0.dtype == up.0.dtype;
    fits.then_some(home)
}

pub(super) fn route(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let graph = fuse.lower.graph;
    let Op::Route { moe, logits, scoring, bias } = graph.ops[at] else { return Ok(None) };
    if home(fuse, moe).is_none() || graph.width(logits) != graph.moe_spec(moe).experts.len() {
        return Ok(None);
    }
    let mut group = Rewritten::new(1, Vec::new(), &[(logits, Form::Plain)], &[]).lasting();
    group.routing = Some(Routing { moe, logits, scoring, bias });
    Ok(Some(group))
}

pub(super) fn experts(fuse: &mut Fuse<'_>, at: usize) -> Result<Option<Rewritten>> {
    let graph = fuse.lower.graph;
    let mut ops = Ops::new(graph, at);
    let Some(&Op::Experts { moe, x, out }) = ops.next() else { return Ok(None) };
    let spec = graph.moe_spec(moe);
    let Some(home) = home(fuse, moe) else { return Ok(None) };
    if (graph.width(x), graph.width(out)) != (spec.hidden, spec.hidden) {
        return Ok(None);
    }
    if fuse.by_rows(moe) {
        return rows::experts(fuse, (moe, x, out), home).map(Some);
    }
    let stream = match ops.next() {
        Some(&Op::Add { x: to, y })
            if y == out && to != out && graph.width(to) == spec.hidden && ops.dead(out) =>
        {
            Some(to)
        }
        _ => None,
    };
    let result = stream.unwrap_or(out);
    let mut recipes = Vec::new();
    if fuse.fetches(moe) {
        recipes.push(fetch(moe, home, spec.top_k)?);
    }
    recipes.extend(fuse.expert_products(moe, home, x, result, stream.is_some())?);
    let mut reads = vec![(x, Form::Packed)];
    reads.extend(stream.map(|buf| (buf, Form::Plain)));
    let consumed = 1 + usize::from(stream.is_some());
    Ok(Some(Rewritten::new(consumed, recipes, &reads, &[(result, Form::Plain)]).lasting()))
}

/// Fetches experts that the routing missed from host memory into slots.
fn fetch(moe: MoeId, home: &Home, top_k: usize) -> Result<Recipe> {
    let quads = word(home.shape.stride / 16)?;
    let params = params::Fetch { quads, parts: word(FETCH_PARTS)? };
    let storage = [Place::Spill(moe), Place::Fetches, Place::Slots(home.chunk)];
    let grid = workgroups_of(FETCH_PARTS * top_k);
    Ok(recipe_grid("decode_fetch", &params, &storage, Rows::Tokens, grid))
}

/// Sets aside one more value at a layer that halts.
pub(super) fn aside(moe: MoeId, value: &Aside<Place>) -> Result<Recipe> {
    let quads = value.bytes / 16;
    let halt = u32::from(moe.0) + 1;
    let params = params::Aside { quads: word(quads)?, at: word(value.at / 16)?, halt };
    let storage = [value.of, Place::State, Place::Aside];
    let grid = workgroups_of(quads.div_ceil(256));
    Ok(recipe_grid("decode_aside", &params, &storage, Rows::Tokens, grid))
}

impl Fuse<'_> {
    /// Whether a token fetches a layer's experts from host memory.
    fn fetches(&self, moe: MoeId) -> bool {
        self.fetches.get(usize::from(moe.0)).is_some_and(|fetches| *fetches)
    }

    fn by_rows(&self, moe: MoeId) -> bool {
        self.lower.reduction == Reduction::Lane && !self.fetches(moe)
    }

    /// A layer's routing, which sets aside what is needed to restart the layer if it halts.
    pub(in crate::gpu::decode) fn route(
        &mut self,
        routing: &Routing,
        kept: &[Aside<Place>],
    ) -> Result<Vec<Recipe>> {
        let Routing { moe, logits, scoring, bias } = *routing;
        if self.by_rows(moe) {
            return rows::route(self, routing, kept);
        }
        let (graph, layout) = (self.lower.graph, self.layout);
        let spec = graph.moe_spec(moe);
        // Without slots there is nothing to look up, and any class will do.
        let class = home(self, moe).map_or(0, |home| home.class);
        // The routing itself saves one value, which it reads as f32.
        let (first, more) = match kept.split_first() {
            Some((first, more)) if matches!(first.of, Place::Activation(_)) => (Some(first), more),
            _ => (None, kept),
        };
        let scoring = ScoringWords::of(scoring);
        let params = params::Route {
            experts: word(spec.experts.len())?,
            top_k: word(spec.top_k)?,
            renormalise: scoring.renormalise,
            table_at: word(layout.row(moe))?,
            ids_at: word(layout.ids_at[usize::from(moe.0)])?,
            halt: u32::from(moe.0) + 1,
            quads: word(first.map_or(0, |first| first.bytes / 16))?,
            spill_at: word(layout.spill_row(moe))?,
            free_at: word(layout.offer_at(class))?,
            taker_at: word(layout.taker_at)?,
            taken_at: word(layout.taker_at + 1 + usize::from(class))?,
            sigmoid: scoring.sigmoid,
            biased: scoring.biased(bias),
            scale: scoring.scale,
            groups: scoring.groups,
            kept: scoring.kept,
            state_stride: word(layout.state_words)?,
        };
        if !scoring.holds(spec.experts.len(), bias) {
            return Err(refused("experts in such groups".into()));
        }
        let x = first.map_or(Place::Activation(logits), |first| first.of);
        let storage = [
            Place::Activation(logits),
            Place::ExpertPlaces,
            x,
            Place::State,
            Place::Routed,
            Place::Aside,
            Place::Fetches,
            self.lower.selection(bias, spec.experts.len())?,
        ];
        let kernel = format!("decode_route{}", self.together());
        let grid = if self.many { self.grid(1)? } else { Grid::One };
        let mut recipes = vec![recipe_grid(&kernel, &params, &storage, Rows::Tokens, grid)];
        for value in more {
            recipes.push(aside(moe, value)?);
        }
        Ok(recipes)
    }

    fn expert_products(
        &self,
        moe: MoeId,
        home: &Home,
        x: Buf,
        result: Buf,
        adds: bool,
    ) -> Result<[Recipe; 2]> {
        let spec = self.lower.graph.moe_spec(moe);
        let ((gate, gate_at), (up, up_at), (down, down_at)) =
            (home.shape.gate, home.shape.up, home.shape.down);
        let slot_stride = word(home.shape.stride / 16)?;
        let inner = pieces(spec.ff);
        let ids_at = word(self.layout.ids_at[usize::from(moe.0)])?;
        let state_stride = word(self.layout.state_words)?;
        let count = spec.experts.len();
        let vectors = spec.biases.map(|of| {
            let gate_up = self.lower.biases(of.gate_up, 2 * spec.ff * count)?;
            Ok([gate_up, self.lower.biases(of.down, spec.hidden * count)?])
        });
        let vectors = vectors.transpose()?;
        let biased = if vectors.is_some() { "biased_" } else { "" };
        let first = params::ExpertGateUp {
            gate: Pieces::of(&gate, gate_at),
            up: Pieces::of(&up, up_at),
            rows: word(spec.ff)?,
            pieces: word(inner)?,
            activation: activation_code(spec.activation),
            slot_stride,
            top_k: word(spec.top_k)?,
            ids_at,
            state_stride,
            ..params::ExpertGateUp::default()
        };
        let slots = Place::Slots(home.chunk);
        let mut storage = vec![Place::Packed(x), slots, Place::Routed, Place::PackedInner];
        storage.extend(vectors.iter().flat_map(|[gate_up, _]| [Place::State, *gate_up]));
        let together = self.together();
        let groups = self.grid(inner * 2 * spec.top_k)?;
        let kernel = format!("decode_expert_gate_up_{biased}{}{together}", gate.dtype.file_name());
        let first = self.in_teams(&kernel, &first, &storage, groups);
        let second = params::ExpertDown {
            down: Pieces::of(&down, down_at),
            rows: word(spec.hidden)?,
            top_k: word(spec.top_k)?,
            slot_stride,
            split: word((8 / spec.top_k).max(1))?,
            adds: u32::from(adds),
            ids_at,
            state_stride,
            ..params::ExpertDown::default()
        };
        let result = Place::Activation(result);
        let mut storage = vec![Place::PackedInner, slots, Place::Routed, result];
        storage.extend(vectors.iter().flat_map(|[_, down]| [Place::State, *down]));
        let kernel = format!("decode_expert_down_{biased}{}{together}", down.dtype.file_name());
        let groups = self.grid(spec.hidden.div_ceil(2))?;
        Ok([first, self.in_teams(&kernel, &second, &storage, groups)])
    }
}
