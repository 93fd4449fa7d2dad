//! One file per command, or per group of related commands: resolves arguments, runs the command,
//! prints the result.

mod bench;
mod bench_mesh;
mod bench_store;
mod chat;
mod control;
mod convert;
mod embed;
mod exercise;
mod inspect;
mod invite;
mod join;
mod leave;
mod logs;
mod measure;
mod page;
mod prompts;
mod ps;
mod pull;
mod run;
mod serve;
mod settings;
mod storage;
mod swarm_key;
mod synth;
mod text_args;
mod trace;
mod trust;

pub use bench::bench;
pub use chat::chat;
pub use control::{ls, peers, publish, status};
pub use convert::{convert, note_restored};
pub use embed::embed;
pub use exercise::exercise;
pub use inspect::inspect;
pub use invite::invite;
pub use join::join;
pub use leave::leave;
pub use logs::logs;
pub use measure::{check, perplexity};
pub use page::page;
pub use ps::ps;
pub use pull::{from_hub, pull, serve_from_hub};
pub use run::run;
pub use serve::serve;
pub use settings::{completions, config, man};
pub use storage::{fsck, gc, pin, rm, unpin};
pub use swarm_key::swarm_key;
pub use synth::synth;
pub use trace::trace;
pub use trust::{asking, can_ask, trust};

use crate::output::outln;

/// Prints a value as one line of JSON.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    outln!("{}", serde_json::to_string(value)?);
    Ok(())
}

/// The command as it was typed, for records. Bytes that are not UTF-8 are replaced.
fn command_line() -> String {
    let words: Vec<_> = std::env::args_os().collect();
    words.join(" ".as_ref()).to_string_lossy().into_owned()
}
