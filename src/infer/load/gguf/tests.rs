//! GGUF files: reference weights of every type, damaged files, parts, vocabularies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;

use super::header::{self, Header};
use super::types::GgmlType;
use super::*;
use crate::load::files::OnDisk;
use crate::load::open;
use crate::quant::dequantize;
use crate::tokenizer::Tokenizer;
use doppler_testing::{gguf_references, root, shared};

/// A metadata value to write. Only what the tests need.
pub enum Meta {
    U32(u32),
    U16(u16),
    F32(f32),
    Bool(bool),
    Text(&'static str),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Kinds(Vec<i32>),
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn list<T>(kind: u32, items: &[T], each: impl Fn(&T) -> Vec<u8>) -> Vec<u8> {
    let mut out = [9_u32.to_le_bytes(), kind.to_le_bytes()].concat();
    out.extend((items.len() as u64).to_le_bytes());
    out.extend(items.iter().flat_map(each));
    out
}

impl Meta {
    fn bytes(&self) -> Vec<u8> {
        let single = |kind: u32, value: &[u8]| [&kind.to_le_bytes()[..], value].concat();
        match self {
            Self::U32(value) => single(4, &value.to_le_bytes()),
            Self::U16(value) => single(2, &value.to_le_bytes()),
            Self::F32(value) => single(6, &value.to_le_bytes()),
            Self::Bool(value) => single(7, &[u8::from(*value)]),
            Self::Text(value) => single(8, &text(value)),
            Self::Texts(values) => list(8, values, |value| text(value)),
            Self::Floats(values) => list(6, values, |value| value.to_le_bytes().to_vec()),
            Self::Kinds(values) => list(5, values, |value| value.to_le_bytes().to_vec()),
        }
    }
}

/// A tensor to write: name, shape with the innermost dimension first, type, bytes.
pub type Tensor = (&'static str, Vec<u64>, u32, Vec<u8>);

pub struct File {
    pub metadata: Vec<(&'static str, Meta)>,
    pub tensors: Vec<Tensor>,
}

impl File {
    fn bytes(&self) -> Vec<u8> {
        let mut out = [&b"GGUF"[..], &3_u32.to_le_bytes()].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(text(key));
            out.extend(value.bytes());
        }
        let mut data = Vec::new();
        for (name, shape, kind, bytes) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            out.extend(shape.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            data.resize(data.len().next_multiple_of(32), 0);
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }

    fn set(&mut self, key: &'static str, value: Meta) {
        self.metadata.retain(|(other, _)| *other != key);
        self.metadata.push((key, value));
    }

    fn open(&self) -> Result<Gguf> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        self.write(&path);
        Gguf::open(&path, Arc::new(OnDisk))
    }
}

/// A Llama that has nothing but its embedding table.
fn llama(table: Tensor) -> File {
    let u32 = |key, value| (key, Meta::U32(value));
    File {
        metadata: vec![
            ("general.architecture", Meta::Text("llama")),
            u32("llama.block_count", 1),
            u32("llama.context_length", 64),
            u32("llama.embedding_length", 32),
            u32("llama.feed_forward_length", 64),
            u32("llama.attention.head_count", 4),
            ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-6)),
        ],
        tensors: vec![table],
    }
}

fn table() -> Tensor {
    ("token_embd.weight", vec![32, 3], 0, vec![0; 4 * 96])
}

/// The one line with which `file` is refused.
fn refusal(file: &File) -> String {
    line(file.open().err().expect("it must be refused"))
}

fn line(error: LoadError) -> String {
    let error = error.to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

#[test]
fn every_type_has_the_reference_implementations_weights() {
    let vectors = std::fs::read(root().join("tests/data/gguf/blocks.safetensors")).unwrap();
    let vectors = SafeTensors::deserialize(&vectors).unwrap();
    let mut numbers: BTreeMap<String, u32> = BTreeMap::new();
    for number in 0..64 {
        if let Ok(kind) = GgmlType::of(number) {
            numbers.insert(kind.to_string(), number);
        }
    }
    assert_eq!(numbers.len(), GgmlType::all().count());
    for (name, number) in numbers {
        let raw = vectors.tensor(&format!("{name}.raw")).unwrap();
        let expected = vectors.tensor(&format!("{name}.weights")).unwrap();
        let [rows, cols] = *expected.shape() else { panic!("{name}") };
        let shape = vec![cols as u64, rows as u64];
        let opened = llama(("token_embd.weight", shape, number, raw.data().to_vec()));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        opened.write(&path);
        let opened = Gguf::open(&path, Arc::new(OnDisk)).unwrap();
        let stored = opened.find("token_embd.weight").unwrap();
        let dtype = stored.dtype().unwrap();
        let row = dtype.row_bytes(cols);
        // Whole, and from its second row on.
        for first in [0, 1] {
            let mut bytes = vec![0; (rows - first) * row];
            opened.read("token_embd.weight", first as u64, &mut bytes).unwrap();
            let mut weights = vec![0.0; cols];
            let expected = expected.data()[first * cols * 4..].chunks_exact(4 * cols);
            for (row, (bytes, expected)) in bytes.chunks_exact(row).zip(expected).enumerate() {
                dequantize(dtype, bytes, cols, &mut weights);
                for (i, (ours, theirs)) in weights.iter().zip(expected.chunks_exact(4)).enumerate()
                {
                    let theirs = f32::from_le_bytes(theirs.try_into().unwrap());
                    assert!(*ours == theirs, "{name}, row {row}, {i}: {ours} against {theirs}");
                }
            }
        }
    }
}

#[test]
fn scales_without_a_counterpart_are_refused_not_rounded() {
    let mut q4_0 = [0; 18];
    q4_0[..2].copy_from_slice(&half::f16::from_f32(9000.0).to_le_bytes());
    assert!(blocks::q4_0(&q4_0, &mut [0; 20]).unwrap_err().contains("9000"));
}

#[test]
fn damaged_headers_are_refused_by_name() {
    let good = llama(table()).bytes();
    let size = good.len() as u64;
    let read = |bytes: &[u8]| header::read(bytes, bytes.len() as u64);
    assert!(read(&good).is_ok());
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        read(&bad).unwrap_err()
    };
    let find = |what: &[u8]| good.windows(what.len()).position(|window| window == what).unwrap();
    // The tensor's dimensions, type and offset follow its name.
    let shape = find(b"token_embd.weight") + 17 + 4;
    let huge = |n: u32| (1_u64 << n).to_le_bytes();
    for (at, bytes, words) in [
        (0, &b"GGJT"[..], "not a GGUF file"),
        (4, &99_u32.to_le_bytes(), "version 99"),
        (4, &1_u32.to_le_bytes(), "version 1 "),
        (4, &3_u32.to_be_bytes(), "big-endian (version 3)"),
        (8, &huge(40), "1099511627776 tensors"),
        (16, &huge(60), "metadata keys"),
        (24, &huge(61), "metadata key 0 claims"),
        (24, &1000_u64.to_le_bytes(), "truncated"),
        (shape - 4, &9_u32.to_le_bytes(), "9 dimensions"),
        (shape, &huge(62), "larger than any file"),
        (shape, &33_u64.to_le_bytes(), "truncated or damaged"),
        (shape + 8, &0_u64.to_le_bytes(), "a dimension of 0"),
        (shape + 16, &250_u32.to_le_bytes(), "type 250 is unknown"),
        (shape + 16, &15_u32.to_le_bytes(), "type Q8_K cannot be read"),
        (shape + 16, &16_u32.to_le_bytes(), "type IQ2_XXS cannot be read"),
        (shape + 16, &12_u32.to_le_bytes(), "not whole blocks of Q4_K"),
        (shape + 20, &(u64::MAX - 31).to_le_bytes(), "beyond any file"),
        (shape + 20, &huge(40), "truncated or damaged"),
        (shape + 20, &31_u64.to_le_bytes(), "offset 31 is not a multiple of 32"),
    ] {
        let problem = with(at, bytes);
        assert!(problem.contains(words), "{words}: {problem}");
        assert_eq!(problem.lines().count(), 1);
    }
    for end in 0..good.len() {
        assert!(read(&good[..end]).is_err(), "cut at {end} of {size}");
    }
    // A file that is shorter than it says is an error, too.
    assert!(header::read(&good[..60], size).is_err());
}

#[test]
fn files_made_to_harm_are_refused_by_name() {
    let Some(formats) = shared("formats") else { return };
    let dirs = std::fs::read_dir(formats).unwrap().map(|entry| entry.unwrap().path());
    let bad = |dir: &PathBuf| {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("gguf-bad") || name == "gguf-big-endian"
    };
    let bad: Vec<PathBuf> = dirs.filter(bad).collect();
    assert!(bad.len() > 10, "{bad:?}");
    for dir in bad {
        let error = line(open(&dir.join("model.gguf")).err().unwrap());
        println!("{error}");
        assert!(error.starts_with(&dir.join("model.gguf").display().to_string()), "{error}");
    }
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    assert!(llama(table()).open().is_ok());
    let with = |key: &'static str, value: Meta| {
        let mut file = llama(table());
        file.set(key, value);
        refusal(&file)
    };
    for (key, value, words) in [
        (
            "general.architecture",
            Meta::Text("mamba"),
            "unknown architecture \"mamba\" (known: llama, ",
        ),
        ("llama.clamp_kqv", Meta::F32(8.0), "\"llama.clamp_kqv\" is 8, which is not understood"),
        ("llama.rope.dimension_count", Meta::U32(4), "only a part rotates"),
        ("llama.rope.scaling.type", Meta::Text("longrope"), "rope scaling \"longrope\""),
        ("llama.attention.value_length", Meta::U32(16), "not as wide"),
        (
            "llama.attention.head_count_kv",
            Meta::Kinds(vec![2, 4]),
            "the same number for all layers",
        ),
        ("llama.embedding_length", Meta::Text("a\nb"), "expected a whole number"),
        ("general.alignment", Meta::U32(24), "a power of 2"),
    ] {
        let error = with(key, value);
        assert!(error.contains(words) && error.contains("model.gguf: "), "{words}: {error}");
    }
    let mut file = llama(table());
    file.tensors[0].0 = "other";
    assert!(refusal(&file).contains("token_embd.weight"));
    let mut file = llama(table());
    file.tensors.push(table());
    assert!(refusal(&file).contains("occurs twice"));
    file.tensors[1] = ("rope_freqs.weight", vec![3], 0, vec![0; 12]);
    assert!(refusal(&file).contains("rope_freqs.weight"), "{}", refusal(&file));
    file.tensors[1] = ("rope_freqs.weight", vec![3], 0, 1_f32.to_le_bytes().repeat(3));
    assert!(refusal(&file).contains("3 values, expected 4"), "{}", refusal(&file));
}

#[test]
fn parts_are_read_as_one_model_and_a_wrong_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = |number: u32| dir.path().join(format!("big-{number:05}-of-00002.gguf"));
    let split = |file: &mut File, number: u16| {
        file.set("split.count", Meta::U16(2));
        file.set("split.no", Meta::U16(number));
        file.set("split.tensors.count", Meta::U32(2));
    };
    let mut first = llama(table());
    split(&mut first, 0);
    let values: Vec<u8> = (0..32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let norm = ("output_norm.weight", vec![32], 0, values.clone());
    let mut second = File { metadata: Vec::new(), tensors: vec![norm] };
    split(&mut second, 1);
    first.write(&path(1));
    let missing = line(Gguf::open(&path(1), Arc::new(OnDisk)).err().unwrap());
    assert!(missing.contains("big-00002-of-00002.gguf"), "{missing}");
    second.write(&path(2));
    let opened = Gguf::open(&path(1), Arc::new(OnDisk)).unwrap();
    assert_eq!((opened.name(), opened.names().count()), ("big".to_owned(), 2));
    let mut read = vec![0; 128];
    opened.read("output_norm.weight", 0, &mut read).unwrap();
    assert_eq!(read, values);
    let other = line(Gguf::open(&path(2), Arc::new(OnDisk)).err().unwrap());
    assert!(other.contains("open the first: big-00001-of-00002.gguf"), "{other}");
    split(&mut second, 0);
    second.write(&path(2));
    assert!(line(Gguf::open(&path(1), Arc::new(OnDisk)).err().unwrap()).contains("not part 2"));
    std::fs::rename(path(1), dir.path().join("renamed.gguf")).unwrap();
    let renamed =
        line(Gguf::open(&dir.path().join("renamed.gguf"), Arc::new(OnDisk)).err().unwrap());
    assert!(renamed.contains("must be called NAME-00001-of-00002.gguf"), "{renamed}");
}

#[test]
fn tokens_equal_the_reference_implementations() {
    #[derive(Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
    }
    let mut seen = 0;
    for dir in gguf_references() {
        let Ok(opened) = open(&dir.join("model.gguf")) else { continue };
        let tokenizer = opened.tokenizer().unwrap().unwrap();
        let tokenizer = Tokenizer::from_bytes(&tokenizer, Vec::new()).unwrap();
        let cases = std::fs::read(dir.join("tokens.json")).unwrap();
        let cases: Vec<Case> = serde_json::from_slice(&cases).unwrap();
        for Case { text, ids } in cases {
            let name = dir.display();
            assert_eq!(tokenizer.encode_bare(&text).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{name}");
            seen += 1;
        }
    }
    assert!(seen > 20);
}

/// A SentencePiece vocabulary of all bytes and these words, for a table of as many rows.
fn spoken(words: &[&str]) -> File {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let mut kinds = vec![2, 3, 3];
    kinds.extend([6; 256]);
    tokens.extend(words.iter().map(|word| (*word).to_owned()));
    kinds.extend(words.iter().map(|_| 1));
    let scores = (0..tokens.len()).map(|id| -(id as f32)).collect();
    let rows = tokens.len() as u64;
    let mut file = llama(("token_embd.weight", vec![32, rows], 0, vec![0; 128 * rows as usize]));
    file.set("tokenizer.ggml.model", Meta::Text("llama"));
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    file.set("tokenizer.ggml.token_type", Meta::Kinds(kinds));
    file.set("tokenizer.ggml.scores", Meta::Floats(scores));
    file.set("tokenizer.ggml.bos_token_id", Meta::U32(1));
    file.set("tokenizer.ggml.eos_token_id", Meta::U32(2));
    file.set("tokenizer.ggml.unknown_token_id", Meta::U32(0));
    file
}

fn tokenizer(file: &File) -> Result<Tokenizer> {
    let opened = file.open()?;
    let ends = opened.eos_token_ids()?;
    let bytes = opened.tokenizer()?.expect("a vocabulary");
    Ok(Tokenizer::from_bytes(&bytes, ends).unwrap())
}

#[test]
fn flags_decide_what_is_put_around_a_text() {
    let words = ["\u{2581}", "a", "b", "ab", "\u{2581}ab"];
    let mut file = spoken(&words);
    let ids = |file: &File| tokenizer(file).unwrap().encode("ab").unwrap();
    assert_eq!(ids(&file), [1, 263], "BOS and a space by default");
    assert_eq!(tokenizer(&file).unwrap().eos_ids(), [2]);
    file.set("tokenizer.ggml.add_space_prefix", Meta::Bool(false));
    file.set("tokenizer.ggml.add_eos_token", Meta::Bool(true));
    assert_eq!(ids(&file), [1, 262, 2]);
    file.set("tokenizer.ggml.add_bos_token", Meta::Bool(false));
    file.set("tokenizer.ggml.add_eos_token", Meta::Bool(false));
    assert_eq!(ids(&file), [262]);
    file.set("tokenizer.ggml.eot_token_id", Meta::U32(0));
    assert_eq!(tokenizer(&file).unwrap().eos_ids(), [0, 2]);
}

#[test]
fn damaged_vocabularies_are_refused_by_name() {
    let words = ["\u{2581}", "a", "b", "ab"];
    let refused = |change: &dyn Fn(&mut File)| {
        let mut file = spoken(&words);
        change(&mut file);
        line(tokenizer(&file).expect_err("it must be refused"))
    };
    let with = |key: &'static str, value: fn() -> Meta| refused(&|file| file.set(key, value()));
    for (words, problem) in [
        ("has a hole: token 260 is empty", refused(&|file| *file = spoken(&["\u{2581}", "", "b"]))),
        ("\"a\" is both 259 and 261", refused(&|file| *file = spoken(&["a", "b", "a"]))),
        ("263 tokens, the embedding table 3 rows", refused(&|file| file.tensors = vec![table()])),
        (
            "expected one for each of 263 tokens",
            with("tokenizer.ggml.scores", || Meta::Floats(vec![0.0])),
        ),
        ("is a list of 2 integers", with("tokenizer.ggml.token_type", || Meta::Kinds(vec![1, 1]))),
        ("number 0 is NaN", with("tokenizer.ggml.scores", || Meta::Floats(vec![f32::NAN; 263]))),
        ("of 263 tokens", with("tokenizer.ggml.eos_token_id", || Meta::U32(263))),
        ("\"rwkv\" is not supported", with("tokenizer.ggml.model", || Meta::Text("rwkv"))),
        ("tokenizer.ggml.pre is missing", with("tokenizer.ggml.model", || Meta::Text("gpt2"))),
    ] {
        assert!(problem.contains(words), "{words}: {problem}");
    }
    let problem = refused(&|file| {
        file.set("tokenizer.ggml.model", Meta::Text("gpt2"));
        file.set("tokenizer.ggml.pre", Meta::Text("martian"));
    });
    assert!(problem.contains("\"martian\" is unknown (known: llama-bpe, "), "{problem}");
    let problem = refused(&|file| {
        file.set("tokenizer.ggml.model", Meta::Text("gpt2"));
        file.set("tokenizer.ggml.pre", Meta::Text("qwen2"));
    });
    assert!(problem.contains("no token for byte 0x00"), "{problem}");
}

#[test]
fn headers_keep_their_values() {
    let mut file = llama(table());
    file.set("llama.rope.freq_base", Meta::F32(1e-6));
    let bytes = file.bytes();
    let Header { metadata, tensors } = header::read(&bytes[..], bytes.len() as u64).unwrap();
    assert_eq!(metadata["llama.rope.freq_base"], Value::Float(1e-6), "as it is written");
    assert_eq!(metadata["llama.block_count"], Value::Integer(1));
    assert_eq!(tensors["token_embd.weight"].shape, [3, 32]);
}

/// A byte-level vocabulary of this kind, with a token for each merge, for a table of as many rows.
fn merged(pre: &'static str, merges: &[&str]) -> File {
    let mut tokens: Vec<String> = words::byte_symbols().map(String::from).into();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let kinds = vec![1; tokens.len()];
    let rows = tokens.len() as u64;
    let mut file = llama(("token_embd.weight", vec![32, rows], 0, vec![0; 128 * rows as usize]));
    file.set("tokenizer.ggml.model", Meta::Text("gpt2"));
    file.set("tokenizer.ggml.pre", Meta::Text(pre));
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    file.set("tokenizer.ggml.token_type", Meta::Kinds(kinds));
    file.set(
        "tokenizer.ggml.merges",
        Meta::Texts(merges.iter().map(|m| (*m).to_owned()).collect()),
    );
    file.set("tokenizer.ggml.eos_token_id", Meta::U32(0));
    file
}

/// Nothing merges across words: digits come in threes, and in one kind a capital begins a word.
#[test]
fn kinds_of_vocabularies_cut_words_where_their_makers_do() {
    let merges = ["1 2", "3 4", "12 34", "a B", "b a"];
    for (pre, text, want) in [
        ("glm4", "1234", vec!["12", "3", "4"]),
        ("glm4", "baBb", vec!["b", "aB", "b"]),
        ("minimax-m2", "1234", vec!["12", "3", "4"]),
        ("minimax-m2", "baBb", vec!["ba", "B", "b"]),
        ("qwen2", "1234", vec!["1", "2", "3", "4"]),
    ] {
        let tokenizer = tokenizer(&merged(pre, &merges)).unwrap();
        let ids = tokenizer.encode(text).unwrap();
        let pieces: Vec<String> = ids.iter().map(|id| tokenizer.decode(&[*id]).unwrap()).collect();
        assert_eq!(pieces, want, "{pre}");
    }
}
