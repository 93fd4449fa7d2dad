//! Attention whose keys and values are made from one latent row a token (multi-head latent
//! attention, DeepSeek-V2, arXiv 2405.04434).
//!
//! In the plain form: keys and values are expanded to heads before they are cached. The absorbed
//! form would cache the latent row and the rotated key alone (DeepSeek-V3: 576 elements a token and
//! layer instead of 49,152) at the price of a wider product for each head.

use super::{Builder, Module};
use crate::graph::{Buf, Heads, Kv, KvId, Op, RopeId, WeightRole};
use crate::source::{Source, Take};

/// Latent attention in one layer.
#[derive(Debug, Clone, Copy)]
pub struct Latent {
    pub heads: usize,
    /// Elements of a head's query and key that do not rotate.
    pub plain: usize,
    /// Elements that do. All heads share those of the keys.
    pub rotated: usize,
    /// Elements of a head's value, at most as many as of its key.
    pub value: usize,
    /// The width of the latent form of queries; `None` if they are projected at once.
    pub query: Option<usize>,
    /// The width of the latent form of keys and values.
    pub rank: usize,
    /// The factor of `q.k`.
    pub scale: f32,
    /// Whether the checkpoint's rotated elements are laid out for rotation of neighbours.
    pub interleaved: bool,
}

/// The epsilon of the norms of latent rows, which no config gives.
const EPS: f32 = 1e-6;

impl Latent {
    const fn head_dim(&self) -> usize {
        self.plain + self.rotated
    }

    /// Rows that rotate, in the order in which they do here.
    fn turned(&self, rows: Source) -> Source {
        match self.interleaved {
            true => rows.permute(self.rotated / 2, 2),
            false => rows,
        }
    }

    /// The projection of queries, with the rotated elements of each head first.
    fn queries(&self) -> Source {
        let rows = |start: usize, count: usize| Source::Itself.rows(start..start + count);
        let parts = (0..self.heads).flat_map(|head| {
            let at = head * self.head_dim();
            [self.turned(rows(at + self.plain, self.rotated)), rows(at, self.plain)]
        });
        Source::Concatenate(parts.collect())
    }

    /// Part of each head of `kv_b_proj`: `count` rows from `start` on.
    fn expansion(&self, stored: &str, start: usize, count: usize) -> Source {
        let each = self.plain + self.value;
        let part = |head: usize| {
            let take = Take { start: head * each + start, count, step: 1 };
            Source::stored(stored).rows(take)
        };
        Source::Concatenate((0..self.heads).map(part).collect())
    }
}

impl Builder {
    pub fn latent_attention(&mut self, x: Buf, of: &Latent, rope: RopeId) -> Buf {
        let &Latent { heads, plain, rotated, value, rank, scale, .. } = of;
        let (head_dim, width) = (of.head_dim(), heads * of.head_dim());
        let (q, k) = (self.buffer("q", width), self.buffer("k", width));
        let mut input = x;
        let mut module = "self_attn.q_proj";
        if let Some(rank) = of.query {
            let latent = self.buffer("q_latent", rank);
            self.projected(x, latent, "self_attn.q_a_proj", Source::Itself);
            input = self.normed_as("q_latent_normed", latent, "self_attn.q_a_layernorm");
            module = "self_attn.q_b_proj";
        }
        self.projected(input, q, module, of.queries());
        self.graph.ops.push(Op::Rope { x: q, heads, head_dim, rope });

        let stored = self.name("self_attn.kv_a_proj_with_mqa.weight");
        let (latent, turning) = (self.buffer("kv_latent", rank), self.buffer("k_rope", rotated));
        let rows = |start: usize, count: usize| Source::stored(&stored).rows(start..start + count);
        self.projected(x, latent, "self_attn.latent_proj", rows(0, rank));
        self.projected(x, turning, "self_attn.k_rope_proj", of.turned(rows(rank, rotated)));
        self.graph.ops.push(Op::Rope { x: turning, heads: 1, head_dim: rotated, rope });
        let latent = self.normed_as("kv_latent_normed", latent, "self_attn.kv_a_layernorm");
        let stored = self.name("self_attn.kv_b_proj.weight");
        let (fixed, v) =
            (self.buffer("k_plain", heads * plain), self.buffer("v_plain", heads * value));
        self.projected(latent, fixed, "self_attn.k_b_proj", of.expansion(&stored, 0, plain));
        self.projected(latent, v, "self_attn.v_b_proj", of.expansion(&stored, plain, value));
        let copy = |x, from, out, to, width| Op::Heads { x, from, out, to, heads, width };
        let whole = |start| Heads { start, stride: head_dim };
        let each = |stride| Heads { start: 0, stride };
        self.graph.ops.push(copy(turning, each(0), k, whole(0), rotated));
        self.graph.ops.push(copy(fixed, each(plain), k, whole(rotated), plain));
        let kv = KvId(u16::try_from(self.graph.kv.len()).expect("layers are bounded"));
        self.graph.kv.push(Kv { kv_heads: heads, head_dim });
        let (mut values, out) = (v, self.buffer("attended", width));
        if value < head_dim {
            // The elements after a value are always zero, because nothing writes them.
            values = self.buffer("v_padded", width);
            self.graph.ops.push(copy(v, each(value), values, whole(0), value));
        }
        self.graph.ops.push(Op::KvWrite { kv, k, v: values });
        let (window, softcap, causal) = (None, None, true);
        self.graph.ops.push(Op::Attention { kv, q, out, heads, scale, window, softcap, causal });
        let mut attended = out;
        if value < head_dim {
            attended = self.buffer("attended_plain", heads * value);
            self.graph.ops.push(copy(out, whole(0), attended, each(value), value));
        }
        let delta = self.buffer("delta", self.graph.width(x));
        let role = WeightRole::AttentionOutput;
        let back = Module { name: "self_attn.o_proj", role, bias: false, part: None };
        self.linear(attended, delta, &back);
        delta
    }

    /// `out = x . w^T` with the weight `MODULE.weight` made in this way.
    pub(super) fn projected(&mut self, x: Buf, out: Buf, module: &str, source: Source) {
        let (rows, cols) = (self.graph.width(out), self.graph.width(x));
        let name = self.name(&format!("{module}.weight"));
        let weight = self.weight(name, WeightRole::Projection, rows, cols, source);
        self.graph.ops.push(Op::Linear { x, weight, bias: None, out });
    }

    /// The norm of a latent row, in a buffer of its own.
    fn normed_as(&mut self, buffer: &'static str, x: Buf, norm: &str) -> Buf {
        let width = self.graph.width(x);
        let out = self.buffer(buffer, width);
        let weight = self.norm_weight(norm, width);
        self.graph.ops.push(Op::RmsNorm { x, weight, out, eps: EPS });
        out
    }
}
