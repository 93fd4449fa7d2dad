//! A checkpoint's chat templates: `chat_template.jinja`, else those in `tokenizer_config.json`, and
//! the special tokens of that file.
//!
//! Only read here, within limits. `template` gives them a meaning.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::hf::{JSON_BYTES_MAX, read_bounded, read_json};
use super::{LoadError, Result};
use doppler_store::chat::{ChatTemplates, DEFAULT, TEMPLATE_BYTES_MAX};

/// The file that Transformers writes since 4.48.
const FILE: &str = "chat_template.jinja";
const CONFIG: &str = "tokenizer_config.json";

/// The special tokens that templates mention.
const TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// The templates of a Hugging Face directory. `None` if there are none.
///
/// # Errors
/// If a file is not what it should be, or there is more than a manifest may carry.
pub fn read(dir: &Path) -> Result<Option<ChatTemplates>> {
    let (file, config) = (dir.join(FILE), dir.join(CONFIG));
    let config = match config.exists() {
        true => read_json(&config, JSON_BYTES_MAX)?,
        false => Value::Null,
    };
    let fail = |path: &Path, problem: String| {
        Err(LoadError::File { file: path.display().to_string(), problem })
    };
    let templates = if file.exists() {
        let bytes = read_bounded(&file, TEMPLATE_BYTES_MAX as u64)?;
        match String::from_utf8(bytes) {
            Ok(source) => BTreeMap::from([(DEFAULT.to_owned(), source)]),
            Err(_) => return fail(&file, "not UTF-8 text".to_owned()),
        }
    } else {
        match named(&config["chat_template"]) {
            Ok(templates) => templates,
            Err(problem) => return fail(&dir.join(CONFIG), problem),
        }
    };
    if templates.is_empty() {
        return Ok(None);
    }
    let tokens = TOKENS.iter().filter_map(|name| {
        let token = &config[*name];
        // An added token is an object with its text inside.
        let text = token.as_str().or_else(|| token["content"].as_str())?;
        Some(((*name).to_owned(), text.to_owned()))
    });
    let chat = ChatTemplates { templates, tokens: tokens.collect() };
    match chat.problem() {
        Some(problem) => fail(dir, format!("its chat template: {problem}")),
        None => Ok(Some(chat)),
    }
}

/// The templates of `chat_template`: a text, or a list of names and texts.
fn named(value: &Value) -> std::result::Result<BTreeMap<String, String>, String> {
    let one = |entry: &Value| {
        let text = |key: &str| entry[key].as_str().map(str::to_owned);
        text("name").zip(text("template"))
    };
    match value {
        Value::Null => Ok(BTreeMap::new()),
        Value::String(source) => Ok([(DEFAULT.to_owned(), source.clone())].into()),
        Value::Array(list) => list
            .iter()
            .map(|entry| one(entry).ok_or("chat_template: an entry without name and template"))
            .collect::<std::result::Result<_, _>>()
            .map_err(str::to_owned),
        _ => Err("chat_template is neither a text nor a list".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(value: &Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG), value.to_string()).unwrap();
        dir
    }

    #[test]
    fn both_forms_and_both_files_are_read() {
        assert_eq!(read(tempfile::tempdir().unwrap().path()).unwrap(), None);
        assert_eq!(read(config(&json!({ "bos_token": "<s>" })).path()).unwrap(), None);
        let dir = config(&json!({
            "bos_token": "<s>", "eos_token": { "content": "</s>", "special": true },
            "pad_token": null, "chat_template": "{{ bos_token }}",
        }));
        let chat = read(dir.path()).unwrap().unwrap();
        assert_eq!(chat.templates, [("default".into(), "{{ bos_token }}".into())].into());
        let tokens = [("bos_token".into(), "<s>".into()), ("eos_token".into(), "</s>".into())];
        assert_eq!(chat.tokens, tokens.into());
        std::fs::write(dir.path().join(FILE), "newer").unwrap();
        let newer = read(dir.path()).unwrap().unwrap();
        assert_eq!(newer.templates["default"], "newer");
        assert_eq!(newer.tokens, chat.tokens);
        let list = json!([{ "name": "default", "template": "a" },
                          { "name": "tool_use", "template": "b" }]);
        let chat = read(config(&json!({ "chat_template": list })).path()).unwrap().unwrap();
        assert_eq!(chat.templates.len(), 2);
        assert_eq!(chat.templates["tool_use"], "b");
    }

    #[test]
    fn what_is_no_template_is_refused_by_its_file() {
        for bad in [json!(3), json!([{ "name": "x" }]), json!(["x"]), json!({})] {
            let dir = config(&json!({ "chat_template": bad }));
            let error = read(dir.path()).unwrap_err().to_string();
            assert!(error.contains(CONFIG) && error.contains("chat_template"), "{error}");
        }
        let dir = config(&json!({ "chat_template": "x".repeat(TEMPLATE_BYTES_MAX + 1) }));
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("chat template") && error.lines().count() == 1, "{error}");
        std::fs::write(dir.path().join(FILE), b"\xff").unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains(FILE) && error.contains("UTF-8"), "{error}");
    }
}
