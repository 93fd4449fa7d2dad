//! `POST /v1/responses`: the request.

use serde_json::{Value, json};

use super::super::body::{Object, optional, required, text, tokens};
use super::super::failed::Failed;
use super::super::fields::Field;
use super::super::fields::Use::{Ignored, Only, Refused, Taken};
use super::super::form;
use super::super::offer::{Offer, function};
use super::super::openai::{call, joined, lane, result, sampled, tool_choice};
use crate::api::GenerateRequest;
use crate::engine::Lane;
use doppler_infer::template::Conversation;

pub const FIELDS: &[Field] = &[
    Field("model", Taken, "a name or an id, as `/v1/models` lists them"),
    Field(
        "input",
        Taken,
        "a text, or items: message, function_call, function_call_output; reasoning is left out",
    ),
    Field("instructions", Taken, ""),
    Field("stream", Taken, ""),
    Field("stream_options", Ignored, ""),
    Field("max_output_tokens", Taken, "without it until the context is full"),
    Field("temperature", Taken, "1 if absent"),
    Field("top_p", Taken, ""),
    Field("seed", Taken, "not OpenAI's"),
    Field("tools", Taken, "functions; `strict` holds the arguments to the schema"),
    Field(
        "tool_choice",
        Taken,
        "`required` and a name: the answer is one call, of arguments that fit",
    ),
    Field("parallel_tool_calls", Taken, "with false, nothing counts after the first call"),
    Field("metadata", Taken, "returned"),
    Field("user", Taken, "requests of one user take turns with those of others"),
    Field("safety_identifier", Taken, "the same"),
    Field("store", Only("false"), "nothing is stored; absent means false"),
    Field(
        "text",
        Taken,
        "`format`: text, json_object, json_schema; not OpenAI's: regex, grammar; `verbosity` is ignored",
    ),
    Field("truncation", Only("\"disabled\""), "nothing is left out of an input"),
    Field("reasoning", Ignored, ""),
    Field("include", Ignored, ""),
    Field("service_tier", Ignored, ""),
    Field("prompt_cache_key", Ignored, "prefixes are found by themselves"),
    Field("prompt_cache_retention", Ignored, ""),
    Field("top_logprobs", Refused, "use `/v1/chat/completions`"),
    Field("previous_response_id", Refused, "nothing is stored: send the whole input"),
    Field("conversation", Refused, "nothing is stored: send the whole input"),
    Field("background", Refused, "an answer is given at once"),
    Field("prompt", Refused, "there are no stored prompts"),
    Field("max_tool_calls", Refused, "there are no built-in tools"),
];

/// What an answer repeats of its request.
#[derive(Debug, Clone, Default)]
pub struct Echo(pub Object);

/// A response that was asked for.
#[derive(Debug)]
pub struct Respond {
    pub request: GenerateRequest,
    pub stream: bool,
    pub offer: Offer,
    pub lane: Lane,
    pub echo: Echo,
}

impl Respond {
    /// # Errors
    /// Names the field that is wrong.
    pub fn read(body: &Object) -> Result<Self, Failed> {
        let limit = tokens(body, "max_output_tokens")?;
        let offer = offer(body)?;
        let instructions: Option<String> = optional(body, "instructions")?;
        let system = instructions.iter().map(|text| Conversation::message("system", text));
        let mut messages: Vec<Value> = system.collect();
        match body.get("input") {
            Some(Value::String(text)) => messages.push(Conversation::message("user", text)),
            Some(Value::Array(list)) => items(list, &mut messages)?,
            _ => return Err(Failed::field("input", "it is a text or a list of items")),
        }
        let conversation = Conversation { messages, tools: offer.tools.clone(), thinking: None };
        Ok(Self {
            request: GenerateRequest {
                model: required(body, "model")?,
                chat: Some(conversation),
                tokens: limit.unwrap_or(usize::MAX),
                constraint: form::within(body, "text", "format")?,
                ..sampled(body)?
            },
            stream: optional(body, "stream")?.unwrap_or(false),
            echo: echo(body),
            offer,
            lane: lane(body, &["safety_identifier", "user"]),
        })
    }
}

fn echo(body: &Object) -> Echo {
    let or = |name: &str, default: Value| {
        let given = body.get(name).filter(|value| !value.is_null());
        (name.to_owned(), given.cloned().unwrap_or(default))
    };
    Echo(Object::from_iter([
        or("instructions", Value::Null),
        or("max_output_tokens", Value::Null),
        or("metadata", json!({})),
        or("parallel_tool_calls", true.into()),
        or("temperature", 1.0.into()),
        or("text", json!({ "format": { "type": "text" } })),
        or("tool_choice", "auto".into()),
        or("tools", json!([])),
        or("top_p", 1.0.into()),
    ]))
}

/// Appends the items as templates take them. The calls of one turn are one message.
fn items(list: &[Value], made: &mut Vec<Value>) -> Result<(), Failed> {
    for (at, item) in list.iter().enumerate() {
        let name = format!("input[{at}]");
        let kind = item.get("type").map_or(Some("message"), Value::as_str);
        match kind {
            Some("message") => made.push(message(item, &name)?),
            Some("function_call") => {
                let arguments = text(item, "arguments", &name)?;
                let called = text(item, "name", &name)?;
                let call = call(text(item, "call_id", &name)?, called, arguments);
                match made.last_mut().filter(|last| last["role"] == "assistant") {
                    Some(turn) => match turn["tool_calls"].as_array_mut() {
                        Some(calls) => calls.push(call),
                        None => turn["tool_calls"] = json!([call]),
                    },
                    None => made.push(json!({
                        "role": "assistant", "content": "", "tool_calls": [call],
                    })),
                }
            }
            Some("function_call_output") => {
                let id = text(item, "call_id", &name)?;
                let kinds = ["input_text", "output_text", "text"];
                let content = joined(item.get("output"), &kinds, &format!("{name}.output"))?;
                let result = result(made, id, &content);
                made.push(result);
            }
            Some("reasoning") => {}
            kind => {
                let why =
                    format!("items of type {kind:?} are refused: docs/api.md lists the others");
                return Err(Failed::field(name, why));
            }
        }
    }
    Ok(())
}

fn message(item: &Value, name: &str) -> Result<Value, Failed> {
    let role = match text(item, "role", name)? {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        role => {
            let why = format!("{role:?} is none of system, developer, user, assistant");
            return Err(Failed::field(format!("{name}.role"), why));
        }
    };
    let kinds = ["input_text", "output_text", "text", "refusal"];
    let content = joined(item.get("content"), &kinds, &format!("{name}.content"))?;
    Ok(Conversation::message(role, &content))
}

fn offer(body: &Object) -> Result<Offer, Failed> {
    let tools = optional::<Vec<Value>>(body, "tools")?.unwrap_or_default();
    let mut strict = Vec::new();
    let tools = tools.iter().enumerate().map(|(at, tool)| {
        let name = format!("tools[{at}]");
        if tool["type"] != "function" {
            let why = format!("only functions can be called, not {}", tool["type"]);
            return Err(Failed::field(format!("{name}.type"), why));
        }
        let called = text(tool, "name", &name)?;
        if tool["strict"] == true {
            strict.push(called.to_owned());
        }
        Ok(function(called, tool["description"].as_str(), tool.get("parameters")))
    });
    let tools = tools.collect::<Result<Vec<_>, _>>()?;
    let named = |choice: &Value| choice["name"].as_str().map(str::to_owned);
    let choice = tool_choice(body.get("tool_choice"), named)?;
    let one_call = optional::<bool>(body, "parallel_tool_calls")? == Some(false);
    Offer { tools, choice, one_call, strict }.checked()
}

#[cfg(test)]
mod tests {
    use super::super::super::offer::Choice;
    use super::*;

    fn read(more: Value) -> Result<Respond, Failed> {
        let mut body = json!({ "model": "m", "input": "Hi" });
        let body = body.as_object_mut().unwrap();
        body.extend(more.as_object().unwrap().clone());
        super::super::super::fields::check(FIELDS, body)?;
        Respond::read(body)
    }

    #[test]
    fn items_become_what_templates_take() {
        let asked = read(json!({
            "instructions": "Be brief.",
            "input": [
                { "role": "user", "content": [{ "type": "input_text", "text": "2 + 3?" }] },
                { "type": "reasoning", "summary": [] },
                { "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
                  "content": [{ "type": "output_text", "text": "Wait.", "annotations": [] }] },
                { "type": "function_call", "call_id": "x", "name": "add", "arguments": "{\"a\":2}" },
                { "type": "function_call", "call_id": "y", "name": "add", "arguments": "{}" },
                { "type": "function_call_output", "call_id": "x", "output": "5" },
            ],
        }))
        .unwrap();
        let call = |id: &str, arguments: Value| {
            json!({ "id": id, "type": "function",
                    "function": { "name": "add", "arguments": arguments } })
        };
        let want = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "2 + 3?" },
            { "role": "assistant", "content": "Wait.",
              "tool_calls": [call("x", json!({ "a": 2 })), call("y", json!({}))] },
            { "role": "tool", "tool_call_id": "x", "content": "5", "name": "add" },
        ]);
        assert_eq!(Value::from(asked.request.chat.unwrap().messages), want);
        assert_eq!(asked.echo.0["instructions"], "Be brief.");
        assert_eq!(asked.echo.0["tools"], json!([]));
    }

    #[test]
    fn what_is_wrong_or_needs_a_memory_is_named() {
        let function = json!({ "type": "function", "name": "f", "parameters": {} });
        let this = json!({ "type": "function", "name": "f" });
        let asked = read(json!({ "tools": [function], "tool_choice": this })).unwrap();
        assert_eq!(asked.offer.choice, Choice::This("f".into()));
        for (more, param) in [
            (json!({ "input": null }), "input"),
            (json!({ "store": true }), "store"),
            (json!({ "previous_response_id": "resp_1" }), "previous_response_id"),
            (json!({ "text": { "format": { "type": "json_schema" } } }), "text.format.schema"),
            (json!({ "truncation": "auto" }), "truncation"),
            (json!({ "input": [{ "type": "item_reference", "id": "x" }] }), "input[0]"),
            (json!({ "tools": [{ "type": "web_search" }] }), "tools[0].type"),
            (json!({ "max_output_tokens": 0 }), "max_output_tokens"),
        ] {
            let failed = read(more.clone()).unwrap_err();
            assert_eq!(failed.param.as_deref(), Some(param), "{more}");
        }
    }
}
