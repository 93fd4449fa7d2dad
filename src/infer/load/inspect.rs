//! What `inspect` shows of a manifest: shards, tensors by role and type, experts, and sizes, as
//! data and as a table.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use doppler_store::Manifest;
use doppler_store::manifest::Role;

/// Tensors of the same role or type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Sum {
    pub tensors: u64,
    pub bytes: u64,
}

/// Experts of the same size, which fit the same slots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExpertClass {
    /// Bytes of one expert.
    pub bytes: u64,
    pub experts: u64,
    /// The layers that have such experts, in ascending order.
    pub layers: Vec<u32>,
}

/// The experts, if each is a group of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Experts {
    pub count: u64,
    pub layers: u64,
    /// Experts per token and layer, if the manifest says.
    pub per_token: Option<u64>,
    pub bytes_min: u64,
    pub bytes_max: u64,
    /// Smallest first.
    pub classes: Vec<ExpertClass>,
    /// Experts that are spread over several shards.
    pub split: u64,
}

/// A summary of a manifest. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// BLAKE3 of the manifest's bytes.
    pub id: String,
    pub model_id: String,
    pub model_type: String,
    pub quantization: String,
    pub hash_algorithm: Option<&'static str>,
    pub layers: Option<u64>,
    pub hidden: Option<u64>,
    pub vocab: Option<u64>,
    pub shards: u64,
    pub shard_bytes_max: u64,
    pub total_bytes: u64,
    pub tensors: u64,
    /// Weights, without padding.
    pub parameters: u64,
    pub trunk_bytes: u64,
    pub expert_bytes: u64,
    /// Bytes in shards that belong to no tensor.
    pub padding_bytes: u64,
    pub roles: BTreeMap<String, Sum>,
    pub dtypes: BTreeMap<String, Sum>,
    /// `None` if no tensor is in a group `layer.L.expert.E`.
    pub experts: Option<Experts>,
    /// Tensors of role `expert` that hold all of a layer's experts.
    pub fused_expert_tensors: u64,
    pub tokenizer: Option<String>,
    /// Names of its chat templates.
    pub chat_templates: Vec<String>,
    pub eos_token_ids: Vec<u32>,
}

/// Summarises a manifest.
pub fn inspect(manifest: &Manifest) -> Summary {
    let (mut roles, mut dtypes) = (BTreeMap::new(), BTreeMap::new());
    let mut parameters = 0_u64;
    let mut fused = 0;
    for (_, tensor) in manifest.tensors.iter() {
        let add = |sums: &mut BTreeMap<String, Sum>, name: String| {
            let sum = sums.entry(name).or_default();
            sum.tensors += 1;
            sum.bytes += tensor.size;
        };
        add(&mut roles, tensor.role.name().to_owned());
        add(&mut dtypes, tensor.dtype.to_string());
        let (rows, cols) = tensor.rows_cols();
        parameters = parameters.saturating_add(rows.saturating_mul(cols));
        fused += u64::from(tensor.role == Role::Expert && tensor.expert().is_none());
    }
    let (trunk_bytes, expert_bytes) = (manifest.trunk_bytes(), manifest.expert_bytes());
    Summary {
        id: manifest.model_id_hash().to_string(),
        model_id: manifest.model_id.clone(),
        model_type: manifest.model_type.clone(),
        quantization: manifest.quantization.clone(),
        hash_algorithm: manifest.shards.first().map(|shard| shard.hash.algorithm.name()),
        layers: manifest.architecture.num_layers,
        hidden: manifest.architecture.hidden_size,
        vocab: manifest.architecture.vocab_size,
        shards: manifest.shards.len() as u64,
        shard_bytes_max: manifest.shards.iter().map(|shard| shard.size).max().unwrap_or(0),
        total_bytes: manifest.total_size,
        tensors: manifest.tensors.len() as u64,
        parameters,
        trunk_bytes,
        expert_bytes,
        padding_bytes: manifest.total_size.saturating_sub(trunk_bytes + expert_bytes),
        roles,
        dtypes,
        experts: experts(manifest),
        fused_expert_tensors: fused,
        tokenizer: manifest.tokenizer.as_ref().map(|tokenizer| tokenizer.file.clone()),
        chat_templates: manifest
            .chat
            .iter()
            .flat_map(|chat| chat.templates.keys().cloned())
            .collect(),
        eos_token_ids: manifest.eos_token_ids.clone(),
    }
}

fn experts(manifest: &Manifest) -> Option<Experts> {
    let mut classes: BTreeMap<u64, ExpertClass> = BTreeMap::new();
    let (mut split, mut layers) = (0, std::collections::BTreeSet::new());
    for group in manifest.expert_groups() {
        let bytes = group.size();
        let class = classes.entry(bytes);
        let class = class.or_insert(ExpertClass { bytes, experts: 0, layers: Vec::new() });
        class.experts += 1;
        if class.layers.last() != Some(&group.layer) {
            class.layers.push(group.layer); // groups come layer by layer
        }
        layers.insert(group.layer);
        split += u64::from(group.place().is_none());
    }
    let (bytes_min, bytes_max) = (*classes.keys().next()?, *classes.keys().next_back()?);
    Some(Experts {
        count: manifest.expert_groups().len() as u64,
        layers: layers.len() as u64,
        per_token: manifest.moe.as_ref().map(|moe| moe.num_experts_per_token),
        bytes_min,
        bytes_max,
        classes: classes.into_values().collect(),
        split,
    })
}

/// `12.3 MiB`, for people.
pub fn human_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(units.len() as u32 - 1);
    match unit {
        0 => format!("{bytes} B"),
        _ => {
            format!("{:.1} {}", bytes as f64 / (1_u64 << (10 * unit)) as f64, units[unit as usize])
        }
    }
}

/// Layer numbers as ranges: `0-3,7`.
fn ranges(layers: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &layer in layers {
        match runs.last_mut() {
            Some((_, end)) if layer == *end + 1 => *end = layer,
            _ => runs.push((layer, layer)),
        }
    }
    let run = |&(a, b): &(u32, u32)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    runs.iter().map(run).collect::<Vec<_>>().join(",")
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |n: Option<u64>| n.map_or("?".to_owned(), |n| n.to_string());
        writeln!(f, "model      {} ({}, {})", self.model_id, self.model_type, self.quantization)?;
        writeln!(f, "id         {}", self.id)?;
        let (layers, hidden) = (number(self.layers), number(self.hidden));
        writeln!(f, "shape      {layers} layers, hidden {hidden}, vocab {}", number(self.vocab))?;
        writeln!(
            f,
            "size       {} ({} bytes), {:.1} M parameters: trunk {}, experts {}, padding {}",
            human_bytes(self.total_bytes),
            self.total_bytes,
            self.parameters as f64 / 1e6,
            human_bytes(self.trunk_bytes),
            human_bytes(self.expert_bytes),
            human_bytes(self.padding_bytes),
        )?;
        writeln!(
            f,
            "shards     {} of at most {}, {}",
            self.shards,
            human_bytes(self.shard_bytes_max),
            self.hash_algorithm.unwrap_or("no hash")
        )?;
        let tokenizer = self.tokenizer.as_deref().unwrap_or("none");
        writeln!(f, "tokenizer  {tokenizer}, end of text {:?}", self.eos_token_ids)?;
        if !self.chat_templates.is_empty() {
            writeln!(f, "chat       template {}", self.chat_templates.join(", "))?;
        }
        for (title, sums) in [("role", &self.roles), ("type", &self.dtypes)] {
            writeln!(f, "\n{title:<12} {:>8} {:>12}", "tensors", "size")?;
            for (name, sum) in sums {
                writeln!(f, "{name:<12} {:>8} {:>12}", sum.tensors, human_bytes(sum.bytes))?;
            }
        }
        if let Some(experts) = &self.experts {
            let per_token = number(experts.per_token);
            writeln!(
                f,
                "\nexperts    {} in {} layers, {per_token} a token and layer",
                experts.count, experts.layers
            )?;
            for class in &experts.classes {
                let (size, layers) = (human_bytes(class.bytes), ranges(&class.layers));
                writeln!(f, "  {:>6} of {size} in layers {layers}", class.experts)?;
            }
            if experts.split > 0 {
                writeln!(f, "  {} are spread over several shards", experts.split)?;
            }
        }
        if self.fused_expert_tensors > 0 {
            let count = self.fused_expert_tensors;
            writeln!(f, "\nexperts    in {count} tensors that each hold all of a layer's experts")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn real(name: &str) -> Summary {
        let dir = doppler_testing::root().join("tests/data/rdrr");
        inspect(&Manifest::read_dir(&dir.join(name)).unwrap())
    }

    #[test]
    fn the_real_manifests_are_summed_up() {
        let diffusion = real("diffusiongemma-26b-a4b-it-q4k-ehf16-af16.manifest.json");
        assert_eq!((diffusion.shards, diffusion.tensors), (234, 691));
        assert_eq!(diffusion.roles["expert"].tensors, 90);
        assert_eq!(diffusion.dtypes["Q4_K"].tensors, 268);
        assert_eq!((diffusion.experts, diffusion.fused_expert_tensors), (None, 90));
        assert_eq!(diffusion.padding_bytes, 0);

        let qwen = real("qwen-3-5-0-8b-q4k-ehaf16.manifest.json");
        assert_eq!(qwen.roles["vision"].tensors, 153);
        assert_eq!(qwen.roles.values().map(|sum| sum.bytes).sum::<u64>(), qwen.total_bytes);
        assert_eq!(qwen.dtypes.values().map(|sum| sum.bytes).sum::<u64>(), qwen.total_bytes);
        assert_eq!(qwen.hash_algorithm, Some("blake3"));
        let table = qwen.to_string();
        for text in
            ["vision", "Q4_K", "1.1 GiB (1146048704 bytes)", "24 layers", "[248046, 248044]"]
        {
            assert!(table.contains(text), "{text} in\n{table}");
        }
        assert_eq!(real("gemma-3-270m-it-q4k-ehf16-af32.manifest.json").expert_bytes, 0);
        assert!(serde_json::to_value(&qwen).unwrap()["dtypes"]["F16"]["tensors"].is_number());
    }

    #[test]
    fn sizes_and_layers_read_well() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(64 << 20), "64.0 MiB");
        assert_eq!(human_bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
    }
}
