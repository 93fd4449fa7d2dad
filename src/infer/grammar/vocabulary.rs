//! The bytes that each token of a tokenizer stands for, as a trie.
//!
//! A token's bytes are those that the tokenizer's decoder makes of it in the middle of a text. Special
//! tokens have no text, so no grammar ever allows them; in the trie they stand behind a byte that UTF-8
//! does not have. One more token, which no model has, stands for the end of the text ([`end`]).
//!
//! Refuses decoders whose bytes depend on a token's neighbours (WordPiece) or that are not known.

use std::collections::HashMap;
use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use serde_json::Value;

use super::GrammarError;
use crate::load::gguf::words::byte_symbols;
use crate::tokenizer::Tokenizer;

/// The most tokens of a vocabulary.
const TOKENS_MAX: usize = 1 << 20;
/// The longest token that a constrained text may use, in bytes. The trie is at most this deep.
const TOKEN_BYTES_MAX: usize = 1000;

/// How a decoder makes bytes of tokens.
#[derive(Debug, Default)]
struct Spelling {
    /// Each character stands for a byte, as GPT-2 has it.
    byte_level: bool,
    /// What stands for a space.
    space: Option<String>,
    /// `<0xNN>` is a byte.
    byte_fallback: bool,
    plain: bool,
}

impl Spelling {
    fn of(decoder: &Value) -> Result<Self, GrammarError> {
        let mut spelling = Self::default();
        let single = std::slice::from_ref(decoder);
        let steps = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array().map_or(&[][..], Vec::as_slice),
            _ => single,
        };
        for step in steps {
            match step["type"].as_str() {
                Some("ByteLevel") => spelling.byte_level = true,
                Some("ByteFallback") => spelling.byte_fallback = true,
                Some("Metaspace") => {
                    spelling.space = step["replacement"].as_str().map(str::to_owned);
                }
                Some("Replace") if step["content"] == " " => {
                    spelling.space = step["pattern"]["String"].as_str().map(str::to_owned);
                }
                // Tokens are joined as they are.
                Some("Fuse") => spelling.plain = true,
                // It takes the space away that a text begins with.
                Some("Strip") => {}
                other => {
                    let name = other.unwrap_or("none").to_owned();
                    return Err(GrammarError::Decoder(name));
                }
            }
        }
        let Self { byte_level, plain, space, .. } = &spelling;
        match *byte_level || *plain || space.is_some() {
            true => Ok(spelling),
            false => Err(GrammarError::Decoder("none".to_owned())),
        }
    }

    fn bytes(&self, token: &str, symbols: &HashMap<char, u8>) -> Vec<u8> {
        if self.byte_level {
            let bytes = token.chars().map(|symbol| symbols.get(&symbol).copied());
            return bytes.collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec());
        }
        if self.byte_fallback && token.len() == 6 {
            let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            if let Some(byte) = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                return vec![byte];
            }
        }
        match &self.space {
            Some(space) => token.replace(space.as_str(), " ").into_bytes(),
            None => token.as_bytes().to_vec(),
        }
    }
}

/// The bytes of each token by its id. Empty for special tokens and for ids without a token.
///
/// # Errors
/// If the tokenizer's decoder is not known, or it has too many tokens.
pub(super) fn token_bytes(tokenizer: &Tokenizer) -> Result<Vec<Vec<u8>>, GrammarError> {
    let inner = tokenizer.inner();
    let decoder = serde_json::to_value(inner.get_decoder());
    let spelling = Spelling::of(&decoder.unwrap_or(Value::Null))?;
    let vocabulary = inner.get_vocab(true);
    let count = vocabulary.values().max().map_or(0, |most| *most as usize + 1);
    if count > TOKENS_MAX {
        return Err(GrammarError::Vocabulary(count));
    }
    let symbols: HashMap<char, u8> = byte_symbols().into_iter().zip(0..=u8::MAX).collect();
    let added = inner.get_added_tokens_decoder();
    let mut all = vec![Vec::new(); count];
    for (token, id) in &vocabulary {
        if added.get(id).is_some_and(|added| added.special) {
            continue;
        }
        let bytes = spelling.bytes(token, &symbols);
        if bytes.len() <= TOKEN_BYTES_MAX {
            all[*id as usize] = bytes;
        }
    }
    Ok(all)
}

/// The token that stands for the end of a text: the one behind a vocabulary of `count` tokens.
pub(super) const fn end(count: usize) -> u32 {
    count as u32
}

/// The tokenizer's tokens as grammars see them, with the [`end`] of a text behind them.
///
/// # Errors
/// As [`token_bytes`].
pub(super) fn trie(tokenizer: &Tokenizer) -> Result<TokEnv, GrammarError> {
    let mut words = token_bytes(tokenizer)?;
    let end = end(words.len());
    let marked = |name: &str| {
        let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
        word.extend_from_slice(name.as_bytes());
        word
    };
    for (id, added) in tokenizer.inner().get_added_tokens_decoder() {
        // A grammar may name a special token: it is written <...> there.
        if added.special && added.content.len() < TOKEN_BYTES_MAX {
            words[id as usize] = marked(&added.content);
        }
    }
    words.push(marked("<doppler end of text>"));
    let info = TokRxInfo::new(end + 1, end);
    Ok(Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words))))
}
