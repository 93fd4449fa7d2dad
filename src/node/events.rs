//! What a node reports on standard output: lines for people, or JSON with `--json`. Its log keeps the
//! same.

use serde::{Deserialize, Serialize};

use super::journal::{self, Level};
use super::output;
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
    /// A node without a swarm answers, but its model is still read from its file.
    Reading {
        /// Of its HTTP port.
        address: String,
        model: String,
    },
    /// A node without a swarm answers.
    Serving {
        /// Of its HTTP port.
        address: String,
        /// The model that it was given.
        model: Option<String>,
        /// Whether a request must show a key.
        key: bool,
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
    /// Prints the event. The node goes on if standard output is closed.
    pub fn print(&self, json: bool) {
        let text =
            if json { serde_json::to_string(self).unwrap_or_default() } else { self.to_string() };
        output::report(&text);
        journal::report(Level::Info, self.logged());
    }

    /// The event as its log keeps it: on one line, without advice to whoever sits at the terminal.
    fn logged(&self) -> String {
        match self {
            Self::Ready { peer_id, swarm, addresses, control } => format!(
                "joined swarm {swarm:?} as {peer_id}; answers at http://{control}; listens on {}",
                addresses.join(" ")
            ),
            Self::Serving { address, model, .. } => {
                let model = model.as_deref().unwrap_or("the models of this node");
                format!("serving {model} at http://{address}")
            }
            other => other.to_string(),
        }
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
                writeln!(
                    f,
                    "  open http://{control} in a browser on this machine   (Ctrl-C stops)"
                )?;
                write!(
                    f,
                    "  doppler-node page prints the address with which the page may change the node"
                )
            }
            Self::Reading { address, model } => {
                write!(f, "reading {model}; http://{address}/health tells how far it is")
            }
            Self::Serving { address, model, key } => {
                let model = model.as_deref().unwrap_or("the models of this node");
                let key = if *key { ", for who shows the API key" } else { "" };
                writeln!(f, "serving {model}{key}   (Ctrl-C stops)")?;
                writeln!(f, "  OpenAI     http://{address}/v1")?;
                writeln!(f, "  Anthropic  http://{address}")?;
                write!(f, "  a page     http://{address}")
            }
            Self::Model { id, name, bytes, publisher } => {
                let id = id.get(..10).unwrap_or(id);
                write!(f, "learned {name} ({}, {id}), signed by {publisher}", ByteSize(*bytes))
            }
            Self::Stopped => write!(f, "stopped"),
        }
    }
}
