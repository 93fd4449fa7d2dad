//! SmolLM3: a dense decoder in which some layers have no rotary embedding.

use super::block::{Attention, Builder, FeedForward};
use super::config::{COUNT_MAX, Config, FamilyError, HeadDim, bad};
use super::rope::RopeSpec;
use super::{Described, Family, windows};

pub const FAMILY: Family = Family {
    name: "smollm3",
    architectures: &["SmolLM3ForCausalLM"],
    model_types: &["smollm3"],
    read,
};

// The defaults are those of `SmolLM3Config`.
fn read(config: &Config<'_>) -> Result<Described, FamilyError> {
    let shape = config.shape(HeadDim::Divided)?;
    let eps = config.rms_eps(1e-6)?;
    let rope = RopeSpec::from_config(config, 2_000_000.0, shape.context_max)?;
    let rotated = rotated(config, shape.layers)?;
    let windows = match windows::switched(config)? {
        Some(window) if config.has("layer_types") => {
            windows::by_layer_types(config, shape.layers, Some(window))?
        }
        // Without that list, layers without a rotation slide.
        Some(window) => rotated.iter().map(|rotated| (!rotated).then_some(window)).collect(),
        None => vec![None; shape.layers],
    };
    config.skip(&["layer_types"]);
    let bias = config.flag("attention_bias", false)?;
    let plain = FeedForward::plain(config.intermediate()?, config.activation()?);
    let feed_forward = FeedForward { bias: config.flag("mlp_bias", false)?, ..plain };
    let tied = config.flag("tie_word_embeddings", true)?;

    let mut d = Builder::new(&shape);
    let rope = d.rope(&rope, shape.head_dim);
    let x = d.embed(shape.hidden, 1.0);
    for (layer, window) in windows.into_iter().enumerate() {
        d.layer(layer);
        let attention = Attention {
            qkv_bias: bias,
            out_bias: bias,
            rope: rotated[layer].then_some(rope),
            ..Attention::new(&shape, rope, window)
        };
        d.residual(x, "input_layernorm", eps, |d, x| d.attention(x, &attention));
        d.residual(x, "post_attention_layernorm", eps, |d, x| d.feed_forward(x, &feed_forward));
    }
    Ok(d.finish(x, eps, tied))
}

/// Which layers rotate: those where `no_rope_layers` is 1, in spite of its name. Without the list,
/// all but every `no_rope_layer_interval`-th.
fn rotated(config: &Config<'_>, layers: usize) -> Result<Vec<bool>, FamilyError> {
    let interval = config.optional("no_rope_layer_interval", COUNT_MAX)?.unwrap_or(4);
    let Some(value) = config.get("no_rope_layers") else {
        return Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect());
    };
    let list = value.as_array().filter(|list| list.len() == layers);
    let flags = list.and_then(|list| {
        list.iter()
            .map(|flag| flag.as_u64().filter(|flag| *flag < 2).map(|flag| flag == 1))
            .collect()
    });
    flags.ok_or_else(|| {
        bad(
            "no_rope_layers",
            value,
            format!("a list of num_hidden_layers = {layers} zeros and ones"),
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::read;
    use crate::graph::{Graph, Op};

    fn config(changes: &Value) -> Value {
        let mut config = json!({
            "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 99, "max_position_embeddings": 512,
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    /// Whether each layer rotates, and whether it slides.
    fn layers(graph: &Graph) -> (Vec<bool>, Vec<bool>) {
        let (mut rotates, mut all) = (false, (Vec::new(), Vec::new()));
        for op in &graph.ops {
            match op {
                Op::Rope { .. } => rotates = true,
                Op::Attention { window, .. } => {
                    all.0.push(std::mem::take(&mut rotates));
                    all.1.push(window.is_some());
                }
                _ => {}
            }
        }
        all
    }

    #[test]
    fn some_layers_do_not_rotate() {
        let of = |changes: Value| layers(&read(&config(&changes)).unwrap().graph);
        assert_eq!(of(json!({})).0, [true, true, true, false, true]);
        assert_eq!(of(json!({ "no_rope_layer_interval": 2 })).0, [true, false, true, false, true]);
        let listed = json!({ "no_rope_layers": [0, 1, 1, 1, 0], "use_sliding_window": true,
            "sliding_window": 16 });
        let slides = [true, false, false, false, true];
        assert_eq!(of(listed), (vec![false, true, true, true, false], slides.to_vec()));
        for wrong in [json!([1, 1]), json!([1, 1, 1, 1, 2]), json!(true)] {
            let error = read(&config(&json!({ "no_rope_layers": wrong }))).unwrap_err().to_string();
            assert!(error.contains("5 zeros and ones"), "{error}");
        }
    }
}
