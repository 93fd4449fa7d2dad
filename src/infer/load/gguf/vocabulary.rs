//! The vocabulary of a GGUF file as a Hugging Face `tokenizer.json`.
//!
//! Two of llama.cpp's tokenizers are understood: `gpt2` (byte-level BPE with merges; its `pre` kind
//! says how text is cut into words) and `llama` (SentencePiece: scores and byte tokens). Control
//! tokens become special tokens and user-defined ones added tokens, so that both match before
//! anything is merged. Refuses lists of different lengths, a token that occurs twice, an empty one,
//! a merge of unknown tokens, and a vocabulary that cannot spell every byte.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::header::Value;
use super::words;

type Result<T> = std::result::Result<T, String>;

/// `tokenizer.ggml.token_type`, numbered from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Ids that end a text, by key.
const END_KEYS: &[&str] = &["eos_token_id", "eot_token_id", "eom_token_id"];
/// Control tokens that end a turn or a text, whatever the keys say (`llama_vocab::impl::load`).
const END_TOKENS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
];

/// A checked vocabulary.
pub struct Vocabulary<'a> {
    metadata: &'a std::collections::BTreeMap<String, Value>,
    tokens: &'a [String],
    kinds: Vec<Kind>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    /// Reads `tokenizer.ggml`. `None` if the file has no vocabulary.
    ///
    /// # Errors
    /// If its lists do not fit each other or the `rows` of the embedding table, or a token occurs
    /// twice.
    pub fn new(
        metadata: &'a std::collections::BTreeMap<String, Value>,
        rows: u64,
    ) -> Result<Option<Self>> {
        let tokens = match (metadata.get("tokenizer.ggml.model"), get(metadata, "tokens")) {
            (None, None) => return Ok(None),
            (Some(Value::String(model)), _) if model == "none" || model == "no_vocab" => {
                return Ok(None);
            }
            (_, Some(Value::Strings(tokens))) => tokens,
            _ => return Err("tokenizer.ggml.tokens is missing or not a list of strings".into()),
        };
        if tokens.len() as u64 != rows {
            return Err(format!(
                "tokenizer.ggml.tokens has {} tokens, the embedding table {rows} rows",
                tokens.len()
            ));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in (0_u32..).zip(tokens) {
            if token.is_empty() {
                return Err(format!("tokenizer.ggml.tokens has a hole: token {id} is empty"));
            }
            if let Some(first) = ids.insert(token.as_str(), id) {
                return Err(format!("tokenizer.ggml.tokens: {token:?} is both {first} and {id}"));
            }
        }
        let kinds = match get(metadata, "token_type") {
            None => vec![Kind::Normal; tokens.len()],
            Some(Value::Integers(kinds)) if kinds.len() == tokens.len() => kinds
                .iter()
                .zip(tokens)
                .map(|(kind, token)| self::kind(*kind, token))
                .collect::<Result<_>>()?,
            Some(other) => return Err(unlike("token_type", other, tokens.len())),
        };
        Ok(Some(Self { metadata, tokens, kinds, ids }))
    }

    /// The ids that end a text, in ascending order.
    pub fn ends(&self) -> Result<Vec<u32>> {
        let mut ends = Vec::new();
        for key in END_KEYS {
            ends.extend(self.id(key)?);
        }
        let control = |id: &u32| self.kinds[*id as usize] != Kind::Normal;
        let by_name = END_TOKENS.iter().filter_map(|token| self.ids.get(token).copied());
        ends.extend(by_name.filter(control));
        ends.sort_unstable();
        ends.dedup();
        Ok(ends)
    }

    /// `tokenizer.json`.
    ///
    /// # Errors
    /// If the tokenizer's kind is unknown, or it could not tokenize every text.
    pub fn tokenizer(&self) -> Result<Vec<u8>> {
        let model = match self.metadata.get("tokenizer.ggml.model") {
            Some(Value::String(model)) => model.as_str(),
            _ => return Err("tokenizer.ggml.model is missing".into()),
        };
        let (mut file, begins) = match model {
            "gpt2" => self.byte_level()?,
            "llama" => self.sentence_piece()?,
            other => {
                return Err(format!(
                    "tokenizer.ggml.model {other:?} is not supported (gpt2, llama)"
                ));
            }
        };
        file["added_tokens"] = self.added();
        file["post_processor"] = self.around(begins)?;
        serde_json::to_vec(&file).map_err(|error| error.to_string())
    }

    /// Byte-level BPE, and whether a text begins with the BOS token if the file does not say.
    fn byte_level(&self) -> Result<(Json, bool)> {
        let pre = match get(self.metadata, "pre") {
            Some(Value::String(pre)) => pre.as_str(),
            _ => {
                return Err(
                    "tokenizer.ggml.pre is missing: it is not known how to cut text into words"
                        .into(),
                );
            }
        };
        let words = words::of(pre)?;
        for (byte, symbol) in words::byte_symbols().into_iter().enumerate() {
            if !self.ids.contains_key(symbol.to_string().as_str()) {
                return Err(format!(
                    "tokenizer.ggml.tokens has no token for byte {byte:#04x} ({symbol:?})"
                ));
            }
        }
        let merges = match get(self.metadata, "merges") {
            Some(Value::Strings(merges)) => merges,
            _ => return Err("tokenizer.ggml.merges is missing or not a list of strings".into()),
        };
        let pairs = merges.iter().enumerate().map(|(number, merge)| {
            let pair = merge.split_once(' ').filter(|(left, right)| {
                let known = |token: &str| self.ids.contains_key(token);
                known(left) && known(right) && known(&[*left, *right].concat())
            });
            pair.map(|(left, right)| json!([left, right]))
                .ok_or_else(|| format!("tokenizer.ggml.merges: number {number}, {merge:?}, is not of two tokens that make a third"))
        });
        let pairs = pairs.collect::<Result<Vec<_>>>()?;
        let mut cuts: Vec<Json> = words
            .patterns
            .iter()
            .map(|pattern| {
                json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
            })
            .collect();
        cuts.push(byte_level_step());
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": if words.composed { json!({ "type": "NFC" }) } else { Json::Null },
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": cuts },
            "post_processor": null,
            "decoder": byte_level_step(),
            "model": { "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "ignore_merges": words.whole_words,
                "vocab": self.vocab(), "merges": pairs },
        });
        Ok((file, words.begins))
    }

    /// SentencePiece's BPE: of all neighbours that make a token, those whose token has the highest
    /// score are joined first. As in Transformers' converter, every way to make a token is a merge.
    fn sentence_piece(&self) -> Result<(Json, bool)> {
        let scores = match get(self.metadata, "scores") {
            Some(Value::Floats(scores)) if scores.len() == self.tokens.len() => scores,
            Some(other) => return Err(unlike("scores", other, self.tokens.len())),
            None => return Err("tokenizer.ggml.scores is missing".into()),
        };
        if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
            return Err(format!("tokenizer.ggml.scores: number {id} is {}", scores[id]));
        }
        for byte in 0..=255_u8 {
            if !self.ids.contains_key(format!("<0x{byte:02X}>").as_str()) {
                return Err(format!(
                    "tokenizer.ggml.tokens has no token for byte {byte:#04x} (\"<0x{byte:02X}>\")"
                ));
            }
        }
        let spaced = flag(self.metadata, "add_space_prefix")?.unwrap_or(true);
        if flag(self.metadata, "remove_extra_whitespaces")? == Some(true) {
            return Err(
                "tokenizer.ggml.remove_extra_whitespaces is true, which is not supported".into()
            );
        }
        let unknown = self.id("unknown_token_id")?.map(|id| self.tokens[id as usize].as_str());
        let space =
            json!({ "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" });
        let back =
            json!({ "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " });
        let (mut before, mut after) =
            (vec![space], vec![back, json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })]);
        if spaced {
            before.insert(0, json!({ "type": "Prepend", "prepend": "\u{2581}" }));
            after.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": { "type": "Sequence", "normalizers": before },
            "pre_tokenizer": null, "post_processor": null,
            "decoder": { "type": "Sequence", "decoders": after },
            "model": { "type": "BPE", "dropout": null, "unk_token": unknown,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": false,
                "vocab": self.vocab(), "merges": self.merges(scores) },
        });
        Ok((file, true))
    }

    /// Every pair of tokens that make a token, best score first.
    fn merges(&self, scores: &[f32]) -> Vec<Json> {
        let mergeable =
            |id: usize| matches!(self.kinds[id], Kind::Normal | Kind::UserDefined | Kind::Unused);
        let mut order: Vec<usize> = (0..self.tokens.len()).filter(|id| mergeable(*id)).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        let mut merges = Vec::new();
        for id in order {
            let token = &self.tokens[id];
            let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            let known = splits.filter_map(|(left, right)| {
                Some(((*self.ids.get(left)?, *self.ids.get(right)?), (left, right)))
            });
            let mut known: Vec<_> = known.collect();
            known.sort_unstable_by_key(|(ids, _)| *ids);
            merges.extend(known.into_iter().map(|(_, (left, right))| json!([left, right])));
        }
        merges
    }

    fn vocab(&self) -> Json {
        let pairs = (0_u32..).zip(self.tokens).map(|(id, token)| (token.clone(), id.into()));
        Json::Object(pairs.collect::<Map<String, Json>>())
    }

    /// Tokens that match before anything is merged.
    fn added(&self) -> Json {
        let added = (0..).zip(self.tokens).zip(&self.kinds).filter_map(|((id, token), kind)| {
            let special = match kind {
                Kind::Control | Kind::Unknown => true,
                Kind::UserDefined => false,
                Kind::Normal | Kind::Unused | Kind::Byte => return None,
            };
            let id: u32 = id;
            Some(json!({ "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": special }))
        });
        added.collect::<Vec<_>>().into()
    }

    /// The tokens put around every text.
    fn around(&self, begins: bool) -> Result<Json> {
        let ids =
            [("add_bos_token", begins, "bos_token_id"), ("add_eos_token", false, "eos_token_id")];
        let [first, last] = ids.map(|(key, default, id)| {
            let wanted = flag(self.metadata, key)?.unwrap_or(default);
            Ok::<_, String>(if wanted { self.id(id)? } else { None })
        });
        let (first, last) = (first?, last?);
        let mut special = Map::new();
        let mut add = |id: u32| {
            let token = &self.tokens[id as usize];
            special.insert(token.clone(), json!({ "id": token, "ids": [id], "tokens": [token] }));
            json!({ "SpecialToken": { "id": token, "type_id": 0 } })
        };
        let mut single: Vec<Json> = first.into_iter().map(&mut add).collect();
        single.push(json!({ "Sequence": { "id": "A", "type_id": 0 } }));
        single.extend(last.map(add));
        if special.is_empty() {
            return Ok(Json::Null);
        }
        let mut pair = single.clone();
        pair.push(json!({ "Sequence": { "id": "B", "type_id": 1 } }));
        Ok(
            json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special }),
        )
    }

    /// The token id that a key gives.
    fn id(&self, key: &str) -> Result<Option<u32>> {
        match get(self.metadata, key) {
            None => Ok(None),
            Some(Value::Integer(id)) => u32::try_from(*id)
                .ok()
                .filter(|id| (*id as usize) < self.tokens.len())
                .map(Some)
                .ok_or_else(|| {
                    format!("tokenizer.ggml.{key} is {id}, of {} tokens", self.tokens.len())
                }),
            Some(other) => {
                Err(format!("tokenizer.ggml.{key} is {}, expected a number", other.kind()))
            }
        }
    }
}

fn byte_level_step() -> Json {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false })
}

fn get<'a>(
    metadata: &'a std::collections::BTreeMap<String, Value>,
    key: &str,
) -> Option<&'a Value> {
    metadata.get(&format!("tokenizer.ggml.{key}"))
}

fn flag(metadata: &std::collections::BTreeMap<String, Value>, key: &str) -> Result<Option<bool>> {
    match get(metadata, key) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => {
            Err(format!("tokenizer.ggml.{key} is {}, expected true or false", other.kind()))
        }
    }
}

fn unlike(key: &str, value: &Value, tokens: usize) -> String {
    format!("tokenizer.ggml.{key} is {}, expected one for each of {tokens} tokens", value.kind())
}

fn kind(number: i64, token: &str) -> Result<Kind> {
    Ok(match number {
        1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        other => {
            return Err(format!(
                "tokenizer.ggml.token_type: token {token:?} has the unknown type {other}"
            ));
        }
    })
}
