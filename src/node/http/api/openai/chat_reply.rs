//! `POST /v1/chat/completions`: the answer, whole and as chunks.

use serde_json::{Value, json};

use super::super::answer::{Finish, Part, Told, Usage, Whole};
use super::super::failed::Form;
use super::super::sse;
use super::super::submit::{Writer, call_id, total};
use super::super::tools::Call;
use super::{Header, finish_reason, usage};
use crate::api::TokenOdds;

/// The bytes of a token; `None` if they are no whole character.
fn bytes(text: &str) -> Option<&[u8]> {
    (!text.contains('\u{fffd}')).then_some(text.as_bytes())
}

fn logprobs(odds: &[TokenOdds]) -> Value {
    let one = |odds: &TokenOdds| json!({ "token": odds.text, "logprob": odds.logprob, "bytes": bytes(&odds.text) });
    let tokens = odds.iter().map(|odds| {
        let mut token = one(odds);
        token["top_logprobs"] = odds.top.iter().map(one).collect();
        token
    });
    json!({ "content": tokens.collect::<Value>(), "refusal": null })
}

fn tool_call(call: &Call) -> Value {
    let Call { name, arguments } = call;
    json!({
        "id": call_id(),
        "type": "function",
        "function": { "name": name, "arguments": arguments },
    })
}

/// All of an answer. `with_odds`: probabilities were asked for.
pub fn chat_whole(header: &Header, with_odds: bool, answers: &[(Whole, Finish, Usage)]) -> Value {
    let choices = answers.iter().enumerate().map(|(index, (whole, finish, _))| {
        let content = (whole.calls.is_empty() || !whole.text.is_empty()).then_some(&whole.text);
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !whole.calls.is_empty() {
            message["tool_calls"] = whole.calls.iter().map(tool_call).collect();
        }
        json!({
            "index": index,
            "message": message,
            "logprobs": with_odds.then(|| logprobs(&whole.odds)),
            "finish_reason": finish_reason(finish),
        })
    });
    let mut whole = header.body("chat.completion", choices.collect());
    whole["usage"] = usage(total(answers.iter().map(|(.., usage)| *usage)));
    whole
}

/// What a part of a stream is called.
const CHUNK: &str = "chat.completion.chunk";

/// Writes an answer as chunks.
pub struct ChatStream {
    header: Header,
    include_usage: bool,
    /// Of each choice: whether it has begun, and its calls so far.
    choices: Vec<(bool, usize)>,
    usages: Vec<Usage>,
    failed: bool,
}

impl ChatStream {
    pub fn new(header: Header, include_usage: bool, choices: usize) -> Self {
        let choices = vec![(false, 0); choices];
        Self { header, include_usage, choices, usages: Vec::new(), failed: false }
    }

    fn chunk(&self, choices: Value) -> String {
        self.header.chunk(CHUNK, choices, self.include_usage)
    }

    fn delta(&self, index: usize, delta: Value, odds: &[TokenOdds]) -> String {
        let logprobs = (!odds.is_empty()).then(|| logprobs(odds));
        self.chunk(json!([{
            "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null,
        }]))
    }

    fn begun(&mut self, index: usize) -> String {
        if std::mem::replace(&mut self.choices[index].0, true) {
            return String::new();
        }
        self.delta(index, json!({ "role": "assistant", "content": "" }), &[])
    }

    fn parts(&mut self, index: usize, parts: Vec<Part>) -> String {
        let mut text = String::new();
        for part in parts {
            match part {
                Part::Text { text: piece, odds } => {
                    text += &self.delta(index, json!({ "content": piece }), &odds);
                }
                Part::Call(call) => {
                    let at = self.choices[index].1;
                    self.choices[index].1 += 1;
                    let mut first = tool_call(&call);
                    first["index"] = at.into();
                    first["function"]["arguments"] = "".into();
                    text += &self.delta(index, json!({ "tool_calls": [first] }), &[]);
                    let rest = json!({ "index": at, "function": { "arguments": call.arguments } });
                    text += &self.delta(index, json!({ "tool_calls": [rest] }), &[]);
                }
            }
        }
        text
    }
}

impl Writer for ChatStream {
    fn write(&mut self, choice: usize, told: Told) -> String {
        match told {
            Told::Start(_) => self.begun(choice),
            Told::Parts(parts) => self.begun(choice) + &self.parts(choice, parts),
            Told::End { parts, finish, usage } => {
                self.usages.push(usage);
                let end = json!([{
                    "index": choice,
                    "delta": {},
                    "logprobs": null,
                    "finish_reason": finish_reason(&finish),
                }]);
                self.begun(choice) + &self.parts(choice, parts) + &self.chunk(end)
            }
            Told::Failed(failed) => {
                self.failed = true;
                sse::data(&failed.body(Form::OpenAi))
            }
        }
    }

    fn finish(&mut self) -> String {
        if self.failed {
            return String::new();
        }
        let used = self.include_usage.then(|| total(self.usages.drain(..)));
        self.header.done(CHUNK, used)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::failed::Failed;
    use super::*;

    fn header() -> Header {
        Header { id: "chatcmpl-1".into(), created: 1, model: "m".into() }
    }

    const USAGE: Usage = Usage { prompt: 5, cached: 2, generated: 3 };

    fn text(text: &str) -> Part {
        Part::Text { text: text.into(), odds: Vec::new() }
    }

    fn call() -> Call {
        Call { name: "f".into(), arguments: "{\"a\":1}".into() }
    }

    /// The stream's chunks.
    fn chunks(stream: &str) -> Vec<Value> {
        let (chunks, done) = stream.rsplit_once("data: ").unwrap();
        assert_eq!(done, "[DONE]\n\n");
        let lines = chunks.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        lines.map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_whole_answer_has_its_choices_calls_and_tokens() {
        let plain = Whole { text: "Hi".into(), ..Whole::default() };
        let calling = Whole { calls: vec![call()], ..Whole::default() };
        let answers = [(plain, Finish::Length, USAGE), (calling, Finish::Calls, USAGE)];
        let whole = chat_whole(&header(), false, &answers);
        assert_eq!(whole["choices"][0]["message"]["content"], "Hi");
        assert_eq!(whole["choices"][0]["finish_reason"], "length");
        assert!(whole["choices"][0]["message"].get("tool_calls").is_none());
        let message = &whole["choices"][1]["message"];
        assert_eq!(message["content"], Value::Null);
        assert_eq!(message["tool_calls"][0]["function"]["arguments"], "{\"a\":1}");
        assert_eq!(message["tool_calls"][0]["id"].as_str().unwrap().len(), 9);
        assert_eq!(whole["choices"][1]["finish_reason"], "tool_calls");
        let want = json!({ "prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11,
                           "prompt_tokens_details": { "cached_tokens": 2 } });
        assert_eq!(whole["usage"], want);
    }

    #[test]
    fn a_stream_begins_with_the_role_and_ends_with_reason_usage_and_done() {
        let mut stream = ChatStream::new(header(), true, 1);
        let mut said = stream.write(0, Told::Start(5));
        said += &stream.write(0, Told::Parts(vec![text("Hi")]));
        said += &stream.write(0, Told::Parts(Vec::new()));
        let end =
            Told::End { parts: vec![Part::Call(call())], finish: Finish::Calls, usage: USAGE };
        said += &stream.write(0, end);
        said += &stream.finish();
        let chunks = chunks(&said);
        let deltas: Vec<_> = chunks[..5].iter().map(|c| &c["choices"][0]["delta"]).collect();
        assert_eq!(deltas[0], &json!({ "role": "assistant", "content": "" }));
        assert_eq!(deltas[1], &json!({ "content": "Hi" }));
        let first = &deltas[2]["tool_calls"][0];
        assert_eq!((&first["index"], &first["function"]["name"]), (&json!(0), &json!("f")));
        assert_eq!(first["function"]["arguments"], "");
        let rest =
            json!({ "tool_calls": [{ "index": 0, "function": { "arguments": "{\"a\":1}" } }] });
        assert_eq!(deltas[3], &rest);
        assert_eq!(deltas[4], &json!({}));
        assert_eq!(chunks[4]["choices"][0]["finish_reason"], "tool_calls");
        assert_eq!(chunks[4]["usage"], Value::Null);
        assert_eq!(
            (&chunks[5]["choices"], &chunks[5]["usage"]["total_tokens"]),
            (&json!([]), &json!(8))
        );
        assert_eq!(chunks.len(), 6);
    }

    #[test]
    fn a_failure_is_the_last_event() {
        let mut stream = ChatStream::new(header(), true, 1);
        let said = stream.write(0, Told::Failed(Failed::new("device_lost", "gone")));
        let event: Value = serde_json::from_str(said.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(event["error"]["code"], "device_lost");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn probabilities_name_their_tokens_and_bytes() {
        let odds = |text: &str, top| TokenOdds { id: 1, text: text.into(), logprob: -0.5, top };
        let odds = [odds("a", vec![odds("a", vec![]), odds("\u{fffd}", vec![])])];
        let content = &logprobs(&odds)["content"][0];
        assert_eq!(content["bytes"], json!([97]));
        assert_eq!(content["top_logprobs"][1]["bytes"], Value::Null);
        assert_eq!(content["logprob"], -0.5);
    }
}
