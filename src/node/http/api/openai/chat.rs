//! `POST /v1/chat/completions`: the request.

use serde_json::Value;

use super::super::answer::Reading;
use super::super::body::{Object, optional, required, tokens};
use super::super::failed::Failed;
use super::super::fields::Field;
use super::super::fields::Use::{Ignored, Only, Refused, Taken};
use super::super::form;
use super::super::offer::Offer;
use super::CHOICES_MAX;
use super::messages::{chat_tools, messages};
use super::sampling::{lane, sampled};
use crate::api::GenerateRequest;
use crate::engine::Lane;
use doppler_infer::template::Conversation;

pub const CHAT: &[Field] = &[
    Field("model", Taken, "a name or an id, as `/v1/models` lists them"),
    Field("messages", Taken, "text only; roles system, developer, user, assistant, tool"),
    Field("stream", Taken, ""),
    Field("stream_options", Taken, "`include_usage`; `include_obfuscation` is ignored"),
    Field("max_tokens", Taken, "without it until the context is full"),
    Field("max_completion_tokens", Taken, "the same; it wins over `max_tokens`"),
    Field("n", Taken, "up to 16; choice I has the seed plus I"),
    Field("seed", Taken, "the same seed gives the same text; without it another each time"),
    Field("stop", Taken, "a text or up to 16 of them"),
    Field("temperature", Taken, "1 if absent"),
    Field("top_p", Taken, "0 always takes the likeliest token"),
    Field("top_k", Taken, "not OpenAI's; 0 keeps all"),
    Field("min_p", Taken, "not OpenAI's"),
    Field("repetition_penalty", Taken, "not OpenAI's; 1 changes nothing"),
    Field("presence_penalty", Taken, "over the last `repeat_last_n` tokens, prompt included"),
    Field("frequency_penalty", Taken, "likewise"),
    Field("repeat_last_n", Taken, "not OpenAI's; 64 if absent"),
    Field("logit_bias", Taken, "ids are those of the model's own tokenizer"),
    Field("logprobs", Taken, ""),
    Field("top_logprobs", Taken, "up to 20, with `logprobs`"),
    Field(
        "tools",
        Taken,
        "functions, if the model's template offers tools; `strict` holds the arguments to the schema",
    ),
    Field(
        "tool_choice",
        Taken,
        "`required` and a name: the answer is one call, of arguments that fit",
    ),
    Field("parallel_tool_calls", Taken, "with false, nothing counts after the first call"),
    Field("chat_template_kwargs", Taken, "not OpenAI's; `enable_thinking` only"),
    Field(
        "response_format",
        Taken,
        "text, json_object, json_schema; not OpenAI's: regex (`regex`), grammar (`grammar`, in Lark)",
    ),
    Field("user", Taken, "requests of one user take turns with those of others"),
    Field("safety_identifier", Taken, "the same"),
    Field("metadata", Ignored, ""),
    Field("store", Only("false"), "nothing is stored"),
    Field("service_tier", Ignored, ""),
    Field("prompt_cache_key", Ignored, "prefixes are found by themselves"),
    Field("prompt_cache_retention", Ignored, ""),
    Field("reasoning_effort", Ignored, ""),
    Field("verbosity", Ignored, ""),
    Field("modalities", Only("[\"text\"]"), "no model here speaks"),
    Field("audio", Refused, "no model here speaks"),
    Field("prediction", Refused, "nothing is predicted"),
    Field("web_search_options", Refused, "nothing is searched"),
    Field("functions", Refused, "use `tools`"),
    Field("function_call", Refused, "use `tool_choice`"),
];

/// A chat that was asked for.
#[derive(Debug)]
pub struct Chat {
    pub request: GenerateRequest,
    pub choices: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub offer: Offer,
    pub lane: Lane,
}

impl Chat {
    /// # Errors
    /// Names the field that is wrong.
    pub fn read(body: &Object) -> Result<Self, Failed> {
        let choices = optional::<usize>(body, "n")?.unwrap_or(1);
        if !(1..=CHOICES_MAX).contains(&choices) {
            return Err(Failed::field("n", format!("1 to {CHOICES_MAX} choices are possible")));
        }
        let limit = tokens(body, "max_completion_tokens")?.or(tokens(body, "max_tokens")?);
        let offer = chat_tools(body)?;
        let given: Vec<Value> = required(body, "messages")?;
        let conversation = Conversation {
            messages: messages(&given)?,
            tools: offer.tools.clone(),
            thinking: thinking(body)?,
        };
        let options = optional::<Object>(body, "stream_options")?.unwrap_or_default();
        Ok(Self {
            request: GenerateRequest {
                model: required(body, "model")?,
                chat: Some(conversation),
                tokens: limit.unwrap_or(usize::MAX),
                logprobs: logprobs(body)?,
                constraint: form::read(body.get("response_format"), "response_format")?,
                ..sampled(body)?
            },
            choices,
            stream: optional(body, "stream")?.unwrap_or(false),
            include_usage: optional(&options, "include_usage")?.unwrap_or(false),
            offer,
            lane: lane(body, &["safety_identifier", "user"]),
        })
    }

    /// A request for each choice, whose answers are read so.
    pub fn requests(&self, reading: &Reading) -> Vec<GenerateRequest> {
        let one = |choice: usize| GenerateRequest {
            seed: self.request.seed.wrapping_add(choice as u64),
            begin: reading.begin.clone(),
            constraint: reading.constraint.clone(),
            ..self.request.clone()
        };
        (0..self.choices).map(one).collect()
    }
}

fn logprobs(body: &Object) -> Result<Option<usize>, Failed> {
    let wanted = optional::<bool>(body, "logprobs")?.unwrap_or(false);
    match (wanted, optional::<usize>(body, "top_logprobs")?) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(Failed::field("top_logprobs", "this needs logprobs to be true")),
    }
}

fn thinking(body: &Object) -> Result<Option<bool>, Failed> {
    let given = optional::<Object>(body, "chat_template_kwargs")?.unwrap_or_default();
    if let Some(other) = given.keys().find(|key| *key != "enable_thinking") {
        let name = format!("chat_template_kwargs.{other}");
        return Err(Failed::field(name, "only enable_thinking can be given"));
    }
    optional(&given, "enable_thinking")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(more: Value) -> Result<Chat, Failed> {
        let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "Hi" }] });
        let body = body.as_object_mut().unwrap();
        body.extend(more.as_object().unwrap().clone());
        super::super::super::fields::check(CHAT, body)?;
        Chat::read(body)
    }

    #[test]
    fn every_option_reaches_the_engine() {
        let chat = read(json!({
            "max_tokens": 5, "max_completion_tokens": 6, "n": 2, "seed": -1, "stop": "x",
            "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "presence_penalty": 0.2,
            "frequency_penalty": 0.3, "repetition_penalty": 1.1, "repeat_last_n": 9,
            "logit_bias": { "7": -100 }, "logprobs": true, "top_logprobs": 4, "stream": true,
            "stream_options": { "include_usage": true },
            "chat_template_kwargs": { "enable_thinking": false }
        }))
        .unwrap();
        let want = GenerateRequest {
            model: "m".into(),
            tokens: 6,
            seed: u64::MAX,
            stop: vec!["x".into()],
            temperature: 0.5,
            top_p: 0.9,
            top_k: 3,
            min_p: 0.1,
            presence_penalty: 0.2,
            frequency_penalty: 0.3,
            repetition_penalty: 1.1,
            repeat_last_n: Some(9),
            logit_bias: vec![(7, -100.0)],
            logprobs: Some(4),
            resume: true,
            chat: Some(Conversation {
                messages: vec![Conversation::message("user", "Hi")],
                thinking: Some(false),
                ..Conversation::default()
            }),
            ..GenerateRequest::default()
        };
        let json = |request: &GenerateRequest| serde_json::to_value(request).unwrap();
        assert_eq!(json(&chat.request), json(&want));
        assert!(chat.stream && chat.include_usage);
        let seeds: Vec<_> = chat.requests(&Reading::default()).iter().map(|one| one.seed).collect();
        assert_eq!(seeds, [u64::MAX, 0]);
    }

    #[test]
    fn defaults_are_openais() {
        let chat = read(json!({ "temperature": null })).unwrap();
        assert_eq!((chat.request.temperature, chat.request.top_p), (1.0, 1.0));
        assert_eq!((chat.request.tokens, chat.choices, chat.stream), (usize::MAX, 1, false));
        let other = read(json!({})).unwrap();
        assert_ne!(chat.request.seed, other.request.seed, "without a seed any");
        assert_eq!(read(json!({ "top_p": 0 })).unwrap().request.temperature, 0.0);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (more, param) in [
            (json!({ "messages": null }), "messages"),
            (json!({ "model": null }), "model"),
            (json!({ "n": 0 }), "n"),
            (json!({ "n": 17 }), "n"),
            (json!({ "max_tokens": 0 }), "max_tokens"),
            (json!({ "max_tokens": -1 }), "max_tokens"),
            (json!({ "temperature": "hot" }), "temperature"),
            (json!({ "top_logprobs": 2 }), "top_logprobs"),
            (json!({ "logit_bias": { "x": 1 } }), "logit_bias"),
            (json!({ "response_format": { "type": "xml" } }), "response_format.type"),
            (json!({ "functions": [{ "name": "f" }] }), "functions"),
            (json!({ "audio": { "voice": "x" } }), "audio"),
            (json!({ "temprature": 1 }), "temprature"),
            (json!({ "chat_template_kwargs": { "x": 1 } }), "chat_template_kwargs.x"),
        ] {
            let failed = read(more.clone()).unwrap_err();
            assert_eq!(failed.param.as_deref(), Some(param), "{more}");
            assert_eq!(failed.status(), 400);
        }
    }
}
