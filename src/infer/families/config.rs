//! Checked reading of `config.json`: every number is bounded, and errors name the key.
//!
//! Reading a key consumes it. A key left over once a family has built its graph must be on the list
//! of keys that change nothing here (`harmless`); otherwise it is an error that names it. Nothing
//! read here can overflow a size later: every dimension is bounded by [`DIMENSION_MAX`], and
//! products are checked when the model is loaded.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::harmless;
use crate::graph::Activation;

/// The largest matrix dimension accepted from a config: four times the largest vocabulary in use.
pub const DIMENSION_MAX: usize = 1 << 20;
/// The most layers, heads or experts accepted from a config.
pub const COUNT_MAX: usize = 4096;
/// The longest context accepted from a config, in tokens.
const CONTEXT_MAX: usize = 1 << 26;

/// Why a model with this config cannot be run.
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
    /// Understood, but there is no kernel for it.
    #[error("config.json: {key} {value} is not supported ({family} supports {supported})")]
    Unsupported { key: String, value: String, family: String, supported: String },
    /// Not read by the family, and not known to be harmless.
    #[error(
        "config.json: {key} is {value}, which {family} does not read and which could change \
         what the model says; remove the key if it does not"
    )]
    Unread { key: String, value: String, family: String },
}

/// A config's keys. An absent key and `null` are the same, unless a reader asks (`has`).
pub struct Config<'a> {
    map: &'a Map<String, Value>,
    /// The family that reads it, for error messages.
    family: &'static str,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Config<'a> {
    pub fn new(value: &'a Value, family: &'static str) -> Result<Self, FamilyError> {
        let map = value.as_object().ok_or(FamilyError::NotAnObject)?;
        Ok(Self { map, family, read: RefCell::default() })
    }

    /// The key's value. Marks the key as read.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.skip(&[key]);
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is present, even as `null`.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Marks keys as read that have no meaning given the other keys.
    pub fn skip(&self, keys: &[&str]) {
        self.read.borrow_mut().extend(keys.iter().map(|key| (*key).to_owned()));
    }

    /// Refuses the config if a key was not read and is not known to be harmless.
    pub fn all_read(&self) -> Result<(), FamilyError> {
        let read = self.read.borrow();
        let left = self.map.iter().find(|(key, value)| {
            !value.is_null() && !read.contains(*key) && !harmless::is(key, value)
        });
        match left {
            None => Ok(()),
            Some((key, value)) => Err(self.unread(key, value)),
        }
    }

    /// The error for a key that nothing here reads.
    pub fn unread(&self, key: &str, value: &Value) -> FamilyError {
        let family = self.family.to_owned();
        FamilyError::Unread { key: key.to_owned(), value: short(value), family }
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

    /// A whole number in `0..=max`.
    pub fn count(
        &self,
        key: &'static str,
        default: usize,
        max: usize,
    ) -> Result<usize, FamilyError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number
            .filter(|n| *n <= max)
            .ok_or_else(|| bad(key, value, format!("a whole number in 0..={max}")))
    }

    /// Refuses a key unless it is absent or has the only value that is computed here.
    pub fn only(&self, key: &'static str, want: &Value) -> Result<(), FamilyError> {
        match self.get(key).filter(|value| *value != want) {
            None => Ok(()),
            Some(value) => Err(self.unsupported(key, value, &want.to_string())),
        }
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

    /// `hidden_act`; SiLU if it is absent.
    pub fn activation(&self) -> Result<Activation, FamilyError> {
        self.activation_of("hidden_act", Activation::Silu)
    }

    /// The activation that a key names.
    pub fn activation_of(&self, key: &str, default: Activation) -> Result<Activation, FamilyError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => match value.as_str() {
                Some("silu" | "swish") => Ok(Activation::Silu),
                Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
                Some("gelu") => Ok(Activation::Gelu),
                Some("relu2") => Ok(Activation::SquaredRelu),
                _ => Err(self.unsupported(key, value, "silu, gelu, gelu_pytorch_tanh, relu2")),
            },
        }
    }

    /// The width of the dense feed-forward.
    pub fn intermediate(&self) -> Result<usize, FamilyError> {
        self.required("intermediate_size", DIMENSION_MAX)
    }

    /// `rms_norm_eps`.
    pub fn rms_eps(&self, default: f64) -> Result<f32, FamilyError> {
        Ok(self.positive("rms_norm_eps", default)? as f32)
    }

    /// Refuses keys that change the result, and for which there is no kernel, unless they are
    /// absent, `null` or `false`.
    pub fn refuse(&self, keys: &[&str]) -> Result<(), FamilyError> {
        for key in keys {
            if let Some(value) = self.get(key).filter(|value| value.as_bool() != Some(false)) {
                return Err(self.unsupported(key, value, "null"));
            }
        }
        Ok(())
    }

    /// Refuses weights that are already quantized; such checkpoints cannot be read here.
    pub fn refuse_quantized(&self) -> Result<(), FamilyError> {
        for key in ["quantization_config", "quantization"] {
            if let Some(value) = self.get(key) {
                let method = value.get("quant_method").unwrap_or(value);
                return Err(self.unsupported(key, method, "f32, f16 and bf16 checkpoints"));
            }
        }
        Ok(())
    }

    /// The dimensions that every decoder has.
    pub fn shape(&self, head_dim: HeadDim) -> Result<Shape, FamilyError> {
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
        let head_dim = match (self.optional("head_dim", 1 << 16)?, head_dim) {
            (Some(head_dim), _) => head_dim,
            (None, HeadDim::Is(head_dim)) if !self.has("head_dim") => head_dim,
            (None, _) if hidden.is_multiple_of(heads) => hidden / heads,
            (None, _) => {
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
        Ok(Shape {
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocab: self.required("vocab_size", DIMENSION_MAX)?,
            context_max: self.required("max_position_embeddings", CONTEXT_MAX)?,
        })
    }

    /// How many elements of a head rotate if `partial` of them do.
    pub fn rotary_dim(&self, head_dim: usize, partial: f64) -> Result<usize, FamilyError> {
        // As Transformers: rounded down.
        let rotary_dim = (head_dim as f64 * partial) as usize;
        if partial > 1.0 || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(FamilyError::Bad {
                key: "partial_rotary_factor".into(),
                value: partial.to_string(),
                want: format!("an even part of head_dim {head_dim}"),
            });
        }
        Ok(rotary_dim)
    }

    /// The error for a value that is understood but cannot be computed here.
    pub fn unsupported(&self, key: &str, value: &Value, supported: &str) -> FamilyError {
        FamilyError::Unsupported {
            key: key.to_owned(),
            value: short(value),
            family: self.family.to_owned(),
            supported: supported.to_owned(),
        }
    }
}

/// The value of `head_dim` if the key is absent. (If it is `null`, the value is always
/// `hidden / heads`.)
#[derive(Debug, Clone, Copy)]
pub enum HeadDim {
    Divided,
    Is(usize),
}

/// A decoder's dimensions.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub layers: usize,
    pub hidden: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    pub kv_heads: usize,
    /// Even.
    pub head_dim: usize,
    pub vocab: usize,
    /// `max_position_embeddings`, tokens.
    pub context_max: usize,
}

/// A wrong value, shortened so that the error stays one line.
pub fn bad(key: &str, value: &Value, want: impl Into<String>) -> FamilyError {
    FamilyError::Bad { key: key.into(), value: short(value), want: want.into() }
}

fn short(value: &Value) -> String {
    let mut text = value.to_string();
    if let Some((end, _)) = text.char_indices().nth(60) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}
