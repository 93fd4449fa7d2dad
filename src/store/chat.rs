//! A model's chat templates, as its manifest carries them: Jinja sources by name, and the special
//! tokens that they mention.
//!
//! They are part of the manifest, so whoever has the manifest has them, and the model's id covers
//! them. A model without a template has no such key and keeps its id. Bounded in number and bytes.
//! Nothing is parsed here.
//!
//! Format: what Transformers keeps in `tokenizer_config.json` (`chat_template`, `bos_token`...).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The most templates of a model.
pub const TEMPLATES_MAX: usize = 16;
/// The most bytes of all templates of a model. The longest in common use has about 20 KiB.
pub const TEMPLATE_BYTES_MAX: usize = 256 * 1024;
/// The most special tokens, and the most bytes of one.
const TOKENS_MAX: usize = 16;
const TOKEN_BYTES_MAX: usize = 256;
/// The longest name of a template or a token, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// The name of the template that is used unless another is asked for.
pub const DEFAULT: &str = "default";

/// Templates and the tokens that they mention.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatTemplates {
    /// Jinja sources by name.
    pub templates: BTreeMap<String, String>,
    /// The text of special tokens by their names in a template: `bos_token`, `eos_token`...
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tokens: BTreeMap<String, String>,
}

impl ChatTemplates {
    /// A single template.
    pub fn one(source: impl Into<String>) -> Self {
        Self { templates: [(DEFAULT.to_owned(), source.into())].into(), ..Self::default() }
    }

    /// What is wrong with them, if anything.
    pub fn problem(&self) -> Option<String> {
        let Self { templates, tokens } = self;
        if templates.is_empty() || templates.len() > TEMPLATES_MAX {
            return Some(format!(
                "{} templates; there must be 1..={TEMPLATES_MAX}",
                templates.len()
            ));
        }
        let bytes: usize = templates.values().map(String::len).sum();
        if bytes > TEMPLATE_BYTES_MAX {
            return Some(format!("{bytes} bytes of templates, more than {TEMPLATE_BYTES_MAX}"));
        }
        if tokens.len() > TOKENS_MAX {
            return Some(format!("{} tokens, more than {TOKENS_MAX}", tokens.len()));
        }
        let odd = |name: &&String| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(plain)
        };
        if let Some(name) = templates.keys().chain(tokens.keys()).find(odd) {
            let shown: String = name.chars().take(NAME_BYTES_MAX).collect();
            return Some(format!("{shown:?} is not a plain name"));
        }
        let long = tokens.iter().find(|(_, text)| text.len() > TOKEN_BYTES_MAX)?;
        Some(format!("{} is longer than {TOKEN_BYTES_MAX} bytes", long.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_refused_by_name() {
        let good = ChatTemplates::one("{{ bos_token }}");
        assert_eq!(good.problem(), None);
        let problem = |change: &dyn Fn(&mut ChatTemplates)| {
            let mut bad = good.clone();
            change(&mut bad);
            bad.problem().unwrap()
        };
        assert!(problem(&|bad| bad.templates.clear()).contains("0 templates"));
        let long = "x".repeat(TEMPLATE_BYTES_MAX + 1);
        let words = problem(&|bad| _ = bad.templates.insert("long".into(), long.clone()));
        assert!(words.contains("bytes of templates"), "{words}");
        let words = problem(&|bad| {
            bad.templates.extend((0..17).map(|i| (format!("t{i}"), String::new())));
        });
        assert!(words.starts_with("18 templates"), "{words}");
        let words = problem(&|bad| {
            bad.tokens.extend((0..17).map(|i| (format!("t{i}"), String::new())));
        });
        assert!(words.starts_with("17 tokens"), "{words}");
        for name in ["", "a b", "a\n", &"n".repeat(65)] {
            let words = problem(&|bad| _ = bad.tokens.insert(name.into(), "<s>".into()));
            assert!(words.ends_with("not a plain name"), "{words}");
        }
        let words = problem(&|bad| _ = bad.tokens.insert("bos_token".into(), "b".repeat(257)));
        assert!(words.starts_with("bos_token"), "{words}");
    }
}
