//! An answer of the gateway or the port itself that is not 2xx: a sentence and a stable label.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::pace::RETRY_MIN_S;
use doppler_store::BadHash;

/// An answer that is not 2xx, as JSON.
#[derive(Debug)]
pub struct Refused {
    pub status: StatusCode,
    /// A stable name.
    pub code: &'static str,
    pub error: String,
    /// The object's size, if a range was outside it.
    pub size: Option<u64>,
    /// Seconds after which a client may ask again, if it is told 503.
    pub retry_s: u64,
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
        Self { status, code, error, size: None, retry_s: RETRY_MIN_S }
    }

    /// Nothing is known of when there will be room.
    pub fn busy(why: &str) -> Self {
        Self::busy_for(why, RETRY_MIN_S)
    }

    /// There will probably be room in so many seconds.
    pub fn busy_for(why: &str, retry_s: u64) -> Self {
        let error = format!("{why}; ask again in {retry_s} s");
        Self { retry_s, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", error) }
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
            headers.insert(header::RETRY_AFTER, HeaderValue::from(self.retry_s));
        }
        if let Some(size) = self.size
            && let Ok(range) = HeaderValue::from_str(&format!("bytes */{size}"))
        {
            headers.insert(header::CONTENT_RANGE, range);
        }
        response
    }
}
