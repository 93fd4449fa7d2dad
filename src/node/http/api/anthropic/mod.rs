//! Anthropic's messages: requests in, answers out.
//!
//! Reference: Anthropic's API reference, "Messages", "Count tokens" and "Streaming messages".

mod reply;
mod request;

pub use reply::{MessageStream, message_whole};
pub use request::{COUNT, MESSAGES, Message};
