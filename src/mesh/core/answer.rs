//! The result of a request to a peer, as far as decisions depend on it.

use super::reputation::Conduct;

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Whether all of it came, and if not, why.
    pub outcome: Result<(), Failure>,
    /// What was proved of it. `None` if the peer broke the protocol or sent a wrong byte.
    pub proved: Option<Proved>,
}

/// What a request proved, from the start of its range on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proved {
    /// The end of the proved bytes within the object: a group's end or the object's.
    pub end: u64,
    /// The object's size according to the peer. Proved if `end` equals it.
    pub size: u64,
}

/// Why a request did not bring everything it asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    /// Body bytes read.
    pub bytes: u64,
    /// Text to follow the peer's name: "went silent".
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
    /// This node stopped it.
    Stopped,
    NotFound,
    OutOfRange {
        object_size: u64,
    },
    Overloaded,
    /// The peer refuses, or could not read it.
    Refused,
    /// The peer is reachable only through a relay, which may not carry this.
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

    /// Whether what was proved before is kept, because the peer did not act in bad faith.
    pub const fn keeps(self) -> bool {
        matches!(self, Self::Stalled | Self::Lost | Self::Stopped)
    }
}
