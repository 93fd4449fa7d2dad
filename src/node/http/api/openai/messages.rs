//! Messages and tools of a chat, as templates take them.
//!
//! Templates take OpenAI's form with two differences: a content is one text, and the arguments of a
//! call are an object.

use serde_json::{Value, json};

use super::super::body::{Object, optional, text};
use super::super::failed::Failed;
use super::super::offer::{Choice, Offer, function};

/// The text of a content: itself, or that of its parts, a line each.
///
/// # Errors
/// If a part is no text.
pub fn joined(content: Option<&Value>, kinds: &[&str], name: &str) -> Result<String, Failed> {
    let wrong = || Failed::field(name, "a content is a text or a list of parts");
    match content {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(content)) => Ok(content.clone()),
        Some(Value::Array(parts)) => {
            let parts = parts.iter().enumerate().map(|(at, part)| {
                let name = format!("{name}[{at}]");
                match part["type"].as_str() {
                    Some(kind) if kinds.contains(&kind) => text(part, "text", &name),
                    Some(kind) => Err(Failed::field(
                        name,
                        format!("parts of type {kind:?} are refused: only text is understood here"),
                    )),
                    None => Err(Failed::field(name, "a part has a type")),
                }
            });
            Ok(parts.collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        Some(_) => Err(wrong()),
    }
}

/// A call in a message of the assistant.
pub fn call(id: &str, name: &str, arguments: &str) -> Value {
    // What is no object stays as the model wrote it.
    let arguments: Value =
        serde_json::from_str(arguments).unwrap_or_else(|_| Value::from(arguments));
    json!({
        "id": id,
        "type": "function",
        "function": { "name": name, "arguments": arguments },
    })
}

/// The messages of a chat, as templates take them.
///
/// # Errors
/// Names the message and what is wrong with it.
pub fn messages(list: &[Value]) -> Result<Vec<Value>, Failed> {
    let mut made: Vec<Value> = Vec::new();
    for (at, message) in list.iter().enumerate() {
        let name = format!("messages[{at}]");
        let role = text(message, "role", &name)?;
        let content =
            joined(message.get("content"), &["text", "refusal"], &format!("{name}.content"))?;
        made.push(match role {
            "system" | "developer" => json!({ "role": "system", "content": content }),
            "user" => json!({ "role": "user", "content": content }),
            "assistant" => assistant(message, &content, &name)?,
            "tool" => {
                let id = text(message, "tool_call_id", &name)?;
                result(&made, id, &content)
            }
            role => {
                let why = format!("{role:?} is none of system, developer, user, assistant, tool");
                return Err(Failed::field(format!("{name}.role"), why));
            }
        });
    }
    Ok(made)
}

fn assistant(message: &Value, content: &str, name: &str) -> Result<Value, Failed> {
    let mut made = json!({ "role": "assistant", "content": content });
    let calls = message.get("tool_calls").filter(|calls| !calls.is_null());
    let Some(calls) = calls else { return Ok(made) };
    let name = format!("{name}.tool_calls");
    let calls = calls.as_array().ok_or_else(|| Failed::field(&name, "this must be a list"))?;
    let calls = calls.iter().map(|given| {
        let function = &given["function"];
        let called = text(function, "name", &format!("{name}.function"))?;
        let arguments = function["arguments"].as_str().unwrap_or("{}");
        Ok(call(given["id"].as_str().unwrap_or_default(), called, arguments))
    });
    let calls = calls.collect::<Result<Vec<_>, Failed>>()?;
    if !calls.is_empty() {
        made["tool_calls"] = calls.into();
    }
    Ok(made)
}

/// A tool's result. Some templates want the tool's name, which an earlier call has.
pub fn result(before: &[Value], id: &str, content: &str) -> Value {
    let mut calls = before.iter().filter_map(|message| message["tool_calls"].as_array()).flatten();
    let called = calls.rfind(|call| call["id"] == id);
    let mut made = json!({ "role": "tool", "tool_call_id": id, "content": content });
    if let Some(call) = called {
        made["name"] = call["function"]["name"].clone();
    }
    made
}

/// The tools of a chat.
///
/// # Errors
/// If one is no function, or the choice is none.
pub fn chat_tools(body: &Object) -> Result<Offer, Failed> {
    let tools = optional::<Vec<Value>>(body, "tools")?.unwrap_or_default();
    let mut strict = Vec::new();
    let tools = tools.iter().enumerate().map(|(at, tool)| {
        let name = format!("tools[{at}]");
        match tool["type"].as_str() {
            Some("function") => {}
            kind => {
                let why = format!("only functions can be called, not {kind:?}");
                return Err(Failed::field(format!("{name}.type"), why));
            }
        }
        let given = &tool["function"];
        let called = text(given, "name", &format!("{name}.function"))?;
        if given["strict"] == true {
            strict.push(called.to_owned());
        }
        Ok(function(called, given["description"].as_str(), given.get("parameters")))
    });
    let tools = tools.collect::<Result<Vec<_>, _>>()?;
    let choice = tool_choice(body.get("tool_choice"), |choice| {
        choice["function"]["name"].as_str().map(str::to_owned)
    })?;
    let one_call = optional::<bool>(body, "parallel_tool_calls")? == Some(false);
    Offer { tools, choice, one_call, strict }.checked()
}

/// `none`, `auto`, `required`, or an object that names a function.
///
/// # Errors
/// If it is none of them.
pub fn tool_choice(
    choice: Option<&Value>,
    named: impl Fn(&Value) -> Option<String>,
) -> Result<Choice, Failed> {
    let wrong = "it is none, auto, required or the name of a function";
    match choice {
        None | Some(Value::Null) => Ok(Choice::Auto),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => Ok(Choice::Auto),
            "none" => Ok(Choice::Never),
            "required" => Ok(Choice::Any),
            _ => Err(Failed::field("tool_choice", wrong)),
        },
        Some(object) if object["type"] == "function" => {
            named(object).map(Choice::This).ok_or_else(|| Failed::field("tool_choice", wrong))
        }
        Some(_) => Err(Failed::field("tool_choice", wrong)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_what_templates_take() {
        let given = json!([
            { "role": "developer", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "a" },
                                          { "type": "text", "text": "b" }] },
            { "role": "assistant", "content": null, "tool_calls": [{ "id": "x", "type": "function",
                "function": { "name": "f", "arguments": "{\"n\": 1}" } }] },
            { "role": "tool", "tool_call_id": "x", "content": "2" },
            { "role": "assistant", "content": "It is 2." },
        ]);
        let made = messages(given.as_array().unwrap()).unwrap();
        let want = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "a\nb" },
            { "role": "assistant", "content": "", "tool_calls": [{ "id": "x", "type": "function",
                "function": { "name": "f", "arguments": { "n": 1 } } }] },
            { "role": "tool", "tool_call_id": "x", "content": "2", "name": "f" },
            { "role": "assistant", "content": "It is 2." },
        ]);
        assert_eq!(Value::from(made), want);
    }

    #[test]
    fn what_is_wrong_with_a_message_is_named() {
        for (message, param) in [
            (json!({ "content": "x" }), "messages[0].role"),
            (json!({ "role": "robot", "content": "x" }), "messages[0].role"),
            (json!({ "role": "user", "content": 7 }), "messages[0].content"),
            (
                json!({ "role": "user", "content": [{ "type": "image_url" }] }),
                "messages[0].content[0]",
            ),
            (json!({ "role": "tool", "content": "x" }), "messages[0].tool_call_id"),
        ] {
            let failed = messages(std::slice::from_ref(&message)).unwrap_err();
            assert_eq!(failed.param.as_deref(), Some(param), "{message}");
        }
    }

    #[test]
    fn tools_and_the_choice_among_them_are_read() {
        let function = json!({ "type": "function", "function": { "name": "f" } });
        let read = |more: Value| {
            let mut body = json!({ "tools": [function] }).as_object().unwrap().clone();
            body.extend(more.as_object().unwrap().clone());
            chat_tools(&body)
        };
        assert_eq!(read(json!({})).unwrap().choice, Choice::Auto);
        assert!(read(json!({ "tool_choice": "none" })).unwrap().tools.is_empty());
        assert_eq!(read(json!({ "tool_choice": "required" })).unwrap().choice, Choice::Any);
        let this = read(json!({ "tool_choice": function, "parallel_tool_calls": false })).unwrap();
        assert_eq!((this.choice, this.one_call), (Choice::This("f".into()), true));
        let other = json!({ "type": "function", "function": { "name": "g" } });
        for wrong in [json!({ "tool_choice": "perhaps" }), json!({ "tool_choice": other })] {
            assert_eq!(read(wrong).unwrap_err().param.as_deref(), Some("tool_choice"));
        }
        let strict = json!({ "type": "function", "function": { "name": "f", "strict": true } });
        assert_eq!(read(json!({ "tools": [strict] })).unwrap().strict, ["f"]);
        assert!(read(json!({ "tools": [{ "type": "web_search" }] })).is_err());
    }
}
