//! A failure of an API's request, in the form of the API that was asked. Pure.
//!
//! Labels and statuses are those of `failures`; both forms carry the same status.

use std::borrow::Cow;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::pace::RETRY_MIN_S;
use crate::{failures, one_line};

/// Whose form an error has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    OpenAi,
    Anthropic,
}

impl Form {
    /// The form of a path's API.
    pub fn of(path: &str) -> Self {
        if path.starts_with("/v1/messages") { Self::Anthropic } else { Self::OpenAi }
    }
}

/// Why a request is refused, or an answer ends early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    pub label: Cow<'static, str>,
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// After how many seconds it may be worth asking again, if that is known.
    pub retry_s: Option<u64>,
}

impl Failed {
    pub fn new(label: &'static str, message: impl Into<String>) -> Self {
        Self { label: Cow::Borrowed(label), message: message.into(), param: None, retry_s: None }
    }

    /// A field that is unknown, wrong or refused.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("{param}: {}", message.into());
        Self { label: Cow::Borrowed("field"), message, param: Some(param), retry_s: None }
    }

    /// A failure that an event of the engine tells.
    pub fn told(label: String, message: String) -> Self {
        Self { label: Cow::Owned(label), message, param: None, retry_s: None }
    }

    pub fn of(error: &anyhow::Error) -> Self {
        let retry_s = failures::retry_s(error);
        Self { retry_s, ..Self::new(failures::of(error).label, one_line(error)) }
    }

    pub fn status(&self) -> StatusCode {
        let status = failures::of_label(&self.label).status;
        // The table's numbers are all statuses.
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The body of an answer, and the data of a stream's last event.
    pub fn body(&self, form: Form) -> Value {
        match form {
            Form::OpenAi => self.openai(),
            Form::Anthropic => self.anthropic(),
        }
    }

    /// OpenAI's API reference, "Error codes".
    fn openai(&self) -> Value {
        let kind = match self.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let code = match &*self.label {
            "unauthorized" => "invalid_api_key",
            "unknown_model" => "model_not_found",
            "prompt_too_long" => "context_length_exceeded",
            "busy" => "rate_limit_exceeded",
            label => label,
        };
        let Self { message, param, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }

    /// Anthropic's API reference, "Errors".
    fn anthropic(&self) -> Value {
        let kind = match self.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        };
        json!({ "type": "error", "error": { "type": kind, "message": self.message } })
    }

    pub fn response(&self, form: Form) -> Response {
        let status = self.status();
        let mut response = (status, Json(self.body(form))).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            let retry_s = self.retry_s.unwrap_or(RETRY_MIN_S);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_s));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineError;

    #[test]
    fn a_failure_has_one_status_and_each_apis_form() {
        let busy = Failed::of(&EngineError::Busy { retry_s: 7 }.into());
        for form in [Form::OpenAi, Form::Anthropic] {
            let response = busy.response(form);
            assert_eq!(response.status(), 429);
            assert_eq!(response.headers()["retry-after"], "7");
            let stopping = Failed::new("stopping", "the node is stopping").response(form);
            assert_eq!(stopping.headers()["retry-after"], "1", "nothing is known");
            assert_eq!(busy.body(form)["error"]["type"], "rate_limit_error");
        }
        let field = Failed::field("n", "too many");
        let openai = field.body(Form::OpenAi);
        assert_eq!(
            openai["error"],
            json!({ "message": "n: too many", "type": "invalid_request_error", "param": "n",
                    "code": "field" })
        );
        let anthropic = field.body(Form::Anthropic);
        assert_eq!(anthropic["type"], "error");
        assert_eq!(anthropic["error"]["type"], "invalid_request_error");
        let unknown = Failed::new("unknown_model", "x");
        assert_eq!(unknown.status(), 404);
        assert_eq!(unknown.body(Form::OpenAi)["error"]["code"], "model_not_found");
        assert_eq!(unknown.body(Form::Anthropic)["error"]["type"], "not_found_error");
        assert_eq!(Failed::told("of a later version".into(), String::new()).status(), 422);
        assert_eq!(Form::of("/v1/messages/count_tokens"), Form::Anthropic);
        assert_eq!(Form::of("/v1/models"), Form::OpenAi);
    }
}
