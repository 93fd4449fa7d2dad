//! The building blocks of a decoder. A family calls them in the order of its layers.
//!
//! A block emits ops and declares the weights that they read: name, role, layer, and where the
//! values come from. Blocks know no family. Whatever differs is an argument, so a family whose
//! layers differ in norms, widths, windows or ropes says so layer by layer. Activations of the same
//! name and width share a buffer.

use super::Described;
use super::config::Shape;
use super::rope::RopeSpec;
use crate::graph::{
    Activation, Buf, ExpertTensors, Graph, Kv, KvId, Moe, MoeId, Op, RopeId, Scoring, Tensor,
    Weight, WeightId, WeightRole,
};
use crate::source::{Source, Take};

mod encoder;
mod gemma4;
mod gpt_oss;
mod latent;
mod llama4;
mod recurrent;
mod ungated;

pub use encoder::EncoderLayer;
pub use gemma4::Gemma4Attention;
pub use latent::Latent;
pub use llama4::Llama4Attention;
pub use recurrent::DeltaNet;
pub use ungated::Ungated;

/// A decoder under construction.
pub struct Builder {
    graph: Graph,
    /// The spec and the rotated width of a head, for each rope of the graph.
    ropes: Vec<(RopeSpec, usize)>,
    table: Option<WeightId>,
    layer: Option<usize>,
    /// Norms are stored as the difference from 1.
    has_offset_norms: bool,
    /// Norms of states are layer norms with a bias.
    has_layer_norms: bool,
    /// The output matrix has a bias.
    has_head_bias: bool,
    /// The module that may contain an encoder, whose weights have names of their own.
    root: Option<&'static str>,
    /// The module of the norm before the logits.
    last_norm: &'static str,
}

/// Grouped-query attention in one layer.
#[derive(Debug, Clone)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The factor of `q.k`.
    pub scale: f32,
    /// `None` if this layer has no rotary embedding.
    pub rope: Option<RopeId>,
    /// How many positions a token sees, including its own; `None` means all.
    pub window: Option<usize>,
    /// The cap of scores.
    pub softcap: Option<f32>,
    /// Whether a token does not see those after it.
    pub causal: bool,
    /// Whether the projections of queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
    /// How queries and keys are normalised before the rotation.
    pub norm: QueryKeyNorm,
    /// Whether the checkpoint's queries and keys are laid out for rotation of neighbouring elements.
    /// Needs modules of their own, whole heads that rotate, no biases and no norms.
    pub interleaved: bool,
    /// The module whose rows are the projections of queries, keys and values, in this order. `None`
    /// if each has its own module.
    pub packed: Option<&'static str>,
    /// Whether the projection of queries also has a gate of each head, behind its query, whose sigmoid
    /// multiplies the output. Needs modules of their own and no biases.
    pub gated: bool,
    /// The modules of the norms of queries and keys, and of the output projection.
    pub names: [&'static str; 3],
}

impl Attention {
    /// The plain form: with rope, scaled by `1 / sqrt(head_dim)`, without biases or norms.
    pub fn new(shape: &Shape, rope: RopeId, window: Option<usize>) -> Self {
        let &Shape { heads, kv_heads, head_dim, .. } = shape;
        Self {
            heads,
            kv_heads,
            head_dim,
            scale: (head_dim as f32).powf(-0.5),
            rope: Some(rope),
            window,
            softcap: None,
            causal: true,
            qkv_bias: false,
            out_bias: false,
            norm: QueryKeyNorm::None,
            interleaved: false,
            packed: None,
            gated: false,
            names: ["self_attn.q_norm", "self_attn.k_norm", "self_attn.o_proj"],
        }
    }
}

/// A norm of queries and keys, with its epsilon.
#[derive(Debug, Clone, Copy)]
pub enum QueryKeyNorm {
    None,
    /// Of each head by itself; all heads share a vector.
    Heads(f32),
    /// Of all heads together.
    Whole(f32),
}

/// `down(act(gate(x)) * up(x))`.
#[derive(Debug, Clone, Copy)]
pub struct FeedForward {
    /// The module within the layer.
    pub module: &'static str,
    /// The inner width.
    pub width: usize,
    pub activation: Activation,
    /// Whether all three projections have biases.
    pub bias: bool,
    /// How gate and up are stored.
    pub packed: Packed,
    /// The names of gate, up and down.
    pub names: [&'static str; 3],
}

impl Experts {
    /// Experts named as in most families: `mlp.gate` chooses, without a bias, among
    /// `mlp.experts.N.{gate,up,down}_proj`.
    pub const fn plain(
        experts: usize,
        top_k: usize,
        ff: usize,
        activation: Activation,
        scoring: Scoring,
    ) -> Self {
        Self {
            module: "mlp",
            router: "gate",
            stacks: STACKS,
            gate: "gate_proj",
            up: "up_proj",
            down: "down_proj",
            experts,
            top_k,
            ff,
            activation,
            scoring,
            bias: None,
        }
    }

    /// As Mixtral names its own, within `block_sparse_moe`.
    pub const fn block_sparse(self) -> Self {
        Self { module: "block_sparse_moe", gate: "w1", up: "w3", down: "w2", ..self }
    }
}

impl Shared {
    /// Shared experts as one feed-forward, `mlp.shared_experts`, whose result is added as it is.
    /// `None` without any.
    pub fn plain(width: usize, activation: Activation) -> Option<Self> {
        let plain = FeedForward::plain(width, activation);
        let feed_forward = FeedForward { module: "mlp.shared_experts", ..plain };
        (width > 0).then_some(Self { feed_forward, gate: None })
    }
}

impl FeedForward {
    /// Without biases, with gate and up in separate modules.
    pub const fn plain(width: usize, activation: Activation) -> Self {
        let (packed, names) = (Packed::Apart, ["gate_proj", "up_proj", "down_proj"]);
        Self { module: "mlp", width, activation, bias: false, packed, names }
    }
}

/// How a checkpoint stores the rows of gate and up projections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Packed {
    /// In separate modules.
    #[default]
    Apart,
    /// Both in this module, gates first.
    Halves(&'static str),
}

/// A router and its experts, each of which is a gated feed-forward.
#[derive(Debug, Clone, Copy)]
pub struct Experts {
    /// The module within the layer.
    pub module: &'static str,
    /// The router is `MODULE.ROUTER.weight`.
    pub router: &'static str,
    /// The tensors in which all gates and ups, and all downs, may be stacked.
    pub stacks: [&'static str; 2],
    /// The names of an expert's three matrices.
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub experts: usize,
    /// Experts per token, `1..=experts`.
    pub top_k: usize,
    /// An expert's inner width.
    pub ff: usize,
    pub activation: Activation,
    pub scoring: Scoring,
    /// The tensor within the layer that is added to scores for the choice alone.
    pub bias: Option<&'static str>,
}

/// A feed-forward for every token beside the experts.
#[derive(Debug, Clone, Copy)]
pub struct Shared {
    pub feed_forward: FeedForward,
    /// The module whose single output gates it, through a sigmoid. `None` if it is added as it is.
    pub gate: Option<&'static str>,
}

/// A projection: its module, and which part of it, if it is packed.
struct Module<'a> {
    name: &'a str,
    role: WeightRole,
    bias: bool,
    part: Option<(&'static str, Take)>,
}

/// How Transformers 5 stacks a layer's experts.
const STACKS: [&str; 2] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"];

impl Builder {
    pub fn new(shape: &Shape) -> Self {
        let &Shape { layers, vocab, context_max, .. } = shape;
        let graph = Graph { vocab, context_max, layers, ..Graph::default() };
        Self {
            graph,
            ropes: Vec::new(),
            table: None,
            layer: None,
            has_offset_norms: false,
            has_layer_norms: false,
            has_head_bias: false,
            root: None,
            last_norm: "norm",
        }
    }

    /// The checkpoint's norms are all stored as the difference from 1 (Gemma).
    pub const fn offset_norms(mut self) -> Self {
        self.has_offset_norms = true;
        self
    }

    /// The norm before the logits has another name than `norm`.
    pub const fn last_norm(mut self, name: &'static str) -> Self {
        self.last_norm = name;
        self
    }

    /// A rope that rotates the first `rotary_dim` elements of a head. Equal arguments give the same
    /// rope.
    pub fn rope(&mut self, spec: &RopeSpec, rotary_dim: usize) -> RopeId {
        let wanted = (spec.clone(), rotary_dim);
        let found = self.ropes.iter().position(|rope| *rope == wanted);
        let index = found.unwrap_or_else(|| {
            self.graph.ropes.push(spec.rope(rotary_dim));
            self.ropes.push(wanted);
            self.ropes.len() - 1
        });
        RopeId(u8::try_from(index).expect("a model has few ropes"))
    }

    /// The residual stream, which starts as the tokens' embeddings.
    pub fn embed(&mut self, hidden: usize, scale: f32) -> Buf {
        let out = self.buffer("x", hidden);
        let (name, vocab) = ("model.embed_tokens.weight".to_owned(), self.graph.vocab);
        let table = self.weight(name, WeightRole::Embedding, vocab, hidden, Source::Itself);
        self.table = Some(table);
        self.graph.ops.push(Op::Embed { table, out, scale });
        out
    }

    /// Sets the layer to which the following blocks belong. Their weights are below
    /// `model.layers.L`.
    pub const fn layer(&mut self, layer: usize) {
        self.layer = Some(layer);
    }

    /// `x += block(rms_norm(x))`: a pre-norm sub-block.
    pub fn residual(
        &mut self,
        x: Buf,
        norm: &str,
        eps: f32,
        piece: impl FnOnce(&mut Self, Buf) -> Buf,
    ) {
        let normed = self.norm(x, norm, eps);
        let delta = piece(self, normed);
        self.graph.ops.push(Op::Add { x, y: delta });
    }

    /// `x += experts(y) + shared(y)` with `y = rms_norm(x)`.
    ///
    /// The norm, the router and the choice of experts follow one another, so that the next layer's
    /// choice can be guessed (`walk`).
    pub fn residual_experts(
        &mut self,
        x: Buf,
        (norm, eps): (&str, f32),
        experts: &Experts,
        shared: Option<&Shared>,
    ) {
        let normed = self.norm(x, norm, eps);
        let delta = self.experts(normed, experts);
        self.graph.ops.push(Op::Add { x, y: delta });
        let Some(Shared { feed_forward, gate }) = shared else { return };
        let delta = self.feed_forward(normed, feed_forward);
        let sum = match gate {
            None => Op::Add { x, y: delta },
            Some(name) => {
                let gate = self.buffer("shared_gate", 1);
                let role = WeightRole::Other;
                self.linear(normed, gate, &Module { name, role, bias: false, part: None });
                Op::AddGated { x, y: delta, gate }
            }
        };
        self.graph.ops.push(sum);
    }

    /// `x += rms_norm(block(y))`, where `y` is `x`, or `rms_norm(x)` with the norm `before`: a
    /// sub-block whose result is normalised.
    pub fn residual_normed(
        &mut self,
        x: Buf,
        (before, after): (Option<&str>, &str),
        eps: f32,
        piece: impl FnOnce(&mut Self, Buf) -> Buf,
    ) {
        let input = before.map_or(x, |before| self.norm(x, before, eps));
        let delta = piece(self, input);
        let normed = self.norm(delta, after, eps);
        self.graph.ops.push(Op::Add { x, y: normed });
    }

    /// `rms_norm(x)` with the vector `NAME.weight`, or a layer norm.
    pub fn norm(&mut self, x: Buf, name: &str, eps: f32) -> Buf {
        let width = self.graph.width(x);
        let out = self.buffer("normed", width);
        if self.has_layer_norms {
            self.layer_norm(x, name, eps, out);
            return out;
        }
        let weight = self.norm_weight(name, width);
        self.graph.ops.push(Op::RmsNorm { x, weight, out, eps });
        out
    }

    /// Attention: projections, rope, cache, attention, output projection.
    pub fn attention(&mut self, x: Buf, of: &Attention) -> Buf {
        let &Attention { heads, kv_heads, head_dim, scale, window, softcap, causal, .. } = of;
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let mut first = 0;
        let mut project = |buffer, module, role, width| {
            let out = self.buffer(buffer, width);
            let part = of.packed.map(|module| (module, Take::from(first..first + width)));
            first += width;
            self.linear(x, out, &Module { name: module, role, bias: of.qkv_bias, part });
            out
        };
        let q = project("q", "self_attn.q_proj", WeightRole::Query, q_width);
        let k = project("k", "self_attn.k_proj", WeightRole::Key, kv_width);
        let v = project("v", "self_attn.v_proj", WeightRole::Value, kv_width);
        if of.interleaved {
            for role in [WeightRole::Query, WeightRole::Key] {
                let of_layer = |w: &&mut Weight| w.layer == self.layer && w.role == role;
                let weight = self.graph.weights.iter_mut().find(of_layer);
                let weight = weight.expect("the projection was just added");
                weight.source = std::mem::take(&mut weight.source).permute(head_dim / 2, 2);
            }
        }
        let [q_norm, k_norm, back] = of.names;
        for (x, norm, heads) in [(q, q_norm, heads), (k, k_norm, kv_heads)] {
            let normed = match of.norm {
                QueryKeyNorm::None => None,
                QueryKeyNorm::Heads(eps) => Some((head_dim, eps)),
                QueryKeyNorm::Whole(eps) => Some((heads * head_dim, eps)),
            };
            if let Some((width, eps)) = normed {
                let weight = self.norm_weight(norm, width);
                self.graph.ops.push(Op::RmsNorm { x, weight, out: x, eps });
            }
            if let Some(rope) = of.rope {
                self.graph.ops.push(Op::Rope { x, heads, head_dim, rope });
            }
        }
        let kv = KvId(u16::try_from(self.graph.kv.len()).expect("layers are bounded"));
        self.graph.kv.push(Kv { kv_heads, head_dim });
        self.graph.ops.push(Op::KvWrite { kv, k, v });
        let out = self.buffer("attended", q_width);
        self.graph.ops.push(Op::Attention { kv, q, out, heads, scale, window, softcap, causal });
        if of.gated {
            self.gate_heads(x, out, heads, head_dim);
        }
        let delta = self.buffer("delta", self.graph.width(x));
        let role = WeightRole::AttentionOutput;
        let back = Module { name: back, role, bias: of.out_bias, part: None };
        self.linear(out, delta, &back);
        delta
    }

    /// A dense gated feed-forward.
    pub fn feed_forward(&mut self, x: Buf, of: &FeedForward) -> Buf {
        let gate = self.buffer("gate", of.width);
        let up = self.buffer("up", of.width);
        let (width, bias) = (of.width, of.bias);
        let half = |half: usize| match of.packed {
            Packed::Apart => None,
            Packed::Halves(module) => {
                Some((module, Take { start: half * width, count: width, step: 1 }))
            }
        };
        for (number, out, name, role) in
            [(0, gate, of.names[0], WeightRole::Gate), (1, up, of.names[1], WeightRole::Up)]
        {
            let name = &format!("{}.{name}", of.module);
            self.linear(x, out, &Module { name, role, bias, part: half(number) });
        }
        self.graph.ops.push(Op::Gated { gate, up, out: gate, activation: of.activation });
        let delta = self.buffer("delta", self.graph.width(x));
        let name = &format!("{}.{}", of.module, of.names[2]);
        self.linear(gate, delta, &Module { name, role: WeightRole::Down, bias, part: None });
        delta
    }

    /// Router, choice of experts, and experts.
    ///
    /// Each expert's matrices are separate tensors, or slices of the two [`Experts::stacks`]:
    /// `[experts, 2 ff, hidden]`, gates first, and `[experts, hidden, ff]`.
    pub fn experts(&mut self, x: Buf, of: &Experts) -> Buf {
        let &Experts { module, experts, top_k, ff, activation, scoring, .. } = of;
        let hidden = self.graph.width(x);
        let logits = self.buffer("router", experts);
        let router = self.name(&format!("{module}.{}.weight", of.router));
        let renamed = self.name("mlp.gate.weight");
        let source = match router == renamed {
            true => Source::Itself,
            false => Source::FirstOf(vec![Source::Itself, Source::Stored(renamed)]),
        };
        let weight = self.weight(router, WeightRole::Router, experts, hidden, source);
        self.graph.ops.push(Op::Linear { x, weight, bias: None, out: logits });
        let stacked = |name: &str, start: usize, count: usize| {
            let stack = Source::stored(self.name(name));
            Source::FirstOf(vec![Source::Itself, stack.rows(start..start + count)])
        };
        let tensor = |expert: usize, part: &str, source| {
            let name = self.name(&format!("{module}.experts.{expert}.{part}.weight"));
            Tensor { name, source }
        };
        let list = (0..experts).map(|e| ExpertTensors {
            gate: tensor(e, of.gate, stacked(of.stacks[0], 2 * e * ff, ff)),
            up: tensor(e, of.up, stacked(of.stacks[0], (2 * e + 1) * ff, ff)),
            down: tensor(e, of.down, stacked(of.stacks[1], e * hidden, hidden)),
        });
        let experts = list.collect();
        let moe = MoeId(u16::try_from(self.graph.moe.len()).expect("layers are bounded"));
        let layer = self.layer.expect("experts are in a layer");
        let biases = None;
        self.graph.moe.push(Moe { layer, top_k, hidden, ff, activation, biases, experts });
        let out = self.buffer("delta", hidden);
        let bias = of.bias.map(|name| {
            let name = self.name(name);
            self.weight(name, WeightRole::Bias, 1, of.experts, Source::Itself)
        });
        self.graph.ops.push(Op::Route { moe, logits, scoring, bias });
        self.graph.ops.push(Op::Experts { moe, x, out });
        out
    }

    /// The final norm and the logits, computed with the embedding table if `tied`, otherwise with
    /// `lm_head.weight`.
    pub fn finish(self, x: Buf, eps: f32, tied: bool) -> Described {
        self.close(x, eps, tied, 1.0, None)
    }

    /// As [`Self::finish`], with logits times a factor, which the final norm applies.
    pub fn finish_scaled(self, x: Buf, eps: f32, tied: bool, factor: f32) -> Described {
        self.close(x, eps, tied, factor, None)
    }

    /// As [`Self::finish`], with a cap of the logits.
    pub fn finish_capped(self, x: Buf, eps: f32, tied: bool, softcap: Option<f32>) -> Described {
        self.close(x, eps, tied, 1.0, softcap)
    }

    fn close(
        mut self,
        x: Buf,
        eps: f32,
        tied: bool,
        factor: f32,
        softcap: Option<f32>,
    ) -> Described {
        self.layer = None;
        let normed = self.norm(x, self.last_norm, eps);
        if factor != 1.0
            && let Some(norm) = self.graph.weights.last_mut()
        {
            norm.source = std::mem::take(&mut norm.source).times(factor);
        }
        let vocab = self.graph.vocab;
        let bias = self.has_head_bias.then(|| {
            self.weight("lm_head.bias".to_owned(), WeightRole::Bias, 1, vocab, Source::Itself)
        });
        let weight = match self.table.filter(|_| tied) {
            Some(table) => table,
            None => {
                let (rows, cols) = (self.graph.vocab, self.graph.width(x));
                let name = "lm_head.weight".to_owned();
                self.weight(name, WeightRole::Head, rows, cols, Source::Itself)
            }
        };
        self.graph.ops.push(Op::Logits { x: normed, weight, bias, softcap });
        let ropes = self.ropes.into_iter().map(|(spec, _)| spec).collect();
        Described { graph: self.graph, ropes, embedding: None }
    }

    /// `out = x . MODULE.weight^T (+ MODULE.bias)`.
    fn linear(&mut self, x: Buf, out: Buf, module: &Module<'_>) {
        let &Module { name, role, bias, part } = module;
        let (rows, cols) = (self.graph.width(out), self.graph.width(x));
        // A part of a bias is some columns of its single row.
        let source = |builder: &Self, end: &str| {
            part.map(|(packed, take)| {
                (Source::Stored(builder.name(&format!("{packed}.{end}"))), take)
            })
        };
        let whole = source(self, "weight");
        let tensor = self.name(&format!("{name}.weight"));
        let itself = |tensor: &str| self.rooted_source(tensor);
        let from = whole.map_or_else(|| itself(&tensor), |(source, take)| source.rows(take));
        let weight = self.weight(tensor, role, rows, cols, from);
        let bias = bias.then(|| {
            let whole = source(self, "bias");
            let name = self.name(&format!("{name}.bias"));
            let itself = || self.rooted_source(&name);
            let from = whole.map_or_else(itself, |(source, take)| source.cols(take));
            self.weight(name, WeightRole::Bias, 1, rows, from)
        });
        self.graph.ops.push(Op::Linear { x, weight, bias, out });
    }

    /// The vector `NAME.weight` of a norm.
    fn norm_weight(&mut self, name: &str, width: usize) -> WeightId {
        let name = self.name(&format!("{name}.weight"));
        let source = match self.has_offset_norms {
            true => Source::Itself.add_one(),
            false => self.rooted_source(&name),
        };
        self.weight(name, WeightRole::Norm, 1, width, source)
    }

    /// A tensor's name within the current layer.
    fn name(&self, rest: &str) -> String {
        match (self.root, self.layer) {
            (None, Some(layer)) => format!("model.layers.{layer}.{rest}"),
            (None, None) => format!("model.{rest}"),
            (Some(_), Some(layer)) => format!("encoder.layer.{layer}.{rest}"),
            (Some(_), None) => rest.to_owned(),
        }
    }

    fn weight(
        &mut self,
        tensor: String,
        role: WeightRole,
        rows: usize,
        cols: usize,
        source: Source,
    ) -> WeightId {
        let layer = self.layer;
        self.graph.add_weight(Weight { tensor, rows, cols, role, layer, source })
    }

    fn buffer(&mut self, name: &'static str, width: usize) -> Buf {
        let found = self.graph.buffers.iter().position(|b| b.name == name && b.width == width);
        match found {
            Some(index) => Buf(u16::try_from(index).expect("a graph has few buffers")),
            None => self.graph.buffer(name, width),
        }
    }
}
