//! Checked reading of `config.json`: bounds on every number, errors that name the key.
//!
//! Owns what all families share (shapes, activation, flags); refuses what a
//! graph could not hold. Nothing read from here can overflow a size later:
//! every dimension is bounded by [`DIMENSION_MAX`] and products are checked at load.

use serde_json::{Map, Value};

use super::rope::RopeSpec;
use super::{FAMILIES, Spec};
use crate::graph::Activation;

/// The widest matrix side read from a config: four times the largest vocabulary in use.
pub const DIMENSION_MAX: usize = 1 << 20;
/// The most layers, heads or experts read from a config.
pub const COUNT_MAX: usize = 4096;
/// The longest context read from a config, tokens.
const CONTEXT_MAX: usize = 1 << 26;

/// Why a config cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FamilyError {
    #[error("config.json: not a JSON object")]
    NotAnObject,
    #[error("config.json: unknown architecture {name:?} (known: {known})")]
    UnknownArchitecture { name: String, known: String },
    #[error("config.json: {key} is missing")]
    Missing { key: &'static str },
    #[error("config.json: {key} is {value}, expected {want}")]
    Bad { key: String, value: String, want: String },
    /// Understood, but no kernel here computes it.
    #[error("config.json: {key} {value} is not supported ({family} supports {supported})")]
    Unsupported { key: String, value: String, family: String, supported: String },
}

/// A config's keys; absent and `null` are the same.
pub struct Config<'a> {
    map: &'a Map<String, Value>,
}

impl<'a> Config<'a> {
    pub fn new(value: &'a Value) -> Result<Self, FamilyError> {
        value.as_object().map(|map| Self { map }).ok_or(FamilyError::NotAnObject)
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, even as `null`.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// `architectures[0]`, or `model_type` where that is absent.
    pub fn architecture(&self) -> Result<&'a str, FamilyError> {
        self.get("architectures")
            .and_then(|list| list.get(0))
            .or_else(|| self.get("model_type"))
            .and_then(Value::as_str)
            .ok_or(FamilyError::Missing { key: "architectures" })
    }

    /// A whole number in `1..=max`; `None` if absent.
    pub fn optional(&self, key: &'static str, max: usize) -> Result<Option<usize>, FamilyError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (1..=max).contains(n))
            .map(Some)
            .ok_or_else(|| bad(key, value, format!("a whole number in 1..={max}")))
    }

    pub fn required(&self, key: &'static str, max: usize) -> Result<usize, FamilyError> {
        self.optional(key, max)?.ok_or(FamilyError::Missing { key })
    }

    pub fn flag(&self, key: &'static str, default: bool) -> Result<bool, FamilyError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| bad(key, value, "true or false")),
        }
    }

    /// A finite number above 0.
    pub fn positive(&self, key: &'static str, default: f64) -> Result<f64, FamilyError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value
            .as_f64()
            .filter(|x| x.is_finite() && *x > 0.0)
            .ok_or_else(|| bad(key, value, "a number above 0"))
    }

    /// A list of whole numbers; empty if absent.
    pub fn indices(&self, key: &'static str) -> Result<Vec<usize>, FamilyError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let list = value.as_array().filter(|list| list.len() <= COUNT_MAX);
        list.and_then(|list| {
            list.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
        })
        .ok_or_else(|| bad(key, value, "a list of layer numbers"))
    }

    fn activation(&self, family: &str) -> Result<Activation, FamilyError> {
        match self.get("hidden_act") {
            None => Ok(Activation::Silu),
            Some(value) => match value.as_str() {
                Some("silu" | "swish") => Ok(Activation::Silu),
                Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
                _ => Err(FamilyError::Unsupported {
                    key: "hidden_act".into(),
                    value: value.to_string(),
                    family: family.into(),
                    supported: "silu, gelu_pytorch_tanh".into(),
                }),
            },
        }
    }

    /// The keys every family has. What differs is left at the plain case for the
    /// family to overwrite: no biases, no q/k norm, no windows, no experts.
    pub fn base(&self, defaults: &Defaults) -> Result<Spec, FamilyError> {
        let Defaults { family, rms_eps, rope_theta, .. } = *defaults;
        debug_assert!(FAMILIES.iter().any(|f| f.name == family));
        for key in ["quantization_config", "quantization"] {
            if self.get(key).is_some() {
                return Err(FamilyError::Unsupported {
                    key: key.into(),
                    value: "(weights already quantized)".into(),
                    family: family.into(),
                    supported: "f32, f16 and bf16 checkpoints".into(),
                });
            }
        }
        let layers = self.required("num_hidden_layers", COUNT_MAX)?;
        let hidden = self.required("hidden_size", DIMENSION_MAX)?;
        let heads = self.required("num_attention_heads", COUNT_MAX)?;
        let kv_heads = self.optional("num_key_value_heads", COUNT_MAX)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(FamilyError::Bad {
                key: "num_key_value_heads".into(),
                value: kv_heads.to_string(),
                want: format!("a divisor of num_attention_heads {heads}"),
            });
        }
        let head_dim = match self.optional("head_dim", 1 << 16)? {
            Some(head_dim) => head_dim,
            None if !self.has("head_dim") && defaults.head_dim.is_some() => {
                defaults.head_dim.unwrap_or_default()
            }
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(FamilyError::Bad {
                    key: "num_attention_heads".into(),
                    value: heads.to_string(),
                    want: format!("a divisor of hidden_size {hidden}, or a head_dim"),
                });
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(FamilyError::Bad {
                key: "head_dim".into(),
                value: head_dim.to_string(),
                want: "an even number".into(),
            });
        }
        let context_max = self.required("max_position_embeddings", CONTEXT_MAX)?;
        Ok(Spec {
            family,
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ff: self.required("intermediate_size", DIMENSION_MAX)?,
            vocab: self.required("vocab_size", DIMENSION_MAX)?,
            rms_eps: self.positive("rms_norm_eps", rms_eps)? as f32,
            rope: RopeSpec::from_config(self, family, rope_theta, context_max)?,
            tie_word_embeddings: self.flag("tie_word_embeddings", false)?,
            context_max,
            activation: self.activation(family)?,
            attention_bias: self.flag("attention_bias", false)?,
            mlp_bias: false,
            qk_norm: false,
            windows: vec![None; layers],
            moe: None,
        })
    }

    /// `layer_types` as windows: `sliding_attention` layers see `window` positions.
    /// `None` if the config has no such list.
    pub fn layer_windows(
        &self,
        family: &str,
        layers: usize,
        window: Option<usize>,
    ) -> Result<Option<Vec<Option<usize>>>, FamilyError> {
        let Some(value) = self.get("layer_types") else { return Ok(None) };
        let list = value.as_array().filter(|list| list.len() == layers).ok_or_else(|| {
            bad("layer_types", value, format!("a list of num_hidden_layers = {layers} names"))
        })?;
        let windows = list.iter().map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") if window.is_some() => Ok(window),
            Some("sliding_attention") => Err(FamilyError::Missing { key: "sliding_window" }),
            _ => Err(FamilyError::Unsupported {
                key: "layer_types".into(),
                value: kind.to_string(),
                family: family.into(),
                supported: "full_attention, sliding_attention".into(),
            }),
        });
        windows.collect::<Result<Vec<_>, _>>().map(Some)
    }
}

/// What a family's config means where a key is absent (Transformers' config classes).
pub struct Defaults {
    pub family: &'static str,
    pub rms_eps: f64,
    pub rope_theta: f64,
    /// `head_dim` where the key is absent; `None` is `hidden / heads`.
    pub head_dim: Option<usize>,
}

/// A wrong value, shortened so that the error stays one line.
pub fn bad(key: &str, value: &Value, want: impl Into<String>) -> FamilyError {
    let mut text = value.to_string();
    if let Some((end, _)) = text.char_indices().nth(60) {
        text.truncate(end);
        text.push_str("...");
    }
    FamilyError::Bad { key: key.into(), value: text, want: want.into() }
}
