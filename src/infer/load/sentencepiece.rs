//! `tokenizer.model` (SentencePiece) as a `tokenizer.json`, for checkpoints that have no such file.
//!
//! Read are models of the type BPE whose text is not changed beforehand, with tokens for bytes: those
//! of Llama, Mistral, Gemma and Phi-3. They are what a GGUF file with `tokenizer.ggml.model` "llama"
//! has, and become the same tokenizer (`gguf/vocabulary`). Tokens that were added later come from
//! tokenizer_config.json or added_tokens.json. Refuses by name other types and normalizers, and what
//! is damaged. Invariant: memory grows only with the bytes of the file.
//!
//! Format: protocol buffers, `sentencepiece_model.proto` of <https://github.com/google/sentencepiece>.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::gguf;
use super::gguf::header::Value;
use super::hf::{JSON_BYTES_MAX, read_bounded, read_json};
use super::{LoadError, Result};

const FILE: &str = "tokenizer.model";
/// The most pieces.
const PIECES_MAX: usize = 1 << 21;
/// `TrainerSpec.ModelType.BPE`.
const BPE: u64 = 2;

/// The tokenizer of a directory. `None` if it has no `tokenizer.model`.
///
/// # Errors
/// One line that names the file and what is wrong with it.
pub fn tokenizer(dir: &Path) -> Result<Option<Vec<u8>>> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let bytes = read_bounded(&path, JSON_BYTES_MAX)?;
    let fail = |problem: String| LoadError::File { file: path.display().to_string(), problem };
    let model = Model::read(&bytes).map_err(fail)?;
    let config = dir.join("tokenizer_config.json");
    let config = match config.exists() {
        true => read_json(&config, JSON_BYTES_MAX)?,
        false => Json::Null,
    };
    let listed = dir.join("added_tokens.json");
    let listed = match listed.exists() {
        true => read_json(&listed, JSON_BYTES_MAX)?,
        false => Json::Null,
    };
    let count = model.pieces.len();
    let made = gguf::sentence_piece(&model.metadata(&config)).map_err(fail)?;
    let mut file: Json = serde_json::from_slice(&made).map_err(|error| fail(error.to_string()))?;
    let added = added(&config, &listed, count).map_err(fail)?;
    if let Some(list) = file["added_tokens"].as_array_mut() {
        list.extend(added);
    }
    // Without the old behaviour, text after a special token is not taken for a new text.
    if model.spaced && config.get("legacy") == Some(&Json::Bool(false)) {
        file["normalizer"] = Json::Null;
        file["pre_tokenizer"] = json!({ "type": "Metaspace", "replacement": "\u{2581}",
            "prepend_scheme": "first", "split": false });
    }
    serde_json::to_vec(&file).map(Some).map_err(|error| fail(error.to_string()))
}

/// Tokens that are not in the model, in the form of `tokenizer.json`.
fn added(config: &Json, listed: &Json, count: usize) -> std::result::Result<Vec<Json>, String> {
    let mut found: BTreeMap<u64, Json> = BTreeMap::new();
    for (token, id) in listed.as_object().into_iter().flatten() {
        let id = id.as_u64().ok_or_else(|| format!("added_tokens.json: {token:?} has no id"))?;
        found.insert(id, json!({ "content": token, "special": true }));
    }
    for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        let id = id.parse().map_err(|_| format!("tokenizer_config.json: {id:?} is not an id"))?;
        found.insert(id, token.clone());
    }
    let new = found.into_iter().filter(|(id, _)| *id >= count as u64);
    let mut made = Vec::new();
    for ((id, token), wanted) in new.zip(count as u64..) {
        if id != wanted {
            return Err(format!("added token {id}: token {wanted} before it is missing"));
        }
        let flag = |key: &str| token.get(key).and_then(Json::as_bool).unwrap_or(false);
        let Some(content) = token.get("content").and_then(Json::as_str) else {
            return Err(format!("added token {id} has no text"));
        };
        made.push(json!({ "id": id, "content": content, "single_word": flag("single_word"),
            "lstrip": flag("lstrip"), "rstrip": flag("rstrip"), "normalized": flag("normalized"),
            "special": flag("special") }));
    }
    Ok(made)
}

struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

/// What is read of a model.
struct Model {
    pieces: Vec<Piece>,
    unknown: u64,
    begin: u64,
    end: u64,
    /// Whether a text begins with a space.
    spaced: bool,
    trimmed: bool,
}

impl Model {
    fn read(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut model =
            Self { pieces: Vec::new(), unknown: 0, begin: 1, end: 2, spaced: true, trimmed: true };
        // The format's default is UNIGRAM.
        let mut kind = 1;
        for field in fields(bytes) {
            match field? {
                (1, Field::Bytes(piece)) => {
                    if model.pieces.len() == PIECES_MAX {
                        return Err(format!("more than {PIECES_MAX} pieces"));
                    }
                    model.pieces.push(self::piece(piece)?);
                }
                (2, Field::Bytes(trainer)) => kind = model.trainer(trainer)?.unwrap_or(kind),
                (3, Field::Bytes(normalizer)) => model.normalizer(normalizer)?,
                _ => {}
            }
        }
        match (kind, model.pieces.is_empty()) {
            (_, true) => Err("not a SentencePiece model: it has no pieces".into()),
            (BPE, false) => Ok(model),
            (1, false) => {
                Err("a SentencePiece model of the type UNIGRAM, which is not supported".into())
            }
            (other, false) => {
                Err(format!("a SentencePiece model of the type {other}, which is not supported"))
            }
        }
    }

    /// The model's type, if it is stated.
    fn trainer(&mut self, bytes: &[u8]) -> std::result::Result<Option<u64>, String> {
        let mut kind = None;
        for field in fields(bytes) {
            match field? {
                (3, Field::Number(value)) => kind = Some(value),
                (24, Field::Number(1)) => {
                    return Err("white space as a suffix, which is not supported".into());
                }
                (40, Field::Number(id)) => self.unknown = id,
                // An id of -1 means that there is none.
                (41, Field::Number(id)) => self.begin = id,
                (42, Field::Number(id)) => self.end = id,
                _ => {}
            }
        }
        Ok(kind)
    }

    fn normalizer(&mut self, bytes: &[u8]) -> std::result::Result<(), String> {
        let mut name = String::new();
        for field in fields(bytes) {
            match field? {
                (1, Field::Bytes(text)) => name = String::from_utf8_lossy(text).into_owned(),
                (2, Field::Bytes(map)) if !map.is_empty() => {
                    return Err(format!("text is normalized by {name:?}, which is not supported"));
                }
                (3, Field::Number(flag)) => self.spaced = flag != 0,
                (4, Field::Number(flag)) => self.trimmed = flag != 0,
                (5, Field::Number(0)) => {
                    return Err("white space is not escaped, which is not supported".into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The same as a GGUF file's metadata. The numbers of kinds are the same there.
    fn metadata(&self, config: &Json) -> BTreeMap<String, Value> {
        let mut metadata = BTreeMap::new();
        let mut set = |key: &str, value: Value| {
            metadata.insert(format!("tokenizer.ggml.{key}"), value);
        };
        let pieces = || self.pieces.iter();
        set("model", Value::String("llama".into()));
        set("tokens", Value::Strings(pieces().map(|piece| piece.text.clone()).collect()));
        set("scores", Value::Floats(pieces().map(|piece| piece.score).collect()));
        set("token_type", Value::Integers(pieces().map(|piece| piece.kind as i64).collect()));
        set("add_space_prefix", Value::Bool(self.spaced));
        set("remove_extra_whitespaces", Value::Bool(self.trimmed));
        let known = |id: u64| (id as usize) < self.pieces.len() && id < PIECES_MAX as u64;
        for (key, id) in [
            ("unknown_token_id", self.unknown),
            ("bos_token_id", self.begin),
            ("eos_token_id", self.end),
        ] {
            if known(id) {
                set(key, Value::Integer(id.into()));
            }
        }
        for key in ["add_bos_token", "add_eos_token"] {
            if let Some(flag) = config.get(key).and_then(Json::as_bool) {
                set(key, Value::Bool(flag));
            }
        }
        metadata
    }
}

fn piece(bytes: &[u8]) -> std::result::Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: 1 };
    for field in fields(bytes) {
        match field? {
            (1, Field::Bytes(text)) => {
                let text = String::from_utf8(text.to_vec());
                piece.text = text.map_err(|_| "a piece is not UTF-8".to_owned())?;
            }
            (2, Field::Word(bits)) => piece.score = f32::from_bits(bits),
            (3, Field::Number(kind)) => piece.kind = kind.min(i64::MAX as u64),
            _ => {}
        }
    }
    Ok(piece)
}

/// A field's value.
enum Field<'a> {
    Number(u64),
    Word(u32),
    Bytes(&'a [u8]),
    /// Eight bytes; no field that is read has them.
    Long,
}

/// The numbered fields of a message.
fn fields(mut bytes: &[u8]) -> impl Iterator<Item = std::result::Result<(u64, Field<'_>), String>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let field =
            next(&mut bytes).ok_or_else(|| "truncated or no SentencePiece model".to_owned());
        if field.is_err() {
            bytes = &[];
        }
        Some(field)
    })
}

fn next<'a>(bytes: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let key = number(bytes)?;
    let value = match key & 7 {
        0 => Field::Number(number(bytes)?),
        1 => {
            take(bytes, 8)?;
            Field::Long
        }
        2 => {
            let len = usize::try_from(number(bytes)?).ok()?;
            Field::Bytes(take(bytes, len)?)
        }
        5 => Field::Word(u32::from_le_bytes(take(bytes, 4)?.try_into().ok()?)),
        _ => return None,
    };
    Some((key >> 3, value))
}

fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(taken)
}

fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for place in 0..10 {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << (7 * place).min(63);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;

    fn data() -> std::path::PathBuf {
        doppler_testing::root().join("tests/data/sentencepiece")
    }

    /// A directory with one of the models, and a tokenizer_config.json.
    fn dir(name: &str, config: &Json) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(data().join(format!("{name}.model")), dir.path().join(FILE)).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        dir
    }

    #[test]
    fn a_model_tokenizes_as_sentencepiece_does() {
        let expected = std::fs::read(data().join("expected.json")).unwrap();
        let expected: BTreeMap<String, Vec<(String, Vec<u32>)>> =
            serde_json::from_slice(&expected).unwrap();
        assert_eq!(expected.len(), 2);
        for (name, texts) in expected {
            let dir = dir(&name, &json!({ "add_bos_token": false }));
            let bytes = tokenizer(dir.path()).unwrap().unwrap();
            let tokenizer = Tokenizer::from_bytes(&bytes, Vec::new()).unwrap();
            for (text, ids) in texts {
                // Control symbols in a text are text to sentencepiece, and symbols to Transformers.
                if text.contains("<s>") || text.starts_with("<|end|>") {
                    continue;
                }
                assert_eq!(tokenizer.encode_bare(&text).unwrap(), ids, "{name}: {text:?}");
            }
        }
    }

    #[test]
    fn tokens_that_were_added_later_follow_the_models() {
        let token = |text: &str| json!({ "content": text, "special": true });
        let config = json!({ "added_tokens_decoder": {
            "641": token("<|user|>"), "640": token("<|assistant|>"), "1": token("<s>") } });
        let bytes = tokenizer(dir("prefixed", &config).path()).unwrap().unwrap();
        let tokenizer = Tokenizer::from_bytes(&bytes, Vec::new()).unwrap();
        assert_eq!(tokenizer.id_of("<|assistant|>"), Some(640));
        let ids = tokenizer.encode("<|user|>a").unwrap();
        assert_eq!(ids[..2], [1, 641], "the beginning of a text, then the added token");
        let gap = json!({ "added_tokens_decoder": { "641": token("<|user|>") } });
        let error = super::tokenizer(dir("prefixed", &gap).path()).unwrap_err().to_string();
        assert!(error.contains("token 640 before it is missing"), "{error}");
    }

    #[test]
    fn what_is_damaged_or_of_another_type_is_one_line() {
        let whole = std::fs::read(data().join("plain.model")).unwrap();
        let read = |bytes: &[u8]| Model::read(bytes).map(|_| ());
        assert_eq!(read(&whole), Ok(()));
        for cut in [1, 2, whole.len() / 2, whole.len() - 1] {
            let error = read(&whole[..cut]).unwrap_err();
            assert!(error.contains("truncated") || error.contains("type"), "{cut}: {error}");
        }
        assert!(read(&[]).unwrap_err().contains("no pieces"));
        // One piece, and no trainer: the default type.
        let unigram = [0x0a, 3, 0x0a, 1, b'a'];
        assert!(read(&unigram).unwrap_err().contains("UNIGRAM"));
        // A length far beyond the file.
        assert!(read(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]).unwrap_err().contains("truncated"));
    }
}
