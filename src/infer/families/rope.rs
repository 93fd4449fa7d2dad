//! Rotary embedding parameters: from either config form to inverse frequencies.
//!
//! Forms: `default`, `linear` (frequencies divided by a factor) and `llama3`
//! (NTK by parts, Llama 3.1). Every other `rope_type` is refused by name.
//! Formulas: Transformers, `modeling_rope_utils.py`.

use std::f64::consts::PI;

use serde_json::{Map, Value};

use super::config::{Config, FamilyError, bad};
use crate::graph::Rope;

/// How far positions turn a head's pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for contexts longer than those trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Long wavelengths divided by `factor`, short ones kept, those between blended.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        /// Tokens.
        original_context: f64,
    },
}

impl RopeSpec {
    /// Reads `rope_parameters`, or `rope_theta` with `rope_scaling`.
    pub fn from_config(
        config: &Config<'_>,
        family: &str,
        default_theta: f64,
        context_max: usize,
    ) -> Result<Self, FamilyError> {
        let outer_theta = config.positive("rope_theta", default_theta)?;
        let partial = config.positive("partial_rotary_factor", 1.0)?;
        let (key, map) = match (config.get("rope_parameters"), config.get("rope_scaling")) {
            (Some(value), _) => ("rope_parameters", object("rope_parameters", value)?),
            (None, Some(value)) => ("rope_scaling", object("rope_scaling", value)?),
            (None, None) => {
                refuse_partial(partial, family)?;
                return Ok(Self { theta: outer_theta, scaling: RopeScaling::None });
            }
        };
        let keys = Keys { key, map };
        refuse_partial(keys.number("partial_rotary_factor")?.unwrap_or(partial), family)?;
        let theta = keys.number("rope_theta")?.unwrap_or(outer_theta);
        // Old configs call it `type`; where both stand, `rope_type` is the one Transformers reads.
        let kind = ["rope_type", "type"].iter().find_map(|name| keys.get(name));
        let kind = match kind {
            None => "default",
            Some(value) => value.as_str().ok_or_else(|| bad("rope_type", value, "a name"))?,
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: keys.needed("factor")? },
            "llama3" => {
                let low_freq_factor = keys.needed("low_freq_factor")?;
                let high_freq_factor = keys.needed("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    return Err(FamilyError::Bad {
                        key: format!("{key}.high_freq_factor"),
                        value: high_freq_factor.to_string(),
                        want: format!("more than low_freq_factor {low_freq_factor}"),
                    });
                }
                let original = keys.number("original_max_position_embeddings")?;
                RopeScaling::Llama3 {
                    factor: keys.needed("factor")?,
                    low_freq_factor,
                    high_freq_factor,
                    original_context: original.unwrap_or(context_max as f64),
                }
            }
            other => {
                return Err(FamilyError::Unsupported {
                    key: format!("{key}.rope_type"),
                    value: format!("{other:?}"),
                    family: family.into(),
                    supported: "default, linear, llama3".into(),
                });
            }
        };
        Ok(Self { theta, scaling })
    }

    /// Inverse frequencies of a head of `head_dim`: `theta^(-2i / head_dim)`, scaled.
    pub fn rope(&self, head_dim: usize) -> Rope {
        let inv_freq = (0..head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f64 / head_dim as f64;
                self.scaling.apply(self.theta.powf(-exponent)) as f32
            })
            .collect();
        Rope { inv_freq, attention_factor: 1.0 }
    }
}

impl RopeScaling {
    /// One inverse frequency, radians a position.
    fn apply(&self, freq: f64) -> f64 {
        match *self {
            Self::None => freq,
            Self::Linear { factor } => freq / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let wavelength = 2.0 * PI / freq;
                if wavelength < original_context / high_freq_factor {
                    freq
                } else if wavelength > original_context / low_freq_factor {
                    freq / factor
                } else {
                    let smooth = (original_context / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * freq / factor + smooth * freq
                }
            }
        }
    }
}

fn refuse_partial(factor: f64, family: &str) -> Result<(), FamilyError> {
    if factor == 1.0 {
        return Ok(());
    }
    Err(FamilyError::Unsupported {
        key: "partial_rotary_factor".into(),
        value: factor.to_string(),
        family: family.into(),
        supported: "1".into(),
    })
}

fn object<'a>(key: &str, value: &'a Value) -> Result<&'a Map<String, Value>, FamilyError> {
    let map = value.as_object().ok_or_else(|| bad(key, value, "an object"))?;
    match map.values().any(Value::is_object) {
        true => Err(bad(key, value, "one flat set of parameters for all layers")),
        false => Ok(map),
    }
}

/// The keys of `rope_parameters` or `rope_scaling`.
struct Keys<'a> {
    key: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// A finite number above 0; `None` if absent.
    fn number(&self, name: &str) -> Result<Option<f64>, FamilyError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value
            .as_f64()
            .filter(|x| x.is_finite() && *x > 0.0)
            .map(Some)
            .ok_or_else(|| bad(&format!("{}.{name}", self.key), value, "a number above 0"))
    }

    fn needed(&self, name: &str) -> Result<f64, FamilyError> {
        self.number(name)?.ok_or_else(|| FamilyError::Bad {
            key: format!("{}.{name}", self.key),
            value: "missing".into(),
            want: "a number above 0".into(),
        })
    }
}
