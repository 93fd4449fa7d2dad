//! How byte-level tokenizers cut text into words before they merge: `tokenizer.ggml.pre`.
//!
//! The patterns are those of the makers' `tokenizer.json`; llama.cpp has the same in
//! `llama_vocab::impl::load` and `llm_tokenizer_bpe`. A kind that is not listed is refused by name:
//! with another pattern a model reads other tokens than it was trained on.

/// How a kind of tokenizer prepares text.
#[derive(Debug, Clone, Copy)]
pub struct Words {
    kinds: &'static [&'static str],
    /// Applied one after the other. What matches is a word, and so is what lies between.
    pub patterns: &'static [&'static str],
    /// A word that is a token is taken whole, whatever the merges say.
    pub whole_words: bool,
    /// A text begins with the BOS token unless the file says otherwise.
    pub begins: bool,
    /// Text is put into the composed form (NFC) first.
    pub composed: bool,
}

pub const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: Words =
    Words { kinds: &[], patterns: &[], whole_words: false, begins: false, composed: false };

const WORDS: &[Words] = &[
    Words {
        kinds: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        patterns: &[LLAMA3],
        whole_words: true,
        begins: true,
        ..PLAIN
    },
    Words { kinds: &["smaug-bpe", "dbrx", "glm4", "chatglm-bpe"], patterns: &[LLAMA3], ..PLAIN },
    Words { kinds: &["qwen2", "deepseek-r1-qwen"], patterns: &[QWEN2], composed: true, ..PLAIN },
    Words {
        kinds: &["smollm", "starcoder", "refact", "command-r"],
        patterns: &[r"\p{N}", GPT2],
        ..PLAIN
    },
    Words { kinds: &["gpt-2", "phi-2", "olmo", "mpt"], patterns: &[GPT2], ..PLAIN },
    Words { kinds: &["gpt-4o", "minimax-m2"], patterns: &[O200K], ..PLAIN },
    Words { kinds: &["tekken"], patterns: &[TEKKEN], whole_words: true, begins: true, ..PLAIN },
];

/// The `tokenizer.ggml.pre` that cuts text with these patterns. `None` if llama.cpp has none.
pub fn kind(patterns: &[&str], whole_words: bool, composed: bool) -> Option<&'static str> {
    let same = |words: &&Words| {
        words.patterns == patterns && words.whole_words == whole_words && words.composed == composed
    };
    WORDS.iter().find(same).map(|words| words.kinds[0])
}

/// How text is cut for this `tokenizer.ggml.pre`.
///
/// # Errors
/// If it is not known.
pub fn of(pre: &str) -> Result<Words, String> {
    let found = WORDS.iter().find(|words| words.kinds.contains(&pre));
    found.copied().ok_or_else(|| {
        let known: Vec<&str> = WORDS.iter().flat_map(|words| words.kinds.iter().copied()).collect();
        format!("tokenizer.ggml.pre {pre:?} is unknown (known: {})", known.join(", "))
    })
}

/// The character that stands for each byte in byte-level tokens (GPT-2's `bytes_to_unicode`).
pub fn byte_symbols() -> [char; 256] {
    let mut next = 256;
    std::array::from_fn(|byte| {
        let byte = byte as u32;
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if printable { byte } else { next };
        next += u32::from(!printable);
        char::from_u32(code).expect("below 512")
    })
}
