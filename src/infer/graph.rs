//! The op list that a model family emits: what one step computes, over which buffers and weights.
//! It says nothing about how, and knows no backend.
//!
//! A step runs the ops in order for a batch of consecutive tokens of one
//! sequence (decode: one token). Activations are f32, row-major `[rows, width]`.
//! Indices into the graph's tables are newtypes; a graph is immutable once built.

use super::source::Source;
use doppler_store::DType;

/// Index into [`Graph::buffers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Buf(pub u16);

/// Index into [`Graph::weights`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub u32);

/// Index into [`Graph::ropes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RopeId(pub u8);

/// Index into [`Graph::kv`]: an attention layer's key/value cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KvId(pub u16);

/// Index into [`Graph::moe`]: a mixture-of-experts layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MoeId(pub u16);

/// Index into [`Graph::states`]: the recurrent state of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StateId(pub u16);

/// An activation buffer: `width` f32 for each token of the batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    pub name: &'static str,
    pub width: usize,
}

/// A resident tensor of the trunk: a matrix `[rows, cols]`, or a vector with `rows == 1`.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// The tensor's name in the manifest.
    pub tensor: String,
    pub rows: usize,
    pub cols: usize,
    pub role: WeightRole,
    /// The decoder layer it belongs to; `None` for what is before or after the layers.
    pub layer: Option<usize>,
    /// How it is made from a checkpoint's tensors.
    pub source: Source,
}

/// What a weight is for. Decides how it is stored and which adapters may change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum WeightRole {
    /// Tokens to states; also the output matrix where the two are tied.
    Embedding,
    /// States to logits.
    Head,
    Norm,
    Bias,
    Router,
    Query,
    Key,
    Value,
    /// The projection back from attention.
    AttentionOutput,
    /// A matrix that adapters do not know under this name, or not in this layout.
    Projection,
    /// The three matrices of a gated feed-forward, dense or of an expert.
    Gate,
    Up,
    Down,
    #[default]
    Other,
}

impl WeightRole {
    /// What adapters call the module, if they change this matrix (`target_modules` of PEFT's LoRA
    /// configs).
    pub const fn adapter_target(self) -> Option<&'static str> {
        match self {
            Self::Query => Some("q_proj"),
            Self::Key => Some("k_proj"),
            Self::Value => Some("v_proj"),
            Self::AttentionOutput => Some("o_proj"),
            Self::Gate => Some("gate_proj"),
            Self::Up => Some("up_proj"),
            Self::Down => Some("down_proj"),
            Self::Head => Some("lm_head"),
            Self::Embedding => Some("embed_tokens"),
            Self::Norm | Self::Bias | Self::Router | Self::Projection | Self::Other => None,
        }
    }
}

/// Rotary position embedding of the "rotate half" form: pair `i` of a head is
/// `(x[i], x[i + rotary_dim / 2])`, rotated by `position * inv_freq[i]` and scaled by
/// `attention_factor`. Elements past `rotary_dim` pass through.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// `rotary_dim / 2` inverse frequencies, scaling already applied.
    pub inv_freq: Vec<f32>,
    pub attention_factor: f32,
    /// The frequencies of long sequences, if they differ.
    pub long: Option<LongRope>,
}

/// Frequencies for all positions of a sequence that is longer than the original context.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// As many as the short ones.
    pub inv_freq: Vec<f32>,
    /// The original context, in tokens.
    pub from: usize,
}

impl Rope {
    /// The form for long sequences, or for others. Without a form of its own, the same.
    pub fn form(&self, long: bool) -> &[f32] {
        match &self.long {
            Some(other) if long => &other.inv_freq,
            _ => &self.inv_freq,
        }
    }
}

/// One attention layer's cache: keys and values of `kv_heads * head_dim` a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kv {
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// One layer's recurrent state: what a token passes on to the next one, whatever the position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// f32 elements.
    pub width: usize,
}

/// A tensor's name in the manifest, and how it is made from a checkpoint's tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub source: Source,
}

impl From<&str> for Tensor {
    fn from(name: &str) -> Self {
        Self { name: name.to_owned(), source: Source::Itself }
    }
}

/// The tensors of one expert.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertTensors {
    /// `[ff, hidden]`
    pub gate: Tensor,
    /// `[ff, hidden]`
    pub up: Tensor,
    /// `[hidden, ff]`
    pub down: Tensor,
}

/// A mixture-of-experts layer. Its experts are paged; its router is in the trunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// The model's layer number.
    pub layer: usize,
    pub top_k: usize,
    pub hidden: usize,
    /// The experts' inner width.
    pub ff: usize,
    pub activation: Activation,
    pub biases: Option<ExpertBiases>,
    /// One entry per expert.
    pub experts: Vec<ExpertTensors>,
}

/// The biases of a layer's experts. They are in the trunk, so an expert's bytes are its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertBiases {
    /// A vector of `[experts, ff, 2]`: each row's gate and up.
    pub gate_up: WeightId,
    /// A vector of `[experts, hidden]`.
    pub down: WeightId,
}

impl Moe {
    /// The weights of one expert: gate, up and down.
    pub fn weights(&self, expert: usize) -> [Weight; 3] {
        let ExpertTensors { gate, up, down } = &self.experts[expert];
        let weight = |tensor: &Tensor, role, rows, cols| Weight {
            tensor: tensor.name.clone(),
            rows,
            cols,
            role,
            layer: Some(self.layer),
            source: tensor.source.clone(),
        };
        [
            weight(gate, WeightRole::Gate, self.ff, self.hidden),
            weight(up, WeightRole::Up, self.ff, self.hidden),
            weight(down, WeightRole::Down, self.hidden, self.ff),
        ]
    }
}

/// The activation of a feed-forward, of its gate if it has one: `act(gate) * up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// `x * Phi(x)`, with the error function itself.
    Gelu,
    /// `max(x, 0)^2`
    SquaredRelu,
    /// `tanh(x)`
    Tanh,
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// Of experts with biases alone, and of gate and up together: with the gate at most 7 and the up
    /// in -7 .. 7, `gate * sigmoid(1.702 gate) * (up + 1)`. (gpt-oss.)
    Clamped,
}

/// What a short convolution reads and what becomes of its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConvForm {
    /// Rows of three parts `b`, `c`, `x`: `c * conv(b * x)`. (LFM2.)
    Gated,
    /// `silu(conv(x))`. (Gated delta nets.)
    Silu,
}

/// The heads of a gated delta net. Those of keys and queries are shared by `heads / key_heads`
/// neighbouring ones of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaShape {
    pub key_heads: usize,
    pub heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
}

impl DeltaShape {
    /// The width of queries, keys and values together.
    pub const fn x_width(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.heads * self.value_dim
    }

    /// f32 elements of its state.
    pub const fn state_width(&self) -> usize {
        self.heads * self.key_dim * self.value_dim
    }
}

/// Where a part of each head lies in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Of the first head.
    pub start: usize,
    /// From one head to the next; 0 if all heads read the same.
    pub stride: usize,
}

/// How router logits become the weights of the chosen experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scoring {
    /// Softmax over all experts; the chosen top-k are renormalised to sum to 1 if asked. (Mixtral;
    /// Qwen3-MoE with `norm_topk_prob`.) Ties go to the lower expert id.
    Softmax { renormalise: bool },
    /// The sigmoid of each expert's own logit; those of the chosen top-k are divided by their sum
    /// if asked, then multiplied by `scale`. (GLM-4.5, MiniMax-M2.)
    Sigmoid { renormalise: bool, scale: f32 },
    /// As [`Self::Softmax`], renormalised; each weight is then multiplied by its expert's factor, which
    /// stands in the place of the bias and does not choose. (Gemma 4.)
    Scaled,
    /// As [`Self::Sigmoid`] with a bias, among the experts of the `kept` best of `groups` groups of
    /// neighbours: those whose two best scores plus bias have the largest sums. The others' scores
    /// count as 0. (DeepSeek-V3; as in Transformers.)
    Grouped { renormalise: bool, scale: f32, groups: u32, kept: u32 },
    /// Each choice by its own softmax, over the experts not chosen before that are close to it:
    /// `best - l <= 2 jitter max(|l|, best)`. Nothing is renormalised. (SparseMixer, Liu et al.,
    /// arXiv 2310.00811; Phi-3.5-MoE.) Without a bias.
    Mixer { jitter: f32 },
}

/// The bits of a token that is fed to a model above its id: its segment, for encoders that tell two
/// parts of a text apart.
const SEGMENT_SHIFT: u32 = 24;

/// A token and its segment as one word.
pub const fn fed(token: u32, segment: u32) -> u32 {
    token | segment << SEGMENT_SHIFT
}

/// The token's id. Vocabularies are far smaller than its range.
pub const fn token_of(fed: u32) -> u32 {
    fed & ((1 << SEGMENT_SHIFT) - 1)
}

pub const fn segment_of(fed: u32) -> u32 {
    fed >> SEGMENT_SHIFT
}

/// Which row of a table belongs to a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    Position,
    Segment,
}

/// One operation. Shapes use `T` for the batch's tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// `out[T, cols] = table[token] * scale`; `table` is `[vocab, cols]`.
    Embed { table: WeightId, out: Buf, scale: f32 },
    /// `x[T, cols] += table[row]`, with the row of each token's position or segment.
    EmbedMore { by: Lookup, table: WeightId, x: Buf },
    /// `out = x / sqrt(mean(x^2) + eps) * weight` over each `group` consecutive
    /// elements (`group` = `weight.cols`): the whole row, or each head of it.
    /// `x` and `out` may be the same buffer.
    RmsNorm { x: Buf, weight: WeightId, out: Buf, eps: f32 },
    /// `out = (x - mean(x)) / sqrt(var(x) + eps) * weight (+ bias)` over whole rows (Ba, Kiros and
    /// Hinton, 2016). `x` and `out` may be the same buffer.
    LayerNorm { x: Buf, weight: WeightId, bias: Option<WeightId>, out: Buf, eps: f32 },
    /// `out[T, rows] = x[T, cols] . weight^T (+ bias)`.
    Linear { x: Buf, weight: WeightId, bias: Option<WeightId>, out: Buf },
    /// Rotates each of `heads` heads of `head_dim` in place by its token's position.
    Rope { x: Buf, heads: usize, head_dim: usize, rope: RopeId },
    /// Appends the batch's keys and values, `[T, kv_heads * head_dim]` each, at its positions.
    KvWrite { kv: KvId, k: Buf, v: Buf },
    /// Causal grouped-query attention of `q [T, heads * head_dim]` over the cache, including the
    /// batch's own positions: `softmax(scale * q.k) v`. With `window = w` a token sees the last `w`
    /// positions, including its own. With `softcap = c` a score `s` is `c tanh(s / c)`. Unless
    /// `causal`, a token also sees those after it in the batch, with a window `w` the next `w - 1`.
    Attention {
        kv: KvId,
        q: Buf,
        out: Buf,
        heads: usize,
        scale: f32,
        window: Option<usize>,
        softcap: Option<f32>,
        causal: bool,
    },
    /// A causal convolution of each channel with its own filter: `sum_j filter[c, j] *
    /// input[t - taps + 1 + j, c]`, `taps = filter.cols / width(out)`. What lies before the batch is
    /// in the state, `[taps - 1, channels]`, and zero before the sequence.
    Conv { state: StateId, x: Buf, filter: WeightId, out: Buf, form: ConvForm },
    /// As [`Self::Attention`] without a window or a cap; a token sees the positions of its own chunk
    /// alone, from the last multiple of `chunk` on.
    AttendChunk { kv: KvId, q: Buf, out: Buf, heads: usize, scale: f32, chunk: usize },
    /// As [`Self::Attention`], causal and without a cap; each head's softmax also has the score
    /// `sinks[head]`, which belongs to no position and has no value.
    AttendSinks {
        kv: KvId,
        q: Buf,
        out: Buf,
        heads: usize,
        scale: f32,
        window: Option<usize>,
        sinks: WeightId,
    },
    /// `x *= 1 + scale * ln(1 + floor((position + 1) / each))`.
    Temper { x: Buf, each: usize, scale: f32 },
    /// `out = x * sigmoid(the largest logit)`, row by row.
    WeighInput { x: Buf, logits: Buf, out: Buf },
    /// `x *= weight`, a single element.
    Scale { x: Buf, weight: WeightId },
    /// A gated delta net (Yang et al., arXiv 2412.06464) over `x`: queries, keys and values. For each
    /// value head and token, with the state `S`: `S *= exp(g)`, `S += k (beta (v - k S))`, `out = q
    /// S`, where `g = -exp(decay) softplus(a + shift)`, `beta = sigmoid(b)`, `gates` holds `b` and
    /// `a` of all heads, `k` has unit length and `q` the length `1 / sqrt(key_dim)`.
    Delta {
        state: StateId,
        x: Buf,
        gates: Buf,
        decays: WeightId,
        shifts: WeightId,
        out: Buf,
        shape: DeltaShape,
    },
    /// Copies `width` elements of each of `heads` heads from `x` to `out`, whose other elements stay.
    Heads { x: Buf, from: Heads, out: Buf, to: Heads, heads: usize, width: usize },
    /// `out = act(gate) * up`, element by element. `out` may be `gate` or `up`.
    Gated { gate: Buf, up: Buf, out: Buf, activation: Activation },
    /// `x = act(x)`, element by element.
    Activate { x: Buf, activation: Activation },
    /// `x += y`.
    Add { x: Buf, y: Buf },
    /// `x += sigmoid(gate) * y`, with one gate `[T, 1]` for each row.
    AddGated { x: Buf, y: Buf, gate: Buf },
    /// Chooses `top_k` experts per token from `logits [T, experts]`. The backend keeps the ids and
    /// the routing weights for the next `Experts` op of the same layer. Choices are in order of
    /// descending logit, then ascending id. With a bias `[experts]`, they are in order of the
    /// softmax or the sigmoid plus the bias instead; it does not change an expert's weight.
    Route { moe: MoeId, logits: Buf, scoring: Scoring, bias: Option<WeightId> },
    /// `out[T, hidden] = sum_j weight_j * down_j(act(gate_j(x)) * up_j(x))`, with the biases of
    /// [`Moe::biases`] added to each product, summed in the order of
    /// choice `j = 0..top_k`, in whatever order the experts ran, so that paging never changes a bit
    /// of the result.
    Experts { moe: MoeId, x: Buf, out: Buf },
    /// The logits `[wanted rows, vocab]` of the rows the step asked for. With `softcap = c` a logit
    /// `l`, its bias included, is `c tanh(l / c)`.
    Logits { x: Buf, weight: WeightId, bias: Option<WeightId>, softcap: Option<f32> },
    /// The states `x` themselves of the rows the step asked for, instead of logits.
    States { x: Buf },
}

impl Op {
    /// The activations that it reads, including one that it changes in place.
    pub fn reads(&self) -> impl Iterator<Item = Buf> {
        let reads = match *self {
            Self::Embed { .. } => [None; 3],
            Self::RmsNorm { x, .. }
            | Self::LayerNorm { x, .. }
            | Self::Linear { x, .. }
            | Self::Activate { x, .. }
            | Self::Rope { x, .. }
            | Self::Conv { x, .. }
            | Self::Experts { x, .. }
            | Self::EmbedMore { x, .. }
            | Self::States { x }
            | Self::Logits { x, .. } => [Some(x), None, None],
            Self::KvWrite { k, v, .. } => [Some(k), Some(v), None],
            Self::Attention { q, .. } => [Some(q), None, None],
            Self::Gated { gate, up, .. } => [Some(gate), Some(up), None],
            Self::Add { x, y } => [Some(x), Some(y), None],
            Self::Heads { x, out, .. } => [Some(x), Some(out), None],
            Self::Delta { x, gates, .. } => [Some(x), Some(gates), None],
            Self::AttendChunk { q, .. } | Self::AttendSinks { q, .. } => [Some(q), None, None],
            Self::Temper { x, .. } | Self::Scale { x, .. } => [Some(x), None, None],
            Self::WeighInput { x, logits, .. } => [Some(x), Some(logits), None],
            Self::AddGated { x, y, gate } => [Some(x), Some(y), Some(gate)],
            Self::Route { logits, .. } => [Some(logits), None, None],
        };
        reads.into_iter().flatten()
    }

    /// The activation that it writes, in full.
    pub const fn writes(&self) -> Option<Buf> {
        match *self {
            Self::Embed { out, .. }
            | Self::RmsNorm { out, .. }
            | Self::LayerNorm { out, .. }
            | Self::Linear { out, .. }
            | Self::Attention { out, .. }
            | Self::Conv { out, .. }
            | Self::Heads { out, .. }
            | Self::Delta { out, .. }
            | Self::AttendChunk { out, .. }
            | Self::AttendSinks { out, .. }
            | Self::Temper { x: out, .. }
            | Self::Scale { x: out, .. }
            | Self::WeighInput { out, .. }
            | Self::Gated { out, .. }
            | Self::Experts { out, .. } => Some(out),
            Self::Rope { x, .. }
            | Self::EmbedMore { x, .. }
            | Self::Activate { x, .. }
            | Self::Add { x, .. }
            | Self::AddGated { x, .. } => Some(x),
            Self::KvWrite { .. }
            | Self::Route { .. }
            | Self::Logits { .. }
            | Self::States { .. } => None,
        }
    }
}

impl Op {
    /// How many of the first ops are products of the same input with results of their own.
    pub fn products_of_one_input(ops: &[Self]) -> usize {
        let mut outs: Vec<Buf> = Vec::new();
        let mut input = None;
        for op in ops {
            let Self::Linear { x, out, .. } = op else { break };
            let x = *input.get_or_insert(*x) == *x;
            if !x || input == Some(*out) || outs.contains(out) {
                break;
            }
            outs.push(*out);
        }
        outs.len()
    }

    /// Whether it changes what outlives the step: a cache or a state.
    pub const fn lasts(&self) -> bool {
        matches!(self, Self::KvWrite { .. } | Self::Conv { .. } | Self::Delta { .. })
    }
}

/// One step of a model, for any backend.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Graph {
    pub buffers: Vec<Buffer>,
    pub weights: Vec<Weight>,
    pub ropes: Vec<Rope>,
    pub kv: Vec<Kv>,
    pub states: Vec<State>,
    pub moe: Vec<Moe>,
    pub ops: Vec<Op>,
    pub vocab: usize,
    /// The longest context that the model was made for, in tokens.
    pub context_max: usize,
    /// Decoder layers.
    pub layers: usize,
}

impl Graph {
    /// Adds an activation buffer.
    pub fn buffer(&mut self, name: &'static str, width: usize) -> Buf {
        let id = u16::try_from(self.buffers.len()).expect("a graph has few buffers");
        self.buffers.push(Buffer { name, width });
        Buf(id)
    }

    /// The id of a trunk tensor of no particular role, stored under its own name.
    pub fn weight(&mut self, tensor: impl Into<String>, rows: usize, cols: usize) -> WeightId {
        let (role, source) = (WeightRole::Other, Source::Itself);
        self.add_weight(Weight { tensor: tensor.into(), rows, cols, role, layer: None, source })
    }

    /// The id of a trunk tensor, added once however often it is used.
    pub fn add_weight(&mut self, weight: Weight) -> WeightId {
        let found = self.weights.iter().position(|w| *w == weight);
        let index = found.unwrap_or_else(|| {
            self.weights.push(weight);
            self.weights.len() - 1
        });
        WeightId(u32::try_from(index).expect("a graph has fewer than 2^32 weights"))
    }

    /// Whether no op from `at` on reads what `buf` holds before `at`: the first op that uses it
    /// overwrites it, or none uses it.
    pub fn dead_after(&self, buf: Buf, at: usize) -> bool {
        for op in &self.ops[at..] {
            if op.reads().any(|read| read == buf) {
                return false;
            }
            if op.writes() == Some(buf) {
                return true;
            }
        }
        true
    }

    /// Whether the output matrix and the embedding table are the same tensor.
    pub fn tied(&self) -> bool {
        let table = self.ops.iter().find_map(|op| match op {
            Op::Embed { table, .. } => Some(*table),
            _ => None,
        });
        self.ops.iter().any(|op| matches!(op, Op::Logits { weight, .. } if Some(*weight) == table))
    }

    /// Whether a step's result is states, for embeddings, instead of logits.
    pub fn embeds(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::States { .. }))
    }

    /// Elements of a row of a step's result: as many as the vocabulary has tokens, or the states
    /// are wide.
    pub fn result_width(&self) -> usize {
        let states = self.ops.iter().find_map(|op| match op {
            Op::States { x } => Some(self.width(*x)),
            _ => None,
        });
        states.unwrap_or(self.vocab)
    }

    /// Whether no token sees those after it, so that a text can be run in several steps.
    pub fn causal(&self) -> bool {
        !self.ops.iter().any(|op| matches!(op, Op::Attention { causal: false, .. }))
    }

    /// The length beyond which a sequence's keys have another form, in tokens.
    pub fn stretches_from(&self) -> Option<usize> {
        self.ropes.iter().find_map(|rope| rope.long.as_ref()).map(|long| long.from)
    }

    /// Segments that tokens may have.
    pub fn segments(&self) -> usize {
        let rows = self.ops.iter().find_map(|op| match op {
            Op::EmbedMore { by: Lookup::Segment, table, .. } => Some(self.weight_spec(*table).rows),
            _ => None,
        });
        rows.unwrap_or(1)
    }

    /// Whether the model knows this token and its segment.
    pub fn admits(&self, fed: u32) -> bool {
        (token_of(fed) as usize) < self.vocab && (segment_of(fed) as usize) < self.segments()
    }

    /// Experts that a single token uses, over all layers.
    pub fn experts_per_token(&self) -> usize {
        self.moe.iter().map(|moe| moe.top_k).sum()
    }

    /// A buffer's width, in f32 elements.
    pub fn width(&self, buf: Buf) -> usize {
        self.buffers[usize::from(buf.0)].width
    }

    pub fn weight_spec(&self, id: WeightId) -> &Weight {
        &self.weights[id.0 as usize]
    }

    pub fn moe_spec(&self, id: MoeId) -> &Moe {
        &self.moe[usize::from(id.0)]
    }

    pub fn kv_spec(&self, id: KvId) -> Kv {
        self.kv[usize::from(id.0)]
    }

    pub fn state_spec(&self, id: StateId) -> State {
        self.states[usize::from(id.0)]
    }

    pub fn rope_spec(&self, id: RopeId) -> &Rope {
        &self.ropes[usize::from(id.0)]
    }
}

/// A matrix inside a larger run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MatrixSpec {
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    /// Where it starts, in bytes.
    pub offset: usize,
}

impl MatrixSpec {
    /// Bytes it takes: whole rows of whole blocks.
    pub const fn bytes(&self) -> usize {
        self.rows * self.dtype.row_bytes(self.cols)
    }
}

/// How one expert's stored bytes divide into its three matrices. Layers whose
/// experts share a layout share a slot size class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertLayout {
    pub gate: MatrixSpec,
    pub up: MatrixSpec,
    pub down: MatrixSpec,
    /// Bytes of the whole expert as stored.
    pub bytes: usize,
}
