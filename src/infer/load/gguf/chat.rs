//! The chat templates of a GGUF file, and the special tokens that they mention.
//!
//! Format: `tokenizer.chat_template`, and `tokenizer.chat_template.NAME` for each further one, as
//! llama.cpp's converter writes them.

use std::collections::BTreeMap;

use super::header::Value;
use doppler_store::chat::{ChatTemplates, DEFAULT};

const KEY: &str = "tokenizer.chat_template";

/// Special tokens by their names in a template, and the keys of their ids.
const TOKENS: [(&str, &str); 4] = [
    ("bos_token", "tokenizer.ggml.bos_token_id"),
    ("eos_token", "tokenizer.ggml.eos_token_id"),
    ("unk_token", "tokenizer.ggml.unknown_token_id"),
    ("pad_token", "tokenizer.ggml.padding_token_id"),
];

/// `None` if the file has no template.
///
/// # Errors
/// If there is more than a manifest may carry.
pub fn templates(metadata: &BTreeMap<String, Value>) -> Result<Option<ChatTemplates>, String> {
    let mut templates = BTreeMap::new();
    for (key, value) in metadata.range(KEY.to_owned()..) {
        let Some(rest) = key.strip_prefix(KEY) else { break };
        let name = if rest.is_empty() { Some(DEFAULT) } else { rest.strip_prefix('.') };
        if let (Some(name), Value::String(source)) = (name, value) {
            templates.insert(name.to_owned(), source.clone());
        }
    }
    if templates.is_empty() {
        return Ok(None);
    }
    let token = |key: &str| {
        let Some(Value::Integer(id)) = metadata.get(key) else { return None };
        let Some(Value::Strings(tokens)) = metadata.get("tokenizer.ggml.tokens") else {
            return None;
        };
        tokens.get(usize::try_from(*id).ok()?).cloned()
    };
    let tokens = TOKENS.iter().filter_map(|(name, key)| Some(((*name).to_owned(), token(key)?)));
    let chat = ChatTemplates { templates, tokens: tokens.collect() };
    match chat.problem() {
        Some(problem) => Err(format!("its chat template: {problem}")),
        None => Ok(Some(chat)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_and_their_tokens_are_found_by_their_keys() {
        let text = |text: &str| Value::String(text.to_owned());
        let mut metadata: BTreeMap<String, Value> = [
            ("tokenizer.chat_templates".to_owned(), Value::Strings(vec!["tool_use".to_owned()])),
            ("tokenizer.ggml.bos_token_id".to_owned(), Value::Integer(1)),
            ("tokenizer.ggml.eos_token_id".to_owned(), Value::Integer(9)),
            ("tokenizer.ggml.tokens".to_owned(), Value::Strings(vec!["a".into(), "<s>".into()])),
        ]
        .into();
        assert_eq!(templates(&metadata), Ok(None));
        metadata.insert(KEY.to_owned(), text("plain"));
        metadata.insert(format!("{KEY}.tool_use"), text("with tools"));
        let chat = templates(&metadata).unwrap().unwrap();
        let want = [("default", "plain"), ("tool_use", "with tools")];
        let want = want.map(|(name, source)| (name.to_owned(), source.to_owned()));
        assert_eq!(chat.templates, want.into());
        assert_eq!(chat.tokens, [("bos_token".to_owned(), "<s>".to_owned())].into());
        metadata.insert(KEY.to_owned(), text(&"x".repeat(300_000)));
        assert!(templates(&metadata).unwrap_err().contains("chat template"));
    }
}
