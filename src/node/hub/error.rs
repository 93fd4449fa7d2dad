//! Why a model cannot be pulled from the Hub. Each message is one line that names the thing and says
//! what to do. No message contains a token.

use std::io;
use std::path::Path;

/// See the module.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HubError {
    #[error(
        "{0:?} names no model of the Hub: write hf:ORG/MODEL, hf:ORG/MODEL:FILE.gguf or \
         hf:ORG/MODEL:Q4_K_M, each with @REVISION behind it if need be"
    )]
    Name(String),
    /// Nothing in the repository fits, or too much.
    #[error("{0}")]
    Choice(String),
    #[error("{0}")]
    Access(String),
    #[error("{0}")]
    Missing(String),
    #[error(
        "{host} cannot be reached ({problem}); what has arrived is kept, the same command goes on from there"
    )]
    Offline { host: String, problem: String },
    /// An answer that makes no sense.
    #[error("{host}: {problem}")]
    Answer { host: String, problem: String },
    #[error(
        "{file} is not what the Hub says it is: its {algorithm} is {actual}, expected {expected}; \
         what was fetched is removed, so that the same command begins anew"
    )]
    Mismatch { file: String, algorithm: &'static str, expected: String, actual: String },
    #[error("{path}: {problem}")]
    Io { path: String, problem: String, is_full: bool },
    #[error("{0}")]
    Room(String),
    #[error("it was stopped")]
    Stopped,
}

impl HubError {
    /// A stable name for the table of failures.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Name(_) => "hub_name",
            Self::Choice(_) => "hub_choice",
            Self::Access(_) => "hub_access",
            Self::Missing(_) => "hub_missing",
            Self::Offline { .. } => "hub_offline",
            Self::Answer { .. } => "hub_answer",
            Self::Mismatch { .. } => "hub_mismatch",
            Self::Io { is_full: true, .. } | Self::Room(_) => "disk_full",
            Self::Io { .. } => "io",
            Self::Stopped => "stopping",
        }
    }

    /// For `map_err`: a failure of the file system at `path`.
    pub fn io(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.display().to_string();
        move |error| {
            let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
            let is_full = full.contains(&error.kind());
            Self::Io { path: path.clone(), problem: error.to_string(), is_full }
        }
    }
}
