//! A fused graph as dispatches: eight a dense layer, ten a MoE layer, eleven where it fetches experts.
//!
//! | | kernel |
//! |---|---|
//! | norm, packed | decode_norm |
//! | queries, keys, values | decode_linear |
//! | head norms, rotary positions, cache, attention by splits of the context | decode_attention |
//! | the splits together, packed | decode_combine |
//! | output product, added to the stream | decode_linear |
//! | norm, packed | decode_norm |
//! | gate, up, activation; down, added | decode_gate_up, decode_linear |
//! | or: router, choice | decode_linear, decode_route |
//! | where experts lie in memory of the host: those that are missed | decode_fetch |
//! | experts' gate, up, activation; down, weighted sum, added | decode_expert_gate_up, decode_expert_down |

use wgpu::Buffer;

use super::buffers::{DecodeBuffers, SPLITS_MAX};
use super::fuse::{Biased, FeedForward, Fused, Layer, Norm};
use super::params::{self, Pieces, pieces};
use crate::backend::Result;
use crate::gpu::dispatch::{Dispatch, Grid, Rows};
use crate::gpu::lower::{activation_code, refused, word};
use crate::gpu::params::Params;
use crate::gpu::pipelines::format_name;
use crate::gpu::plan::Builder;
use crate::gpu::weights::{Piece, join, matrix, vector};
use crate::graph::{Activation, MoeId, WeightId};
use doppler_store::DType;

/// One token's dispatches in order.
pub(in crate::gpu) struct Sequence {
    pub steps: Vec<Dispatch>,
    /// By MoE layer: where a step that halted there is begun again.
    pub resume: Vec<usize>,
    /// By MoE layer: where a step that stopped after its routing goes on.
    pub routed: Vec<usize>,
    /// Where the final norm and the logits begin.
    pub logits: usize,
}

/// Workgroups that share the bytes of one fetched expert.
const FETCH_SHARES: usize = 64;

/// Query heads of one key head in a workgroup of decode_attention.
const HEADS_TOGETHER: usize = 4;

/// Teams wanted for one dispatch, so that a big GPU is full.
const TEAMS_WANTED: usize = 5000;

impl Sequence {
    /// `embed` looks the token up.
    pub fn new(
        builder: &mut Builder<'_>,
        fused: &Fused,
        buffers: &DecodeBuffers,
        embed: Vec<Dispatch>,
    ) -> Result<Self> {
        let parts = builder.parts;
        let begins = vec![0; parts.graph.moe.len()];
        let sequence = Self { steps: embed, resume: begins.clone(), routed: begins, logits: 0 };
        let mut make = Make { builder, fused, buffers, sequence };
        for layer in &fused.layers {
            make.attention(layer)?;
            make.feed_forward(layer)?;
        }
        make.sequence.logits = make.sequence.steps.len();
        make.norm(&fused.norm)?;
        make.output()?;
        Ok(make.sequence)
    }
}

struct Make<'a, 'b> {
    builder: &'a mut Builder<'b>,
    fused: &'a Fused,
    buffers: &'a DecodeBuffers,
    sequence: Sequence,
}

/// What `linear` multiplies and where the result goes.
struct Product<'a> {
    x: &'a Buffer,
    bias: Option<&'a Buffer>,
    result: &'a Buffer,
    adds: bool,
}

impl<'b> Make<'_, 'b> {
    fn push(
        &mut self,
        kernel: &str,
        params: &impl Params,
        storage: &[&Buffer],
        grid: Grid,
    ) -> Result<()> {
        let dispatch = self.builder.dispatch_grid(kernel, params, storage, Rows::Tokens, grid)?;
        self.sequence.steps.push(dispatch);
        Ok(())
    }

    /// As `push`, for a kernel that sums in teams.
    fn push_team(
        &mut self,
        kernel: &str,
        params: &impl Params,
        storage: &[&Buffer],
        grid: Grid,
    ) -> Result<()> {
        let team = self.builder.parts.device.team();
        self.push(&format!("{kernel}_{team}"), params, storage, grid)
    }

    fn stream(&self) -> &'b Buffer {
        self.builder.parts.buffers.activation(self.fused.x)
    }

    fn norm(&mut self, norm: &Norm) -> Result<()> {
        let parts = self.builder.parts;
        let cols = parts.graph.width(self.fused.x);
        let params = params::Norm { cols: word(cols)?, pieces: word(pieces(cols))?, eps: norm.eps };
        let weight = vector(parts.graph, parts.weights, norm.weight)?;
        let storage = [self.stream(), weight, &self.buffers.normed];
        self.push_team("decode_norm", &params, &storage, workgroups_of(pieces(cols).div_ceil(32)))
    }

    /// The one piece of a matrix that is not split.
    fn piece(&self, id: WeightId) -> Result<&'b Piece> {
        let parts = self.builder.parts;
        match matrix(parts.graph, parts.weights, id)? {
            [piece] => Ok(piece),
            _ => Err(refused(format!("{} in pieces", parts.graph.weight_spec(id).tensor))),
        }
    }

    /// Up to three pieces of matrices in one buffer; each result goes after the one before,
    /// or to its own rows if there is one only.
    fn linear(&mut self, of: &[&'b Piece], product: &Product<'_>) -> Result<()> {
        let [first, ..] = of else { return Ok(()) };
        if of.len() > 3 || of.iter().any(|piece| piece.buffer != first.buffer) {
            return Err(refused("matrices read together in several buffers".into()));
        }
        let rows: usize = of.iter().map(|piece| piece.packed.rows).sum();
        let split = split(rows, params::items(&first.packed));
        let each = 8 / split;
        let mut params = params::Linear {
            split: word(split)?,
            has_bias: u32::from(product.bias.is_some()),
            adds: u32::from(product.adds),
            ..params::Linear::default()
        };
        let (mut end, mut result_at) = (0, 0);
        for (segment, i) in params.segments.iter_mut().zip(0..) {
            // Segments that there are not end where the last one does.
            let Some(piece) = of.get(i) else {
                segment.end = u32::MAX;
                continue;
            };
            let m = Pieces::of(&piece.packed, piece.at);
            end += piece.packed.rows.div_ceil(each);
            *segment = params::Segment {
                base: m.base,
                blocks: m.blocks,
                row_blocks: m.row_blocks,
                pieces: m.pieces,
                format: m.format,
                rows: word(piece.packed.rows)?,
                result_at: word(result_at + piece.row_start)?,
                end: word(end)?,
            };
            result_at += piece.packed.rows;
        }
        let bias = product.bias.unwrap_or(&self.builder.parts.buffers.empty);
        let storage = [product.x, &first.buffer, bias, product.result];
        let kernel =
            format!("decode_linear_{}", formats(of.iter().map(|piece| piece.packed.dtype)));
        self.push_team(&kernel, &params, &storage, workgroups_of(end))
    }

    fn attention(&mut self, layer: &Layer) -> Result<()> {
        let parts = self.builder.parts;
        self.norm(&layer.norm)?;
        self.qkv(layer)?;
        let cache = parts.buffers.kv(layer.kv);
        let empty = &parts.buffers.empty;
        let (norms, eps) = match layer.head_norms {
            Some((ids, eps)) => {
                let [q, k] = ids.map(|id| vector(parts.graph, parts.weights, id));
                (Some([q?, k?]), eps)
            }
            None => (None, 0.0),
        };
        let [q_norm, k_norm] = norms.unwrap_or([empty, empty]);
        let [heads, kv_heads, head_dim] =
            [word(layer.heads)?, word(layer.kv_heads)?, word(layer.head_dim)?];
        let window = word(layer.window.unwrap_or(0))?;
        let attend = params::Attention {
            heads,
            kv_heads,
            head_dim,
            pairs: word(parts.graph.rope_spec(layer.rope).inv_freq.len())?,
            window,
            splits_max: SPLITS_MAX,
            normed: u32::from(norms.is_some()),
            eps,
            scale: layer.scale,
        };
        let DecodeBuffers { qkv, partial, attended, .. } = self.buffers;
        let turns = parts.buffers.rope(layer.rope);
        let storage = [qkv, q_norm, k_norm, turns, &cache.keys, &cache.values, partial];
        let each = kv_heads * word((layer.heads / layer.kv_heads).div_ceil(HEADS_TOGETHER))?;
        let grid = Grid::Splits { each, window, most: SPLITS_MAX };
        self.push_team("decode_attention", &attend, &storage, grid)?;
        let width = layer.heads * layer.head_dim;
        let pieces = word(pieces(width))?;
        let splits_max = SPLITS_MAX;
        let combine = params::Combine { heads, head_dim, window, splits_max, pieces };
        let groups = workgroups_of(width.div_ceil(64));
        self.push("decode_combine", &combine, &[partial, attended], groups)?;
        self.onto_stream(layer.out, attended)
    }

    /// Queries, keys and values one after the other; one dispatch if their matrices lie together.
    fn qkv(&mut self, layer: &Layer) -> Result<()> {
        let parts = self.builder.parts;
        let bias = match layer.qkv[0].1 {
            Some(_) => {
                let ids: Vec<WeightId> = layer.qkv.iter().filter_map(|(_, bias)| *bias).collect();
                Some(join(parts.device, parts.graph, parts.weights, &ids)?)
            }
            None => None,
        };
        let mut of = Vec::new();
        for (id, _) in layer.qkv {
            of.push(self.piece(id)?);
        }
        let DecodeBuffers { normed, qkv, .. } = self.buffers;
        let product = Product { x: normed, bias: bias.as_ref(), result: qkv, adds: false };
        self.linear(&of, &product)
    }

    /// The stream plus the product of `x`.
    fn onto_stream(&mut self, (weight, bias): Biased, x: &Buffer) -> Result<()> {
        let parts = self.builder.parts;
        let bias = bias.map(|id| vector(parts.graph, parts.weights, id)).transpose()?;
        let result = self.stream();
        let piece = self.piece(weight)?;
        self.linear(&[piece], &Product { x, bias, result, adds: true })
    }

    fn feed_forward(&mut self, layer: &Layer) -> Result<()> {
        let begin = self.sequence.steps.len();
        self.norm(&layer.ff_norm)?;
        match layer.ff {
            FeedForward::Dense { gate, up, down, activation } => {
                self.gate_up(gate, up, activation)?;
                let inner = &self.buffers.inner;
                self.onto_stream(down, inner)
            }
            FeedForward::Experts { router, moe, renormalise } => {
                let index = usize::from(moe.0);
                self.sequence.resume[index] = begin;
                self.route(router, moe, renormalise)?;
                self.sequence.routed[index] = self.sequence.steps.len();
                self.fetch(moe)?;
                self.experts(moe)
            }
        }
    }

    fn gate_up(&mut self, gate: WeightId, up: WeightId, activation: Activation) -> Result<()> {
        let (gate, up) = (self.piece(gate)?, self.piece(up)?);
        if gate.buffer != up.buffer || gate.packed != up.packed {
            return Err(refused("a gate and an up that do not lie together".into()));
        }
        let rows = gate.packed.rows;
        let params = params::GateUp {
            gate: Pieces::of(&gate.packed, gate.at),
            up: Pieces::of(&up.packed, up.at),
            rows: word(rows)?,
            pieces: word(pieces(rows))?,
            activation: activation_code(activation),
            ..params::GateUp::default()
        };
        let DecodeBuffers { normed, inner, .. } = self.buffers;
        let storage = [normed, &gate.buffer, inner];
        let kernel = format!("decode_gate_up_{}", format_name(gate.packed.dtype));
        self.push_team(&kernel, &params, &storage, workgroups_of(pieces(rows) * 2))
    }

    fn route(&mut self, router: Biased, moe: MoeId, renormalise: bool) -> Result<()> {
        let parts = self.builder.parts;
        let spec = parts.graph.moe_spec(moe);
        let DecodeBuffers { normed, router: logits, routed, aside, state, fetches, table, .. } =
            self.buffers;
        let taker_at = self.buffers.taker_at;
        // Without slots there is nothing to look up.
        let class = parts.experts.class_of(moe).unwrap_or(0);
        let bias = router.1.map(|id| vector(parts.graph, parts.weights, id)).transpose()?;
        let piece = self.piece(router.0)?;
        self.linear(&[piece], &Product { x: normed, bias, result: logits, adds: false })?;
        let params = params::Route {
            experts: word(spec.experts.len())?,
            top_k: word(spec.top_k)?,
            renormalise: u32::from(renormalise),
            table_at: word(table.row(moe))?,
            ids_at: word(self.buffers.ids_at[usize::from(moe.0)])?,
            halt: u32::from(moe.0) + 1,
            quads: word(spec.hidden.div_ceil(4))?,
            shelf_at: word(table.shelf_row(moe))?,
            free_at: word(table.offer_at(class))?,
            taker_at: word(taker_at)?,
            taken_at: word(taker_at + 1 + usize::from(class))?,
        };
        let storage = [logits, &table.buffer, self.stream(), state, routed, aside, fetches];
        self.push("decode_route", &params, &storage, Grid::One)
    }

    /// What the routing missed and memory of the host holds goes into slots.
    fn fetch(&mut self, moe: MoeId) -> Result<()> {
        let parts = self.builder.parts;
        let spec = parts.graph.moe_spec(moe);
        let Some(area) = parts.spill.and_then(|spill| spill.area(moe)) else { return Ok(()) };
        let Some((chunk, shape)) = parts.experts.home(moe, spec) else { return Ok(()) };
        let params = params::Fetch { quads: word(shape.stride / 16)?, shares: word(FETCH_SHARES)? };
        let storage = [area, &self.buffers.fetches, &chunk.buffer];
        self.push("decode_fetch", &params, &storage, workgroups_of(FETCH_SHARES * spec.top_k))
    }

    fn experts(&mut self, moe: MoeId) -> Result<()> {
        let parts = self.builder.parts;
        let spec = parts.graph.moe_spec(moe);
        let (chunk, shape) = parts
            .experts
            .home(moe, spec)
            .ok_or_else(|| refused(format!("layer {}'s experts in several buffers", spec.layer)))?;
        let ((gate, gate_at), (up, up_at), (down, down_at)) = (shape.gate, shape.up, shape.down);
        if gate.dtype != up.dtype {
            return Err(refused(format!("experts with {} gates and {} ups", gate.dtype, up.dtype)));
        }
        let slot_stride = word(shape.stride / 16)?;
        let inner_pieces = pieces(spec.ff);
        let first = params::ExpertGateUp {
            gate: Pieces::of(&gate, gate_at),
            up: Pieces::of(&up, up_at),
            rows: word(spec.ff)?,
            pieces: word(inner_pieces)?,
            activation: activation_code(spec.activation),
            slot_stride,
            ..params::ExpertGateUp::default()
        };
        let DecodeBuffers { normed, inner, routed, .. } = self.buffers;
        let storage = [normed, &chunk.buffer, routed, inner];
        let groups = workgroups_of(inner_pieces * 2 * spec.top_k);
        let kernel = format!("decode_expert_gate_up_{}", format_name(gate.dtype));
        self.push_team(&kernel, &first, &storage, groups)?;
        let second = params::ExpertDown {
            down: Pieces::of(&down, down_at),
            rows: word(spec.hidden)?,
            top_k: word(spec.top_k)?,
            slot_stride,
            split: word((8 / spec.top_k).max(1))?,
            ..params::ExpertDown::default()
        };
        let storage = [inner, &chunk.buffer, routed, self.stream()];
        let kernel = format!("decode_expert_down_{}", format_name(down.dtype));
        self.push_team(&kernel, &second, &storage, workgroups_of(spec.hidden.div_ceil(2)))
    }

    fn output(&mut self) -> Result<()> {
        let parts = self.builder.parts;
        let result = &parts.buffers.logits;
        let normed = &self.buffers.normed;
        for piece in matrix(parts.graph, parts.weights, self.fused.output)? {
            self.linear(&[piece], &Product { x: normed, bias: None, result, adds: false })?;
        }
        Ok(())
    }
}

/// Which decode_linear: one format, a mixture's two, or any.
fn formats(of: impl Iterator<Item = DType> + Clone) -> &'static str {
    let first = of.clone().next().map_or("any", format_name);
    if of.clone().all(|dtype| format_name(dtype) == first) {
        return first;
    }
    let only = |other| of.clone().all(|dtype| dtype == DType::Q4K || dtype == other);
    match () {
        () if only(DType::Q6K) => "q4_k_q6_k",
        () if only(DType::Q8_0) => "q4_k_q8_0",
        () => "any",
    }
}

/// Teams that share a row of so many items: enough for a big GPU, while each has a full round of work.
fn split(rows: usize, items: usize) -> usize {
    let mut split = 1;
    while split < 8 && rows * split < TEAMS_WANTED && items >= split * 2 * 32 {
        split *= 2;
    }
    split
}

const fn workgroups_of(count: usize) -> Grid {
    Grid::Items { items: count as u64, per_workgroup: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_takes_the_narrowest_kernel() {
        let named = |of: &[DType]| formats(of.iter().copied());
        assert_eq!(named(&[DType::Q6K]), "q6_k");
        assert_eq!(named(&[DType::Q8_0; 3]), "q8_0");
        assert_eq!(named(&[DType::Q4K, DType::Q4K, DType::Q6K]), "q4_k_q6_k");
        assert_eq!(named(&[DType::Q4K, DType::Q8_0, DType::Q8_0]), "q4_k_q8_0");
        assert_eq!(named(&[DType::Q4K, DType::Q5K, DType::Q6K]), "any");
        assert_eq!(named(&[DType::F32, DType::Bf16]), "any");
    }

    #[test]
    fn a_row_is_shared_only_while_there_is_work_for_each_team() {
        assert_eq!(split(28_672, 128), 1);
        assert_eq!(split(4096, 128), 2);
        assert_eq!(split(2048, 128), 4);
        assert_eq!(split(128, 64), 2);
        assert_eq!(split(128, 448), 8);
        assert_eq!(split(1, 2), 1);
    }
}
