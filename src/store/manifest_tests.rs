//! Manifests: the three real ones, our own round trip, and every refusal.

use serde_json::{Value, json};

use super::manifest::{ExpertPart, HashAlgorithm, Role, ShardHash};
use super::{ByteRange, DType, Manifest, ManifestError, ModelId, ShardId};

fn real(name: &str) -> (Vec<u8>, Manifest) {
    let path = doppler_testing::root().join("tests/data/rdrr").join(name);
    let bytes = std::fs::read(path.with_extension("manifest.json")).unwrap();
    let manifest = Manifest::parse(&bytes).unwrap();
    (bytes, manifest)
}

fn hex(byte: u8) -> String {
    ShardHash { algorithm: HashAlgorithm::Blake3, bytes: [byte; 32] }.to_hex()
}

/// Two shards; a norm, a matrix across both, and an expert.
fn sample() -> Value {
    json!({
        "version": 1, "modelId": "m", "modelType": "mixtral", "quantization": "Q8_0",
        "hashAlgorithm": "blake3",
        "shards": [
            { "index": 0, "filename": "shard_00000.bin", "size": 8192, "hash": hex(1), "offset": 0 },
            { "index": 1, "filename": "shard_00001.bin", "size": 8192, "hash": hex(2), "offset": 8192 },
        ],
        "tensors": {
            "norm": { "shard": 0, "offset": 0, "size": 128, "shape": [64], "dtype": "BF16",
                      "role": "norm", "group": "layer.0" },
            "wide": { "spans": [{ "shardIndex": 0, "offset": 4096, "size": 4096 },
                                { "shardIndex": 1, "offset": 0, "size": 64 }],
                      "size": 4160, "shape": [40, 52], "dtype": "BF16", "role": "matmul",
                      "group": "layer.0" },
            "gate": { "shardIndex": 1, "offset": 4096, "size": 288, "shape": [2, 5], "dtype": "Q4_K_M",
                      "role": "expert", "group": "layer.0.expert.3", "layout": "row" },
            "down": { "shard": 1, "offset": 4384, "size": 34, "shape": [7], "dtype": "Q8_0",
                      "role": "expert", "group": "layer.0.expert.3", "layout": "row" },
        },
        "eos_token_id": 2, "someday": { "new": [1, 2] },
    })
}

fn parse(value: &Value) -> Result<Manifest, ManifestError> {
    Manifest::parse(&serde_json::to_vec(value).unwrap())
}

/// The error of the sample after a change, on one line.
fn refused(change: impl FnOnce(&mut Value)) -> String {
    let mut value = sample();
    change(&mut value);
    let text = parse(&value).expect_err("the changed manifest must be refused").to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn the_real_manifests_are_read() {
    let (bytes, gemma) = real("gemma-3-270m-it-q4k-ehf16-af32");
    assert_eq!((gemma.shards.len(), gemma.total_size), (6, 399_357_184));
    assert_eq!(gemma.eos_token_ids, [1, 106]);
    assert_eq!(gemma.model_id_hash(), ModelId::of(&bytes));
    // Its shards have a `blake3` key with the sha256 value: the algorithm's name decides.
    assert_eq!(gemma.shards[0].hash.algorithm, HashAlgorithm::Sha256);
    assert_eq!(gemma.shard_id(0), Err(ManifestError::NotBlake3(0)));

    let (_, qwen) = real("qwen-3-5-0-8b-q4k-ehaf16");
    assert_eq!((qwen.tensors.len(), qwen.shards.len()), (489, 18));
    assert!(qwen.shard_id(17).is_ok());
    assert_eq!(qwen.shard_id(18), Err(ManifestError::Missing("shard 18".into())));
    let head = qwen.tensors.get("model.language_model.lm_head.weight").unwrap();
    assert_eq!((head.spans.len(), head.size, head.dtype), (4, 143_032_320, DType::Q4K));
    assert_eq!(head.role, Role::LmHead);
    assert_eq!(qwen.tensors.iter().filter(|(_, t)| t.role == Role::Vision).count(), 153);
    assert_eq!(qwen.expert_bytes(), 0);

    let (_, diffusion) = real("diffusiongemma-26b-a4b-it-q4k-ehf16-af16");
    assert_eq!((diffusion.tensors.len(), diffusion.shards.len()), (691, 234));
    assert_eq!(diffusion.eos_token_ids, [1, 106, 50]);
    assert_eq!(diffusion.moe.as_ref().unwrap().num_experts, 128);
    // Rows of 704 are padded to 768 weights: three blocks.
    let down = diffusion.tensors.get("model.decoder.layers.0.experts.down_proj").unwrap();
    assert_eq!((down.rows_cols(), down.size), ((128 * 2816, 704), 128 * 2816 * 3 * 144));
    assert_eq!(diffusion.expert_bytes() + diffusion.trunk_bytes(), diffusion.total_size);
    assert_eq!(diffusion.tokenizer.as_ref().unwrap().file, "tokenizer.json");
}

#[test]
fn both_forms_of_a_place_and_the_experts_are_understood() {
    let manifest = parse(&sample()).unwrap();
    assert_eq!(manifest.eos_token_ids, [2]);
    assert_eq!(manifest.tensors.get("wide").unwrap().spans.len(), 2);
    let names: Vec<&str> = manifest.tensors.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["norm", "wide", "gate", "down"], "the file's order is kept");
    let expert = manifest.expert(0, 3).unwrap();
    let part = |name: &str, offset, size| ExpertPart { name: name.into(), offset, size };
    assert_eq!(expert.parts, [part("gate", 0, 288), part("down", 288, 34)]);
    assert_eq!(expert.place(), Some((1, ByteRange::new(4096, 4418).unwrap())));
    assert_eq!((expert.size(), manifest.expert_bytes()), (322, 322));
    assert_eq!(manifest.expert_groups().len(), 1);
    assert_eq!(manifest.expert(0, 2), None);
    assert_eq!(manifest.shard_id(1), Ok(ShardId::from([2; 32])));
}

#[test]
fn an_expert_larger_than_a_shard_is_read_in_pieces() {
    let mut value = sample();
    for (name, spans, size, shape) in [
        ("gate", json!([[0, 8000, 192], [1, 4096, 96]]), 288, json!([2, 5])),
        ("down", json!([[1, 4200, 34]]), 34, json!([7])),
        ("wide", json!([[0, 128, 40]]), 40, json!([20])),
    ] {
        let span = |s: &Value| json!({ "shardIndex": s[0], "offset": s[1], "size": s[2] });
        let spans: Vec<Value> = spans.as_array().unwrap().iter().map(span).collect();
        let tensor = &mut value["tensors"][name];
        (tensor["spans"], tensor["size"], tensor["shape"]) = (json!(spans), json!(size), shape);
    }
    let manifest = parse(&value).unwrap();
    let expert = manifest.expert(0, 3).unwrap();
    let range = |start, end| ByteRange::new(start, end).unwrap();
    assert_eq!(expert.pieces, [(0, range(8000, 8192)), (1, range(4096, 4234))]);
    assert_eq!((expert.place(), expert.size()), (None, 330));
    let part = |name: &str, offset, size| ExpertPart { name: name.into(), offset, size };
    assert_eq!(expert.parts, [part("gate", 0, 288), part("down", 296, 34)]);

    // A tensor that another one splits is not offered as one run of bytes.
    value["tensors"]["down"]["spans"][0] = json!({ "shardIndex": 1, "offset": 9, "size": 34 });
    assert_eq!(parse(&value).unwrap().expert(0, 3), None);
}

#[test]
fn a_manifest_and_its_id_survive_writing_and_reading() {
    for manifest in [
        parse(&sample()).unwrap(),
        real("gemma-3-270m-it-q4k-ehf16-af32").1,
        real("qwen-3-5-0-8b-q4k-ehaf16").1,
    ] {
        let bytes = manifest.to_json_bytes();
        let again = Manifest::parse(&bytes).unwrap();
        assert_eq!(*again, *manifest);
        assert_eq!(again.to_json_bytes(), bytes);
        assert_eq!(again.model_id_hash(), ModelId::of(&bytes));
        let made = Manifest::new((*manifest).clone()).unwrap();
        assert_eq!(made.model_id_hash(), again.model_id_hash());
    }
}

#[test]
fn tensors_may_be_in_a_file_of_their_own() {
    let mut value = sample();
    let tensors = value.as_object_mut().unwrap().remove("tensors").unwrap();
    value["tensorsFile"] = json!("tensors.json");
    let error = parse(&value).unwrap_err();
    assert_eq!(error, ManifestError::TensorsElsewhere("tensors.json".into()));

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("manifest.json"), value.to_string()).unwrap();
    let missing = Manifest::read_dir(dir.path()).unwrap_err().to_string();
    assert!(missing.contains("tensors.json"), "{missing}");
    for body in [tensors.to_string(), json!({ "tensors": tensors }).to_string()] {
        std::fs::write(dir.path().join("tensors.json"), body).unwrap();
        let manifest = Manifest::read_dir(dir.path()).unwrap();
        assert_eq!(manifest.tensors.len(), 4);
        assert_eq!(manifest.model_id_hash(), ModelId::of(value.to_string().as_bytes()));
    }
    value["tensorsFile"] = json!("../tensors.json");
    std::fs::write(dir.path().join("manifest.json"), value.to_string()).unwrap();
    let escape = Manifest::read_dir(dir.path()).unwrap_err().to_string();
    assert!(escape.contains("plain file name"), "{escape}");
}

#[test]
fn overlaps_and_ranges_outside_a_shard_name_tensor_and_shard() {
    let overlap = refused(|m| m["tensors"]["down"]["offset"] = json!(4383));
    assert!(overlap.contains("\"gate\" and \"down\" overlap in shard 1"), "{overlap}");
    let outside = refused(|m| m["tensors"]["down"]["offset"] = json!(8170));
    assert!(outside.contains("\"down\"") && outside.contains("shard 1 of 8192"), "{outside}");
    let far = refused(|m| m["tensors"]["down"]["offset"] = json!(u64::MAX));
    assert!(far.contains("outside shard 1"), "{far}");
    let nowhere = refused(|m| m["tensors"]["down"]["shard"] = json!(2));
    assert!(nowhere.contains("shard 2, but there are 2 shards"), "{nowhere}");
    let spans = refused(|m| m["tensors"]["wide"]["spans"][1]["size"] = json!(65));
    assert!(spans.contains("sum to 4161"), "{spans}");
    let empty = refused(|m| m["tensors"]["wide"]["spans"][1]["size"] = json!(0));
    assert!(empty.contains("empty span"), "{empty}");
}

#[test]
fn sizes_must_follow_from_shape_and_type() {
    let size = refused(|m| m["tensors"]["gate"]["size"] = json!(144));
    assert!(size.contains("\"gate\"") && size.contains("takes 288"), "{size}");
    let huge = refused(|m| m["tensors"]["gate"]["shape"] = json!([u64::MAX, u64::MAX, 4]));
    assert!(huge.contains("too large"), "{huge}");
    assert!(refused(|m| m["tensors"]["gate"]["shape"] = json!([2, 0])).contains("of 0"));
    assert!(refused(|m| m["tensors"]["gate"]["shape"] = json!(vec![1; 9])).contains("dimensions"));
    assert!(refused(|m| m["tensors"]["gate"]["dtype"] = json!("Q3_K")).contains("Q3_K"));
    assert!(refused(|m| m["tensors"]["gate"]["layout"] = json!("column")).contains("column"));
}

#[test]
fn shards_must_be_whole_numbered_and_bounded() {
    assert!(refused(|m| m["shards"][1]["index"] = json!(2)).contains("numbered 2"));
    assert!(refused(|m| m["shards"][1]["size"] = json!(67_108_865)).contains("67108865"));
    assert!(refused(|m| m["shards"][1]["size"] = json!(0)).starts_with("shard 1: 0 bytes"));
    assert!(refused(|m| m["shards"][1]["offset"] = json!(1)).contains("shards before it"));
    assert!(refused(|m| m["shards"][1]["hash"] = json!("ab")).contains("hexadecimal"));
    assert!(refused(|m| m["shards"][1]["blake3"] = json!(hex(9))).contains("differ"));
    assert!(refused(|m| m["hashAlgorithm"] = json!("md5")).contains("md5"));
    assert!(refused(|m| drop(m.as_object_mut().unwrap().remove("hashAlgorithm"))).contains("hash"));
    assert!(refused(|m| m["totalSize"] = json!(1)).contains("totalSize"));
    for name in ["../x", "a/b", "a\\b", "", ".hidden", "c:x", "a\u{0}", "shard_00000.bin"] {
        let text = refused(|m| m["shards"][1]["filename"] = json!(name));
        assert!(text.starts_with("shard 1: file name"), "{text}");
    }
    assert!(refused(|m| m["tokenizer"] = json!({ "file": "../../etc/passwd" })).contains("plain"));
}

#[test]
fn what_is_not_a_manifest_is_refused_in_one_line() {
    assert!(refused(|m| m["version"] = json!(2)).contains("version 2"));
    assert!(refused(|m| m["eos_token_id"] = json!([1, -1])).contains("eos_token_id"));
    assert!(refused(|m| m["modelId"] = json!("a\nb")).contains("control"));
    assert!(refused(|m| m["tensors"]["a\nb"] = m["tensors"]["norm"].clone()).contains("control"));
    assert!(refused(|m| drop(m.as_object_mut().unwrap().remove("tensors"))).contains("tensors"));
    for junk in [&b""[..], b"{}", b"[1]", b"{\"version\":1", b"\xff\xfe", &[b'['; 500]] {
        assert!(matches!(Manifest::parse(junk), Err(ManifestError::Json(_))));
    }
    let text = sample().to_string();
    let twice = text.replacen("\"down\":", "\"gate\":", 1);
    let error = Manifest::parse(twice.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("\"gate\"") && error.contains("twice"), "{error}");
    assert_eq!(
        Manifest::parse(&vec![b' '; super::manifest::MANIFEST_BYTES_MAX + 1]),
        Err(ManifestError::TooLarge(super::manifest::MANIFEST_BYTES_MAX + 1))
    );
}

#[test]
fn no_truncation_or_flipped_byte_of_a_manifest_panics() {
    let bytes = sample().to_string().into_bytes();
    for end in 0..bytes.len() {
        assert!(Manifest::parse(&bytes[..end]).is_err());
    }
    for at in 0..bytes.len() {
        for flip in [1, 0x20, 0x80] {
            let mut bytes = bytes.clone();
            bytes[at] ^= flip;
            let _ = Manifest::parse(&bytes);
        }
    }
}

#[test]
fn hashes_check_bytes_with_their_own_function() {
    for algorithm in [HashAlgorithm::Sha256, HashAlgorithm::Blake3] {
        let hash = ShardHash::of(algorithm, b"abc");
        assert!(hash.matches(b"abc") && !hash.matches(b"abd"));
    }
    // FIPS 180-2's example.
    assert_eq!(
        ShardHash::of(HashAlgorithm::Sha256, b"abc").to_string(),
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}
