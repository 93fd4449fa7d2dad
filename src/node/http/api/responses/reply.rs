//! `POST /v1/responses`: the answer, whole and as events.

use serde_json::{Value, json};

use super::super::answer::{Finish, Part, Told, Usage, Whole};
use super::super::failed::{Failed, Form};
use super::super::openai::Header;
use super::super::sse;
use super::super::submit::{Writer, call_id, id};
use super::super::tools::Call;
use super::Echo;

/// How an answer ends: the response's status, and why it is not complete.
fn ended(finish: &Finish) -> (&'static str, Value) {
    match finish {
        Finish::Length | Finish::Context => {
            ("incomplete", json!({ "reason": "max_output_tokens" }))
        }
        Finish::Stop | Finish::StopText(_) | Finish::Calls => ("completed", Value::Null),
    }
}

fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt,
        "input_tokens_details": { "cached_tokens": usage.cached },
        "output_tokens": usage.generated,
        "output_tokens_details": { "reasoning_tokens": 0 },
        "total_tokens": usage.prompt + usage.generated,
    })
}

fn text_part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

fn text_item(id: &str, text: Option<&str>, status: &str) -> Value {
    let content: Vec<Value> = text.map(text_part).into_iter().collect();
    json!({ "type": "message", "id": id, "status": status, "role": "assistant", "content": content })
}

fn call_item(id: &str, call_id: &str, call: &Call, status: &str) -> Value {
    json!({
        "type": "function_call",
        "id": id,
        "call_id": call_id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    })
}

fn response(header: &Header, echo: &Echo, status: &str, why: Value, output: &[Value]) -> Value {
    let mut response = json!({
        "id": header.id,
        "object": "response",
        "created_at": header.created,
        "status": status,
        "error": null,
        "incomplete_details": why,
        "model": header.model,
        "output": output,
        "previous_response_id": null,
        "reasoning": { "effort": null, "summary": null },
        "store": false,
        "text": { "format": { "type": "text" } },
        "truncation": "disabled",
        "usage": null,
        "user": null,
    });
    if let Some(object) = response.as_object_mut() {
        object.extend(echo.0.clone());
    }
    response
}

/// All of an answer.
pub fn response_whole(
    header: &Header,
    echo: &Echo,
    whole: &Whole,
    finish: &Finish,
    used: Usage,
) -> Value {
    let (status, why) = ended(finish);
    let mut output = Vec::new();
    if !whole.text.is_empty() || whole.calls.is_empty() {
        output.push(text_item(&id("msg_"), Some(&whole.text), status));
    }
    let calls = whole.calls.iter();
    output.extend(calls.map(|call| call_item(&id("fc_"), &call_id(), call, "completed")));
    let mut response = response(header, echo, status, why, &output);
    response["usage"] = usage(used);
    response
}

/// Writes an answer as events.
pub struct ResponseStream {
    header: Header,
    echo: Echo,
    sequence: u64,
    /// The items that are done.
    output: Vec<Value>,
    /// The message that goes on: its id and text so far.
    message: Option<(String, String)>,
    begun: bool,
}

impl ResponseStream {
    pub const fn new(header: Header, echo: Echo) -> Self {
        Self { header, echo, sequence: 0, output: Vec::new(), message: None, begun: false }
    }

    fn event(&mut self, kind: &str, mut fields: Value) -> String {
        fields["type"] = kind.into();
        fields["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        sse::named(&fields)
    }

    fn begin(&mut self) -> String {
        if std::mem::replace(&mut self.begun, true) {
            return String::new();
        }
        let response = response(&self.header, &self.echo, "in_progress", Value::Null, &[]);
        let fields = json!({ "response": response });
        self.event("response.created", fields.clone()) + &self.event("response.in_progress", fields)
    }

    fn text(&mut self, piece: &str) -> String {
        let mut said = String::new();
        let index = self.output.len();
        let (item, mut text) = match self.message.take() {
            Some(message) => message,
            None => {
                let item = id("msg_");
                let added = text_item(&item, None, "in_progress");
                let fields = json!({ "output_index": index, "item": added });
                said += &self.event("response.output_item.added", fields);
                let fields = json!({ "item_id": item, "output_index": index, "content_index": 0,
                                     "part": text_part("") });
                said += &self.event("response.content_part.added", fields);
                (item, String::new())
            }
        };
        let fields = json!({ "item_id": item, "output_index": index, "content_index": 0,
                             "delta": piece, "logprobs": [] });
        said += &self.event("response.output_text.delta", fields);
        text.push_str(piece);
        self.message = Some((item, text));
        said
    }

    fn end_text(&mut self, status: &str) -> String {
        let Some((item, text)) = self.message.take() else { return String::new() };
        let index = self.output.len();
        let at = json!({ "item_id": item, "output_index": index, "content_index": 0 });
        let mut done = at.clone();
        done["text"] = text.as_str().into();
        done["logprobs"] = json!([]);
        let mut said = self.event("response.output_text.done", done);
        let mut done = at;
        done["part"] = text_part(&text);
        said += &self.event("response.content_part.done", done);
        said + &self.item_done(text_item(&item, Some(&text), status))
    }

    fn item_done(&mut self, item: Value) -> String {
        let fields = json!({ "output_index": self.output.len(), "item": item });
        self.output.push(item);
        self.event("response.output_item.done", fields)
    }

    fn call(&mut self, call: &Call) -> String {
        let mut said = self.end_text("completed");
        let index = self.output.len();
        let (item, call_id) = (id("fc_"), call_id());
        let empty = Call { name: call.name.clone(), arguments: String::new() };
        let added = call_item(&item, &call_id, &empty, "in_progress");
        let fields = json!({ "output_index": index, "item": added });
        said += &self.event("response.output_item.added", fields);
        let fields = json!({ "item_id": item, "output_index": index, "delta": call.arguments });
        said += &self.event("response.function_call_arguments.delta", fields);
        let fields = json!({ "item_id": item, "output_index": index, "name": call.name,
                             "arguments": call.arguments });
        said += &self.event("response.function_call_arguments.done", fields);
        said + &self.item_done(call_item(&item, &call_id, call, "completed"))
    }

    fn parts(&mut self, parts: Vec<Part>) -> String {
        let mut said = String::new();
        for part in parts {
            said += &match part {
                Part::Text { text, .. } if text.is_empty() => continue,
                Part::Text { text, .. } => self.text(&text),
                Part::Call(call) => self.call(&call),
            };
        }
        said
    }

    fn end(&mut self, finish: &Finish, used: Usage) -> String {
        let (status, why) = ended(finish);
        let mut said = String::new();
        if self.output.is_empty() && self.message.is_none() {
            said += &self.text("");
        }
        said += &self.end_text(status);
        let mut response = response(&self.header, &self.echo, status, why, &self.output);
        response["usage"] = usage(used);
        said + &self.event(&format!("response.{status}"), json!({ "response": response }))
    }

    fn failed(&mut self, failed: &Failed) -> String {
        let error = &failed.body(Form::OpenAi)["error"];
        let mut response = response(&self.header, &self.echo, "failed", Value::Null, &self.output);
        response["error"] = json!({ "code": error["code"], "message": error["message"] });
        self.event("response.failed", json!({ "response": response }))
    }
}

impl Writer for ResponseStream {
    fn write(&mut self, _: usize, told: Told) -> String {
        let begin = self.begin();
        begin
            + &match told {
                Told::Start(_) => String::new(),
                Told::Parts(parts) => self.parts(parts),
                Told::End { parts, finish, usage } => self.parts(parts) + &self.end(&finish, usage),
                Told::Failed(failed) => self.failed(&failed),
            }
    }

    fn finish(&mut self) -> String {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USAGE: Usage = Usage { prompt: 5, cached: 2, generated: 3 };

    fn header() -> Header {
        Header { id: "resp_1".into(), created: 1, model: "m".into() }
    }

    #[test]
    fn a_stream_numbers_its_events_and_ends_with_the_whole_response() {
        let mut stream = ResponseStream::new(header(), Echo::default());
        let text = |text: &str| Part::Text { text: text.into(), odds: Vec::new() };
        let call = Call { name: "f".into(), arguments: "{}".into() };
        let mut said = stream.write(0, Told::Start(5));
        said += &stream.write(0, Told::Parts(vec![text("a"), text("b")]));
        let parts = vec![Part::Call(call)];
        said += &stream.write(0, Told::End { parts, finish: Finish::Calls, usage: USAGE });
        said += &stream.finish();
        let events: Vec<Value> = said
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(|data| serde_json::from_str(data).unwrap())
            .collect();
        let kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
        let want = [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ];
        assert_eq!(kinds, want);
        for (at, event) in events.iter().enumerate() {
            assert_eq!(event["sequence_number"], at, "{event}");
        }
        let response = &events.last().unwrap()["response"];
        assert_eq!(response["output"][0]["content"][0]["text"], "ab");
        assert_eq!(response["output"][1]["arguments"], "{}");
        assert_eq!(response["usage"]["total_tokens"], 8);
    }

    #[test]
    fn an_answer_that_was_cut_off_says_so_and_an_empty_one_has_a_message() {
        let finish = Finish::Length;
        let said = response_whole(&header(), &Echo::default(), &Whole::default(), &finish, USAGE);
        assert_eq!(said["status"], "incomplete");
        assert_eq!(said["incomplete_details"]["reason"], "max_output_tokens");
        assert_eq!(said["output"][0]["content"][0]["text"], "");
        let mut stream = ResponseStream::new(header(), Echo::default());
        let failed = stream.write(0, Told::Failed(Failed::new("device_lost", "gone")));
        assert!(failed.contains("event: response.failed\n"), "{failed}");
    }
}
