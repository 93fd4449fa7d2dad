//! Each syntax, whatever pieces its text comes in, and what only looks like it.

use super::*;

/// What a parser gives out, whatever pieces the text comes in: text joined, calls as they are.
fn parsed(syntax: Syntax, text: &str) -> (String, Vec<(String, String)>) {
    let chars: Vec<String> = text.chars().map(String::from).collect();
    let mut all: Vec<_> = [1, 3, 7, chars.len().max(1)]
        .into_iter()
        .map(|size| {
            let mut parser = Parser::new(syntax, vec!["add".into(), "now".into()]);
            let mut found = Vec::new();
            for piece in chars.chunks(size) {
                found.extend(parser.push(&piece.concat()));
            }
            found.extend(parser.finish());
            let (mut text, mut calls) = (String::new(), Vec::new());
            for found in found {
                match found {
                    Found::Text(piece) => text += &piece,
                    Found::Call(call) => calls.push((call.name, call.arguments)),
                }
            }
            (text, calls)
        })
        .collect();
    all.dedup();
    assert_eq!(all.len(), 1, "the pieces change what is found: {all:?}");
    all.remove(0)
}

fn call(name: &str, arguments: &str) -> (String, String) {
    (name.to_owned(), arguments.to_owned())
}

#[test]
fn each_syntax_is_found_after_text_and_several_times() {
    let add = call("add", r#"{"a":1,"b":2}"#);
    let now = call("now", "{}");
    let cases = [
        (
            Syntax::Hermes,
            "Let me see.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}\n\
             </tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n",
            "Let me see.",
        ),
        (
            Syntax::Llama,
            "{\"name\": \"add\", \"parameters\": {\"a\": 1, \"b\": 2}}; {\"name\": \"now\"}",
            "",
        ),
        (
            Syntax::Mistral,
            "So: [TOOL_CALLS] [{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}, \
             {\"name\": \"now\", \"arguments\": {}}]",
            "So:",
        ),
        (
            Syntax::MistralNamed,
            "So: [TOOL_CALLS]add[ARGS]{\"a\": 1, \"b\": 2}[TOOL_CALLS]now[ARGS]{}",
            "So:",
        ),
    ];
    for (syntax, said, text) in cases {
        assert_eq!(
            parsed(syntax, said),
            (text.to_owned(), vec![add.clone(), now.clone()]),
            "{said}"
        );
    }
}

#[test]
fn what_is_no_call_stays_text_to_the_last_character() {
    for (syntax, said) in [
        (Syntax::Hermes, "plain  text\n"),
        (Syntax::Hermes, "a < b, <tool_cal"),
        (Syntax::Hermes, "<tool_call>\n{\"name\": \"add\", \"arguments\": {"),
        (
            Syntax::Hermes,
            "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}</tool_call> and on",
        ),
        (Syntax::Hermes, "<tool_call>not JSON</tool_call>"),
        (Syntax::Hermes, "<tool_call>{\"name\": \"add\", \"arguments\": 7}</tool_call>"),
        (Syntax::Hermes, "{\"name\": \"add\", \"arguments\": {\"a\": 1}} is a call"),
        (Syntax::Hermes, "{\"name\": \"add\", \"arguments\": {\"a\": 1"),
        (Syntax::Hermes, "{\"name\": \"add\"}"),
        (Syntax::Hermes, "{\"name\": \"adder\", \"arguments\": {}}"),
        (Syntax::Hermes, "{\"name\": \"add\", \"arguments\": [1]}"),
        (Syntax::Hermes, "```json\n{\"a\": 1}\n```"),
        (Syntax::Hermes, "```python\nadd()\n```"),
        (Syntax::Hermes, "Here: {\"name\": \"add\", \"arguments\": {}}"),
        (Syntax::Mistral, "{\"an\": \"answer\"}"),
        (Syntax::Llama, "It is {\"name\": \"add\", \"parameters\": {}}"),
        (Syntax::Llama, "{\"an\": \"answer\"}"),
        (Syntax::Llama, "{\"name\": \"add\", \"parameters\": {}} and on"),
        (Syntax::Llama, "  \n"),
        (Syntax::Mistral, "[TOOL_CALLS] nothing [TOOL"),
        (Syntax::Mistral, "no call [TOOL_"),
        (Syntax::MistralNamed, "[TOOL_CALLS]unknown[ARGS]{}"),
    ] {
        assert_eq!(parsed(syntax, said), (said.to_owned(), Vec::new()), "{syntax:?}");
    }
}

#[test]
fn a_call_that_lacks_only_its_end_counts_and_a_tag_in_an_argument_does_not_end_it() {
    let said = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}";
    assert_eq!(parsed(Syntax::Hermes, said).1, [call("add", r#"{"a":1}"#)]);
    let said =
        "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": \"</tool_call>\"}}</tool_call>";
    assert_eq!(parsed(Syntax::Hermes, said).1, [call("add", r#"{"a":"</tool_call>"}"#)]);
    let said = "<|python_tag|>{\"name\": \"add\", \"parameters\": {\"b\": 2}}";
    assert_eq!(parsed(Syntax::Llama, said).1, [call("add", r#"{"b":2}"#)]);
    let said = "[TOOL_CALLS] [{\"name\": \"add\", \"arguments\": \"{\\\"a\\\": 3}\"}";
    assert_eq!(parsed(Syntax::Mistral, said).1, [call("add", r#"{"a":3}"#)]);
}

#[test]
fn text_before_a_call_is_given_out_as_it_comes() {
    let mut parser = Parser::new(Syntax::Hermes, vec!["add".into()]);
    assert_eq!(parser.push("Well"), [Found::Text("Well".into())]);
    assert_eq!(parser.push(", <tool"), [Found::Text(",".into())], "this may be a call");
    assert_eq!(parser.push("s>"), [Found::Text(" <tools>".into())]);
}

#[test]
fn an_answer_that_must_call_begins_as_the_model_would() {
    for syntax in [Syntax::Hermes, Syntax::Llama, Syntax::Mistral, Syntax::MistralNamed] {
        let named = format!("{} {{\"a\": 1}}", syntax.begin(Some("add")));
        let named = match syntax {
            Syntax::Mistral => named + "}]",
            Syntax::MistralNamed => named,
            _ => named + "}",
        };
        assert_eq!(parsed(syntax, &named), (String::new(), vec![call("add", r#"{"a":1}"#)]));
        let begin = syntax.begin(None);
        let mut parser = Parser::new(syntax, vec!["add".into()]);
        assert_eq!(parser.push(&begin), [], "{begin}");
    }
}

#[test]
fn a_template_tells_its_syntax() {
    let data = doppler_testing::root().join("tests/data/templates");
    let read = |name: &str| std::fs::read_to_string(data.join(name)).unwrap();
    assert_eq!(Syntax::of(&read("mistral.jinja")), Some(Syntax::Mistral));
    assert_eq!(Syntax::of(&read("llama3.jinja")), Some(Syntax::Llama));
    assert_eq!(Syntax::of(&read("gemma.jinja")), None);
    let qwen = "{% if tools %}<tools>{{ tools }}</tools> use <tool_call></tool_call>{% endif %}";
    assert_eq!(Syntax::of(qwen), Some(Syntax::Hermes));
    let coder = "{% if tools %}<tool_call><function=x><parameter=y>{% endif %}";
    assert_eq!(Syntax::of(coder), None);
    let named = "{{ tools }} [TOOL_CALLS]name[ARGS]{}";
    assert_eq!(Syntax::of(named), Some(Syntax::MistralNamed));
}

/// As Qwen2.5-Coder-0.5B writes them.
#[test]
fn an_answer_that_is_nothing_but_a_calls_json_is_one_without_its_marks() {
    let add = call("add", r#"{"a":1,"b":"}\\\" ```"}"#);
    let json = r#"{"name": "add", "arguments": {"a": 1, "b": "}\\\" ```"}}"#;
    for said in [
        json.to_owned(),
        format!("\n{json}\n"),
        format!("```json\n{json}\n```"),
        format!("```\n{json}\n```\n"),
        format!("```json\n{json}"),
        r#"{"arguments": {"a": 1, "b": "}\\\" ```"}, "name": "add"}"#.to_owned(),
    ] {
        for syntax in [Syntax::Hermes, Syntax::Mistral, Syntax::MistralNamed] {
            assert_eq!(parsed(syntax, &said), (String::new(), vec![add.clone()]), "{said}");
        }
    }
    let two = format!("{json}\n{}", r#"{"name": "now", "parameters": {}}"#);
    assert_eq!(parsed(Syntax::Hermes, &two).1, [add, call("now", "{}")]);
}

#[test]
fn what_can_be_no_call_any_more_is_given_out_at_once() {
    let text = |text: &str| vec![Found::Text(text.to_owned())];
    for (held, given) in [
        ("{", "\"c"),
        ("{\"n", "o"),
        ("{\"name\": \"a", "x"),
        ("{\"name\": \"add\", ", "\"x"),
        ("```", "py"),
        ("```json\n", "["),
        ("``", "x"),
        ("{\"name\": \"add\", \"arguments\": {}}", "x"),
        ("  {\"arguments\": {\"any\": [\"x\"]}, \"name\": ", "\"b"),
    ] {
        let mut parser = Parser::new(Syntax::Hermes, vec!["add".into(), "now".into()]);
        assert_eq!(parser.push(held), [], "{held}");
        assert_eq!(parser.push(given), text(&format!("{held}{given}")), "{held}{given}");
        assert_eq!(parser.push("more"), text("more"));
    }
}

/// A text that a strict tool's grammar was made for, begun and free.
#[test]
fn grammars_of_calls_are_what_the_parser_reads() {
    let tokenizer = include_bytes!("../../../../../models/tiny-mixtral-q4_k_m/tokenizer.json");
    let tokenizer = doppler_infer::tokenizer::Tokenizer::from_bytes(tokenizer, vec![0]).unwrap();
    let schema = serde_json::json!({ "type": "object", "additionalProperties": false,
        "properties": { "a": { "type": "integer", "minimum": 0, "maximum": 9 } }, "required": ["a"] });
    let tool = |name: &str| held::Held { name: name.into(), schema: schema.clone() };
    let tools = [tool("add"), tool("now")];
    for syntax in [Syntax::Hermes, Syntax::Llama, Syntax::Mistral, Syntax::MistralNamed] {
        for (named, tools) in [(true, &tools[..1]), (false, &tools[..])] {
            let begin = syntax.begin(named.then_some("add"));
            let rest = held::demanded(syntax, tools, named, &[]);
            for seed in 0..20 {
                let text = drawn(&tokenizer, &rest, seed, None);
                let (said, calls) = parsed(syntax, &format!("{begin}{text}"));
                assert_eq!((said.as_str(), calls.len()), ("", 1), "{begin}{text}");
                assert!(calls[0].1.starts_with("{\"a\":"), "{calls:?}");
            }
        }
        let free = held::free(syntax, &tools, &[], None);
        let open = match syntax {
            Syntax::Hermes => "<tool_call>",
            Syntax::Llama => "{",
            Syntax::Mistral | Syntax::MistralNamed => "[TOOL_CALLS]",
        };
        let first = tokenizer.encode_bare(open).unwrap();
        for seed in 0..20 {
            let text = drawn(&tokenizer, &free, seed, Some(&first));
            let (_, calls) = parsed(syntax, &text);
            assert!(!calls.is_empty() && calls[0].1.starts_with("{\"a\":"), "{syntax:?}: {text:?}");
        }
        let instead = held::free(syntax, &tools, &[], Some(&schema));
        for seed in 0..20 {
            let text = drawn(&tokenizer, &instead, seed, None);
            let (said, calls) = parsed(syntax, &text);
            let is_json =
                serde_json::from_str::<Value>(&said).is_ok_and(|value| value["a"].is_u64());
            assert_eq!(is_json, calls.is_empty(), "{syntax:?}: {text:?}");
        }
    }
}

/// What a model that wants anything writes, after these tokens.
fn drawn(
    tokenizer: &doppler_infer::tokenizer::Tokenizer,
    constraint: &doppler_infer::grammar::Constraint,
    seed: u64,
    first: Option<&[u32]>,
) -> String {
    use doppler_infer::{extras::Extras, grammar::Progress, odds, sampler};
    let grammar = Some(tokenizer.grammar(constraint, &[0]).unwrap());
    let options = sampler::SamplerOptions { temperature: 1.0, seed, ..Default::default() };
    let mut sampler =
        sampler::Sampler::with(options, Extras { grammar, ..Extras::default() }).unwrap();
    let mut stream = tokenizer.stream(&tokenizer.encode_bare("x").unwrap());
    let mut text = String::new();
    for step in 0..4000 {
        let wanted = first.and_then(|first| first.get(step));
        let logits: Vec<f32> = (0..tokenizer.vocab_size() as u64)
            .map(|token| match (wanted, token) {
                (Some(wanted), token) if u64::from(*wanted) == token => 1000.0,
                // It would rather end than go on for ever.
                (None, 0) if step > 40 => 1000.0,
                _ => (odds::random(seed, step as u64 * 10_000 + token) % 600) as f32 / 100.0,
            })
            .collect();
        let token = sampler.sample(&logits);
        sampler.accept(token);
        if token != 0 {
            text += &stream.push(token).unwrap();
        }
        match sampler.progress().unwrap() {
            Progress::Open => {}
            Progress::Complete => return text + &stream.finish().unwrap(),
            Progress::Failed(why) => panic!("{why}"),
        }
    }
    panic!("no end: {text}");
}
