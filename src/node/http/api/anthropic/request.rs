//! `POST /v1/messages` and `/v1/messages/count_tokens`: the request.

use serde_json::{Value, json};

use super::super::body::{Object, object, optional, required, text, texts, tokens};
use super::super::failed::Failed;
use super::super::fields::Field;
use super::super::fields::Use::{Ignored, Refused, Taken};
use super::super::form;
use super::super::offer::{Choice, Offer, function};
use super::super::openai::{joined, result, sampled};
use crate::api::GenerateRequest;
use crate::engine::Lane;
use doppler_infer::grammar::Constraint;
use doppler_infer::template::Conversation;

pub const MESSAGES: &[Field] = &[
    Field("model", Taken, "a name or an id, as `/v1/models` lists them"),
    Field("max_tokens", Taken, "required"),
    Field(
        "messages",
        Taken,
        "blocks text, tool_use, tool_result; thinking is left out; a last message of the assistant is gone on from",
    ),
    Field("system", Taken, "a text or text blocks"),
    Field("stream", Taken, ""),
    Field("stop_sequences", Taken, "up to 16"),
    Field("temperature", Taken, "1 if absent"),
    Field("top_p", Taken, ""),
    Field("top_k", Taken, ""),
    Field(
        "tools",
        Taken,
        "with an `input_schema`, which `strict` holds the input to; not Anthropic's own tools",
    ),
    Field("tool_choice", Taken, "`any` and `tool`: the answer is one call, of an input that fits"),
    Field("metadata", Taken, "`user_id`: requests of one user take turns with those of others"),
    Field("thinking", Taken, "`disabled` only"),
    Field("seed", Taken, "not Anthropic's"),
    Field("service_tier", Ignored, ""),
    Field("cache_control", Ignored, "prefixes are found by themselves; in blocks, too"),
    Field("inference_geo", Ignored, ""),
    Field("container", Refused, "no code is run"),
    Field("mcp_servers", Refused, "no server is asked"),
    Field("context_management", Refused, "messages stay as they are"),
    Field(
        "output_config",
        Taken,
        "`format`: json_schema; not Anthropic's: json_object, regex, grammar; `effort` is ignored",
    ),
    Field("output_format", Taken, "the same, as it was at first"),
];

pub const COUNT: &[Field] = &[
    Field("model", Taken, ""),
    Field("messages", Taken, "as in `/v1/messages`"),
    Field("system", Taken, ""),
    Field("tools", Taken, ""),
    Field("tool_choice", Taken, ""),
    Field("thinking", Taken, "`disabled` only"),
    Field("cache_control", Ignored, ""),
    Field("mcp_servers", Refused, "no server is asked"),
    Field("context_management", Refused, "messages stay as they are"),
    Field("output_config", Ignored, ""),
    Field("output_format", Ignored, ""),
];

/// A message that was asked for.
#[derive(Debug)]
pub struct Message {
    pub request: GenerateRequest,
    pub stream: bool,
    pub offer: Offer,
    pub lane: Lane,
}

impl Message {
    /// `counts`: only the prompt's tokens are wanted.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn read(body: &Object, counts: bool) -> Result<Self, Failed> {
        let limit = if counts { Some(1) } else { tokens(body, "max_tokens")? };
        let limit = limit.ok_or_else(|| Failed::field("max_tokens", "this is required"))?;
        let offer = offer(body)?;
        let mut messages = system(body)?;
        let given: Vec<Value> = required(body, "messages")?;
        turns(&given, &mut messages)?;
        let begin = prefill(&mut messages, &offer)?;
        let metadata = optional::<Object>(body, "metadata")?.unwrap_or_default();
        let user = optional::<String>(&metadata, "user_id")?;
        let conversation =
            Conversation { messages, tools: offer.tools.clone(), thinking: thinking(body)? };
        Ok(Self {
            request: GenerateRequest {
                model: required(body, "model")?,
                chat: Some(conversation),
                begin,
                tokens: limit,
                constraint: form(body)?,
                stop: texts(body, "stop_sequences")?,
                ..sampled(body)?
            },
            stream: optional(body, "stream")?.unwrap_or(false),
            offer,
            lane: user.filter(|user| !user.is_empty()).map_or_else(Lane::own, |u| Lane::of(&u)),
        })
    }
}

/// The form of the answer: within `output_config`, or as it was at first.
fn form(body: &Object) -> Result<Option<Constraint>, Failed> {
    match form::within(body, "output_config", "format")? {
        Some(form) => Ok(Some(form)),
        None => form::read(body.get("output_format"), "output_format"),
    }
}

fn system(body: &Object) -> Result<Vec<Value>, Failed> {
    let system = joined(body.get("system"), &["text"], "system")?;
    let message = (!system.is_empty()).then(|| Conversation::message("system", &system));
    Ok(message.into_iter().collect())
}

fn thinking(body: &Object) -> Result<Option<bool>, Failed> {
    let Some(thinking) = optional::<Object>(body, "thinking")? else { return Ok(None) };
    match thinking.get("type").and_then(Value::as_str) {
        Some("disabled") => Ok(Some(false)),
        _ => Err(Failed::field("thinking", "thoughts are not told apart here: use disabled")),
    }
}

/// Appends the turns as templates take them: results of tools are messages of their own.
fn turns(given: &[Value], made: &mut Vec<Value>) -> Result<(), Failed> {
    for (at, turn) in given.iter().enumerate() {
        let name = format!("messages[{at}]");
        let role = text(turn, "role", &name)?;
        let wrong = |why: &str| Failed::field(format!("{name}.role"), why.to_owned());
        let name = format!("{name}.content");
        let blocks = match turn.get("content") {
            Some(Value::String(text)) => vec![json!({ "type": "text", "text": text })],
            Some(Value::Array(blocks)) => blocks.clone(),
            _ => return Err(Failed::field(name, "it is a text or a list of blocks")),
        };
        match role {
            "user" => user(&blocks, made, &name)?,
            "assistant" => made.push(assistant(&blocks, &name)?),
            _ => return Err(wrong("it is user or assistant (system is a field of its own)")),
        }
    }
    Ok(())
}

fn user(blocks: &[Value], made: &mut Vec<Value>, name: &str) -> Result<(), Failed> {
    let mut texts: Vec<&str> = Vec::new();
    for (at, block) in blocks.iter().enumerate() {
        let name = format!("{name}[{at}]");
        match block["type"].as_str() {
            Some("text") => texts.push(text(block, "text", &name)?),
            Some("tool_result") => {
                let id = text(block, "tool_use_id", &name)?;
                let content = joined(block.get("content"), &["text"], &format!("{name}.content"))?;
                let content = match block["is_error"] == true {
                    true => format!("Error: {content}"),
                    false => content,
                };
                let result = result(made, id, &content);
                made.push(result);
            }
            kind => return Err(refused(&name, kind)),
        }
    }
    if !texts.is_empty() {
        made.push(Conversation::message("user", &texts.join("\n")));
    }
    Ok(())
}

fn assistant(blocks: &[Value], name: &str) -> Result<Value, Failed> {
    let (mut texts, mut calls): (Vec<&str>, Vec<Value>) = Default::default();
    for (at, block) in blocks.iter().enumerate() {
        let name = format!("{name}[{at}]");
        match block["type"].as_str() {
            Some("text") => texts.push(text(block, "text", &name)?),
            Some("tool_use") => {
                object(&block["input"], &format!("{name}.input"))?;
                calls.push(json!({
                    "id": text(block, "id", &name)?,
                    "type": "function",
                    "function": { "name": text(block, "name", &name)?, "arguments": block["input"] },
                }));
            }
            Some("thinking" | "redacted_thinking") => {}
            kind => return Err(refused(&name, kind)),
        }
    }
    let mut made = Conversation::message("assistant", &texts.join("\n"));
    if !calls.is_empty() {
        made["tool_calls"] = calls.into();
    }
    Ok(made)
}

fn refused(name: &str, kind: Option<&str>) -> Failed {
    match kind {
        Some(kind) => Failed::field(
            name,
            format!("blocks of type {kind:?} are refused: only text and tools are understood here"),
        ),
        None => Failed::field(name, "a block has a type"),
    }
}

/// The beginning of the answer, which a last message of the assistant is.
fn prefill(messages: &mut Vec<Value>, offer: &Offer) -> Result<String, Failed> {
    let is_begun = messages
        .last()
        .is_some_and(|last| last["role"] == "assistant" && last.get("tool_calls").is_none());
    if !is_begun {
        return Ok(String::new());
    }
    if !matches!(offer.choice, Choice::Auto | Choice::Never) {
        let why = "an answer that must call a tool cannot be begun by the last message";
        return Err(Failed::field("tool_choice", why));
    }
    let last = messages.pop().unwrap_or_default();
    Ok(last["content"].as_str().unwrap_or_default().to_owned())
}

fn offer(body: &Object) -> Result<Offer, Failed> {
    let tools = optional::<Vec<Value>>(body, "tools")?.unwrap_or_default();
    let mut strict = Vec::new();
    let tools = tools.iter().enumerate().map(|(at, tool)| {
        let name = format!("tools[{at}]");
        if let Some(kind) = tool["type"].as_str().filter(|kind| *kind != "custom") {
            let why = format!("{kind:?} is not there; only tools with an input_schema are");
            return Err(Failed::field(format!("{name}.type"), why));
        }
        let called = text(tool, "name", &name)?;
        if tool["strict"] == true {
            strict.push(called.to_owned());
        }
        Ok(function(called, tool["description"].as_str(), tool.get("input_schema")))
    });
    let tools = tools.collect::<Result<Vec<_>, _>>()?;
    let given = optional::<Value>(body, "tool_choice")?.unwrap_or(Value::Null);
    let choice = match given["type"].as_str() {
        None if given.is_null() => Choice::Auto,
        Some("auto") => Choice::Auto,
        Some("none") => Choice::Never,
        Some("any") => Choice::Any,
        Some("tool") => Choice::This(text(&given, "name", "tool_choice")?.to_owned()),
        _ => return Err(Failed::field("tool_choice", "its type is auto, any, tool or none")),
    };
    let one_call = given["disable_parallel_tool_use"] == true;
    Offer { tools, choice, one_call, strict }.checked()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: Value) -> Result<Message, Failed> {
        let mut body = json!({ "model": "m", "max_tokens": 9,
                               "messages": [{ "role": "user", "content": "Hi" }] });
        let body = body.as_object_mut().unwrap();
        body.extend(more.as_object().unwrap().clone());
        super::super::super::fields::check(MESSAGES, body)?;
        Message::read(body, false)
    }

    fn messages(asked: &Message) -> Value {
        asked.request.chat.as_ref().unwrap().messages.clone().into()
    }

    #[test]
    fn blocks_become_what_templates_take() {
        let asked = read(json!({
            "system": [{ "type": "text", "text": "Be brief.", "cache_control": {} }],
            "messages": [
                { "role": "user", "content": "2 + 3?" },
                { "role": "assistant", "content": [
                    { "type": "thinking", "thinking": "hm", "signature": "s" },
                    { "type": "text", "text": "Let me add." },
                    { "type": "tool_use", "id": "x", "name": "add", "input": { "a": 2 } }] },
                { "role": "user", "content": [
                    { "type": "tool_result", "tool_use_id": "x", "is_error": true,
                      "content": [{ "type": "text", "text": "no" }] },
                    { "type": "text", "text": "Try again." }] },
            ],
            "stop_sequences": ["a", "b"], "top_k": 3, "metadata": { "user_id": "u" },
            "thinking": { "type": "disabled" },
        }))
        .unwrap();
        let want = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "2 + 3?" },
            { "role": "assistant", "content": "Let me add.", "tool_calls": [
                { "id": "x", "type": "function",
                  "function": { "name": "add", "arguments": { "a": 2 } } }] },
            { "role": "tool", "tool_call_id": "x", "content": "Error: no", "name": "add" },
            { "role": "user", "content": "Try again." },
        ]);
        assert_eq!(messages(&asked), want);
        assert_eq!((asked.request.tokens, asked.request.top_k), (9, 3));
        assert_eq!(asked.request.stop, ["a", "b"]);
        assert_eq!(asked.lane, Lane::of("u"));
        assert_eq!(asked.request.chat.unwrap().thinking, Some(false));
    }

    #[test]
    fn a_last_message_of_the_assistant_is_gone_on_from() {
        let turns = json!([{ "role": "user", "content": "Hi" },
                           { "role": "assistant", "content": "Well," }]);
        let asked = read(json!({ "messages": turns })).unwrap();
        assert_eq!(asked.request.begin, "Well,");
        assert_eq!(messages(&asked).as_array().unwrap().len(), 1);
    }

    #[test]
    fn tools_and_the_choice_among_them_are_read() {
        let tool = json!({ "name": "f", "description": "d", "input_schema": { "type": "object" } });
        let with = |choice: Value| read(json!({ "tools": [tool], "tool_choice": choice }));
        assert_eq!(with(json!({ "type": "any" })).unwrap().offer.choice, Choice::Any);
        let one = json!({ "type": "auto", "disable_parallel_tool_use": true });
        assert!(with(one).unwrap().offer.one_call);
        let named = with(json!({ "type": "tool", "name": "f" })).unwrap();
        assert_eq!(named.offer.choice, Choice::This("f".into()));
        assert_eq!(named.offer.tools[0]["function"]["description"], "d");
        assert!(with(json!({ "type": "none" })).unwrap().offer.tools.is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let content =
            |block: Value| json!({ "messages": [{ "role": "user", "content": [block] }] });
        for (more, param) in [
            (json!({ "max_tokens": null }), "max_tokens"),
            (json!({ "messages": [{ "role": "system", "content": "x" }] }), "messages[0].role"),
            (content(json!({ "type": "image" })), "messages[0].content[0]"),
            (content(json!({ "type": "tool_result" })), "messages[0].content[0].tool_use_id"),
            (json!({ "thinking": { "type": "enabled", "budget_tokens": 1024 } }), "thinking"),
            (json!({ "tools": [{ "type": "bash_20250124", "name": "bash" }] }), "tools[0].type"),
            (json!({ "tool_choice": { "type": "tool", "name": "g" } }), "tool_choice"),
            (json!({ "mcp_servers": [{ "url": "x" }] }), "mcp_servers"),
            (
                json!({ "output_config": { "format": { "type": "xml" } } }),
                "output_config.format.type",
            ),
            (json!({ "unknown": 1 }), "unknown"),
        ] {
            let failed = read(more.clone()).unwrap_err();
            assert_eq!(failed.param.as_deref(), Some(param), "{more}");
        }
    }
}
