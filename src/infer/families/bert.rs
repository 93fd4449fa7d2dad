//! BERT, for embeddings (MiniLM, BGE, GTE, Arctic): an encoder with absolute positions and segments,
//! normalised after each residual, without a causal mask. Heads for other tasks are ignored.

use serde_json::json;

use super::block::{Builder, EncoderLayer};
use super::config::{COUNT_MAX, Config, FamilyError, HeadDim};
use super::{Described, Family};
use crate::graph::Activation;

pub const FAMILY: Family =
    Family { name: "bert", architectures: &["BertModel"], model_types: &["bert"], read };

/// The most segments whose number fits beside a token's id.
const SEGMENTS_MAX: usize = 256;

// The defaults are those of `BertConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let segments = config.optional("type_vocab_size", SEGMENTS_MAX)?.unwrap_or(2);
    let layer = EncoderLayer {
        heads: shape.heads,
        head_dim: shape.head_dim,
        width: config.intermediate()?,
        activation: config.activation_of("hidden_act", Activation::Gelu)?,
        eps: config.positive("layer_norm_eps", 1e-12)? as f32,
    };
    config.only("position_embedding_type", &json!("absolute"))?;
    // States do not depend on an output matrix.
    config.skip(&["tie_word_embeddings", "pooler_fc_size", "pooler_num_attention_heads"]);
    config.skip(&["pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"]);
    config.optional("num_hidden_layers", COUNT_MAX)?;

    let mut d = Builder::new(&shape).rooted("bert");
    let x = d.encoder_embeddings(shape.hidden, shape.context_max, segments, layer.eps);
    for number in 0..shape.layers {
        d.layer(number);
        d.encoder_layer(x, &layer);
    }
    Ok(d.finish_states(x))
}
