//! What `join` reports on standard output: lines for people, or JSON with `--json`.

use serde::{Deserialize, Serialize};

use super::size::ByteSize;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum NodeEvent {
    /// The node listens and its control API answers.
    Ready {
        peer_id: String,
        swarm: String,
        addresses: Vec<String>,
        control: String,
    },
    /// A model was learned from the swarm and its manifest checked.
    Model {
        id: String,
        name: String,
        bytes: u64,
        publisher: String,
    },
    Stopped,
}

impl NodeEvent {
    /// Prints the event; a closed standard output is nobody's loss.
    pub fn print(&self, json: bool) {
        use std::io::Write;
        let text =
            if json { serde_json::to_string(self).unwrap_or_default() } else { self.to_string() };
        let _ = writeln!(std::io::stdout().lock(), "{text}");
    }
}

impl std::fmt::Display for NodeEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ready { peer_id, swarm, addresses, control } => {
                writeln!(f, "joined swarm {swarm:?} as {peer_id}")?;
                for address in addresses {
                    writeln!(f, "  listening on {address}")?;
                }
                write!(f, "  open http://{control} in a browser on this machine   (Ctrl-C stops)")
            }
            Self::Model { id, name, bytes, publisher } => {
                let (id, publisher) = (short(id), short(publisher));
                write!(f, "learned {name} ({}, {id}) signed by {publisher}", ByteSize(*bytes))
            }
            Self::Stopped => write!(f, "stopped"),
        }
    }
}

fn short(id: &str) -> &str {
    id.get(..10).unwrap_or(id)
}
