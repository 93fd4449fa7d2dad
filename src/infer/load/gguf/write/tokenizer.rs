//! A `tokenizer.json` as llama.cpp's vocabulary: the inverse of `gguf/vocabulary`.
//!
//! Byte-level BPE becomes the kind `gpt2` with the `pre` whose patterns it has; BPE with tokens for
//! bytes becomes the kind `llama`, whose scores are the ranks of merges. Other tokenizers are refused.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::super::words;
use super::bytes::Meta;

type Result<T> = std::result::Result<T, String>;

/// `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The keys of a vocabulary of `count` tokens. `ends` end a text.
pub(super) fn keys(
    file: &[u8],
    count: usize,
    ends: &[u32],
    config: &Json,
) -> Result<Vec<(String, Meta)>> {
    let file: Json = serde_json::from_slice(file).map_err(|error| error.to_string())?;
    let model = &file["model"];
    if model["type"] != "BPE" {
        return Err(format!("a tokenizer of the type {} cannot be written as GGUF", model["type"]));
    }
    let bytes = model["byte_fallback"] == true;
    let mut tokens: Vec<String> = (0..count).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; count];
    let mut set = |token: &str, id: &Json, kind: i32| {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < count);
        let id =
            id.ok_or_else(|| format!("token {token:?} is not one of the {count} of the model"))?;
        (tokens[id], kinds[id]) = (token.to_owned(), kind);
        Ok::<_, String>(id)
    };
    let vocab = model["vocab"].as_object().ok_or("the tokenizer has no vocabulary")?;
    for (token, id) in vocab {
        let byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        set(token, id, if bytes && byte { BYTE } else { NORMAL })?;
    }
    let unknown = model["unk_token"].as_str();
    for added in file["added_tokens"].as_array().into_iter().flatten() {
        let Some(token) = added["content"].as_str() else { continue };
        let kind = match added["special"] == true {
            true if unknown == Some(token) => UNKNOWN,
            true => CONTROL,
            false => USER_DEFINED,
        };
        set(token, &added["id"], kind)?;
    }
    let ids: HashMap<&str, u32> =
        (0_u32..).zip(&tokens).map(|(id, token)| (token.as_str(), id)).collect();
    let begins = around(&file, "single").and_then(|token| ids.get(token.as_str()).copied());
    let mut keys = match bytes {
        true => sentence_piece(&file, &ids, count, unknown)?,
        false => byte_level(&file)?,
    };
    let mut key = |name: &str, value: Meta| keys.push((format!("tokenizer.ggml.{name}"), value));
    let begin =
        begins.or_else(|| config["bos_token_id"].as_u64().and_then(|id| id.try_into().ok()));
    if let Some(begin) = begin.filter(|id| (*id as usize) < count) {
        key("bos_token_id", Meta::Number(begin));
    }
    key("add_bos_token", Meta::Flag(begins.is_some()));
    key("add_eos_token", Meta::Flag(false));
    for (name, end) in ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().zip(ends) {
        key(name, Meta::Number(*end));
    }
    key("token_type", Meta::Numbers(kinds));
    key("tokens", Meta::Texts(tokens));
    Ok(keys)
}

/// The special token before every text.
fn around(file: &Json, form: &str) -> Option<String> {
    let processor = &file["post_processor"];
    let steps = processor["processors"].as_array();
    let all = steps.into_iter().flatten().chain(std::iter::once(processor));
    let template = all.into_iter().find(|step| step["type"] == "TemplateProcessing")?;
    Some(template[form][0]["SpecialToken"]["id"].as_str()?.to_owned())
}

/// The pairs that are merged, in order.
fn merges(file: &Json) -> Result<Vec<(String, String)>> {
    let merges = file["model"]["merges"].as_array().ok_or("the tokenizer has no merges")?;
    let pair = |merge: &Json| match merge {
        Json::String(text) => {
            text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()))
        }
        Json::Array(pair) => {
            Some((pair.first()?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned()))
        }
        _ => None,
    };
    merges
        .iter()
        .map(|merge| pair(merge).ok_or_else(|| format!("the tokenizer's merge {merge} is no pair")))
        .collect()
}

fn byte_level(file: &Json) -> Result<Vec<(String, Meta)>> {
    let pre = &file["pre_tokenizer"];
    let steps: Vec<&Json> = match pre["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![pre],
    };
    let mut patterns = Vec::new();
    let mut level = false;
    for step in steps {
        match step["type"].as_str() {
            Some("Split") => patterns.push(step["pattern"]["Regex"].as_str().unwrap_or_default()),
            Some("Digits") if step["individual_digits"] == true => patterns.push(r"\p{N}"),
            Some("ByteLevel") => {
                level = true;
                if step["use_regex"] != false {
                    patterns.push(words::GPT2);
                }
            }
            other => return Err(format!("the pre-tokenizer {other:?} cannot be written as GGUF")),
        }
    }
    let composed = file["normalizer"]["type"] == "NFC";
    let whole = file["model"]["ignore_merges"] == true;
    let kind = words::kind(&patterns, whole, composed).filter(|_| level);
    let kind = kind.ok_or_else(|| {
        format!("llama.cpp has no name for how its tokenizer cuts words ({patterns:?})")
    })?;
    let pair = |(left, right): (String, String)| format!("{left} {right}");
    let merges = merges(file)?.into_iter().map(pair).collect();
    Ok(vec![
        ("tokenizer.ggml.model".into(), Meta::Text("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Meta::Text(kind.into())),
        ("tokenizer.ggml.merges".into(), Meta::Texts(merges)),
    ])
}

fn sentence_piece(
    file: &Json,
    ids: &HashMap<&str, u32>,
    count: usize,
    unknown: Option<&str>,
) -> Result<Vec<(String, Meta)>> {
    let merges = merges(file)?;
    // A token that no merge makes comes after all that are made.
    let mut scores = vec![-(merges.len() as f32) - 1.0; count];
    for (rank, (left, right)) in merges.iter().enumerate().rev() {
        let made = ids.get(format!("{left}{right}").as_str());
        let made = made.ok_or_else(|| format!("{left:?} and {right:?} make no token"))?;
        scores[*made as usize] = -(rank as f32);
    }
    let text = |of: &Json| of.to_string();
    let prepends = text(&file["normalizer"]).contains("Prepend");
    let spaced = &file["pre_tokenizer"]["prepend_scheme"];
    let spaced = spaced.is_string() && spaced != "never";
    let mut keys = vec![
        ("tokenizer.ggml.model".into(), Meta::Text("llama".into())),
        ("tokenizer.ggml.pre".into(), Meta::Text("default".into())),
        ("tokenizer.ggml.scores".into(), Meta::Floats(scores)),
        ("tokenizer.ggml.add_space_prefix".into(), Meta::Flag(prepends || spaced)),
    ];
    if let Some(id) = unknown.and_then(|token| ids.get(token)) {
        keys.push(("tokenizer.ggml.unknown_token_id".into(), Meta::Number(*id)));
    }
    Ok(keys)
}
