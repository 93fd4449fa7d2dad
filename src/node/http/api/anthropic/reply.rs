//! `POST /v1/messages`: the answer, whole and as events.

use serde_json::{Value, json};

use super::super::answer::{Finish, Part, Told, Usage, Whole};
use super::super::failed::Form;
use super::super::openai::Header;
use super::super::sse;
use super::super::submit::{Writer, arguments, call_id};

fn stop_reason(finish: &Finish) -> &'static str {
    match finish {
        Finish::Stop => "end_turn",
        Finish::StopText(_) => "stop_sequence",
        Finish::Length => "max_tokens",
        Finish::Context => "model_context_window_exceeded",
        Finish::Calls => "tool_use",
    }
}

fn stop_sequence(finish: &Finish) -> Option<&str> {
    match finish {
        Finish::StopText(text) => Some(text),
        _ => None,
    }
}

/// Anthropic counts tokens that were cached apart from the others.
fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt.saturating_sub(usage.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.generated,
    })
}

fn message(header: &Header, content: Value, finish: Option<&Finish>, used: Usage) -> Value {
    json!({
        "id": header.id,
        "type": "message",
        "role": "assistant",
        "model": header.model,
        "content": content,
        "stop_reason": finish.map(stop_reason),
        "stop_sequence": finish.and_then(stop_sequence),
        "usage": usage(used),
    })
}

/// All of an answer.
pub fn message_whole(header: &Header, whole: &Whole, finish: &Finish, usage: Usage) -> Value {
    let mut content = Vec::new();
    if !whole.text.is_empty() {
        content.push(json!({ "type": "text", "text": whole.text }));
    }
    content.extend(whole.calls.iter().map(|call| {
        json!({ "type": "tool_use", "id": call_id(), "name": call.name,
                "input": arguments(&call.arguments) })
    }));
    message(header, content.into(), Some(finish), usage)
}

/// Writes an answer as events.
pub struct MessageStream {
    header: Header,
    /// Blocks that were begun, and whether the last of them is text that goes on.
    blocks: usize,
    in_text: bool,
    begun: bool,
}

impl MessageStream {
    pub const fn new(header: Header) -> Self {
        Self { header, blocks: 0, in_text: false, begun: false }
    }

    fn begin(&mut self, prompt: usize) -> String {
        if std::mem::replace(&mut self.begun, true) {
            return String::new();
        }
        let used = Usage { prompt, ..Usage::default() };
        let message = message(&self.header, json!([]), None, used);
        let start = json!({ "type": "message_start", "message": message });
        sse::named(&start) + &sse::named(&json!({ "type": "ping" }))
    }

    fn start(&mut self, block: &Value) -> String {
        let index = self.blocks;
        self.blocks += 1;
        sse::named(&json!({
            "type": "content_block_start", "index": index, "content_block": block,
        }))
    }

    fn delta(&self, delta: &Value) -> String {
        let index = self.blocks.saturating_sub(1);
        sse::named(&json!({ "type": "content_block_delta", "index": index, "delta": delta }))
    }

    fn stop(&self) -> String {
        let index = self.blocks.saturating_sub(1);
        sse::named(&json!({ "type": "content_block_stop", "index": index }))
    }

    fn end_text(&mut self) -> String {
        match std::mem::replace(&mut self.in_text, false) {
            true => self.stop(),
            false => String::new(),
        }
    }

    fn parts(&mut self, parts: Vec<Part>) -> String {
        let mut said = String::new();
        for part in parts {
            match part {
                Part::Text { text, .. } if text.is_empty() => {}
                Part::Text { text, .. } => {
                    if !std::mem::replace(&mut self.in_text, true) {
                        said += &self.start(&json!({ "type": "text", "text": "" }));
                    }
                    said += &self.delta(&json!({ "type": "text_delta", "text": text }));
                }
                Part::Call(call) => {
                    said += &self.end_text();
                    let block = json!({ "type": "tool_use", "id": call_id(), "name": call.name,
                                        "input": {} });
                    said += &self.start(&block);
                    let json = json!({ "type": "input_json_delta",
                                       "partial_json": call.arguments });
                    said += &self.delta(&json);
                    said += &self.stop();
                }
            }
        }
        said
    }
}

impl Writer for MessageStream {
    fn write(&mut self, _: usize, told: Told) -> String {
        match told {
            Told::Start(prompt) => self.begin(prompt),
            Told::Parts(parts) => self.begin(0) + &self.parts(parts),
            Told::End { parts, finish, usage: used } => {
                let mut said = self.begin(used.prompt) + &self.parts(parts) + &self.end_text();
                let delta = json!({ "stop_reason": stop_reason(&finish),
                                    "stop_sequence": stop_sequence(&finish) });
                said += &sse::named(&json!({
                    "type": "message_delta", "delta": delta, "usage": usage(used),
                }));
                said + &sse::named(&json!({ "type": "message_stop" }))
            }
            Told::Failed(failed) => sse::named(&failed.body(Form::Anthropic)),
        }
    }

    fn finish(&mut self) -> String {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::failed::Failed;
    use super::super::super::tools::Call;
    use super::*;

    fn header() -> Header {
        Header { id: "msg_1".into(), created: 1, model: "m".into() }
    }

    const USAGE: Usage = Usage { prompt: 5, cached: 2, generated: 3 };

    fn call() -> Call {
        Call { name: "f".into(), arguments: "{\"a\":1}".into() }
    }

    #[test]
    fn a_whole_answer_has_blocks_reason_and_tokens() {
        let whole = Whole { text: "Well.".into(), calls: vec![call()], ..Whole::default() };
        let said = message_whole(&header(), &whole, &Finish::Calls, USAGE);
        assert_eq!(said["content"][0], json!({ "type": "text", "text": "Well." }));
        assert_eq!(said["content"][1]["input"], json!({ "a": 1 }));
        assert_eq!(said["stop_reason"], "tool_use");
        let used = &said["usage"];
        assert_eq!(
            (&used["input_tokens"], &used["cache_read_input_tokens"]),
            (&json!(3), &json!(2))
        );
        let stopped = Finish::StopText("END".into());
        let said = message_whole(&header(), &Whole::default(), &stopped, USAGE);
        let (reason, text) = (&said["stop_reason"], &said["stop_sequence"]);
        assert_eq!((reason, text), (&json!("stop_sequence"), &json!("END")));
    }

    #[test]
    fn a_stream_opens_and_closes_each_block_once() {
        let mut stream = MessageStream::new(header());
        let text = |text: &str| Part::Text { text: text.into(), odds: Vec::new() };
        let mut said = stream.write(0, Told::Start(5));
        said += &stream.write(0, Told::Parts(vec![text("a")]));
        said += &stream.write(0, Told::Parts(vec![text(""), text("b"), Part::Call(call())]));
        let end = Told::End { parts: vec![text("c")], finish: Finish::Calls, usage: USAGE };
        said += &stream.write(0, end);
        said += &stream.finish();
        let events: Vec<Value> = said
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(|data| serde_json::from_str(data).unwrap())
            .collect();
        let kinds: Vec<_> = events
            .iter()
            .map(|event| (event["type"].as_str().unwrap(), event["index"].as_u64()))
            .collect();
        let want = [
            ("message_start", None),
            ("ping", None),
            ("content_block_start", Some(0)),
            ("content_block_delta", Some(0)),
            ("content_block_delta", Some(0)),
            ("content_block_stop", Some(0)),
            ("content_block_start", Some(1)),
            ("content_block_delta", Some(1)),
            ("content_block_stop", Some(1)),
            ("content_block_start", Some(2)),
            ("content_block_delta", Some(2)),
            ("content_block_stop", Some(2)),
            ("message_delta", None),
            ("message_stop", None),
        ];
        assert_eq!(kinds, want);
        assert!(said.starts_with("event: message_start\ndata: "));
        assert_eq!(events[0]["message"]["usage"]["input_tokens"], 5);
        assert_eq!(events[7]["delta"]["partial_json"], "{\"a\":1}");
        assert_eq!(events[12]["usage"]["output_tokens"], 3);
        let failed = stream.write(0, Told::Failed(Failed::new("device_lost", "gone")));
        assert!(failed.starts_with("event: error\n"), "{failed}");
    }
}
