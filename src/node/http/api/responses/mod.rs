//! OpenAI's responses, without their memory: requests in, answers out.
//!
//! Reference: OpenAI's API reference, "Responses" and "Streaming events". Nothing is stored, so a
//! request carries its whole conversation, as with `store: false` there.

mod reply;
mod request;

pub use reply::{ResponseStream, response_whole};
pub use request::{Echo, FIELDS, Respond};
