//! The building blocks of an encoder: embeddings of tokens, positions and segments, layers that see
//! the whole text and are normalised after each residual, and states instead of logits.

use super::{Builder, Module};
use crate::families::Described;
use crate::graph::{Activation, Buf, Kv, KvId, Lookup, Op, WeightId, WeightRole};
use crate::source::Source;

/// One layer. Its projections, norms and feed-forward have BERT's names, and biases.
#[derive(Debug, Clone, Copy)]
pub struct EncoderLayer {
    pub heads: usize,
    pub head_dim: usize,
    /// The inner width of the feed-forward.
    pub width: usize,
    pub activation: Activation,
    pub eps: f32,
}

impl Builder {
    /// The weights are named from the checkpoint's root, which may itself be a module called `root`.
    pub const fn rooted(mut self, root: &'static str) -> Self {
        self.root = Some(root);
        self
    }

    /// `layer_norm(tokens + positions + segments)`.
    pub fn encoder_embeddings(
        &mut self,
        hidden: usize,
        positions: usize,
        segments: usize,
        eps: f32,
    ) -> Buf {
        let x = self.buffer("x", hidden);
        let vocab = self.graph.vocab;
        let table = self.table("embeddings.word_embeddings", vocab, hidden);
        self.graph.ops.push(Op::Embed { table, out: x, scale: 1.0 });
        let table = self.table("embeddings.position_embeddings", positions, hidden);
        self.graph.ops.push(Op::EmbedMore { by: Lookup::Position, table, x });
        let table = self.table("embeddings.token_type_embeddings", segments, hidden);
        self.graph.ops.push(Op::EmbedMore { by: Lookup::Segment, table, x });
        self.layer_norm(x, "embeddings.LayerNorm", eps, x);
        x
    }

    /// Attention and feed-forward, each followed by its residual and a norm.
    pub fn encoder_layer(&mut self, x: Buf, of: &EncoderLayer) {
        let &EncoderLayer { heads, head_dim, eps, .. } = of;
        let mut project = |buffer, name, role| {
            let out = self.buffer(buffer, heads * head_dim);
            self.linear(x, out, &Module { name, role, bias: true, part: None });
            out
        };
        let q = project("q", "attention.self.query", WeightRole::Query);
        let k = project("k", "attention.self.key", WeightRole::Key);
        let v = project("v", "attention.self.value", WeightRole::Value);
        let kv = KvId(u16::try_from(self.graph.kv.len()).expect("layers are bounded"));
        self.graph.kv.push(Kv { kv_heads: heads, head_dim });
        self.graph.ops.push(Op::KvWrite { kv, k, v });
        let out = self.buffer("attended", heads * head_dim);
        let scale = (head_dim as f32).powf(-0.5);
        self.graph.ops.push(Op::Attention {
            kv,
            q,
            out,
            heads,
            scale,
            window: None,
            softcap: None,
            causal: false,
        });
        let delta = self.buffer("delta", self.graph.width(x));
        let (name, role) = ("attention.output.dense", WeightRole::AttentionOutput);
        self.linear(out, delta, &Module { name, role, bias: true, part: None });
        self.graph.ops.push(Op::Add { x, y: delta });
        self.layer_norm(x, "attention.output.LayerNorm", eps, x);
        let up = self.buffer("up", of.width);
        let (name, role) = ("intermediate.dense", WeightRole::Up);
        self.linear(x, up, &Module { name, role, bias: true, part: None });
        self.graph.ops.push(Op::Activate { x: up, activation: of.activation });
        let (name, role) = ("output.dense", WeightRole::Down);
        self.linear(up, delta, &Module { name, role, bias: true, part: None });
        self.graph.ops.push(Op::Add { x, y: delta });
        self.layer_norm(x, "output.LayerNorm", eps, x);
    }

    /// Ends with the states themselves.
    pub fn finish_states(mut self, x: Buf) -> Described {
        self.graph.ops.push(Op::States { x });
        let ropes = self.ropes.into_iter().map(|(spec, _)| spec).collect();
        Described { graph: self.graph, ropes, embedding: None }
    }

    fn table(&mut self, name: &str, rows: usize, cols: usize) -> WeightId {
        let name = self.name(&format!("{name}.weight"));
        let source = self.rooted_source(&name);
        self.weight(name, WeightRole::Embedding, rows, cols, source)
    }

    /// The tensor itself, or the same within the root module.
    pub(super) fn rooted_source(&self, name: &str) -> Source {
        match self.root {
            None => Source::Itself,
            Some(root) => {
                Source::FirstOf(vec![Source::Itself, Source::Stored(format!("{root}.{name}"))])
            }
        }
    }
}
