//! Server-sent events: an answer's body that comes as it is made.
//!
//! If the client goes, the body is dropped, and with it the channels on which the engine's events
//! come; the engine then stops at the next token.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::Stream;
use serde_json::Value;

/// The last line of OpenAI's streams.
pub const DONE: &str = "data: [DONE]\n\n";

/// An event without a name.
pub fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// An event named as its `type`.
pub fn named(value: &Value) -> String {
    format!("event: {}\ndata: {value}\n\n", value["type"].as_str().unwrap_or_default())
}

/// An answer of events.
pub fn response(events: impl Stream<Item = String> + Send + 'static) -> Response {
    use futures::StreamExt as _;
    let body = Body::from_stream(events.map(|event| Ok::<_, Infallible>(Bytes::from(event))));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, body).into_response()
}
