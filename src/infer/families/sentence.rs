//! What makes embeddings of states: pooling, dense heads, normalisation and prompts, from the files
//! that sentence-transformers writes beside a checkpoint.
//!
//! They are in the config under [`KEY`] (`load::sentence` puts them there), so that a converted model
//! has them, too. What is not understood is refused by name. A checkpoint without these files is an
//! embedding model if its architecture has no output matrix; Qwen3's embed with the last token,
//! others with the mean.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::config::{Config, DIMENSION_MAX, FamilyError, bad};
use crate::graph::{Activation, Graph, Op, Weight, WeightRole};
use crate::source::Source;

/// The config's key.
pub const KEY: &str = "sentence_transformers";

/// The most dense heads.
const DENSE_MAX: usize = 8;

/// Which states become an embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's.
    First,
    /// The last token's.
    Last,
    /// The mean of all.
    Mean,
}

/// A matrix that every state is multiplied with. A mean of such products is the product of the mean,
/// so it stands before the pooling.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// The module's directory, with which its tensors' names begin.
    pub module: String,
    pub width: usize,
    pub bias: bool,
    /// `None` for the identity.
    pub activation: Option<Activation>,
}

/// How texts become embeddings.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    pub pooling: Pooling,
    pub dense: Vec<Dense>,
    /// Whether embeddings have length 1.
    pub normalise: bool,
    /// What is put before a text, by the name of its task.
    pub prompts: BTreeMap<String, String>,
    pub default_prompt: Option<String>,
    /// The most tokens of a text, special ones included. `None` for the model's context.
    pub tokens_max: Option<usize>,
    /// Whether texts are written in lower case first.
    pub lower_case: bool,
}

/// The spec of an embedding model; `None` if the model makes text.
pub fn spec(config: &Config<'_>, architecture: &str) -> Result<Option<Spec>, FamilyError> {
    let Some(value) = config.get(KEY) else {
        let states = architecture.ends_with("Model") || architecture == "bert";
        return Ok(states.then(|| plain(architecture)));
    };
    let files =
        Files { config, files: value.as_object().ok_or_else(|| bad(KEY, value, "an object"))? };
    files.spec(architecture).map(Some)
}

fn plain(architecture: &str) -> Spec {
    let last = architecture.starts_with("Qwen3");
    Spec {
        pooling: if last { Pooling::Last } else { Pooling::Mean },
        dense: Vec::new(),
        normalise: true,
        prompts: BTreeMap::new(),
        default_prompt: None,
        tokens_max: None,
        lower_case: false,
    }
}

/// The files' contents.
struct Files<'a> {
    config: &'a Config<'a>,
    files: &'a Map<String, Value>,
}

impl Files<'_> {
    fn spec(&self, architecture: &str) -> Result<Spec, FamilyError> {
        let modules = self.files.get("modules").unwrap_or(&Value::Null);
        let list = modules.as_array().ok_or_else(|| bad("modules.json", modules, "a list"))?;
        let mut spec = Spec { normalise: false, ..plain(architecture) };
        // Transformer, pooling, dense heads, normalisation: this order, the first two once.
        let mut reached = 0;
        for module in list {
            let kind = module.get("type").and_then(Value::as_str).unwrap_or_default();
            let path = module.get("path").and_then(Value::as_str).unwrap_or_default();
            let rank = match kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" => 1,
                "Pooling" => 2,
                "Dense" => 3,
                "Normalize" => 4,
                _ => 0,
            };
            let follows = if rank == 3 {
                reached == 2 || reached == 3
            } else {
                rank == reached + 1 || rank == 4 && reached >= 2
            };
            if rank == 0 || !follows || rank == 1 && !path.is_empty() {
                let kind = Value::from(kind);
                let known =
                    "Transformer in the same directory, Pooling, Dense, Normalize, in this order";
                return Err(self.config.unsupported("modules.json", &kind, known));
            }
            reached = rank;
            match rank {
                2 => spec.pooling = self.pooling(path)?,
                3 => spec.dense.push(self.dense(path)?),
                4 => spec.normalise = true,
                _ => {}
            }
        }
        if reached < 2 || spec.dense.len() > DENSE_MAX {
            return Err(bad(
                "modules.json",
                modules,
                "a Transformer, a Pooling and few Dense heads",
            ));
        }
        let bent = spec
            .dense
            .iter()
            .rev()
            .skip(usize::from(spec.pooling != Pooling::Mean))
            .any(|dense| dense.activation.is_some());
        if bent && spec.pooling == Pooling::Mean {
            let value = Value::from("an activation");
            return Err(self.config.unsupported("Dense", &value, "the identity after a mean"));
        }
        self.settings(&mut spec)?;
        Ok(spec)
    }

    fn pooling(&self, path: &str) -> Result<Pooling, FamilyError> {
        let value = self.file(path)?;
        let named = |name: &str, value: &Value| match name {
            "cls" | "cls_token" => Ok(Pooling::First),
            "mean" | "mean_tokens" => Ok(Pooling::Mean),
            "lasttoken" => Ok(Pooling::Last),
            _ => Err(self.config.unsupported("pooling_mode", value, "cls, mean, lasttoken")),
        };
        if value.get("include_prompt").and_then(Value::as_bool) == Some(false) {
            return Err(self.config.unsupported("include_prompt", &false.into(), "true"));
        }
        if let Some(mode) = value.get("pooling_mode").filter(|mode| !mode.is_null()) {
            return named(mode.as_str().unwrap_or_default(), mode);
        }
        let on = value.iter().filter(|(_, on)| on.as_bool() == Some(true));
        let modes = on.filter_map(|(key, _)| key.strip_prefix("pooling_mode_"));
        let modes: Vec<&str> = modes.collect();
        match modes[..] {
            [mode] => named(mode, &mode.into()),
            _ => Err(self.config.unsupported(
                "pooling_mode",
                &modes.join(" and ").into(),
                "one mode",
            )),
        }
    }

    fn dense(&self, path: &str) -> Result<Dense, FamilyError> {
        let value = self.file(path)?;
        let width = value.get("out_features").unwrap_or(&Value::Null);
        let fits = width.as_u64().and_then(|n| usize::try_from(n).ok());
        let fits = fits.filter(|n| (1..=DIMENSION_MAX).contains(n));
        let width = fits.ok_or_else(|| bad("out_features", width, "a width"))?;
        let named = value.get("activation_function").unwrap_or(&Value::Null);
        let name = named.as_str().unwrap_or("torch.nn.modules.activation.Tanh");
        let activation = match name.rsplit('.').next().unwrap_or_default() {
            "Identity" => None,
            "Tanh" => Some(Activation::Tanh),
            _ => {
                return Err(self.config.unsupported(
                    "activation_function",
                    named,
                    "Identity, Tanh",
                ));
            }
        };
        let bias = value.get("bias").and_then(Value::as_bool).unwrap_or(true);
        Ok(Dense { module: path.to_owned(), width, bias, activation })
    }

    fn settings(&self, spec: &mut Spec) -> Result<(), FamilyError> {
        let settings = self.files.get("settings").unwrap_or(&Value::Null);
        if let Some(prompts) = settings.get("prompts").filter(|prompts| !prompts.is_null()) {
            let read = serde_json::from_value(prompts.clone());
            spec.prompts = read.map_err(|_| bad("prompts", prompts, "texts by name"))?;
        }
        let name = settings.get("default_prompt_name").unwrap_or(&Value::Null);
        spec.default_prompt = name.as_str().map(ToOwned::to_owned);
        if spec.default_prompt.as_ref().is_some_and(|name| !spec.prompts.contains_key(name)) {
            return Err(bad("default_prompt_name", name, "the name of a prompt"));
        }
        let transformer = self.files.get("transformer").unwrap_or(&Value::Null);
        if let Some(most) = transformer.get("max_seq_length").filter(|most| !most.is_null()) {
            let tokens = most.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
            spec.tokens_max =
                Some(tokens.ok_or_else(|| bad("max_seq_length", most, "a number above 0"))?);
        }
        spec.lower_case =
            transformer.get("do_lower_case").and_then(Value::as_bool).unwrap_or(false);
        Ok(())
    }

    /// The config of the module in this directory.
    fn file(&self, path: &str) -> Result<&Map<String, Value>, FamilyError> {
        let found = self.files.get("configs").and_then(|configs| configs.get(path));
        let found = found.and_then(Value::as_object);
        found.ok_or_else(|| bad(&format!("{path}/config.json"), &Value::Null, "an object"))
    }
}

/// Makes the graph end with states, multiplied by the dense heads, instead of logits.
pub fn apply(graph: &mut Graph, spec: &Spec) {
    let mut x = match graph.ops.pop() {
        Some(Op::Logits { x, weight, .. }) => {
            let head = weight.0 as usize;
            // The output matrix comes last, unless it is the embedding table.
            if graph.weights[head].role == WeightRole::Head && head + 1 == graph.weights.len() {
                graph.weights.pop();
            }
            x
        }
        Some(Op::States { x }) => x,
        _ => unreachable!("a graph ends with logits or states"),
    };
    for weight in &mut graph.weights {
        let name = weight.tensor.clone();
        weight.source = bare(std::mem::take(&mut weight.source), &name);
    }
    for (number, dense) in spec.dense.iter().enumerate() {
        let cols = graph.width(x);
        let name = [
            "dense 1", "dense 2", "dense 3", "dense 4", "dense 5", "dense 6", "dense 7", "dense 8",
        ][number];
        let out = graph.buffer(name, dense.width);
        let mut add = |part: &str, role, rows, cols| {
            let tensor = format!("{}.linear.{part}", dense.module);
            let source = Source::Itself;
            graph.add_weight(Weight { tensor, rows, cols, role, layer: None, source })
        };
        let weight = add("weight", WeightRole::Other, dense.width, cols);
        let bias = dense.bias.then(|| add("bias", WeightRole::Bias, 1, dense.width));
        graph.ops.push(Op::Linear { x, weight, bias, out });
        if let Some(activation) = dense.activation {
            graph.ops.push(Op::Activate { x: out, activation });
        }
        x = out;
    }
    graph.ops.push(Op::States { x });
}

/// The same source, from tensors whose names may lack the first `model.`, as those of a model that was
/// saved without its output matrix.
fn bare(source: Source, weight: &str) -> Source {
    let short =
        |name: &str| name.strip_prefix("model.").map(|name| Source::Stored(name.to_owned()));
    let either = |source: Source, name: &str| match short(name) {
        Some(other) => Source::FirstOf(vec![source, other]),
        None => source,
    };
    match source {
        Source::Itself => either(Source::Itself, weight),
        Source::Stored(name) => {
            let stored = Source::Stored(name.clone());
            either(stored, &name)
        }
        Source::AddOne(of) => Source::AddOne(Box::new(bare(*of, weight))),
        Source::Times(of, factor) => Source::Times(Box::new(bare(*of, weight)), factor),
        other => other,
    }
}
