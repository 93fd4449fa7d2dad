//! `POST /v1/completions`: a prompt that is continued as it is.

use serde_json::{Value, json};

use super::super::answer::{Finish, Part, Told, Usage, Whole};
use super::super::body::{Object, optional, required, tokens};
use super::super::failed::{Failed, Form};
use super::super::fields::Field;
use super::super::fields::Use::{Only, Refused, Taken};
use super::super::form;
use super::super::sse;
use super::super::submit::Writer;
use super::sampling::{lane, sampled};
use super::{CHOICES_MAX, Header, finish_reason, usage};
use crate::api::{GenerateRequest, TokenOdds};
use crate::engine::Lane;

pub const COMPLETIONS: &[Field] = &[
    Field("model", Taken, "a name or an id, as `/v1/models` lists them"),
    Field("prompt", Taken, "a text, tokens, or a list of either"),
    Field("stream", Taken, ""),
    Field("stream_options", Taken, "`include_usage`; `include_obfuscation` is ignored"),
    Field("max_tokens", Taken, "16 if absent"),
    Field("n", Taken, "prompts times choices: up to 16"),
    Field("seed", Taken, "choice I has the seed plus I"),
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
    Field("logprobs", Taken, "up to 20"),
    Field("response_format", Taken, "not OpenAI's: as for chats"),
    Field("user", Taken, "requests of one user take turns with those of others"),
    Field("best_of", Only("1"), "every choice is returned: use `n`"),
    Field("echo", Refused, "the prompt is not repeated"),
    Field("suffix", Refused, "nothing is filled in"),
];

/// Tokens of an answer if the request does not say.
const TOKENS_DEFAULT: usize = 16;

/// A completion that was asked for: a request for each prompt and choice, in OpenAI's order.
#[derive(Debug)]
pub struct Completion {
    pub model: String,
    pub requests: Vec<GenerateRequest>,
    /// How many of them share a prompt.
    pub choices: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub lane: Lane,
}

impl Completion {
    /// # Errors
    /// Names the field that is wrong.
    pub fn read(body: &Object) -> Result<Self, Failed> {
        let choices = optional::<usize>(body, "n")?.unwrap_or(1);
        let prompts = prompts(body.get("prompt"))?;
        if !(1..=CHOICES_MAX).contains(&prompts.len().saturating_mul(choices)) {
            let why = format!("1 to {CHOICES_MAX} choices are possible, of all prompts together");
            return Err(Failed::field("n", why));
        }
        let model: String = required(body, "model")?;
        let base = GenerateRequest {
            model: model.clone(),
            tokens: tokens(body, "max_tokens")?.unwrap_or(TOKENS_DEFAULT),
            logprobs: optional(body, "logprobs")?,
            constraint: form::read(body.get("response_format"), "response_format")?,
            ..sampled(body)?
        };
        let choice = |prompt: GenerateRequest, choice: usize| GenerateRequest {
            seed: base.seed.wrapping_add(choice as u64),
            prompt: prompt.prompt,
            prompt_ids: prompt.prompt_ids,
            ..base.clone()
        };
        let requests = prompts
            .iter()
            .flat_map(|prompt| (0..choices).map(|at| choice(prompt.clone(), at)))
            .collect();
        let options = optional::<Object>(body, "stream_options")?.unwrap_or_default();
        Ok(Self {
            model,
            requests,
            choices,
            stream: optional(body, "stream")?.unwrap_or(false),
            include_usage: optional(&options, "include_usage")?.unwrap_or(false),
            lane: lane(body, &["user"]),
        })
    }
}

/// Requests that have only their prompts.
fn prompts(given: Option<&Value>) -> Result<Vec<GenerateRequest>, Failed> {
    let wrong = || Failed::field("prompt", "it is a text, a list of tokens, or a list of either");
    let text = |text: &str| GenerateRequest { prompt: text.to_owned(), ..Default::default() };
    let ids = |list: &[Value]| {
        let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = list.iter().map(id).collect();
        let prompt_ids = ids.filter(|ids| !ids.is_empty()).ok_or_else(wrong)?;
        Ok(GenerateRequest { prompt_ids, ..Default::default() })
    };
    match given {
        None | Some(Value::Null) => Err(Failed::field("prompt", "this is required")),
        Some(Value::String(prompt)) => Ok(vec![text(prompt)]),
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_u64) => Ok(vec![ids(list)?]),
        Some(Value::Array(list)) => {
            let one = |value: &Value| match value {
                Value::String(prompt) => Ok(text(prompt)),
                Value::Array(list) => ids(list),
                _ => Err(wrong()),
            };
            list.iter().map(one).collect()
        }
        Some(_) => Err(wrong()),
    }
}

/// OpenAI's older form: lists side by side. `offset` is where the text of the first begins.
fn logprobs(odds: &[TokenOdds], offset: usize) -> Value {
    let mut at = offset;
    let offsets: Vec<usize> = odds
        .iter()
        .map(|odds| {
            let here = at;
            at += odds.text.chars().count();
            here
        })
        .collect();
    let top = |odds: &TokenOdds| {
        let pairs = odds.top.iter().map(|top| (top.text.clone(), Value::from(top.logprob)));
        Value::Object(pairs.collect())
    };
    json!({
        "tokens": odds.iter().map(|odds| Value::from(odds.text.as_str())).collect::<Value>(),
        "token_logprobs": odds.iter().map(|odds| Value::from(odds.logprob)).collect::<Value>(),
        "top_logprobs": odds.iter().map(top).collect::<Value>(),
        "text_offset": offsets,
    })
}

/// The tokens of all answers. Those of one prompt share it.
fn total(choices: usize, usages: &[Usage]) -> Usage {
    let prompts = usages.chunks(choices.max(1)).map(|of| super::super::submit::total(of.to_vec()));
    prompts.fold(Usage::default(), |sum, one| Usage {
        prompt: sum.prompt + one.prompt,
        cached: sum.cached + one.cached,
        generated: sum.generated + one.generated,
    })
}

/// What an answer and a part of a stream are called.
const OBJECT: &str = "text_completion";

/// All of an answer. `choices` share a prompt.
pub fn completion_whole(
    header: &Header,
    with_odds: bool,
    choices: usize,
    answers: &[(Whole, Finish, Usage)],
) -> Value {
    let usages: Vec<_> = answers.iter().map(|(.., usage)| *usage).collect();
    let answers = answers.iter().enumerate().map(|(index, (whole, finish, _))| {
        json!({
            "index": index,
            "text": whole.text,
            "logprobs": with_odds.then(|| logprobs(&whole.odds, 0)),
            "finish_reason": finish_reason(finish),
        })
    });
    let mut whole = header.body(OBJECT, answers.collect());
    whole["usage"] = usage(total(choices, &usages));
    whole
}

/// Writes an answer as chunks.
pub struct CompletionStream {
    header: Header,
    include_usage: bool,
    choices: usize,
    /// Of each answer: characters so far, and its tokens.
    answers: Vec<(usize, Usage)>,
    failed: bool,
}

impl CompletionStream {
    pub fn new(header: Header, asked: &Completion) -> Self {
        let answers = vec![(0, Usage::default()); asked.requests.len()];
        let Completion { include_usage, choices, .. } = *asked;
        Self { header, include_usage, choices, answers, failed: false }
    }

    fn chunk(&self, index: usize, text: &str, odds: &[TokenOdds], finish: Option<&str>) -> String {
        let logprobs = (!odds.is_empty()).then(|| logprobs(odds, self.answers[index].0));
        let choice = json!([{ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish }]);
        self.header.chunk(OBJECT, choice, self.include_usage)
    }

    fn parts(&mut self, index: usize, parts: Vec<Part>) -> String {
        let mut said = String::new();
        for part in parts {
            // No tools are offered, so there are no calls.
            let Part::Text { text, odds } = part else { continue };
            said += &self.chunk(index, &text, &odds, None);
            let tokens: usize = odds.iter().map(|odds| odds.text.chars().count()).sum();
            self.answers[index].0 += tokens;
        }
        said
    }
}

impl Writer for CompletionStream {
    fn write(&mut self, choice: usize, told: Told) -> String {
        match told {
            Told::Start(_) => String::new(),
            Told::Parts(parts) => self.parts(choice, parts),
            Told::End { parts, finish, usage } => {
                self.answers[choice].1 = usage;
                let said = self.parts(choice, parts);
                said + &self.chunk(choice, "", &[], Some(finish_reason(&finish)))
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
        let used = self.include_usage.then(|| {
            let usages: Vec<_> = self.answers.iter().map(|(_, usage)| *usage).collect();
            total(self.choices, &usages)
        });
        self.header.done(OBJECT, used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: Value) -> Result<Completion, Failed> {
        let mut body = json!({ "model": "m", "prompt": "Hi" });
        let body = body.as_object_mut().unwrap();
        body.extend(more.as_object().unwrap().clone());
        super::super::super::fields::check(COMPLETIONS, body)?;
        Completion::read(body)
    }

    #[test]
    fn prompts_are_texts_or_tokens_and_each_has_its_choices() {
        let asked = read(json!({ "prompt": ["a", [1, 2]], "n": 2, "seed": 5 })).unwrap();
        let seen: Vec<_> = asked
            .requests
            .iter()
            .map(|one| (one.prompt.as_str(), one.prompt_ids.as_slice(), one.seed, one.tokens))
            .collect();
        let ids = [1, 2];
        let want: [(&str, &[u32], u64, usize); 4] =
            [("a", &[], 5, 16), ("a", &[], 6, 16), ("", &ids, 5, 16), ("", &ids, 6, 16)];
        assert_eq!(seen, want);
        assert_eq!(read(json!({ "prompt": [7] })).unwrap().requests[0].prompt_ids, [7]);
        for (more, param) in [
            (json!({ "prompt": null }), "prompt"),
            (json!({ "prompt": [] }), "n"),
            (json!({ "prompt": [[]] }), "prompt"),
            (json!({ "prompt": [1, "a"] }), "prompt"),
            (json!({ "prompt": 7 }), "prompt"),
            (json!({ "n": 17 }), "n"),
            (json!({ "echo": true }), "echo"),
            (json!({ "suffix": "x" }), "suffix"),
            (json!({ "best_of": 2 }), "best_of"),
        ] {
            let failed = read(more.clone()).unwrap_err();
            assert_eq!(failed.param.as_deref(), Some(param), "{more}");
        }
    }

    #[test]
    fn answers_of_one_prompt_count_it_once() {
        let usage = Usage { prompt: 3, cached: 1, generated: 2 };
        let sum = total(2, &[usage; 4]);
        assert_eq!(sum, Usage { prompt: 6, cached: 2, generated: 8 });
    }

    #[test]
    fn offsets_go_on_from_chunk_to_chunk() {
        let odds = |text: &str| TokenOdds { id: 0, text: text.into(), logprob: -1.0, top: vec![] };
        let part = |text: &str| Part::Text { text: text.into(), odds: vec![odds(text)] };
        let asked = read(json!({ "logprobs": 0 })).unwrap();
        assert_eq!(asked.requests[0].logprobs, Some(0));
        let header = Header { id: "cmpl-1".into(), created: 1, model: "m".into() };
        let mut stream = CompletionStream::new(header, &asked);
        let first = stream.write(0, Told::Parts(vec![part("äb")]));
        let second = stream.write(0, Told::Parts(vec![part("c")]));
        assert!(first.contains("\"text_offset\":[0]"), "{first}");
        assert!(second.contains("\"text_offset\":[2]"), "{second}");
    }
}
