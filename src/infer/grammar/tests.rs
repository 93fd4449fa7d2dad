//! Random schemas against random likelihoods: whatever a model wants, its text has the form.

use std::time::Instant;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use super::*;
use crate::extras::Extras;
use crate::sampler::{Sampler, SamplerOptions};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::tests::{bytes_tokenizer, fallback_tokenizer};

/// More tokens than any text of a random schema has.
const TOKENS_MAX: usize = 60_000;

fn embedded() -> Tokenizer {
    let file = include_bytes!("../../../models/tiny-mixtral-q4_k_m/tokenizer.json");
    Tokenizer::from_bytes(file, vec![0]).unwrap()
}

/// Byte level, SentencePiece's byte fallback, and a trained vocabulary; each with its end token.
fn tokenizers() -> [(Tokenizer, u32); 3] {
    [(bytes_tokenizer(), 256), (fallback_tokenizer(), 260), (embedded(), 0)]
}

fn any_schema(rng: &mut StdRng, depth: usize) -> Value {
    let kinds = if depth == 0 { 6 } else { 9 };
    match rng.random_range(0..kinds) {
        0 => json!({ "type": "boolean" }),
        1 => json!({ "type": "null" }),
        2 => {
            let low = rng.random_range(-300..300);
            json!({ "type": "integer", "minimum": low, "maximum": low + rng.random_range(0..400) })
        }
        3 => json!({ "type": "string", "maxLength": rng.random_range(0..7) }),
        4 => json!({ "enum": ["red", "gr\u{fc}n", "\"", 7, null] }),
        5 => json!({ "const": { "a": [1, "\u{1f433}"] } }),
        6 => {
            let least = rng.random_range(0..3);
            let most = least + rng.random_range(0..3);
            let items = any_schema(rng, depth - 1);
            json!({ "type": "array", "items": items, "minItems": least, "maxItems": most })
        }
        7 => {
            let names = ["a", "b c", "\u{e9}", "\""];
            let count = rng.random_range(0..=names.len());
            let (mut properties, mut required) = (serde_json::Map::new(), Vec::new());
            for name in &names[..count] {
                properties.insert((*name).to_owned(), any_schema(rng, depth - 1));
                if rng.random_range(0..2) == 0 {
                    required.push(*name);
                }
            }
            json!({ "type": "object", "properties": properties, "required": required,
                    "additionalProperties": false })
        }
        _ => json!({ "anyOf": [any_schema(rng, depth - 1), any_schema(rng, depth - 1)] }),
    }
}

/// Whether a value fits a schema of [`any_schema`].
fn fits(schema: &Value, value: &Value) -> bool {
    if let Some(one) = schema.get("const") {
        return value == one;
    }
    if let Some(all) = schema["enum"].as_array() {
        return all.contains(value);
    }
    if let Some(any) = schema["anyOf"].as_array() {
        return any.iter().any(|schema| fits(schema, value));
    }
    let number = |key: &str| schema[key].as_i64().unwrap();
    match schema["type"].as_str().unwrap() {
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "integer" => {
            // JSON's -0 is read as a float.
            let whole = value.as_i64().or_else(|| (value.as_f64() == Some(0.0)).then_some(0));
            whole.is_some_and(|value| (number("minimum")..=number("maximum")).contains(&value))
        }
        "string" => {
            value.as_str().is_some_and(|text| text.chars().count() as i64 <= number("maxLength"))
        }
        "array" => value.as_array().is_some_and(|list| {
            (number("minItems")..=number("maxItems")).contains(&(list.len() as i64))
                && list.iter().all(|value| fits(&schema["items"], value))
        }),
        _ => value.as_object().is_some_and(|object| {
            let properties = schema["properties"].as_object().unwrap();
            let required = schema["required"].as_array().unwrap();
            required.iter().all(|name| object.contains_key(name.as_str().unwrap()))
                && object.iter().all(|(name, value)| {
                    properties.get(name).is_some_and(|schema| fits(schema, value))
                })
        }),
    }
}

fn sampler(tokenizer: &Tokenizer, constraint: &Constraint, end: u32, seed: u64) -> Sampler {
    let grammar = Some(tokenizer.grammar(constraint, &[end]).unwrap());
    let options = SamplerOptions { temperature: 1.0, seed, ..SamplerOptions::default() };
    Sampler::with(options, Extras { grammar, ..Extras::default() }).unwrap()
}

/// A model that wants anything: the text that it writes, and whether that came to an end.
fn written(
    tokenizer: &Tokenizer,
    sampler: &mut Sampler,
    end: u32,
    rng: &mut StdRng,
    most: usize,
) -> (String, bool) {
    let bytes = vocabulary::token_bytes(tokenizer).unwrap();
    // More logits than tokens, as padded vocabularies have.
    let mut logits = vec![0.0_f32; tokenizer.vocab_size() + 40];
    let mut text = Vec::new();
    let mut ended = false;
    for _ in 0..most {
        logits.iter_mut().for_each(|logit| *logit = rng.random_range(-3.0..3.0));
        let token = sampler.sample(&logits);
        sampler.accept(token);
        if token != end {
            text.extend_from_slice(&bytes[token as usize]);
        }
        match sampler.progress().unwrap() {
            Progress::Open => {}
            Progress::Complete => {
                ended = true;
                break;
            }
            Progress::Failed(why) => panic!("{why}"),
        }
    }
    (String::from_utf8(text).unwrap(), ended)
}

fn seed() -> u64 {
    let given = std::env::var("DOPPLER_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(rand::random);
    println!("seed {seed}");
    seed
}

#[test]
fn whatever_a_model_wants_its_text_fits_a_random_schema() {
    let mut rng = StdRng::seed_from_u64(seed());
    for (tokenizer, end) in tokenizers() {
        for _ in 0..20 {
            let schema = any_schema(&mut rng, 2);
            let constraint = Constraint::JsonSchema(schema.clone());
            let mut sampler = sampler(&tokenizer, &constraint, end, rng.random());
            let (text, ended) = written(&tokenizer, &mut sampler, end, &mut rng, TOKENS_MAX);
            assert!(ended, "{schema}: {text}");
            let value: Value = serde_json::from_str(&text)
                .unwrap_or_else(|error| panic!("{schema}: {error}: {text:?}"));
            assert!(fits(&schema, &value), "{schema}: {text}");
        }
    }
}

#[test]
fn a_text_that_is_rewound_goes_on_as_if_the_rest_had_never_been() {
    let tokenizer = embedded();
    let constraint = Constraint::JsonSchema(json!({
        "type": "object", "additionalProperties": false, "required": ["a", "b"],
        "properties": { "a": { "type": "string", "maxLength": 40 }, "b": { "type": "integer" } },
    }));
    let logits: Vec<Vec<f32>> = (0..30_u32)
        .map(|step| {
            let mut rng = StdRng::seed_from_u64(u64::from(step));
            (0..tokenizer.vocab_size()).map(|_| rng.random_range(-3.0..3.0)).collect()
        })
        .collect();
    let mut sampler = sampler(&tokenizer, &constraint, 0, 7);
    for token in [5, 6, 7] {
        sampler.accept(token);
    }
    let go_on = |sampler: &mut Sampler, from: usize, to: usize| -> Vec<u32> {
        let one = |logits: &Vec<f32>| {
            let token = sampler.sample(logits);
            sampler.accept(token);
            token
        };
        logits[from..to].iter().map(one).collect()
    };
    let all = go_on(&mut sampler, 0, 12);
    for back in [1, 4, 12] {
        sampler.rewind(3 + 12 - back);
        assert_eq!(go_on(&mut sampler, 12 - back, 12), all[12 - back..], "{back} back");
    }
    // Another text than the one before.
    let mut fork = sampler.clone();
    assert_eq!(go_on(&mut fork, 12, 14), go_on(&mut sampler, 12, 14));
    assert_eq!(sampler.progress(), Some(Progress::Open));
}

#[test]
fn expressions_and_grammars_hold_a_text_and_say_when_it_is_complete() {
    let mut rng = StdRng::seed_from_u64(seed());
    for (tokenizer, end) in tokenizers() {
        for (constraint, good) in [
            (
                Constraint::Regex("(ab|\u{e9}){2}[0-9]".to_owned()),
                &["abab", "ab\u{e9}", "\u{e9}ab"][..],
            ),
            (
                Constraint::Lark("start: \"x\" pair\npair: /[ab]+/ \"!\"".to_owned()),
                &["xa", "xb"][..],
            ),
        ] {
            let mut sampler = sampler(&tokenizer, &constraint, end, rng.random());
            let (text, ended) = written(&tokenizer, &mut sampler, end, &mut rng, 4000);
            let begins =
                good.iter().any(|good| text.starts_with(good)) || text.starts_with("\u{e9}\u{e9}");
            assert!(ended && begins, "{constraint:?}: {text:?}");
        }
    }
}

#[test]
fn a_text_that_may_end_can_be_ended_by_the_model_only_there() {
    let tokenizer = embedded();
    let constraint = Constraint::Regex("(ab)+".to_owned());
    let mut sampler = sampler(&tokenizer, &constraint, 0, 0);
    let mut logits = vec![0.0_f32; tokenizer.vocab_size()];
    // It wants nothing more than to end.
    logits[0] = 100.0;
    let mut ids = Vec::new();
    while sampler.progress() == Some(Progress::Open) {
        let token = sampler.sample(&logits);
        sampler.accept(token);
        ids.push(token);
    }
    assert_eq!(ids.pop(), Some(0));
    let text = tokenizer.decode(&ids).unwrap();
    assert!(!text.is_empty() && text.replace("ab", "").is_empty(), "{text:?}");
}

/// What the stream gives out is what the grammar was told of each token.
#[test]
fn the_bytes_of_tokens_are_those_of_the_text() {
    let mut rng = StdRng::seed_from_u64(seed());
    for (tokenizer, _) in tokenizers() {
        let bytes = vocabulary::token_bytes(&tokenizer).unwrap();
        assert!(bytes.iter().filter(|bytes| bytes.is_empty()).count() <= 1, "only special tokens");
        let context = tokenizer.encode_bare("x").unwrap();
        for _ in 0..200 {
            let ids: Vec<u32> = (0..rng.random_range(1..30))
                .map(|_| rng.random_range(0..bytes.len() as u32))
                .collect();
            let all: Vec<u8> = ids.iter().flat_map(|id| bytes[*id as usize].clone()).collect();
            // What is no text at all is replaced in more than one way.
            let Ok(want) = String::from_utf8(all) else { continue };
            let mut stream = tokenizer.stream(&context);
            let mut text: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
            text += &stream.finish().unwrap();
            assert_eq!(text, want, "{ids:?}");
        }
    }
}

fn refusal(constraint: &Constraint) -> String {
    embedded().grammar(constraint, &[0]).unwrap_err().to_string()
}

#[test]
fn what_is_refused_says_where_and_why() {
    let nested = json!({ "type": "object", "properties": {
        "fine": { "type": "integer" },
        "a/b": { "type": "array", "items": { "anyOf": [{ "type": "null" }, { "type": "colour" }] } } } });
    let said = refusal(&Constraint::JsonSchema(nested));
    assert!(
        said.contains("at /properties/a~1b/items/anyOf/1: ") && said.contains("colour"),
        "{said}"
    );
    let said = refusal(&Constraint::JsonSchema(json!({ "not": { "type": "null" } })));
    assert!(said.contains("at its root: ") && said.contains("not"), "{said}");
    let said = refusal(&Constraint::JsonSchema(json!(7)));
    assert!(said.contains("at its root"), "{said}");
    let said = refusal(&Constraint::JsonSchema(json!(false)));
    assert!(said.starts_with("the JSON schema is refused"), "{said}");
    let missing = json!({ "$ref": "#/$defs/none" });
    assert!(refusal(&Constraint::JsonSchema(missing)).contains("none"));
    let said = refusal(&Constraint::Regex("(a".to_owned()));
    assert!(said.starts_with("the regular expression is refused: "), "{said}");
    let said = refusal(&Constraint::Lark("start: none".to_owned()));
    assert!(said.starts_with("the grammar is refused: ") && said.contains("none"), "{said}");
    assert!(!said.contains('\n'));
}

#[test]
fn hostile_forms_are_refused_at_once() {
    let long = Constraint::Regex("a".repeat(CONSTRAINT_BYTES_MAX + 1));
    assert!(refusal(&long).contains("bytes long"));
    let deep = "(".repeat(50_000) + &")".repeat(50_000);
    for deep in [Constraint::Regex(deep.clone()), Constraint::Lark(format!("start: {deep}"))] {
        assert!(refusal(&deep).contains("levels deep"));
    }
    let began = Instant::now();
    let many: Vec<String> = (0..10_000).map(|number| format!("{number}x")).collect();
    let tokenizer = embedded();
    for hostile in [
        Constraint::Regex("((a{1,1000}){1,1000}){1,1000}".to_owned()),
        Constraint::Regex("(.*a.{60}b)&(.*c.{60}d)".to_owned()),
        Constraint::JsonSchema(json!({ "type": "string", "minLength": 4_000_000_000_u64 })),
        Constraint::JsonSchema(json!({ "type": "array", "minItems": 1_000_000_000,
            "items": { "type": "array", "minItems": 1_000_000_000 } })),
        Constraint::JsonSchema(json!({ "enum": many })),
        Constraint::JsonSchema(json!({ "$ref": "#" })),
        Constraint::JsonSchema(json!({ "$defs": { "a": { "allOf": [{ "$ref": "#/$defs/a" },
            { "$ref": "#/$defs/a" }] } }, "$ref": "#/$defs/a" })),
    ] {
        let one = Instant::now();
        let result = tokenizer.grammar(&hostile, &[0]);
        let shown = match result {
            Ok(_) => "taken".to_owned(),
            Err(error) => error.to_string(),
        };
        println!("{:?} for {}: {shown}", one.elapsed(), format!("{hostile:.60?}").len());
    }
    assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
}

#[test]
fn only_so_many_compiled_grammars_are_kept() {
    let tokenizer = embedded();
    let regex = |number: usize| Constraint::Regex(format!("a{{{number}}}"));
    let first = tokenizer.grammar(&regex(1), &[0]).unwrap();
    assert_eq!(tokenizer.grammar(&regex(1), &[0]).unwrap(), first, "compiled once");
    for number in 2..30 {
        tokenizer.grammar(&regex(number), &[0]).unwrap();
    }
    assert_eq!(tokenizer.grammars().kept(), KEPT_MAX);
    assert_ne!(tokenizer.grammar(&regex(1), &[0]).unwrap(), first);
}

#[test]
fn a_schemas_own_options_for_the_compiler_do_not_count() {
    let schema = json!({ "x-guidance": { "lenient": true }, "type": "null" });
    let options = &compile::with_options(&schema)["x-guidance"];
    assert_eq!(options.get("lenient"), None);
}
