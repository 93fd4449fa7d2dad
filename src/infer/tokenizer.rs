//! Text to token ids and back, using a Hugging Face `tokenizer.json`.
//!
//! Owns the end-of-text ids and streaming. Text is emitted only in whole characters, and is exactly
//! what the whole sequence would decode to.

use std::ops::Deref;
use std::sync::Arc;

use super::grammar::{Constraint, Grammar, GrammarError, Grammars};

/// The longest prompt, in bytes. A model's context is far smaller.
pub const PROMPT_BYTES_MAX: usize = 16 << 20;

/// Over how many tokens a character may be spread before its bytes are emitted as they are (a UTF-8
/// character has at most four).
const HELD_TOKENS_MAX: usize = 16;
/// Bytes of a UTF-8 character.
const CHARACTER_BYTES_MAX: usize = 4;

/// Why text could not be tokenized, or tokens could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    #[error("tokenizer.json is not usable: {0}")]
    File(String),
    #[error("the text could not be tokenized: {0}")]
    Encode(String),
    #[error("the tokens could not be decoded: {0}")]
    Decode(String),
    #[error("the text is {0} bytes long, more than {PROMPT_BYTES_MAX}")]
    TooLong(usize),
}

/// A tokenizer, and the ids that end a text.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: Vec<u32>,
    /// What answers are held to, compiled for it.
    grammars: Arc<Grammars>,
}

fn line(error: &dyn std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Tokenizer {
    /// Reads the bytes of a `tokenizer.json`; `eos` are the ids that end a text.
    ///
    /// The file's `truncation` and `padding` are meant for batches of training text. They would
    /// clip or pad prompts, so they are reset, as Transformers does.
    pub fn from_bytes(bytes: &[u8], eos: Vec<u32>) -> Result<Self, TokenizerError> {
        let unusable = |error: tokenizers::Error| TokenizerError::File(line(&error));
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(unusable)?;
        inner.with_truncation(None).map_err(unusable)?;
        inner.with_padding(None);
        Ok(Self { inner, eos, grammars: Arc::default() })
    }

    /// Ids of the text, including special tokens that the tokenizer puts around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if text.len() > PROMPT_BYTES_MAX {
            return Err(TokenizerError::TooLong(text.len()));
        }
        let encoding = self.inner.encode(text, true);
        let encoding = encoding.map_err(|error| TokenizerError::Encode(line(&error)))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// As [`Self::encode`], with at most this many tokens: the text loses its end, the special tokens
    /// stay. Also returns how many tokens were lost.
    pub fn encode_within(
        &self,
        text: &str,
        most: usize,
    ) -> Result<(Vec<u32>, usize), TokenizerError> {
        let ids = self.encode(text)?;
        if ids.len() <= most {
            return Ok((ids, 0));
        }
        let wrong = |error: tokenizers::Error| TokenizerError::Encode(line(&error));
        let mut bare = self.inner.encode(text, false).map_err(wrong)?;
        let special = ids.len() - bare.len().min(ids.len());
        let cut = ids.len() - most;
        let kept = most.saturating_sub(special);
        bare.truncate(kept, 0, tokenizers::TruncationDirection::Right);
        let whole = self.inner.post_process(bare, None, true).map_err(wrong)?;
        Ok((whole.get_ids().to_vec(), cut))
    }

    /// The special tokens that the tokenizer puts before every text. For most models this is the
    /// beginning-of-sequence token or nothing.
    pub fn prefix(&self) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode("a", true);
        let encoding = encoding.map_err(|error| TokenizerError::Encode(line(&error)))?;
        let special = encoding.get_special_tokens_mask().iter().take_while(|mask| **mask == 1);
        Ok(encoding.get_ids()[..special.count()].to_vec())
    }

    /// Ids of the text only, without special tokens around it.
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if text.len() > PROMPT_BYTES_MAX {
            return Err(TokenizerError::TooLong(text.len()));
        }
        let encoding = self.inner.encode(text, false);
        let encoding = encoding.map_err(|error| TokenizerError::Encode(line(&error)))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of the ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(ids, true).map_err(|error| TokenizerError::Decode(line(&error)))
    }

    /// The number of tokens in the vocabulary, including added ones.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token that is exactly this text, special ones included.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The constraint, compiled for texts that one of `ends` may end.
    ///
    /// # Errors
    /// If it is out of bounds, wrong or not understood, or this tokenizer's tokens have no bytes of
    /// their own.
    pub fn grammar(&self, constraint: &Constraint, ends: &[u32]) -> Result<Grammar, GrammarError> {
        self.grammars.compile(self, constraint, ends)
    }

    #[cfg(test)]
    pub(super) fn grammars(&self) -> &Grammars {
        &self.grammars
    }

    pub(super) const fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    pub fn is_eos(&self, id: u32) -> bool {
        self.eos.contains(&id)
    }

    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// A stream of text, token by token, that continues `context` (a prompt's tokens, whose text it
    /// does not repeat).
    pub fn stream(&self, context: &[u32]) -> TextStream<&Self> {
        TextStream::new(self, context)
    }
}

/// Turns tokens into text as they arrive.
///
/// A token's text may depend on the one before it (a leading space) and its bytes may be part of a
/// character. So each step decodes a short window twice, without and with the new token, and emits
/// the difference. The window begins where a character does: some decoders replace a whole run of bytes if
/// its first ones are missing. Ids that the tokenizer does not know (padding of the vocabulary) have no text.
#[derive(Debug)]
pub struct TextStream<T> {
    tokenizer: T,
    /// The last tokens whose text was emitted, then those still held back.
    window: Vec<u32>,
    /// How many tokens of the window were emitted.
    given: usize,
    /// After how many tokens of the window a character ends.
    ends: Vec<usize>,
}

impl<T: Deref<Target = Tokenizer>> TextStream<T> {
    /// A stream that continues `context`, as [`Tokenizer::stream`].
    pub fn new(tokenizer: T, context: &[u32]) -> Self {
        // The character of which the last of them is part began a few tokens before.
        let keeps = HELD_TOKENS_MAX..HELD_TOKENS_MAX + CHARACTER_BYTES_MAX;
        let tail = |keep: usize| &context[context.len() - keep.min(context.len())..];
        let is_whole = |keep: &usize| {
            tokenizer.decode(tail(*keep)).is_ok_and(|text| !text.contains('\u{fffd}'))
        };
        let keep = keeps.into_iter().find(is_whole).unwrap_or(HELD_TOKENS_MAX);
        let window = tail(keep).to_vec();
        let given = window.len();
        Self { tokenizer, window, given, ends: vec![given] }
    }

    /// The text that this token completes, possibly empty.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.window.push(id);
        self.give_out(self.window.len() - self.given >= HELD_TOKENS_MAX)
    }

    /// What is still held back: bytes that never became a character, as U+FFFD.
    pub fn finish(mut self) -> Result<String, TokenizerError> {
        self.give_out(true)
    }

    fn give_out(&mut self, whatever: bool) -> Result<String, TokenizerError> {
        let before = self.tokenizer.decode(&self.window[..self.given])?;
        let after = self.tokenizer.decode(&self.window)?;
        if after.ends_with('\u{fffd}') && !whatever {
            return Ok(String::new());
        }
        let text = match after.strip_prefix(&before) {
            Some(text) => text.to_owned(),
            // Bytes that looked like a character turned out not to be one. Emitted text cannot be
            // taken back.
            None => after.chars().skip(before.chars().count()).collect(),
        };
        if !after.ends_with('\u{fffd}') {
            self.ends.push(self.window.len());
        }
        let most = self.window.len().saturating_sub(HELD_TOKENS_MAX);
        let at_end = self.ends.iter().copied().filter(|end| *end <= most).max();
        // Without characters for long there is nothing to begin with.
        let too_long = self.window.len() > 3 * HELD_TOKENS_MAX;
        let cut = at_end.unwrap_or(if too_long { most } else { 0 });
        self.window.drain(..cut);
        self.ends.retain(|end| *end > cut);
        self.ends.iter_mut().for_each(|end| *end -= cut);
        self.given = self.window.len();
        Ok(text)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use serde_json::json;

    use super::*;

    /// One token per byte, spelled as GPT-2 does, and one special token; no merges.
    pub(crate) fn bytes_tokenizer() -> Tokenizer {
        let spelled: Vec<u32> = (33..=126).chain(161..=172).chain(174..=255).collect();
        let mut vocab = serde_json::Map::new();
        let mut next = 256;
        for byte in 0..256_u32 {
            let code = if spelled.contains(&byte) { byte } else { next };
            next += u32::from(code >= 256);
            vocab.insert(char::from_u32(code).unwrap().to_string(), json!(byte));
        }
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [{ "id": 256, "content": "<end>", "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false, "special": true }],
            "normalizer": null, "post_processor": null,
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": true },
            "decoder": { "type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": true },
            "model": { "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
        });
        Tokenizer::from_bytes(file.to_string().as_bytes(), vec![256]).unwrap()
    }

    /// SentencePiece's form: `<0xNN>` for bytes, U+2581 for a space, a stripped first space.
    pub(crate) fn fallback_tokenizer() -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        for byte in 0..256 {
            vocab.insert(format!("<0x{byte:02X}>"), json!(byte));
        }
        for (i, word) in ["\u{2581}call", "\u{2581}me", "\u{2581}", "x"].iter().enumerate() {
            vocab.insert((*word).to_string(), json!(256 + i));
        }
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
                { "type": "ByteFallback" }, { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
            "model": { "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": true, "vocab": vocab, "merges": [] },
        });
        Tokenizer::from_bytes(file.to_string().as_bytes(), vec![]).unwrap()
    }

    #[test]
    fn limits_in_the_file_neither_clip_nor_pad_a_prompt() {
        let file = include_bytes!("../../models/tiny-mixtral-q4_k_m/tokenizer.json");
        let mut limited: serde_json::Value = serde_json::from_slice(file).unwrap();
        limited["truncation"] = json!({
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
        });
        limited["padding"] = json!({
            "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
        });
        let plain = Tokenizer::from_bytes(file, vec![]).unwrap();
        let limited = Tokenizer::from_bytes(limited.to_string().as_bytes(), vec![]).unwrap();
        let text = "Once upon a time there was a whale";
        let ids = plain.encode(text).unwrap();
        assert!((4..60).contains(&ids.len()), "{ids:?}");
        assert_eq!(limited.encode(text).unwrap(), ids);
    }

    fn streamed(tokenizer: &Tokenizer, context: &[u32], ids: &[u32]) -> (String, Vec<String>) {
        let mut stream = tokenizer.stream(context);
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        (pieces.concat(), pieces)
    }

    #[test]
    fn characters_are_given_out_whole() {
        let tokenizer = bytes_tokenizer();
        let text = "na\u{ef}ve \u{2014} \u{1f433} ok";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(ids.len(), text.len(), "a token a byte");
        let (all, pieces) = streamed(&tokenizer, &[], &ids);
        assert_eq!(all, text);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        assert_eq!(pieces.iter().filter(|piece| piece.is_empty()).count(), 1 + 2 + 3 + 1);
    }

    #[test]
    fn random_texts_stream_as_they_decode_after_any_context() {
        let tokenizer = bytes_tokenizer();
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for _ in 0..200 {
            let length = rng.random_range(1..80);
            let text: String = (0..length)
                .map(|_| match rng.random_range(0..4) {
                    0 => rng.random_range('\u{1f300}'..'\u{1f5ff}'),
                    1 => rng.random_range('\u{4e00}'..'\u{9fff}'),
                    2 => ' ',
                    _ => rng.random_range('a'..='z'),
                })
                .collect();
            let ids = tokenizer.encode(&text).unwrap();
            assert_eq!(streamed(&tokenizer, &[], &ids).0, text);
            let cut = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
            let (context, rest) = ids.split_at(cut);
            assert_eq!(streamed(&tokenizer, context, rest).0, text[cut..]);
        }
    }

    #[test]
    fn broken_bytes_come_out_as_replacements_and_end() {
        let tokenizer = bytes_tokenizer();
        let (all, _) = streamed(&tokenizer, &[], &[0xe2, 0x80]);
        assert_eq!(all, "\u{fffd}");
        let (all, pieces) = streamed(&tokenizer, &[], &[0x80; 100]);
        assert_eq!(all.chars().count(), 100);
        assert!(pieces[..40].iter().any(|piece| !piece.is_empty()), "held back for ever");
        let (all, _) = streamed(&tokenizer, &[], &[u32::from(b'a'), 256, 99_999, u32::from(b'b')]);
        assert_eq!(all, "ab", "special and unknown tokens have no text");
    }

    #[test]
    fn byte_fallback_and_leading_spaces_join_right() {
        let tokenizer = fallback_tokenizer();
        let ids = [256, 257, 0xe2, 0x82, 0xac, 258, 259];
        let (all, pieces) = streamed(&tokenizer, &[], &ids);
        assert_eq!(all, "call me\u{20ac} x");
        assert_eq!(all, tokenizer.decode(&ids).unwrap());
        assert_eq!(pieces[2..5], ["", "", "\u{20ac}"]);
        assert_eq!(streamed(&tokenizer, &ids[..1], &ids[1..]).0, " me\u{20ac} x");
        // A character that is not finished takes the bytes before it along.
        let (all, _) = streamed(&tokenizer, &[], &[256, 0xc3, 0xa9, 0xc3, 259]);
        assert!(all.starts_with("call\u{e9}") && all.ends_with('x'), "{all:?}");
    }

    /// A run of bytes that a decoder takes as one: what of it is left out must end with a character.
    #[test]
    fn characters_that_no_token_has_stay_whole_however_many_follow_each_other() {
        let tokenizer = fallback_tokenizer();
        for text in ["\u{1f433}", "\u{20ac}", "\u{e9}", "x\u{1f433}\u{e9}\u{20ac}"] {
            let text = text.repeat(40);
            let ids: Vec<u32> = text.bytes().map(u32::from).collect();
            assert_eq!(streamed(&tokenizer, &[], &ids).0, text);
            for begun in 1..30 {
                let (context, rest) = ids.split_at(text.ceil_char_boundary(begun));
                let want = &text[context.len()..];
                assert_eq!(streamed(&tokenizer, context, rest).0, want, "after {begun}");
            }
        }
    }

    /// The cases that the page's own tokenizer (web/src/engine/tokenizer.ts) must match, checked
    /// for this one, too.
    #[test]
    fn ids_are_those_that_the_page_is_held_to() {
        let file = include_bytes!("../../models/tiny-mixtral-q4_k_m/tokenizer.json");
        let tokenizer = Tokenizer::from_bytes(file, vec![0]).unwrap();
        let listed: Vec<(String, Vec<u32>)> =
            serde_json::from_str(include_str!("../../tests/data/tab/ids.json")).unwrap();
        assert!(listed.len() > 8);
        for (text, ids) in &listed {
            assert_eq!(tokenizer.encode(text).unwrap(), *ids, "{text:?}");
        }
    }

    #[test]
    fn special_tokens_before_a_text_are_told_from_it() {
        let plain = bytes_tokenizer();
        assert_eq!(plain.prefix().unwrap(), [] as [u32; 0]);
        assert_eq!(plain.encode_bare("ab").unwrap(), plain.encode("ab").unwrap());
        let mut file: serde_json::Value =
            serde_json::from_str(&plain.inner.to_string(false).unwrap()).unwrap();
        let special = |id: &str| json!({ "SpecialToken": { "id": id, "type_id": 0 } });
        let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        file["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [special("<end>"), text, special("<end>")],
            "pair": [], "special_tokens": {
                "<end>": { "id": "<end>", "ids": [256], "tokens": ["<end>"] } },
        });
        let around = Tokenizer::from_bytes(file.to_string().as_bytes(), vec![256]).unwrap();
        assert_eq!(around.encode("ab").unwrap(), [256, 97, 98, 256]);
        assert_eq!(around.prefix().unwrap(), [256]);
        assert_eq!(around.encode_bare("ab").unwrap(), [97, 98]);
    }

    #[test]
    fn the_trained_tokenizer_works_and_rubbish_is_refused() {
        for rubbish in [&b""[..], b"{}", b"\xff", b"{\"model\": 3}"] {
            let error = Tokenizer::from_bytes(rubbish, vec![]).unwrap_err().to_string();
            assert!(error.starts_with("tokenizer.json") && error.lines().count() == 1, "{error}");
        }
        assert!(matches!(
            bytes_tokenizer().encode(&"a".repeat(PROMPT_BYTES_MAX + 1)),
            Err(TokenizerError::TooLong(_))
        ));
        let Some(file) = doppler_testing::shared("models/tiny-mixtral/tokenizer.json") else {
            return;
        };
        let bytes = std::fs::read(file).unwrap();
        let tokenizer = Tokenizer::from_bytes(&bytes, vec![0]).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.is_eos(0)), (4096, true));
        for text in ["ROMEO:\nBut soft", "Once upon a time, \u{201c}said\u{201d} \u{2014} \u{e9}"] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            assert_eq!(streamed(&tokenizer, &[], &ids).0, text);
        }
    }
}
