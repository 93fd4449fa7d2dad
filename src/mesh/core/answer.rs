//! What a request to a peer brought, as far as decisions care.

use super::reputation::Conduct;

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// All of it came, or why not.
    pub outcome: Result<(), Failure>,
    /// What was proved of it. Nothing of a peer that broke the protocol or sent a wrong byte.
    pub proved: Option<Proved>,
}

/// What a request proved, from the start of its range on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proved {
    /// The byte of the object after it: a group's end, or the object's.
    pub end: u64,
    /// The object's size, as the peer says; proved if `end` is that.
    pub size: u64,
}

/// Why a request did not bring what it asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    /// Body bytes read.
    pub bytes: u64,
    /// Said after the peer's name: "went silent".
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// A byte did not match its hash.
    Wrong,
    /// The reply broke the protocol.
    Violation,
    /// Silent, or too slow.
    Stalled,
    /// No connection, or it broke.
    Lost,
    /// It was stopped here.
    Stopped,
    NotFound,
    OutOfRange {
        object_size: u64,
    },
    Overloaded,
    /// It will not, or could not read it.
    Refused,
    /// Only a relay leads there, and that may not carry this.
    Relayed,
}

impl FailureKind {
    /// How it counts for the peer's reputation.
    pub(super) const fn conduct(self) -> Option<Conduct> {
        match self {
            Self::Wrong => Some(Conduct::WrongByte),
            Self::Violation => Some(Conduct::Violation),
            Self::Stalled => Some(Conduct::Stalled),
            Self::Lost => Some(Conduct::Lost),
            Self::NotFound => Some(Conduct::Denied),
            Self::OutOfRange { .. } => Some(Conduct::Disputed),
            Self::Overloaded | Self::Refused | Self::Relayed | Self::Stopped => None,
        }
    }

    /// Whether what was proved before is kept: the peer did not show bad faith.
    pub const fn keeps(self) -> bool {
        matches!(self, Self::Stalled | Self::Lost | Self::Stopped)
    }
}
