//! Unpacked weights equal those from which the directories in `tests/data/packed` were made, and
//! models agree with reference outputs. And every way in which packed tensors can be wrong.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::super::tests::to_memory;
use super::super::{Checkpoint, Quantization, open, restored};
use super::float::{e2m1, e4m3, e8m0};
use crate::backend::KvFormat;
use crate::check::{Expected, check};
use crate::cpu::CpuDevice;
use crate::engine::LoadOptions;
use crate::quant::dequantize;
use crate::session::Session;
use crate::testing::{converted, packed_references};
use doppler_store::DType;
use doppler_testing::{root, shared};

/// How far logits may be from those of the exactly dequantised weights.
const DIFFERENCE_MAX: f64 = 1e-4;

fn fixtures() -> Vec<PathBuf> {
    let dirs = fs::read_dir(root().join("tests/data/packed")).unwrap();
    let mut dirs: Vec<PathBuf> =
        dirs.map(|dir| dir.unwrap().path()).filter(|path| path.is_dir()).collect();
    dirs.sort();
    dirs
}

/// All weights of a tensor, read a few rows at a time.
fn weights(checkpoint: &dyn Checkpoint, name: &str, step: u64) -> (DType, Vec<f32>) {
    let stored = checkpoint.find(name).unwrap();
    let (dtype, (rows, cols)) = (stored.dtype().unwrap(), stored.rows_cols());
    let row = dtype.row_bytes(cols as usize);
    let mut all = Vec::new();
    for first in (0..rows).step_by(step as usize) {
        let mut bytes = vec![0; step.min(rows - first) as usize * row];
        checkpoint.read(name, first, &mut bytes).unwrap();
        for bytes in bytes.chunks_exact(row) {
            let mut values = vec![0.0; cols as usize];
            dequantize(dtype, bytes, cols as usize, &mut values);
            all.extend(values);
        }
    }
    (dtype, all)
}

#[test]
fn unpacked_weights_are_those_that_were_packed() {
    let mut held = Vec::new();
    for dir in fixtures() {
        let checkpoint = open(&dir).unwrap_or_else(|error| panic!("{error}"));
        let expected = fs::read(dir.join("weights.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&expected).unwrap();
        let names: Vec<&str> = checkpoint.names().collect();
        assert_eq!(
            names,
            {
                let mut all = expected.names();
                all.sort_unstable();
                all
            },
            "{}",
            dir.display()
        );
        for (name, tensor) in expected.tensors() {
            let shape: Vec<u64> = tensor.shape().iter().map(|n| *n as u64).collect();
            assert_eq!(checkpoint.find(name.as_str()).unwrap().shape, shape);
            let words = tensor.data().as_chunks::<4>().0;
            let want: Vec<f32> = words.iter().map(|b| f32::from_le_bytes(*b)).collect();
            for step in [1, 7, 1000] {
                let (dtype, found) = weights(checkpoint.as_ref(), &name, step);
                let same =
                    found.iter().zip(&want).position(|(a, b)| a.to_bits() != b.to_bits() && a != b);
                let odd = same.map(|at| (at, found[at], want[at]));
                assert_eq!(odd, None, "{} {name} as {dtype}", dir.display());
                assert_eq!(found.len(), want.len());
                held.push(format!("{} {name} {dtype}", dir.file_name().unwrap().display()));
            }
        }
    }
    held.dedup();
    println!("{}", held.join("\n"));
    // Levels stay levels where that is exact, and only there.
    for (what, dtype) in [
        ("gptq-v1 a.weight", DType::Q8_0),
        ("gptq-v1-order a.weight", DType::F32),
        ("gptq-8bit a.weight", DType::Q8_0),
        ("gptq-8bit-asym a.weight", DType::F32),
        ("gptq-f32-scales a.weight", DType::F32),
        ("awq a.weight", DType::Q8_0),
        ("awq-g48 a.weight", DType::F32),
        ("ct-4bit a.weight", DType::Q8_0),
        ("ct-8bit a.weight", DType::Q8_0),
        ("mlx b4g64.weight", DType::Q4_1),
        ("mlx b3g32.weight", DType::Q4_1),
        ("mlx b5g64.weight", DType::F32),
        ("mlx-f32 b4g64.weight", DType::F32),
        ("mlx-mxfp4 a.weight", DType::Mxfp4),
        ("fp8-channel a.weight", DType::Fp8),
        ("fp8-tensor a.weight", DType::Fp8),
        ("fp8-block a.weight", DType::F32),
        ("mxfp4 a.down_proj_blocks", DType::Mxfp4),
    ] {
        assert!(held.contains(&format!("{what} {dtype}")), "{what} should be {dtype}");
    }
}

#[test]
fn numbers_of_few_bits_have_the_values_of_their_formats() {
    let of = |byte: u8| (e4m3(byte), e4m3(byte | 0x80));
    assert_eq!(of(0x7e), (448.0, -448.0), "the largest");
    assert_eq!(of(0x08), (2_f32.powi(-6), -2_f32.powi(-6)), "the smallest normal one");
    assert_eq!(of(0x01), (2_f32.powi(-9), -2_f32.powi(-9)), "the smallest");
    assert_eq!(e4m3(0x38), 1.0);
    assert!(e4m3(0x7f).is_nan() && e8m0(255).is_nan());
    assert_eq!((e2m1(7), e2m1(15), e2m1(1)), (6.0, -6.0, 0.5));
    assert_eq!((e8m0(127), e8m0(0), e8m0(254)), (1.0, 2_f32.powi(-127), 2_f32.powi(127)));
}

/// Every method, as a whole model: all at once and token by token.
#[test]
fn packed_references_agree() {
    for dir in packed_references() {
        let model = converted(&dir, Quantization::Keep, 8192);
        let expected = fs::read(dir.join("expected.safetensors")).unwrap();
        let expected = Expected::parse(&expected).unwrap();
        let mut largest: f64 = 0.0;
        for batch in [64, 1] {
            let (context, kv) = (Some(96), KvFormat::F32);
            let options = LoadOptions { context, batch, kv, ..LoadOptions::default() };
            let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
            let report = check(&mut session, &expected).unwrap();
            let held = restored(open(&dir).unwrap().as_ref());
            println!("{}, batch {batch}: {report:?} {held:?}", dir.display());
            assert!(report.passes(crate::check::REL_MAX), "{}: {report:?}", dir.display());
            assert!(report.max_abs <= DIFFERENCE_MAX, "{}: {report:?}", dir.display());
            largest = largest.max(report.rel);
        }
        crate::measured::note(&dir, &dir, "CPU", largest);
    }
}

/// MXFP4 and FP8 are how makers publish originals; other packed weights were made of one.
#[test]
fn originals_may_be_stored_smaller_and_what_was_made_of_one_may_not() {
    let stored = |name: &str| -> Option<Result<Vec<DType>, String>> {
        let dir = shared(&format!("formats/{name}"))?;
        let made = to_memory(&dir, Quantization::Blocks(DType::Q4_1));
        let types = |manifest: &doppler_store::Manifest| {
            let matrix = |name: &str| name.contains("down_proj") && name.ends_with("weight");
            let all = manifest.tensors.iter().filter(|(name, _)| matrix(name));
            all.map(|(_, tensor)| tensor.dtype).collect()
        };
        Some(made.map(|(manifest, _)| types(&manifest)).map_err(|error| error.to_string()))
    };
    for name in ["gpt-oss-mxfp4", "ct-fp8-channel"] {
        let Some(types) = stored(name) else { return };
        let types = types.unwrap();
        assert!(!types.is_empty() && types.iter().all(|of| *of == DType::Q4_1), "{types:?}");
    }
    let refused = stored("awq-gemm-g128").expect("beside the others").unwrap_err();
    assert!(refused.contains("already"), "{refused}");
}

/// A tensor of a safetensors file: name, type, shape, bytes.
type Tensor = (String, String, Vec<u64>, Vec<u8>);

/// A copy of a fixture, changed, and the line with which it is refused.
fn refusal(
    fixture: &str,
    config: impl FnOnce(&mut Value),
    tensors: impl FnOnce(&mut Vec<Tensor>),
) -> String {
    let from = root().join("tests/data/packed").join(fixture);
    let dir = tempfile::tempdir().unwrap();
    let mut described: Value =
        serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    config(&mut described);
    fs::write(dir.path().join("config.json"), described.to_string()).unwrap();
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let mut all = read_file(&bytes);
    tensors(&mut all);
    write_file(&dir.path().join("model.safetensors"), &all);
    let error = open(dir.path()).err().expect("it must be refused").to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    println!("{error}");
    error
}

fn read_file(bytes: &[u8]) -> Vec<Tensor> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let data = &bytes[8 + length..];
    let tensors = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    let each = tensors.map(|(name, entry)| {
        let at = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
        let shape = entry["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap());
        let dtype = entry["dtype"].as_str().unwrap().to_owned();
        (name.clone(), dtype, shape.collect(), data[at(0)..at(1)].to_vec())
    });
    each.collect()
}

fn write_file(path: &Path, tensors: &[Tensor]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
        header.insert(name.clone(), entry);
        data.extend_from_slice(bytes);
    }
    let header = Value::from(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    fs::write(path, file).unwrap();
}

/// AutoGPTQ gives modules that have no bias one of zeros.
#[test]
fn a_bias_that_nothing_reads_must_be_zero() {
    let Some(from) = shared("formats/gptq-int8-g64") else { return };
    let all = read_file(&fs::read(from.join("model.safetensors")).unwrap());
    for (value, accepted) in [(0_u8, true), (0x3c, false)] {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
        let name = "model.layers.0.mlp.up_proj.bias".to_owned();
        let bias = (name, "F16".to_owned(), vec![128], [0, value].repeat(128));
        let tensors = [&all[..], &[bias]].concat();
        write_file(&dir.path().join("model.safetensors"), &tensors);
        let converted = to_memory(dir.path(), Quantization::Keep);
        let problem = converted.err().map(|error| error.to_string());
        assert_eq!(problem.is_none(), accepted, "{problem:?}");
        let names_it =
            |line: &String| line.contains("up_proj.bias") && line.contains("not part of");
        assert!(problem.as_ref().is_none_or(names_it), "{problem:?}");
    }
}

/// Changes one tensor, or removes it.
fn part(
    name: &'static str,
    change: impl FnOnce(&mut Tensor) -> bool,
) -> impl FnOnce(&mut Vec<Tensor>) {
    move |all| {
        let at = all.iter().position(|tensor| tensor.0 == name).expect("the tensor to change");
        if !change(&mut all[at]) {
            all.remove(at);
        }
    }
}

#[test]
fn packed_tensors_that_do_not_fit_are_refused_by_name() {
    let same = |_: &mut Value| ();
    let gone = |name| part(name, |_| false);
    let short = |name| {
        part(name, |tensor: &mut Tensor| {
            let row = tensor.3.len() / tensor.2[0] as usize;
            tensor.2[0] /= 2;
            tensor.3.truncate(row * tensor.2[0] as usize);
            true
        })
    };
    for (fixture, name) in [
        ("gptq-v1", "a.scales"),
        ("gptq-v1", "a.qzeros"),
        ("gptq-v1", "a.qweight"),
        ("awq", "a.qzeros"),
        ("awq", "a.scales"),
        ("ct-4bit", "a.weight_scale"),
        ("ct-4bit", "a.weight_shape"),
        ("fp8-block", "a.weight_scale_inv"),
        ("fp8-channel", "a.weight_scale"),
        ("nvfp4", "a.weight_global_scale"),
        ("mlx-mxfp4", "a.scales"),
        ("mlx-f32", "b4g64.biases"),
        ("mxfp4", "a.down_proj_scales"),
    ] {
        let line = refusal(fixture, same, gone(name));
        let all_gone = line.contains("no tensor here is packed");
        let beside = line.contains("is packed, and what");
        assert!(line.contains(name) || all_gone || beside, "{fixture} without {name}: {line}");
    }
    for (fixture, name) in [
        ("gptq-v1", "a.scales"),
        ("gptq-v1", "a.qzeros"),
        ("gptq-v1-order", "a.g_idx"),
        ("awq", "a.scales"),
        ("ct-4bit-asym", "a.weight_zero_point"),
        ("fp8-block", "a.weight_scale_inv"),
        ("mlx-mxfp4", "a.scales"),
        ("mxfp4", "a.down_proj_scales"),
    ] {
        let line = refusal(fixture, same, short(name));
        assert!(line.contains(name) && line.contains("its shape is"), "{fixture}, {name}: {line}");
    }
}

#[test]
fn values_that_make_no_sense_are_refused() {
    let same = |_: &mut Value| ();
    let line = refusal(
        "gptq-v1-order",
        same,
        part("a.g_idx", |tensor| {
            tensor.3[..4].copy_from_slice(&(-1_i32).to_le_bytes());
            true
        }),
    );
    assert!(line.contains("column 0 is in group -1, of 4 groups"), "{line}");
    let line = refusal(
        "ct-4bit",
        same,
        part("a.weight_shape", |tensor| {
            tensor.3[..8].copy_from_slice(&i64::MAX.to_le_bytes());
            true
        }),
    );
    assert!(line.contains("a.weight_shape: it is [9223372036854775807, 96]"), "{line}");
    let line = refusal(
        "mlx-mxfp4",
        same,
        part("a.weight", |tensor| {
            (tensor.1, tensor.2[0]) = ("I64".into(), tensor.2[0] / 2);
            true
        }),
    );
    assert!(line.contains("its type is I64, expected U32"), "{line}");
    // Nothing is allocated for a header that claims more than the file has.
    let line = refusal(
        "awq",
        same,
        part("a.qweight", |tensor| {
            tensor.2 = vec![1 << 40, 1 << 40];
            true
        }),
    );
    assert!(line.contains("takes more than fits"), "{line}");
}

#[test]
fn methods_that_are_not_understood_are_refused_by_name() {
    let none = |_: &mut Vec<Tensor>| ();
    let with = |fixture: &str, key: &'static str, value: Value| {
        refusal(fixture, |config: &mut Value| config["quantization_config"][key] = value, none)
    };
    for (line, words) in [
        (with("gptq-v1", "quant_method", json!("bitsandbytes")), "\"bitsandbytes\" cannot be read"),
        (with("gptq-v1", "quant_method", json!("frobnicate")), "\"frobnicate\" cannot be read"),
        (with("gptq-v1", "bits", json!(3)), "bits 3 cannot be read (2, 4, 8 can)"),
        (with("gptq-v1", "checkpoint_format", json!("marlin")), "\"marlin\" cannot be read"),
        (with("gptq-v1", "group_size", json!(0)), "group_size is 0"),
        (with("awq", "version", json!("gemv")), "version \"gemv\" cannot be read"),
        (with("ct-4bit", "format", json!("marlin-24")), "format \"marlin-24\" cannot be read"),
        (with("ct-4bit", "transform_config", json!({ "config_groups": {} })), "transform_config"),
        (with("fp8-block", "fmt", json!("e5m2")), "fmt \"e5m2\" cannot be read"),
        (with("fp8-block", "weight_block_size", json!([0, 16])), "weight_block_size contains 0"),
    ] {
        assert!(line.contains(words), "{words}: {line}");
    }
    let mlx = |key: &'static str, value: Value| {
        refusal("mlx-f32", |config: &mut Value| config["quantization"][key] = value, none)
    };
    for (line, words) in [
        (mlx("mode", json!("nf4")), "mode \"nf4\" cannot be read"),
        (mlx("bits", json!(7)), "7 bits in groups of 64 are not possible"),
        (mlx("bits", json!(8)), "b4g64.weight: rows of 8 words are no whole groups of 64"),
        (mlx("b4g64", json!(false)), "the config says that it is not quantised"),
        (mlx("b4g64", json!("yes")), "b4g64 is \"yes\""),
    ] {
        assert!(line.contains(words), "{words}: {line}");
    }
    let two =
        |config: &mut Value| config["quantization_config"] = json!({ "bits": 8, "group_size": 64 });
    assert!(refusal("mlx-f32", two, none).contains("says something else than quantization"));
}
