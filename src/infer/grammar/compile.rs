//! From a constraint to a [`Grammar`], within bounds.
//!
//! What is asked for comes from strangers: its bytes and depth are bounded before anything is parsed, the
//! compiler and the parser have fuel and limited tables, and both run on a stack of their own. Compiled
//! grammars are kept, the last used at the end.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::{Constraint, Grammar, GrammarError, place, vocabulary};
use crate::tokenizer::Tokenizer;

/// The longest schema (as compact JSON), expression or grammar, in bytes.
pub const CONSTRAINT_BYTES_MAX: usize = 256 * 1024;
/// How deep its brackets may be nested.
pub const DEPTH_MAX: usize = 128;
/// The most states of a grammar's lexer, of 1 to 2 KB each.
pub const COMPILE_STATES_MAX: usize = 20_000;
/// The most compiled grammars that a tokenizer keeps.
pub const KEPT_MAX: usize = 8;
/// The most symbols in a grammar's productions.
const SYMBOLS_MAX: usize = 200_000;
/// The stack of a compilation; the depth is bounded.
const STACK_BYTES: usize = 64 << 20;
/// White space between the parts of JSON. Without a bound a model could go on with it for ever.
const SPACE: &str = r"[\x20\x0A\x0D\x09]{1,64}";
/// The longest reason that is passed on, in characters.
const WHY_CHARS_MAX: usize = 400;

/// Compiles for one tokenizer.
#[derive(Default)]
pub struct Grammars {
    /// Made for the first constraint: it takes a while for a large vocabulary.
    tools: OnceLock<Result<Tools, GrammarError>>,
    kept: Mutex<Vec<(Constraint, Arc<Mutex<Matcher>>)>>,
}

struct Tools {
    factory: ParserFactory,
    /// The size of the vocabulary.
    count: usize,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Tools {
    fn of(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let trie = vocabulary::trie(tokenizer)?;
        let count = trie.tok_trie().vocab_size() - 1;
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&trie, InferenceCapabilities::default(), &slices);
        let mut factory =
            factory.map_err(|error| GrammarError::Decoder(one_line(&error.to_string())))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: COMPILE_STATES_MAX,
            max_grammar_size: SYMBOLS_MAX,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory, count })
    }

    fn matcher(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let parser = self.factory.create_parser(grammar);
        let mut matcher = Matcher::new(Ok(parser.map_err(|error| one_line(&error.to_string()))?));
        // What allows no first token is refused now, not in the middle of a generation.
        match matcher.compute_mask_or_eos() {
            Ok(mask) if mask.num_set() == 0 => Err("no text has this form".to_owned()),
            Ok(_) => Ok(matcher),
            Err(error) => Err(one_line(&error.to_string())),
        }
    }

    fn compile(&self, constraint: &Constraint) -> Result<Matcher, GrammarError> {
        let what = constraint.name();
        let refused = |place, why| GrammarError::Refused { what, place, why };
        match constraint {
            Constraint::JsonSchema(schema) => {
                let grammar = TopLevelGrammar::from_json_schema(with_options(schema));
                self.matcher(grammar).map_err(|why| {
                    let again = |part: &Value| {
                        let part = TopLevelGrammar::from_json_schema(with_options(part));
                        self.matcher(part).err()
                    };
                    refused(format!(" at {}", shown(&place::find(schema, &why, again))), why)
                })
            }
            Constraint::Regex(regex) => {
                let matcher = self.matcher(TopLevelGrammar::from_regex(regex));
                matcher.map_err(|why| refused(String::new(), why))
            }
            Constraint::Lark(lark) => {
                let matcher = self.matcher(TopLevelGrammar::from_lark(lark.clone()));
                matcher.map_err(|why| refused(String::new(), why))
            }
        }
    }
}

impl Grammars {
    /// # Errors
    /// If the constraint is out of bounds, wrong or not understood, or the tokenizer cannot be used.
    pub fn compile(
        &self,
        tokenizer: &Tokenizer,
        constraint: &Constraint,
        ends: &[u32],
    ) -> Result<Grammar, GrammarError> {
        check_bounds(constraint)?;
        let kept = self.take_kept(constraint);
        let work = || -> Result<_, GrammarError> {
            let tools = self.tools.get_or_init(|| Tools::of(tokenizer));
            let tools = tools.as_ref().map_err(Clone::clone)?;
            let fresh = match kept {
                Some(fresh) => fresh,
                None => Arc::new(Mutex::new(tools.compile(constraint)?)),
            };
            Ok((fresh, tools.count))
        };
        let (fresh, count) = std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().name("grammar".to_owned());
            let failed = GrammarError::Failed(constraint.name());
            match builder.stack_size(STACK_BYTES).spawn_scoped(scope, work) {
                Ok(thread) => thread.join().unwrap_or(Err(failed)),
                Err(_) => Err(failed),
            }
        })?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(other, _)| other != constraint);
        if kept.len() == KEPT_MAX {
            kept.remove(0);
        }
        kept.push((constraint.clone(), fresh.clone()));
        Ok(Grammar { fresh, count, ends: ends.into() })
    }

    fn take_kept(&self, constraint: &Constraint) -> Option<Arc<Mutex<Matcher>>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|(other, _)| other == constraint).map(|(_, fresh)| fresh.clone())
    }

    /// How many compiled grammars are kept.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// The schema as the compiler takes it: with our choices, and none of whoever wrote it.
pub(super) fn with_options(schema: &Value) -> Value {
    let mut schema = match schema {
        // A schema may be true or false.
        Value::Bool(true) => json!({}),
        other => other.clone(),
    };
    if let Some(object) = schema.as_object_mut() {
        object.insert("x-guidance".to_owned(), json!({ "whitespace_pattern": SPACE }));
    }
    schema
}

/// The right side of a rule of a grammar: JSON that fits this schema.
pub fn rule(schema: &Value) -> String {
    format!("%json {}", with_options(schema))
}

/// # Errors
/// If it is too long or too deep.
fn check_bounds(constraint: &Constraint) -> Result<(), GrammarError> {
    let what = constraint.name();
    let json;
    let text = match constraint {
        Constraint::JsonSchema(schema) => {
            json = schema.to_string();
            &json
        }
        Constraint::Regex(text) | Constraint::Lark(text) => text,
    };
    if text.len() > CONSTRAINT_BYTES_MAX {
        return Err(GrammarError::Long { what, bytes: text.len() });
    }
    // Brackets in texts count, too: what is balanced there is not deep.
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    match deepest > DEPTH_MAX {
        true => Err(GrammarError::Deep { what }),
        false => Ok(()),
    }
}

fn shown(place: &str) -> &str {
    if place.is_empty() { "its root" } else { place }
}

/// A message of the compiler on one line, without what it says of its own state.
pub(super) fn one_line(message: &str) -> String {
    let message = message.split("<state>").next().unwrap_or_default();
    let message = message.replace("<non-verbose/>", "");
    let words: Vec<&str> = message.split_whitespace().collect();
    words.join(" ").chars().take(WHY_CHARS_MAX).collect()
}
