//! Chat templates: the text is Jinja2's, and a hostile template is one clear error.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::template::{Conversation, TemplateError, check, render};
use doppler_store::chat::ChatTemplates;

fn hello() -> Conversation {
    Conversation { messages: vec![Conversation::message("user", "Hello")], ..Default::default() }
}

fn rendered(source: &str) -> Result<String, TemplateError> {
    render(Some(&ChatTemplates::one(source)), &hello(), SystemTime::UNIX_EPOCH)
}

/// The forms of ChatML, Llama 3, Gemma, Mistral and SmolLM, with tools, system messages and
/// thinking. `tests/data/templates/generate.py` made the expected texts with Jinja2.
#[test]
fn prompts_are_those_of_jinja2() {
    let dir = doppler_testing::root().join("tests/data/templates");
    let cases = std::fs::read(dir.join("cases.json")).unwrap();
    let cases: Value = serde_json::from_slice(&cases).unwrap();
    let now = UNIX_EPOCH + Duration::from_secs(cases["now"].as_u64().unwrap());
    let tokens = serde_json::from_value(cases["tokens"].clone()).unwrap();
    let mut chat = ChatTemplates { tokens, ..ChatTemplates::default() };
    let list = cases["cases"].as_array().unwrap();
    assert!(list.len() > 25);
    for case in list {
        let name = case["template"].as_str().unwrap();
        let source = std::fs::read_to_string(dir.join(format!("{name}.jinja"))).unwrap();
        chat.templates = [("default".to_owned(), source)].into();
        check(&chat).unwrap();
        let conversation: Conversation = serde_json::from_value(case.clone()).unwrap();
        let got = render(Some(&chat), &conversation, now);
        let want = match case.get("expected") {
            Some(text) => Ok(text.as_str().unwrap().to_owned()),
            None => Err(TemplateError::Refused(case["refused"].as_str().unwrap().to_owned())),
        };
        assert_eq!(got, want, "{name}, {}", case["case"]);
    }
}

#[test]
fn the_template_for_tools_is_used_with_tools_only() {
    let named = |names: &[&str]| ChatTemplates {
        templates: names.iter().map(|name| ((*name).into(), format!("as {name}"))).collect(),
        ..ChatTemplates::default()
    };
    let text = |names: &[&str], tools: usize| {
        let tools = vec![json!({ "type": "function" }); tools];
        let conversation = Conversation { tools, ..hello() };
        render(Some(&named(names)), &conversation, UNIX_EPOCH)
    };
    assert_eq!(text(&["default", "tool_use"], 1).unwrap(), "as tool_use");
    assert_eq!(text(&["default", "tool_use"], 0).unwrap(), "as default");
    assert_eq!(text(&["rag"], 0).unwrap(), "as rag");
    let error = text(&["rag", "tool_use"], 0).unwrap_err().to_string();
    assert!(error.contains("rag, tool_use"), "{error}");
}

#[test]
fn a_wrong_conversation_or_a_missing_template_is_said() {
    let error = render(None, &hello(), UNIX_EPOCH).unwrap_err();
    assert_eq!(error, TemplateError::Missing);
    let chat = ChatTemplates::one("");
    let refused = |messages: Vec<Value>, tools: usize| {
        let tools = vec![json!({}); tools];
        let conversation = Conversation { messages, tools, thinking: None };
        render(Some(&chat), &conversation, UNIX_EPOCH).unwrap_err().to_string()
    };
    assert!(refused(vec![], 0).ends_with("no messages"));
    let good = Conversation::message("user", "x");
    assert!(refused(vec![good.clone(), json!({ "content": "x" })], 0).contains("message 2"));
    assert!(refused(vec![json!("text")], 0).contains("message 1"));
    assert!(refused(vec![good.clone(); 4097], 0).contains("4097 messages"));
    assert!(refused(vec![good], 513).contains("513 tools"));
}

#[test]
fn a_tag_that_closes_where_it_opens_is_a_syntax_error() {
    for source in ["{%}", "{{ 1 }}{%}", "{%}{% generation %}%}"] {
        assert!(matches!(check(&ChatTemplates::one(source)), Err(TemplateError::Syntax(_))));
        assert!(matches!(rendered(source), Err(TemplateError::Syntax(_))), "{source}");
    }
}

/// Each would take all time or all memory, or reach outside, if it were let.
#[test]
fn a_hostile_template_is_one_clear_error_in_bounded_time() {
    let doubling = "{% set ns = namespace(x='0123456789abcdef') %}{% for i in range(60) %}\
                    {% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}";
    let costly = [
        doubling.to_owned(),
        doubling.replace("ns.x ~ ns.x", "ns.x + ns.x"),
        doubling.replace("ns.x ~ ns.x", "ns.x * 16"),
        doubling.replace("ns.x ~ ns.x", "ns.x|replace('0', ns.x)"),
        doubling.replace("ns.x ~ ns.x", "[ns.x, ns.x]|join(ns.x)"),
        doubling.replace("ns.x ~ ns.x", "[ns.x, ns.x]|tojson"),
        "{{ 'x' * 99999999 }}".to_owned(),
        // Endless: loops in loops, and a macro that calls itself twice.
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}\
         {% endfor %}{% endfor %}{% endfor %}"
            .to_owned(),
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
            .to_owned(),
        // A value that contains itself many times over becomes more text than there is memory.
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}\
         {% endfor %}{{ ns.x|tojson }}"
            .to_owned(),
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}\
         {% endfor %}{{ ns.x }}"
            .to_owned(),
    ];
    for source in &costly {
        let started = Instant::now();
        let error = rendered(source).map(|text| text.len()).expect_err(source);
        assert_eq!(error, TemplateError::Costly, "{source}");
        let took = started.elapsed();
        assert!(took < Duration::from_secs(20), "{took:?} for {source}");
    }
    // Deep instead of wide: a list in a list, as often as the fuel allows, and a macro in itself.
    let deep = "{% set ns = namespace(x=[]) %}{% for a in range(90000) %}{% set ns.x = [ns.x] %}\
                {% endfor %}{{ ns.x|tojson }}";
    for source in [deep, "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"] {
        let error = rendered(source).expect_err(source);
        assert!(matches!(error, TemplateError::Failed(_)), "{source}: {error}");
        assert_eq!(error.to_string().lines().count(), 1);
    }
    let nested = format!("{}1{}", "(".repeat(50_000), ")".repeat(50_000));
    for source in [
        "{% include '/etc/passwd' %}",
        "{% extends 'default' %}",
        "{% import 'default' as d %}",
        "{% if %}",
        "{{ 'open",
        "{% generation %}",
        &format!("{{{{ {nested} }}}}"),
    ] {
        let error = rendered(source).expect_err(source);
        assert!(matches!(error, TemplateError::Syntax(_)), "{source}: {error}");
        assert!(check(&ChatTemplates::one(source)).is_err());
    }
    for source in ["{{ messages.nothing.more }}", "{{ open('x') }}", "{{ missing|tojson }}"] {
        let error = rendered(source).expect_err(source);
        assert!(matches!(error, TemplateError::Failed(_)), "{source}: {error}");
    }
    let error = rendered("{{ raise_exception('one\\ntwo' ~ 'x' * 9999) }}").unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, TemplateError::Refused(_)) && text.lines().count() == 1);
    assert!(text.len() < 600, "{text}");
    let long = "{% for a in range(99999) %}{{ 'many words of the same kind '*7 }}{% endfor %}";
    assert!(matches!(rendered(long), Err(TemplateError::TooLong(_))));
}
