//! An answer of the gateway or the port itself that is not 2xx: a sentence and a stable label.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use doppler_store::BadHash;

/// Seconds after which a client may retry when the port is busy.
const RETRY_S: u64 = 1;

/// An answer that is not 2xx, as JSON.
#[derive(Debug)]
pub struct Refused {
    pub status: StatusCode,
    /// A stable name.
    pub code: &'static str,
    pub error: String,
    /// The object's size, if a range was outside it.
    pub size: Option<u64>,
}

#[derive(Serialize)]
struct RefusedBody<'a> {
    error: String,
    code: &'a str,
    /// The code, as the control API names it.
    label: &'a str,
}

impl Refused {
    pub const fn new(status: StatusCode, code: &'static str, error: String) -> Self {
        Self { status, code, error, size: None }
    }

    pub fn busy(why: &str) -> Self {
        let error = format!("{why}; ask again in {RETRY_S} s");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", error)
    }

    pub fn bad_id(error: &BadHash) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", error.to_string())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let body = RefusedBody { error: self.error, code: self.code, label: self.code };
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_S));
        }
        if let Some(size) = self.size
            && let Ok(range) = HeaderValue::from_str(&format!("bytes */{size}"))
        {
            headers.insert(header::CONTENT_RANGE, range);
        }
        response
    }
}
