//! Rotary embedding parameters: from both config forms to inverse frequencies.
//!
//! Forms: `default`, `linear` (frequencies divided by a factor), `llama3` (NTK by parts, Llama 3.1)
//! `longrope` (two lists, by the sequence's length), `yarn`, and a list of `divisors`, which only GGUF files
//! have. Every other `rope_type` is refused by name. Families whose sliding layers rotate
//! differently have two specs ([`RopeSpec::by_layer_type`]).
//! Formulas: Transformers, `modeling_rope_utils.py`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::f64::consts::PI;
use std::fmt;

use serde_json::{Map, Value};

use super::config::{COUNT_MAX, Config, FamilyError, bad};
use crate::graph::{LongRope, Rope};

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
    /// Divides the frequencies of pairs that rotate less than `beta_slow` times within the original
    /// context by `factor`, keeps those that rotate more than `beta_fast` times, and blends in
    /// between. (Peng et al., "YaRN", arXiv 2309.00071.)
    Yarn {
        factor: f64,
        /// Tokens.
        original_context: f64,
        beta_fast: f64,
        beta_slow: f64,
        /// Whether the bounds of the blend are whole pairs.
        truncate: bool,
        /// The factor of sines and cosines.
        attention_factor: f64,
    },
    /// Divides the frequency of each pair by a number of its own, of which there are two lists: one
    /// for sequences within the original context, one for longer ones. (Ding et al., "LongRoPE",
    /// arXiv 2402.13753; Phi-3.)
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        /// Tokens.
        original_context: usize,
        /// The factor of sines and cosines.
        attention_factor: f64,
    },
    /// Rotates the first `part` of the pairs, with the frequencies that they have in a whole head,
    /// divided by `factor`; the others stay. (Gemma 4.)
    Proportional {
        part: f64,
        factor: f64,
    },
    /// Divides the frequency of each pair by a number of its own. GGUF files of Llama 3.1 have
    /// such a list instead of the parameters behind it.
    Divisors(Vec<f64>),
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
        let (spec, partial) = Self::partial(config, default_theta, context_max)?;
        refuse_partial(config, partial)?;
        Ok(spec)
    }

    /// As [`Self::from_config`], for families in which a part of each head rotates: also that part,
    /// `partial_rotary_factor`, for [`Config::rotary_dim`] to check.
    pub fn partial(
        config: &Config<'_>,
        default_theta: f64,
        context_max: usize,
    ) -> Result<(Self, f64), FamilyError> {
        Self::forms(config, default_theta, context_max, false)
    }

    /// As [`Self::partial`], for families whose ropes may change with the sequence's length. The
    /// caller compares their factors with the heads ([`Self::fits`]).
    pub fn perhaps_long(
        config: &Config<'_>,
        default_theta: f64,
        context_max: usize,
    ) -> Result<(Self, f64), FamilyError> {
        Self::forms(config, default_theta, context_max, true)
    }

    fn forms(
        config: &Config<'_>,
        default_theta: f64,
        context_max: usize,
        may_be_long: bool,
    ) -> Result<(Self, f64), FamilyError> {
        let theta = config.positive("rope_theta", default_theta)?;
        let partial = config.positive("partial_rotary_factor", 1.0)?;
        let read = |key: &'static str| {
            let map = config.get(key).map(|value| flat(key, value)).transpose()?;
            // An empty set of parameters counts as absent.
            let Some(map) = map.filter(|map| !map.is_empty()) else { return Ok(None) };
            let keys = Keys { may_be_long, ..Keys::new(config, key, map) };
            keys.spec(theta, partial, context_max).map(Some)
        };
        match (read("rope_scaling")?, read("rope_parameters")?) {
            (None, None) => Ok((Self { theta, scaling: RopeScaling::None }, partial)),
            (Some(read), None) | (None, Some(read)) => Ok(read),
            (Some((scaling, part)), Some((parameters, other))) => {
                let plain = parameters.scaling == RopeScaling::None;
                let same = scaling == parameters || plain && scaling.theta == parameters.theta;
                if same && part == other {
                    return Ok((scaling, part));
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

    /// The specs of layers that see everything and of sliding layers.
    ///
    /// Reads the new form, a set of `rope_parameters` for each layer type, or else the old one:
    /// there, all keys of [`Self::from_config`] are those of layers that see everything, and sliding
    /// layers use the plain form with the base `local_theta` gives, or with the same base.
    pub fn by_layer_type(
        config: &Config<'_>,
        default_theta: f64,
        local_theta: Option<f64>,
        context_max: usize,
    ) -> Result<LayerRopes, FamilyError> {
        const KEY: &str = "rope_parameters";
        let sets = config.get(KEY).and_then(Value::as_object);
        let Some(sets) = sets.filter(|sets| sets.values().any(Value::is_object)) else {
            let full = Self::from_config(config, default_theta, context_max)?;
            let theta = local_theta.unwrap_or(full.theta);
            return Ok(LayerRopes { full, sliding: Self { theta, scaling: RopeScaling::None } });
        };
        let set = |kind: &'static str, key: &'static str, theta: f64| {
            let value = sets.get(kind).ok_or_else(|| FamilyError::Bad {
                key: key.into(),
                value: "missing".into(),
                want: "the parameters of this layer type".into(),
            })?;
            let (spec, partial) =
                Keys::new(config, key, flat(key, value)?).spec(theta, 1.0, context_max)?;
            refuse_partial(config, partial)?;
            Ok(spec)
        };
        let known = ["full_attention", "sliding_attention"];
        if let Some((kind, value)) = sets.iter().find(|(kind, _)| !known.contains(&kind.as_str())) {
            return Err(config.unread(&format!("{KEY}.{kind}"), value));
        }
        let full = set(known[0], "rope_parameters.full_attention", default_theta)?;
        let theta = local_theta.unwrap_or(default_theta);
        let sliding = set(known[1], "rope_parameters.sliding_attention", theta)?;
        Ok(LayerRopes { full, sliding })
    }

    /// Refuses lists of factors that do not have one for each pair of `rotary_dim` elements.
    pub fn fits(&self, rotary_dim: usize) -> Result<(), FamilyError> {
        let RopeScaling::LongRope { short, long, .. } = &self.scaling else { return Ok(()) };
        match [("short_factor", short), ("long_factor", long)]
            .into_iter()
            .find(|(_, list)| list.len() != rotary_dim / 2)
        {
            None => Ok(()),
            Some((key, list)) => Err(FamilyError::Bad {
                key: key.into(),
                value: format!("a list of {}", list.len()),
                want: format!("a number for each of {} rotated pairs", rotary_dim / 2),
            }),
        }
    }

    /// Inverse frequencies of a head of which `head_dim` elements rotate:
    /// `theta^(-2i / head_dim)`, scaled.
    pub fn rope(&self, head_dim: usize) -> Rope {
        let pairs = || 0..head_dim / 2;
        let inv_freq = pairs().map(|i| self.inv_freq(i, head_dim) as f32).collect();
        let attention_factor = match self.scaling {
            RopeScaling::Yarn { attention_factor, .. }
            | RopeScaling::LongRope { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        };
        let long = match &self.scaling {
            RopeScaling::LongRope { long, original_context, .. } => {
                let freq = |i: usize| self.theta.powf(-((2 * i) as f64 / head_dim as f64));
                let inv_freq = pairs().map(|i| (freq(i) / long[i]) as f32).collect();
                Some(LongRope { inv_freq, from: *original_context })
            }
            _ => None,
        };
        Rope { inv_freq, attention_factor, long }
    }

    /// How far pair `i` of a head turns from one position to the next, in radians.
    fn inv_freq(&self, i: usize, head_dim: usize) -> f64 {
        let freq = self.theta.powf(-((2 * i) as f64 / head_dim as f64));
        match self.scaling {
            RopeScaling::None => freq,
            // As many as there are pairs.
            RopeScaling::Divisors(ref divisors) => freq / divisors[i],
            RopeScaling::LongRope { ref short, .. } => freq / short[i],
            RopeScaling::Linear { factor } => freq / factor,
            RopeScaling::Proportional { part, factor } => {
                // As Transformers: rounded down.
                let turning = (part * head_dim as f64 / 2.0) as usize;
                if i < turning { freq / factor } else { 0.0 }
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
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
            RopeScaling::Yarn {
                factor, original_context, beta_fast, beta_slow, truncate, ..
            } => {
                // The pair that rotates so many times within the original context.
                let pair = |turns: f64| {
                    let logarithm = (original_context / (turns * 2.0 * PI)).ln();
                    head_dim as f64 * logarithm / (2.0 * self.theta.ln())
                };
                let (low, high) = match truncate {
                    true => (pair(beta_fast).floor(), pair(beta_slow).ceil()),
                    false => (pair(beta_fast), pair(beta_slow)),
                };
                let (low, high) = (low.max(0.0), high.min((head_dim - 1) as f64));
                let width = if low == high { 0.001 } else { high - low };
                let divided = ((i as f64 - low) / width).clamp(0.0, 1.0);
                divided * freq / factor + (1.0 - divided) * freq
            }
        }
    }
}

/// The ropes of a family whose sliding layers have their own.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRopes {
    pub full: RopeSpec,
    pub sliding: RopeSpec,
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
            Self::Yarn { .. } => Some("yarn"),
            Self::LongRope { .. } => Some("longrope"),
            Self::Proportional { .. } => Some("proportional"),
            Self::Divisors(_) => Some("divisors"),
        }
    }

    /// The factor by which the context is extended.
    pub const fn factor(&self) -> f64 {
        match *self {
            Self::None | Self::Divisors(_) | Self::LongRope { .. } => 1.0,
            Self::Linear { factor }
            | Self::Llama3 { factor, .. }
            | Self::Yarn { factor, .. }
            | Self::Proportional { factor, .. } => factor,
        }
    }
}

fn refuse_partial(config: &Config<'_>, factor: f64) -> Result<(), FamilyError> {
    match factor == 1.0 {
        true => Ok(()),
        false => Err(config.unsupported("partial_rotary_factor", &factor.into(), "1")),
    }
}

fn flat<'a>(key: &str, value: &'a Value) -> Result<&'a Map<String, Value>, FamilyError> {
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
    /// Whether the family knows longrope.
    may_be_long: bool,
    read: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Keys<'a> {
    fn new(config: &'a Config<'a>, key: &'static str, map: &'a Map<String, Value>) -> Self {
        Self { config, key, map, may_be_long: false, read: RefCell::default() }
    }

    /// Interprets the keys, given `rope_theta` and `partial_rotary_factor` from outside of them.
    /// Also returns the latter.
    fn spec(
        &self,
        theta: f64,
        partial: f64,
        context_max: usize,
    ) -> Result<(RopeSpec, f64), FamilyError> {
        let mut partial = self.number("partial_rotary_factor")?.unwrap_or(partial);
        let theta = self.number("rope_theta")?.unwrap_or(theta);
        let mut spec = RopeSpec { theta, scaling: self.scaling(context_max)? };
        if let RopeScaling::Proportional { part, .. } = &mut spec.scaling {
            *part = std::mem::replace(&mut partial, 1.0);
            if *part > 1.0 {
                return Err(FamilyError::Bad {
                    key: format!("{}.partial_rotary_factor", self.key),
                    value: part.to_string(),
                    want: "a number up to 1".into(),
                });
            }
        }
        if matches!(spec.scaling, RopeScaling::Yarn { .. }) && theta <= 1.0 {
            return Err(FamilyError::Bad {
                key: "rope_theta".into(),
                value: theta.to_string(),
                want: "more than 1, for yarn".into(),
            });
        }
        // The positions of a text are the same on all axes.
        self.read.borrow_mut().extend(["mrope_section", "mrope_interleaved"]);
        let read = self.read.borrow();
        let left =
            |(key, value): &(&String, &Value)| !value.is_null() && !read.contains(key.as_str());
        match self.map.iter().find(left) {
            None => Ok((spec, partial)),
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
            "proportional" => {
                let factor = self.number("factor")?.unwrap_or(1.0);
                Ok(RopeScaling::Proportional { part: 1.0, factor })
            }
            "yarn" => self.yarn(context_max),
            "divisors" => self.divisors(),
            "longrope" | "su" if self.may_be_long => self.longrope(context_max),
            other => {
                let key = format!("{}.rope_type", self.key);
                Err(self.config.unsupported(&key, &other.into(), "default, linear, llama3, yarn"))
            }
        }
    }

    /// One for each pair of a head. The config must state `head_dim`, so that their number can be
    /// checked here.
    fn divisors(&self) -> Result<RopeScaling, FamilyError> {
        let list = self.get("divisors").unwrap_or(&Value::Null);
        let pairs = self.config.optional("head_dim", 1 << 16)?.map(|width| width / 2);
        let numbers = list.as_array().filter(|list| Some(list.len()) == pairs).and_then(|list| {
            let number = |value: &Value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0);
            list.iter().map(number).collect::<Option<Vec<f64>>>()
        });
        let key = format!("{}.divisors", self.key);
        let numbers = numbers.ok_or_else(|| {
            bad(&key, list, "a number above 0 for each pair of head_dim, which must be given")
        })?;
        Ok(RopeScaling::Divisors(numbers))
    }

    /// Longrope as `_compute_longrope_parameters` has it: the factor by which the context is extended
    /// is that of the two contexts. [`RopeSpec::fits`] compares the lists with the heads.
    fn longrope(&self, context_max: usize) -> Result<RopeScaling, FamilyError> {
        let list = |name: &'static str| {
            let value = self.get(name).unwrap_or(&Value::Null);
            let number = |value: &Value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0);
            let numbers = value.as_array().filter(|list| list.len() <= COUNT_MAX);
            let numbers = numbers.and_then(|list| list.iter().map(number).collect());
            let key = format!("{}.{name}", self.key);
            numbers.ok_or_else(|| bad(&key, value, "a number above 0 for each rotated pair"))
        };
        let (short, long) = (list("short_factor")?, list("long_factor")?);
        let outside = self.config.optional("original_max_position_embeddings", 1 << 26)?;
        let inside = self.number("original_max_position_embeddings")?.map(|n| n as usize);
        let given = self.number("factor")?;
        let original_context = inside.or(outside).unwrap_or(context_max);
        let factor = match inside.or(outside) {
            Some(original) => context_max as f64 / original as f64,
            None => given.unwrap_or(1.0),
        };
        let scale = || match factor <= 1.0 {
            true => 1.0,
            false => (1.0 + factor.ln() / (original_context as f64).ln()).sqrt(),
        };
        let attention_factor = self.number("attention_factor")?.unwrap_or_else(scale);
        Ok(RopeScaling::LongRope { short, long, original_context, attention_factor })
    }

    /// YaRN with the defaults of `_compute_yarn_parameters`.
    fn yarn(&self, context_max: usize) -> Result<RopeScaling, FamilyError> {
        let original = self.number("original_max_position_embeddings")?;
        let original_context = original.unwrap_or(context_max as f64);
        let factor = self.needed("factor")?;
        let scale =
            |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let by_scale = match (self.number("mscale")?, self.number("mscale_all_dim")?) {
            (Some(mscale), Some(all)) => scale(mscale) / scale(all),
            _ => scale(1.0),
        };
        let truncate = match self.get("truncate") {
            None => true,
            Some(value) => value
                .as_bool()
                .ok_or_else(|| bad(&format!("{}.truncate", self.key), value, "true or false"))?,
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast: self.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.number("beta_slow")?.unwrap_or(1.0),
            truncate,
            attention_factor: self.number("attention_factor")?.unwrap_or(by_scale),
        })
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
