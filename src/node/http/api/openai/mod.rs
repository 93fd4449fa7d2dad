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

/// What answers have in common.
#[derive(Debug, Clone)]
pub struct Header {
    pub id: String,
    pub created: u64,
    pub model: String,
}

/// What made the answer: it changes if a seed may give another text.
pub const FINGERPRINT: &str = concat!("doppler-node-", env!("CARGO_PKG_VERSION"));

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
