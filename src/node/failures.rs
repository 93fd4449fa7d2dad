//! How each failure is reported: one HTTP status and one exit code for each label.
//!
//! The labels come from the errors of the components (`EngineError`, `SessionError`,
//! `BackendError`, `ReadError`, `StoreError`, `Untrusted`, `LastCopy`, `Unresolved`, `HubError`) and of `http::api`. docs/errors.md contains the same table;
//! a test compares them.

use std::io;

use doppler_infer::adapter::AdapterError;
use doppler_infer::backend::BackendError;
use doppler_infer::error::SessionError;
use doppler_store::{ReadError, StoreError};

use super::client::Answered;
use super::engine::EngineError;
use super::hub::HubError;
use super::last_copy::LastCopy;
use super::opening::NotReady;
use super::resolve::Unresolved;
use super::trust::Untrusted;

/// How a failure is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// Stable, for programs.
    pub label: &'static str,
    /// Of the control API's answer.
    pub status: u16,
    /// Of the command.
    pub exit: u8,
}

const fn failure(label: &'static str, status: u16, exit: u8) -> Failure {
    Failure { label, status, exit }
}

/// Any other failure.
pub const OTHER: Failure = failure("failed", 422, 1);

/// Exit code 2 is also clap's, for wrong usage.
pub const FAILURES: &[Failure] = &[
    OTHER,
    // What was asked for is wrong.
    failure("no_tokens", 400, 2),
    failure("sampling", 400, 2),
    failure("context", 400, 2),
    failure("empty_prompt", 400, 2),
    failure("prompt_too_long", 400, 2),
    failure("token", 400, 2),
    failure("text", 400, 2),
    failure("stop", 400, 2),
    failure("grammar", 400, 2),
    failure("conversation", 400, 2),
    failure("field", 400, 2),
    failure("too_large", 413, 2),
    failure("not_embedding", 400, 2),
    failure("texts", 400, 2),
    failure("ambiguous", 400, 2),
    failure("batch", 400, 2),
    failure("context_full", 400, 2),
    failure("nothing_to_score", 400, 2),
    failure("not_text", 400, 2),
    failure("whole", 400, 2),
    failure("hub_name", 400, 2),
    failure("hub_choice", 400, 2),
    // It is not here, or did not arrive.
    failure("unknown_model", 404, 3),
    failure("no_route", 404, 3),
    failure("method", 405, 2),
    failure("not_found", 404, 3),
    failure("not_held", 404, 3),
    failure("deadline", 504, 3),
    failure("hub_missing", 404, 3),
    failure("hub_offline", 504, 3),
    failure("hub_answer", 502, 3),
    failure("hub_access", 403, 4),
    failure("untrusted", 403, 4),
    failure("unauthorized", 401, 4),
    failure("forbidden", 403, 4),
    // There is no room.
    failure("budget", 507, 5),
    failure("out_of_memory", 507, 5),
    failure("disk_full", 507, 5),
    // Later.
    failure("busy", 429, 6),
    failure("overloaded", 503, 6),
    failure("stopping", 503, 6),
    failure("loading", 503, 6),
    failure("locked", 503, 6),
    // The model is not one that can be run.
    failure("no_tokenizer", 422, 7),
    failure("tokenizer", 422, 7),
    failure("no_template", 422, 7),
    failure("template", 422, 7),
    failure("model", 422, 7),
    failure("unsupported", 422, 7),
    failure("adapter", 422, 7),
    failure("not_finite", 422, 7),
    failure("corrupt", 502, 7),
    failure("hub_mismatch", 502, 7),
    failure("mismatch", 422, 7),
    failure("out_of_range", 422, 7),
    // This machine cannot do it.
    failure("no_device", 500, 8),
    failure("device_lost", 500, 8),
    failure("thread", 500, 8),
    failure("io", 500, 8),
    failure("denied", 500, 8),
    failure("refused", 422, 1),
    failure("last_copy", 409, 1),
    failure("foreign_sequence", 500, 1),
];

/// A file outside the store could not be written because the disk is full.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The entry of a label, or [`OTHER`].
pub fn of_label(label: &str) -> Failure {
    FAILURES.iter().copied().find(|failure| failure.label == label).unwrap_or(OTHER)
}

/// The entry of an error: that of its first cause with a label.
pub fn of(error: &anyhow::Error) -> Failure {
    let label = error.chain().find_map(|cause| {
        let engine = cause.downcast_ref::<EngineError>().map(EngineError::label);
        engine
            .or_else(|| cause.downcast_ref::<AdapterError>().map(AdapterError::label))
            .or_else(|| cause.downcast_ref::<SessionError>().map(SessionError::label))
            .or_else(|| cause.downcast_ref::<BackendError>().map(BackendError::label))
            .or_else(|| cause.downcast_ref::<ReadError>().map(ReadError::label))
            .or_else(|| cause.downcast_ref::<StoreError>().map(StoreError::label))
            .or_else(|| cause.downcast_ref::<Unresolved>().map(Unresolved::label))
            .or_else(|| cause.downcast_ref::<HubError>().map(HubError::label))
            .or_else(|| cause.downcast_ref::<NotReady>().map(|_| "loading"))
            .or_else(|| cause.downcast_ref::<Untrusted>().map(|_| "untrusted"))
            .or_else(|| cause.downcast_ref::<LastCopy>().map(|_| "last_copy"))
            .or_else(|| {
                cause.downcast_ref::<io::Error>().filter(|e| is_full(e)).map(|_| "disk_full")
            })
            .or_else(|| {
                cause.downcast_ref::<Answered>().map(|answered| of_label(&answered.label).label)
            })
    });
    label.map_or(OTHER, of_label)
}

/// After how many seconds it may be worth asking again, if the failure says so.
pub fn retry_s(error: &anyhow::Error) -> Option<u64> {
    error.chain().find_map(|cause| match cause.downcast_ref::<EngineError>() {
        Some(EngineError::Busy { retry_s }) => Some(*retry_s),
        _ => cause.downcast_ref::<NotReady>().map(|not_ready| not_ready.retry_s),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_label_has_one_line_and_the_documentation_says_the_same() {
        let text = include_str!("../../docs/errors.md");
        let listed: Vec<&str> = text.lines().filter(|line| line.starts_with("| `")).collect();
        assert_eq!(listed.len(), FAILURES.len());
        for &Failure { label, status, exit } in FAILURES {
            let lines: Vec<_> = FAILURES.iter().filter(|other| other.label == label).collect();
            assert_eq!(lines.len(), 1, "{label}");
            let row = format!("| `{label}` | {status} | {exit} |");
            assert!(listed.iter().any(|line| line.starts_with(&row)), "docs/errors.md: {row}");
            assert!(exit > 0 && status >= 400, "{label}");
        }
    }

    #[test]
    fn an_error_keeps_its_line_below_any_context_and_over_the_control_api() {
        let error = anyhow::Error::new(EngineError::Busy { retry_s: 7 }).context("generating");
        assert_eq!((of(&error), retry_s(&error)), (of_label("busy"), Some(7)));
        let lost = SessionError::Backend(BackendError::Lost("unplugged".into()));
        assert_eq!(of(&EngineError::Session(lost).into()).label, "device_lost");
        let message = "all wait".to_owned();
        let answered = Answered { label: "busy".into(), message };
        assert_eq!(of(&answered.into()), of_label("busy"));
        let full = anyhow::Error::new(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(of(&full.context("cannot write it")), of_label("disk_full"));
        assert_eq!(of(&anyhow::anyhow!("something else")), OTHER);
        assert_eq!(retry_s(&anyhow::anyhow!("something else")), None);
        assert_eq!(of_label("of a later version"), OTHER);
    }
}
