//! Answers that are held to a form, from the engine's thread.

use doppler_infer::generate::StopReason;
use doppler_infer::grammar::Constraint;
use serde_json::{Value, json};

use super::tests::{bench, request};
use crate::api::GenerateRequest;

fn form() -> Constraint {
    Constraint::JsonSchema(json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": {
            "name": { "type": "string", "maxLength": 12 },
            "age": { "type": "integer", "minimum": 0, "maximum": 99 },
        },
    }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_fits_its_form_and_those_without_one_keep_their_tokens() {
    let bench = bench();
    let plain = request("Once upon a time");
    let before = bench.ask(&plain).await.unwrap();
    for (temperature, resume) in [(0.0, false), (1.0, true), (1.0, true), (5.0, false)] {
        let constraint = Some(form());
        let held = GenerateRequest {
            tokens: 1000,
            temperature,
            resume,
            seed: 7,
            constraint,
            ..request("Once upon a time")
        };
        let end = bench.end(&held).await.unwrap();
        assert_eq!(end.stop, StopReason::Complete, "{}", end.text);
        let value: Value = serde_json::from_str(&end.text).unwrap();
        let age = value["age"].as_u64().unwrap();
        assert!(value["name"].is_string() && age < 100, "{value}");
        let cut = GenerateRequest { tokens: 2, ..held };
        let cut = bench.end(&cut).await.unwrap();
        assert_eq!(cut.stop, StopReason::MaxTokens);
        assert!(end.text.starts_with(&cut.text), "{:?}, {:?}", cut.text, end.text);
        assert_eq!(bench.ask(&plain).await.as_ref(), Ok(&before));
    }
    bench.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_form_that_is_not_understood_costs_nothing() {
    let bench = bench();
    for constraint in [
        Constraint::JsonSchema(json!({ "type": "colour" })),
        Constraint::Regex("(".to_owned()),
        Constraint::Lark("start: \"x".to_owned()),
    ] {
        let wrong = GenerateRequest { constraint: Some(constraint), ..request("Once") };
        assert_eq!(bench.ask(&wrong).await, Err("grammar"));
    }
    assert_eq!(bench.engine.shown().loads, 0);
    bench.engine.stop().await;
}
