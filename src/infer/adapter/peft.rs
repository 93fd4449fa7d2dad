//! Adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Read are plain LoRA adapters with their ranks, `lora_alpha`, rank-stabilised scales and patterns.
//! A key of the config that is neither known here nor off is refused by name: it may change what is
//! computed. So is a tensor of another kind (magnitudes of DoRA, biases, whole modules).
//!
//! Format: <https://huggingface.co/docs/peft/developer_guides/checkpoint>, `LoraConfig`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Adapter, AdapterError, Delta, Matrix, Naming, Result, matrix, name_of};
use crate::load::{self, Checkpoint};

pub(super) const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Keys that say nothing about what is computed once the tensors are there.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "alpha_pattern",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// Ways to begin a training that change the base's weights, too.
const BASE_CHANGED: &[&str] = &["pissa", "olora", "corda", "loftq"];

pub(super) fn open(dir: &Path) -> Result<Adapter> {
    let file = dir.join(CONFIG);
    let config = load::read_small_json(&file)?;
    let place = file.display().to_string();
    let config = Config::read(&config, &place)?;
    let weights = dir.join(WEIGHTS);
    if !weights.exists() && dir.join("adapter_model.bin").exists() {
        let what = "adapter_model.bin is a pickle".to_owned();
        return Err(AdapterError::Unsupported { place: dir.display().to_string(), what });
    }
    let checkpoint = load::open_safetensors(&weights)?;
    let deltas = deltas(&checkpoint, &config).map_err(|problem| match problem {
        Problem::Wrong(problem) => {
            AdapterError::Invalid { place: weights.display().to_string(), problem }
        }
        Problem::Unsupported(what) => {
            AdapterError::Unsupported { place: weights.display().to_string(), what }
        }
    })?;
    Adapter::new(name_of(dir), config.base, Naming::HuggingFace, None, deltas)
}

enum Problem {
    Wrong(String),
    Unsupported(String),
}

/// What a config says about ranks and scales.
struct Config {
    base: String,
    rank: f64,
    alpha: f64,
    stabilised: bool,
    ranks: BTreeMap<String, f64>,
    alphas: BTreeMap<String, f64>,
}

impl Config {
    fn read(config: &Value, place: &str) -> Result<Self> {
        let wrong = |problem: &str| AdapterError::Invalid {
            place: place.to_owned(),
            problem: problem.to_owned(),
        };
        let map = config.as_object().ok_or_else(|| wrong("not a JSON object"))?;
        refuse(map).map_err(|what| AdapterError::Unsupported { place: place.to_owned(), what })?;
        let number = |key: &str| {
            let number = map.get(key).and_then(Value::as_f64);
            number.filter(|n| n.is_finite()).ok_or_else(|| wrong(&format!("{key} is no number")))
        };
        let pattern = |key: &str| -> Result<BTreeMap<String, f64>> {
            let Some(Value::Object(pattern)) = map.get(key) else { return Ok(BTreeMap::new()) };
            let entry = |(module, value): (&String, &Value)| {
                let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
                if !module.chars().all(plain) {
                    let what = format!("{key} with the expression {module:?}");
                    return Err(AdapterError::Unsupported { place: place.to_owned(), what });
                }
                let value = value.as_f64().filter(|value| value.is_finite());
                let value = value.ok_or_else(|| wrong(&format!("{key}: {module} is no number")))?;
                Ok((module.clone(), value))
            };
            pattern.iter().map(entry).collect()
        };
        let text = |key: &str| map.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(Self {
            base: text("base_model_name_or_path"),
            rank: number("r")?,
            alpha: number("lora_alpha")?,
            stabilised: map.get("use_rslora") == Some(&Value::Bool(true)),
            ranks: pattern("rank_pattern")?,
            alphas: pattern("alpha_pattern")?,
        })
    }

    /// The rank and the scale of a module.
    fn of(&self, module: &str) -> (f64, f32) {
        let of = |pattern: &BTreeMap<String, f64>, default| {
            // The whole name, or the end of it from a dot on.
            let means = |key: &str| {
                module.strip_suffix(key).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            };
            pattern.iter().find(|(key, _)| means(key)).map_or(default, |(_, value)| *value)
        };
        let (rank, alpha) = (of(&self.ranks, self.rank), of(&self.alphas, self.alpha));
        let by = if self.stabilised { rank.sqrt() } else { rank };
        (rank, (alpha / by) as f32)
    }
}

/// What of a config is not supported.
fn refuse(map: &Map<String, Value>) -> std::result::Result<(), String> {
    match map.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        Some(other) => return Err(format!("an adapter of type {other:?} (LORA is)")),
        None => return Err("an adapter that does not state its peft_type".into()),
    }
    if let Some(bias) = map.get("bias").filter(|bias| !bias.is_null() && **bias != "none") {
        return Err(format!("bias {bias}"));
    }
    if let Some(init) = map.get("init_lora_weights").and_then(Value::as_str)
        && BASE_CHANGED.iter().any(|known| init.starts_with(known))
    {
        return Err(format!("init_lora_weights {init:?}, which changes the base's weights, too"));
    }
    let off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    let odd = map.iter().find(|(key, value)| !HARMLESS.contains(&key.as_str()) && !off(value));
    match odd {
        None => Ok(()),
        Some((key, _)) => Err(key.clone()),
    }
}

/// The changes, by the names of the checkpoint's tensors.
fn deltas(
    from: &dyn Checkpoint,
    config: &Config,
) -> std::result::Result<BTreeMap<String, Delta>, Problem> {
    let (mut firsts, mut seconds) = (BTreeMap::new(), BTreeMap::new());
    for name in from.names() {
        let Some((module, first)) = part(name) else {
            return Err(Problem::Unsupported(format!("the tensor {name}")));
        };
        let matrix = matrix(from, name).map_err(Problem::Wrong)?;
        let parts = if first { &mut firsts } else { &mut seconds };
        parts.insert(module, matrix);
    }
    if let Some(module) = seconds.keys().find(|module| !firsts.contains_key(*module)) {
        return Err(Problem::Wrong(format!("{module} has no lora_A")));
    }
    let mut deltas = BTreeMap::new();
    for (module, a) in firsts {
        let b: Matrix = seconds
            .remove(&module)
            .ok_or_else(|| Problem::Wrong(format!("{module} has no lora_B")))?;
        let (rank, scale) = config.of(&module);
        if a.rows == b.cols && rank != a.rows as f64 {
            let have = a.rows;
            return Err(Problem::Wrong(format!(
                "{module} has rank {have}, and {CONFIG} says {rank}"
            )));
        }
        deltas.insert(format!("{module}.weight"), Delta { a, b, scale });
    }
    Ok(deltas)
}

/// The module of a tensor, as the text model's checkpoint calls it, and whether the tensor is its A.
fn part(name: &str) -> Option<(String, bool)> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let ends = [(".lora_A", true), (".lora_B", false)];
    let (module, first) = ends.iter().find_map(|(end, first)| {
        let module = [".weight", ".default.weight"]
            .iter()
            .find_map(|kind| name.strip_suffix(kind)?.strip_suffix(end));
        Some((module?, *first))
    })?;
    load::text_model_name(module).map(|module| (module, first))
}
