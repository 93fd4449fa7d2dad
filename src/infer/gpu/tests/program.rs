//! Programs as data: everything that a page looks up is there and fits.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::load::{Arch, SynthOptions, synth_manifest};
use crate::reader::WeightReader;
use crate::testing::{self, Wanted};
use doppler_store::DType;

/// A small Qwen3-MoE whose layers have two expert layouts.
fn mixture() -> Model {
    let config = json!({
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
        "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 500,
        "tie_word_embeddings": false, "hidden_act": "silu", "attention_bias": false,
    });
    testing::random(&config, rand::random(), |wanted: &Wanted<'_>| {
        let deep = wanted.name.contains("layers.2.") && wanted.name.contains("down_proj");
        match wanted.rows {
            1 => DType::Bf16,
            _ if deep => DType::Q6K,
            _ if wanted.cols.is_multiple_of(256) => DType::Q4K,
            _ => DType::Q8_0,
        }
    })
}

fn bytes_of(runs: &[Run]) -> u64 {
    runs.iter().map(|Run(_, start, end)| end - start).sum()
}

/// Only the formats of its weights and experts are described.
fn describes_the_formats_it_uses(program: &Program) {
    let parts = program.classes.iter().flat_map(|class| &class.parts);
    let stored = parts.map(|part| part.stored).chain(program.weights.iter().map(|w| w.stored));
    let used: BTreeSet<&str> = stored.map(|Stored { format, .. }| format).collect();
    assert!(used.len() > 2, "{used:?}");
    assert_eq!(program.formats.keys().copied().collect::<BTreeSet<_>>(), used);
}

/// Half of 18 experts in two classes.
fn has_a_place_for_every_stored_byte(program: &Program) {
    assert_eq!(program.classes.iter().map(|class| class.count).sum::<u32>(), 9);
    for moe in &program.moe {
        let class = &program.classes[usize::from(moe.class)];
        assert_eq!(moe.experts.len(), 6);
        assert!(moe.experts.iter().all(|runs| bytes_of(runs) == class.bytes as u64));
        for part in &class.parts {
            assert!(part.from < class.bytes && part.to < class.stride);
        }
    }
    for weight in &program.weights {
        assert!(bytes_of(&weight.runs) > 0, "{}", weight.tensor);
        let rows: usize = weight.pieces.iter().map(|(.., rows)| rows).sum();
        let wanted = if weight.vectors.is_empty() { weight.stored.rows } else { 0 };
        assert_eq!(rows, wanted, "{}", weight.tensor);
    }
}

#[test]
fn every_index_of_a_program_leads_somewhere_and_sizes_agree() {
    let model = mixture();
    for reduction in [Reduction::Lane, Reduction::Group] {
        let options = ProgramOptions { reduction, context: Some(77), ..Default::default() };
        let program = Program::new(&model, &options).unwrap();
        assert_eq!((program.context, program.batch, program.vocab), (77, 64, 300));
        for dispatch in &program.dispatches {
            let info = &program.kernels[dispatch.kernel];
            let kernel = Kernel::find(info.name).unwrap();
            assert_eq!(dispatch.storage.len(), info.write.len(), "{}", info.name);
            assert_eq!(dispatch.params.len() * 4, kernel.params_bytes as usize, "{}", info.name);
            assert!(dispatch.storage.iter().all(|buffer| *buffer < program.buffers.len()));
            let kernels = ["kv_write", "attention", "decode_attention"];
            let looks_up = kernels.iter().any(|name| info.name.starts_with(name));
            assert_eq!(dispatch.storage.contains(&program.blocks), looks_up, "{}", info.name);
        }
        // Each dispatch belongs to one stretch, and the layers are in order.
        let mut run = BTreeSet::new();
        let mut layers = Vec::new();
        for stretch in &program.steps {
            let all: Vec<usize> = match stretch {
                Stretch::Run(all) => all.clone(),
                Stretch::Experts { moe, waves, sum } => {
                    layers.push(*moe);
                    let class = &program.classes[usize::from(program.moe[*moe].class)];
                    assert_eq!(waves.len(), class.buffers.len());
                    waves.iter().flatten().chain(sum).copied().collect()
                }
            };
            assert!(all.into_iter().all(|dispatch| run.insert(dispatch)), "run twice");
        }
        let token = program.token.as_ref().unwrap();
        run.extend(&token.dispatches);
        assert_eq!((run.len(), layers), (program.dispatches.len(), vec![0, 1, 2]));
        let names = |of: &[usize]| -> Vec<&str> {
            of.iter().map(|at| program.kernels[program.dispatches[*at].kernel].name).collect()
        };
        let all = names(&token.dispatches);
        assert_eq!(all[all.len() - 2..], ["sample_keys", "sample_greedy"]);
        if reduction == Reduction::Group {
            // The node's own list: an embedding, ten dispatches per layer, a norm, logits, a
            // choice.
            assert_eq!(all.len(), 1 + 3 * 10 + 2 + 2, "{all:?}");
            assert!(!all.iter().any(|name| name.ends_with("_subgroup")));
        }
        for layer in &token.layers {
            // A norm, a product with its packing, the routing and what it sets aside.
            let routing = &all[layer.resume..layer.routed];
            let (route, last) = match reduction {
                Reduction::Group => ("decode_route", "decode_route"),
                Reduction::Lane => ("route", "decode_aside"),
            };
            assert!(routing.len() <= 5 && routing.contains(&route), "{routing:?}");
            assert_eq!(routing.last(), Some(&last));
            let [kept] = layer.kept.as_slice() else { panic!("{:?}", layer.kept) };
            assert_eq!((kept.at, kept.bytes), (0, 1024));
            assert!(program.buffers[token.aside] >= 1024 && program.buffers[kept.buffer] >= 1024);
            assert!(layer.row + 6 <= token.entries);
        }

        has_a_place_for_every_stored_byte(&program);
        describes_the_formats_it_uses(&program);
        let shards = &model.manifest.shards;
        for object in &program.shards {
            assert!(shards.iter().any(|shard| shard.id().unwrap() == object.id));
        }
        serde_json::to_string(&program).unwrap();
    }
}

#[test]
fn a_small_binding_cuts_weights_and_slots_and_too_small_a_one_is_named() {
    let model = mixture();
    let least = BINDING_BYTES_MIN;
    let options = |binding_bytes_max, slots| ProgramOptions {
        binding_bytes_max,
        slots: Some(slots),
        context: Some(8),
        ..Default::default()
    };
    let program = Program::new(&model, &options(least, 18)).unwrap();
    let (whole, cut) = (Program::new(&model, &options(1 << 30, 18)).unwrap(), program);
    assert!(cut.buffers.iter().all(|bytes| *bytes <= least));
    assert!(cut.buffers.len() > whole.buffers.len(), "nothing was cut");
    let refused = |model: &Model, options: &ProgramOptions| {
        Program::new(model, options).unwrap_err().to_string()
    };
    assert!(refused(&model, &options(least - 1, 18)).contains("binding is 1048575"));
    assert!(refused(&model, &options(least, 5)).contains("6 slots"));
    let long = ProgramOptions { context: Some(501), ..Default::default() };
    assert!(refused(&model, &long).contains("1 to 500"));
}

#[test]
fn the_programs_of_large_models_are_made_without_their_weights_and_stay_small() {
    let largest = [(Arch::Llama31_8B, 1_u64), (Arch::Qwen3_30BA3B, 2)];
    for (arch, mebibytes) in largest {
        let manifest = synth_manifest(&SynthOptions::new(arch)).unwrap();
        let nothing = Arc::new(testing::MemoryReader::default());
        let reader = WeightReader::new(nothing, testing::runtime().handle().clone());
        let model = Model::open(manifest, reader).unwrap();
        let program = Program::new(&model, &ProgramOptions::default()).unwrap();
        assert!(program.buffers.iter().all(|bytes| *bytes <= BINDING_BYTES_DEFAULT));
        let bytes = serde_json::to_vec(&program).unwrap().len() as u64;
        println!("{arch:?}: {bytes} bytes, {} dispatches", program.dispatches.len());
        assert!(bytes < mebibytes << 20, "{arch:?}: {bytes} bytes");
    }
}
