//! The entry points of the fuzz targets under a seeded mutator: a short form, in
//! every test run, of what `cargo fuzz` does for hours.

use std::fs;
use std::path::PathBuf;

use doppler_mesh::wire::{
    Envelope, Holdings, ModelHoldings, PartHoldings, ShardReply, ShardRequest, Stamp,
};
use doppler_store::groups::{Chunks, Groups};
use doppler_store::signature::SignedModel;
use doppler_store::verified::{Outboard, align};
use doppler_store::{ByteRange, Manifest, ModelId, Priority, ShardId};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

use super::entries::{self, OBJECT};

/// Text fragments and boundary values to insert anywhere.
const TOKENS: [&[u8]; 14] = [
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x00",
    b"\x80",
    b"18446744073709551615",
    b"18446744073709551616",
    b"-1",
    b"1e309",
    b"0",
    b"null",
    b"[]",
    b"{}",
    b"\"\"",
    b"../../../etc/passwd",
    b"\"\\ud800\"",
];

/// One to five changes of one of the samples.
fn mutated(rng: &mut SmallRng, samples: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = samples[rng.random_range(0..samples.len())].clone();
    for _ in 0..rng.random_range(1..=5) {
        let at = rng.random_range(0..=bytes.len());
        let end = (at + rng.random_range(0..40)).min(bytes.len());
        match rng.random_range(0..8) {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            2 if at < bytes.len() => bytes[at] = rng.next_u32() as u8,
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                let to = rng.random_range(0..=bytes.len());
                drop(bytes.splice(to..to, piece));
            }
            5 => {
                let token = TOKENS[rng.random_range(0..TOKENS.len())];
                drop(bytes.splice(at..end.min(at + token.len()), token.iter().copied()));
            }
            6 => {
                let other = &samples[rng.random_range(0..samples.len())];
                let from = rng.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ if rng.random_range(0..4) == 0 => bytes.truncate(at),
            _ => {}
        }
    }
    bytes
}

/// Runs an entry point on the samples and on mutations of them. If `DOPPLER_FUZZ_CORPUS` names a
/// folder, writes the samples there for `cargo fuzz` to start from.
fn run(target: &str, samples: &[Vec<u8>], rounds: usize, entry: impl Fn(&[u8])) {
    if let Some(corpus) = std::env::var_os("DOPPLER_FUZZ_CORPUS") {
        let dir = PathBuf::from(corpus).join(target);
        fs::create_dir_all(&dir).unwrap();
        for sample in samples {
            fs::write(dir.join(ShardId::of(sample).to_string()), sample).unwrap();
        }
    }
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    samples.iter().for_each(|sample| entry(sample));
    for _ in 0..rounds {
        entry(&mutated(&mut rng, samples));
    }
}

#[test]
fn manifests() {
    let root = doppler_testing::root();
    let tiny = fs::read(root.join("models/tiny-mixtral-q4_k_m/manifest.json")).unwrap();
    assert!(Manifest::parse(&tiny).is_ok(), "the sample is one");
    // With few tensors, so that mutations hit all parts of it about equally.
    let mut small: serde_json::Value = serde_json::from_slice(&tiny).unwrap();
    if let Some(tensors) = small["tensors"].as_object_mut() {
        let keep: Vec<String> = tensors.keys().take(4).cloned().collect();
        tensors.retain(|name, _| keep.contains(name));
    }
    let small = serde_json::to_vec(&small).unwrap();
    run("manifest", &[small], 30_000, entries::manifest);
    run("manifest", &[tiny], 300, entries::manifest);
}

#[test]
fn gguf_files() {
    let root = doppler_testing::root().join("tests/data/gguf");
    let samples =
        ["v2", "mixtral"].map(|name| fs::read(root.join(name).join("model.gguf")).unwrap());
    for sample in &samples {
        doppler_infer::load::probe_gguf(sample).unwrap();
    }
    // Mutations hit the header only, which ends where the weights begin.
    let headers = samples.map(|sample| sample[..10 << 10].to_vec());
    run("gguf", &headers, 3_000, |head| {
        // Weights of no meaning follow, so that tensors lie within the file.
        entries::gguf(&[head, &[0; 128 << 10]].concat());
    });
}

#[test]
fn configs() {
    let goldens = doppler_testing::root().join("tests/data/goldens");
    let names = ["llama3", "qwen3-moe", "gpt-oss", "deepseek-v2-lite", "gemma3", "bert"];
    let samples = names.map(|name| fs::read(goldens.join(name).join("config.json")).unwrap());
    for sample in &samples {
        let config = serde_json::from_slice(sample).unwrap();
        doppler_infer::families::read(&config).unwrap();
    }
    run("config", &samples, 20_000, entries::config);
}

#[test]
fn safetensors_files_and_indices() {
    let golden = doppler_testing::root().join("tests/data/goldens/llama3/model.safetensors");
    let file = fs::read(golden).unwrap();
    let tensors = doppler_infer::load::probe_safetensors(&file).unwrap();
    // A header alone, for tensors of no bytes; mutations hit nothing else.
    let header = tensors.values().map(|at| at.start).min().unwrap() as usize;
    let text = r#"{"a":{"dtype":"BF16","shape":[2,0],"data_offsets":[0,0]},"b":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}"#;
    let small = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &[0; 2]].concat();
    assert_eq!(doppler_infer::load::probe_safetensors(&small).unwrap().len(), 2);
    let index = br#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#;
    assert_eq!(doppler_infer::load::probe_index(index).unwrap().len(), 2);
    let tagged = |tag: u8, bytes: &[u8]| [&[tag], bytes].concat();
    let samples = [tagged(0, &file[..header + 64]), tagged(0, &small), tagged(1, index)];
    run("safetensors", &samples, 20_000, entries::safetensors);
}

#[test]
fn templates() {
    let dir = doppler_testing::root().join("tests/data/templates");
    let names = ["chatml", "gemma", "llama3", "mistral", "smol"];
    let samples = names.map(|name| fs::read(dir.join(format!("{name}.jinja"))).unwrap());
    run("template", &samples, 1_000, entries::template);
}

#[test]
fn requests() {
    let request = |start, end, priority| {
        let range = ByteRange::new(start, end).unwrap();
        ShardRequest { shard: ShardId::of(b"s"), range, priority }.encode()
    };
    let samples = [
        request(0, 1, Priority::Token),
        request(5, 4 << 20, Priority::Prefetch),
        request(60 << 20, 64 << 20, Priority::Bulk),
    ];
    run("request", &samples, 200_000, entries::request);
}

#[test]
fn replies() {
    let outboard = Outboard::of(&OBJECT).unwrap();
    let size = OBJECT.len() as u64;
    let mut samples: Vec<Vec<u8>> = (0..6)
        .map(|choice| {
            let range = align(entries::wanted(choice), size).unwrap();
            let bytes = OBJECT[range.start() as usize..range.end() as usize].to_vec();
            let body = outboard.prove(range, bytes.into()).unwrap().encode().bytes;
            let head = ShardReply::Ok { object_size: size, body_bytes: body.len() as u64 };
            [&[choice], &head.encode()[..], &body[..]].concat()
        })
        .collect();
    for reply in [ShardReply::NotFound, ShardReply::OutOfRange { object_size: 7 }] {
        samples.push([&[0], &reply.encode()[..]].concat());
    }
    run("reply", &samples, 30_000, entries::reply);
}

#[test]
fn envelopes() {
    let signed = SignedModel::sign(&[1; 32], ModelId::of(b"m"), "tiny", 77).unwrap();
    let entry = |n: u8| ModelHoldings {
        model: ModelId::of(&[n]),
        manifest: n.is_multiple_of(2),
        objects: vec![n; usize::from(n)],
        parts: vec![PartHoldings { object: n.into(), chunks: Chunks(n.into()) }],
        helps: n > 2,
        hot: vec![n.into(), 3],
        pins: n > 3,
    };
    let holdings = Holdings {
        peer: vec![1; 38],
        stamp: Stamp { epoch: 4, sequence: 9 },
        lease: std::time::Duration::from_secs(30),
        next: std::time::Duration::from_secs(3),
        room: 1 << 40,
        is_leaving: true,
        addresses: vec!["/ip4/127.0.0.1/tcp/1".into(), "/dns/example.org/tcp/443".into()],
        models: (0..6).map(entry).collect(),
        run: 7,
    };
    let announcement = Envelope::Announcement(signed).encode();
    let doubt = Envelope::Doubt(vec![1; 38]).encode();
    let stamp = Stamp { epoch: 4, sequence: 9 };
    let beat = Envelope::Heartbeat { stamp, next: std::time::Duration::from_secs(3) }.encode();
    let goodbye = Envelope::Goodbye(stamp).encode();
    let samples = [announcement, Envelope::Holdings(holdings).encode(), doubt, beat, goodbye];
    run("envelope", &samples, 60_000, entries::envelope);
}

#[test]
fn handshakes() {
    // Either side: a member's messages, nothing, or the protocol's name followed by noise.
    let mut samples: Vec<Vec<u8>> = vec![vec![0], vec![1], vec![0; 200], vec![2], vec![3]];
    let name = b"\x13/multistream/1.0.0\n\x15/doppler/swarm-key/1\n";
    for side in [2, 3] {
        samples.push([&[side], &name[..], &[1; 65]].concat());
        samples.push([&[side], &name[..20], b"\x03ls\n\x03na\n"].concat());
    }
    run("handshake", &samples, 30_000, entries::handshake);
}

#[test]
fn files_beside_an_object() {
    let shard = ShardId::of(&OBJECT);
    let mut groups = Groups::none(OBJECT.len() as u64);
    groups.set(ByteRange::new(16_384, 49_152).unwrap());
    let outboard = Outboard::of(&OBJECT).unwrap();
    let samples = [groups.to_file(shard), outboard.nodes().to_vec()];
    run("files", &samples, 30_000, entries::files);
}
