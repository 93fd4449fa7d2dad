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
