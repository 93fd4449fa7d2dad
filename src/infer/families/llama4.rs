//! Llama 4 (text): attention within chunks in layers that rotate, over everything with queries that
//! grow with their position in those that do not; in every other layer one expert, whose input is
//! weighed, beside a feed-forward for every token.

use serde_json::json;

use super::block::{Attention, Builder, Experts, FeedForward, Llama4Attention, Shared};
use super::config::{COUNT_MAX, Config, DIMENSION_MAX, FamilyError, HeadDim, bad};
use super::rope::RopeSpec;
use super::{Described, Family};
use crate::graph::Scoring;

pub const FAMILY: Family = Family {
    name: "llama4",
    architectures: &["Llama4ForCausalLM"],
    model_types: &["llama4_text"],
    read,
};

// The defaults are those of `Llama4TextConfig`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Is(128))?;
    let eps = config.rms_eps(1e-5)?;
    let rope = RopeSpec::from_config(config, 500_000.0, shape.context_max)?;
    let rotated = rotated(config, shape.layers)?;
    let chunk = config.optional("attention_chunk_size", 1 << 26)?.unwrap_or(8192);
    let normed = config.flag("use_qk_norm", true)?;
    let tempered = config.flag("attn_temperature_tuning", true)?;
    let each = config.optional("floor_scale", 1 << 26)?.unwrap_or(8192);
    let by = config.positive("attn_scale", 0.1)? as f32;
    config.only("attention_bias", &json!(false))?;
    let sparse = sparse(config, shape.layers)?;
    let activation = config.activation()?;
    let (experts, shared) = experts(config)?;
    let wide = config.required("intermediate_size_mlp", DIMENSION_MAX)?;
    let feed_forward =
        FeedForward { module: "feed_forward", ..FeedForward::plain(wide, activation) };
    let tied = config.flag("tie_word_embeddings", false)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, rotates) in rotated.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention { interleaved: true, ..Attention::new(&shape, rope, None) };
        let special = match rotates {
            true => Llama4Attention::Chunked { chunk, norm: normed.then_some(eps) },
            false => Llama4Attention::Whole { temper: tempered.then_some((each, by)) },
        };
        d.residual(x, "input_layernorm", eps, |d, x| d.llama4_attention(x, &attention, special));
        let norm = "post_attention_layernorm";
        match sparse.contains(&layer) {
            true => {
                d.residual_experts(x, (norm, eps), &experts, Some(&shared));
                d.weigh_inputs();
            }
            false => d.residual(x, norm, eps, |d, x| d.feed_forward(x, &feed_forward)),
        }
    }
    Ok(d.finish(x, eps, tied))
}

/// Which layers rotate: those where `no_rope_layers` is 1, in spite of its name. Without the list,
/// all but every `no_rope_layer_interval`-th.
fn rotated(config: &Config<'_>, layers: usize) -> Result<Vec<bool>, FamilyError> {
    let interval = config.optional("no_rope_layer_interval", COUNT_MAX)?.unwrap_or(4);
    let list = config.indices("no_rope_layers")?;
    let rotated: Vec<bool> = match list.is_empty() {
        true => (1..=layers).map(|number| !number.is_multiple_of(interval)).collect(),
        false if list.len() == layers && list.iter().all(|one| *one < 2) => {
            list.iter().map(|one| *one == 1).collect()
        }
        false => {
            let want = format!("a list of num_hidden_layers = {layers} zeros and ones");
            return Err(bad("no_rope_layers", &json!(list), want));
        }
    };
    let kind = |rotates: &bool| if *rotates { "chunked_attention" } else { "full_attention" };
    let kinds: Vec<&str> = rotated.iter().map(kind).collect();
    config.only("layer_types", &json!(kinds))?;
    Ok(rotated)
}

/// The layers with experts.
fn sparse(config: &Config<'_>, layers: usize) -> Result<Vec<usize>, FamilyError> {
    let step = config.optional("interleave_moe_layer_step", COUNT_MAX)?.unwrap_or(1);
    match config.get("moe_layers") {
        None => Ok((0..layers).filter(|layer| (layer + 1).is_multiple_of(step)).collect()),
        Some(_) => config.indices("moe_layers"),
    }
}

fn experts(config: &Config<'_>) -> Result<(Experts, Shared), FamilyError> {
    let activation = config.activation()?;
    let count = config.optional("num_local_experts", COUNT_MAX)?.unwrap_or(16);
    // An expert's input is weighed, so several of a token need an input each.
    config.only("num_experts_per_tok", &json!(1))?;
    let ff = config.intermediate()?;
    // The weight of a single choice is then 1.
    let scoring = Scoring::Softmax { renormalise: true };
    let experts = Experts {
        module: "feed_forward",
        router: "router",
        stacks: ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
        ..Experts::plain(count, 1, ff, activation, scoring)
    };
    let plain = FeedForward::plain(ff, activation);
    let feed_forward = FeedForward { module: "feed_forward.shared_expert", ..plain };
    Ok((experts, Shared { feed_forward, gate: None }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::Op;
    use crate::source::Source;

    fn config(more: Value) -> Value {
        let mut config = json!({
            "architectures": ["Llama4ForCausalLM"], "hidden_size": 64, "intermediate_size": 40,
            "intermediate_size_mlp": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99,
            "max_position_embeddings": 512, "num_local_experts": 6, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 32,
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    #[test]
    fn the_fourth_layer_sees_everything_and_experts_get_weighed_inputs() {
        let graph = read(&config(json!({}))).unwrap().graph;
        let count = |wanted: fn(&Op) -> bool| graph.ops.iter().filter(|op| wanted(op)).count();
        assert_eq!(count(|op| matches!(op, Op::AttendChunk { chunk: 32, .. })), 3);
        assert_eq!(count(|op| matches!(op, Op::Attention { window: None, .. })), 1);
        assert_eq!(count(|op| matches!(op, Op::Rope { .. })), 6);
        assert_eq!(count(|op| matches!(op, Op::Temper { each: 8192, .. })), 1);
        assert_eq!(count(|op| matches!(op, Op::WeighInput { .. })), 2);
        assert_eq!((graph.moe.len(), graph.moe[0].layer, graph.moe[1].layer), (2, 1, 3));
        let [_, up, down] = graph.moe[0].weights(2);
        let stack = |name| Source::stored(format!("model.layers.1.feed_forward.experts.{name}"));
        let stored = stack("gate_up_proj").rows(128..192).cols(40..80).transpose();
        assert_eq!(up.source, stored);
        assert_eq!(down.source, stack("down_proj").rows(80..120).transpose());
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (key, value) in [
            ("num_experts_per_tok", json!(2)),
            ("no_rope_layers", json!([1, 1, 0])),
            ("layer_types", json!(["full_attention"])),
            ("attention_bias", json!(true)),
        ] {
            let error = read(&config(json!({ key: value }))).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}
