//! OpenAI's chat completions and completions: requests in, answers out.
//!
//! Reference: OpenAI's API reference, "Chat" and "Completions".

mod chat;
mod chat_reply;
mod completions;
mod messages;
mod sampling;

pub use chat::{CHAT, Chat};
pub use chat_reply::{ChatStream, chat_whole};
pub use completions::{COMPLETIONS, Completion, CompletionStream, completion_whole};
pub use messages::{call, joined, result, tool_choice};
pub use sampling::{lane, sampled};

use serde_json::{Value, json};

use super::answer::{Finish, Usage};
use super::sse;

/// What answers have in common.
#[derive(Debug, Clone)]
pub struct Header {
    pub id: String,
    pub created: u64,
    pub model: String,
}

impl Header {
    /// An answer, or a part of one, of the kind that OpenAI calls `object`.
    fn body(&self, object: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": FINGERPRINT,
        })
    }

    /// A part of a stream, whose last part may have the `usage`.
    fn chunk(&self, object: &str, choices: Value, include_usage: bool) -> String {
        let mut chunk = self.body(object, choices);
        if include_usage {
            chunk["usage"] = Value::Null;
        }
        sse::data(&chunk)
    }

    /// How a stream ends, after a part with the usage if that was asked for.
    fn done(&self, object: &str, used: Option<Usage>) -> String {
        let used = used.map(|used| {
            let mut chunk = self.body(object, json!([]));
            chunk["usage"] = usage(used);
            sse::data(&chunk)
        });
        used.unwrap_or_default() + sse::DONE
    }
}

/// What made the answer: it changes if a seed may give another text.
const FINGERPRINT: &str = concat!("doppler-node-", env!("CARGO_PKG_VERSION"));

/// The most choices of a request.
pub const CHOICES_MAX: usize = 16;

fn finish_reason(finish: &Finish) -> &'static str {
    match finish {
        Finish::Stop | Finish::StopText(_) => "stop",
        Finish::Length | Finish::Context => "length",
        Finish::Calls => "tool_calls",
    }
}

fn usage(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
        "prompt_tokens_details": { "cached_tokens": usage.cached },
    })
}
