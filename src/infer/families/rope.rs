//! Rotary embedding parameters: from both config forms to inverse frequencies.
//!
//! Forms: `default`, `linear` (frequencies divided by a factor) and `llama3`
//! (NTK by parts, Llama 3.1). Every other `rope_type` is refused by name.
//! Formulas: Transformers, `modeling_rope_utils.py`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::f64::consts::PI;
use std::fmt;

use serde_json::{Map, Value};

use super::config::{Config, FamilyError, bad};
use crate::graph::Rope;

/// By how much a position rotates each pair of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How frequencies are scaled for contexts longer than those of the training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Divides every frequency by `factor`.
    Linear {
        factor: f64,
    },
    /// Divides frequencies of long wavelengths by `factor`, keeps those of short ones, and blends
    /// in between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        /// Tokens.
        original_context: f64,
    },
}

impl RopeSpec {
    /// Reads `rope_scaling` or `rope_parameters`, and `rope_theta`.
    ///
    /// If both are present, Transformers uses `rope_scaling` and ignores the other
    /// (`modeling_rope_utils.py`). Here they must not contradict each other: either both mean the
    /// same, or `rope_parameters` gives only the base that is in force anyway.
    pub fn from_config(
        config: &Config<'_>,
        default_theta: f64,
        context_max: usize,
    ) -> Result<Self, FamilyError> {
        let theta = config.positive("rope_theta", default_theta)?;
        let partial = config.positive("partial_rotary_factor", 1.0)?;
        let read = |key| {
            let map = config.get(key).map(|value| object(key, value)).transpose()?;
            // An empty set of parameters counts as absent.
            let Some(map) = map.filter(|map| !map.is_empty()) else { return Ok(None) };
            Keys { config, key, map, read: RefCell::default() }
                .spec(theta, partial, context_max)
                .map(Some)
        };
        match (read("rope_scaling")?, read("rope_parameters")?) {
            (None, None) => {
                refuse_partial(config, partial)?;
                Ok(Self { theta, scaling: RopeScaling::None })
            }
            (Some(spec), None) | (None, Some(spec)) => Ok(spec),
            (Some(scaling), Some(parameters)) => {
                let plain = parameters.scaling == RopeScaling::None;
                if scaling == parameters || plain && scaling.theta == parameters.theta {
                    return Ok(scaling);
                }
                Err(FamilyError::Bad {
                    key: "rope_scaling".into(),
                    value: scaling.to_string(),
                    want: format!(
                        "what rope_parameters says ({parameters}); remove the one that is wrong"
                    ),
                })
            }
        }
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

impl fmt::Display for RopeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.scaling.name().unwrap_or("default");
        write!(f, "{name}, factor {}, theta {}", self.scaling.factor(), self.theta)
    }
}

impl RopeScaling {
    /// `rope_type`, unless it is the default.
    pub const fn name(&self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Linear { .. } => Some("linear"),
            Self::Llama3 { .. } => Some("llama3"),
        }
    }

    /// The factor by which the context is extended.
    pub const fn factor(&self) -> f64 {
        match *self {
            Self::None => 1.0,
            Self::Linear { factor } | Self::Llama3 { factor, .. } => factor,
        }
    }

    /// Scales one inverse frequency, in radians per position.
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

fn refuse_partial(config: &Config<'_>, factor: f64) -> Result<(), FamilyError> {
    match factor == 1.0 {
        true => Ok(()),
        false => Err(config.unsupported("partial_rotary_factor", &factor.into(), "1")),
    }
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
    config: &'a Config<'a>,
    key: &'static str,
    map: &'a Map<String, Value>,
    read: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Keys<'a> {
    /// Interprets the keys, given `rope_theta` and `partial_rotary_factor` from outside of them.
    fn spec(&self, theta: f64, partial: f64, context_max: usize) -> Result<RopeSpec, FamilyError> {
        let partial = self.number("partial_rotary_factor")?.unwrap_or(partial);
        refuse_partial(self.config, partial)?;
        let theta = self.number("rope_theta")?.unwrap_or(theta);
        let spec = RopeSpec { theta, scaling: self.scaling(context_max)? };
        let read = self.read.borrow();
        let left =
            |(key, value): &(&String, &Value)| !value.is_null() && !read.contains(key.as_str());
        match self.map.iter().find(left) {
            None => Ok(spec),
            Some((key, value)) => Err(self.config.unread(&format!("{}.{key}", self.key), value)),
        }
    }

    fn scaling(&self, context_max: usize) -> Result<RopeScaling, FamilyError> {
        // Old configs call it `type`. If both are present, Transformers reads `rope_type`.
        let kinds = ["rope_type", "type"].map(|name| self.get(name));
        let kind = match kinds.into_iter().flatten().next() {
            None => "default",
            Some(value) => value.as_str().ok_or_else(|| bad("rope_type", value, "a name"))?,
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.needed("factor")? }),
            "llama3" => {
                let low_freq_factor = self.needed("low_freq_factor")?;
                let high_freq_factor = self.needed("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    return Err(FamilyError::Bad {
                        key: format!("{}.high_freq_factor", self.key),
                        value: high_freq_factor.to_string(),
                        want: format!("more than low_freq_factor {low_freq_factor}"),
                    });
                }
                let original = self.number("original_max_position_embeddings")?;
                Ok(RopeScaling::Llama3 {
                    factor: self.needed("factor")?,
                    low_freq_factor,
                    high_freq_factor,
                    original_context: original.unwrap_or(context_max as f64),
                })
            }
            other => {
                let key = format!("{}.rope_type", self.key);
                Err(self.config.unsupported(&key, &other.into(), "default, linear, llama3"))
            }
        }
    }

    fn get(&self, name: &'static str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(name);
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// A finite number above 0; `None` if absent.
    fn number(&self, name: &'static str) -> Result<Option<f64>, FamilyError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value
            .as_f64()
            .filter(|x| x.is_finite() && *x > 0.0)
            .map(Some)
            .ok_or_else(|| bad(&format!("{}.{name}", self.key), value, "a number above 0"))
    }

    fn needed(&self, name: &'static str) -> Result<f64, FamilyError> {
        self.number(name)?.ok_or_else(|| FamilyError::Bad {
            key: format!("{}.{name}", self.key),
            value: "missing".into(),
            want: "a number above 0".into(),
        })
    }
}
