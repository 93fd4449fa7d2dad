//! `bench`: how fast a local model is, and why.
//!
//! Runs rotate over several prompts. Each prompt first has an unmeasured run, which loads the
//! experts. Prompts and decoding are measured separately. Bandwidths are measured in the same call,
//! after the runs, so that comparisons with them are fair on a shared machine.

mod kernels;
mod machine;
mod paging;
mod sample;
mod speed;
mod stats;
mod streams;

use anyhow::ensure;
use serde::Serialize;

use super::print_json;
use super::prompts::Prompts;
use crate::args::{BenchArgs, BenchCommand};
use crate::output::outln;
use crate::source::Opened;
use machine::{Machine, RecordFile};
pub(super) use machine::{cpu_seconds, processor, rss_bytes};

pub fn bench(command: &BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Decode { args, tokens } => {
            ensure!(*tokens > 0, "--tokens must be at least 1");
            speed::speed("decode", args, *tokens)
        }
        BenchCommand::Prefill { args } => speed::speed("prefill", args, 0),
        BenchCommand::Paging { args, tokens, slots, policies } => {
            ensure!(*tokens > 0, "--tokens must be at least 1");
            paging::paging(args, *tokens, *slots, policies)
        }
        BenchCommand::Streams { args, tokens, streams } => {
            ensure!(*tokens > 0, "--tokens must be at least 1");
            streams::streams(args, *tokens, streams)
        }
        BenchCommand::Kernels(args) => kernels::kernels(args),
        BenchCommand::Store(args) => super::bench_store::bench_store(args),
        BenchCommand::Mesh(args) => super::bench_mesh::bench_mesh(args),
    }
}

/// The parameters that the runs have in common.
struct Runs {
    prompts: Prompts,
    /// Tokens of a passage: the prompt and what is decoded after it.
    passage: usize,
    context: usize,
    /// How many passages there are.
    count: usize,
}

impl Runs {
    fn new(args: &BenchArgs, opened: &Opened, decoded: usize) -> anyhow::Result<Self> {
        ensure!((1..=1000).contains(&args.runs), "--runs must be 1 to 1000");
        let passage = args.prompts.prompt_tokens.saturating_add(decoded);
        let prompts = Prompts::open(&args.prompts, opened, passage)?;
        let context = args.model.context.unwrap_or(passage);
        Ok(Self { prompts, passage, context, count: args.prompts.prompts })
    }

    fn passage(&self, run: usize) -> Vec<u32> {
        self.prompts.passage(run % self.count, self.passage)
    }
}

/// The file for `--record`, created before anything is measured.
fn record_file(path: Option<&std::path::Path>) -> anyhow::Result<Option<RecordFile>> {
    path.map(RecordFile::create).transpose()
}

/// Prints a result, and records it if asked to.
fn report(
    json: bool,
    file: Option<RecordFile>,
    record: &impl Serialize,
    title: &str,
    machine: &Machine,
    text: &str,
) -> anyhow::Result<()> {
    if let Some(file) = file {
        file.write(title, machine, text)?;
    }
    if json {
        return print_json(record);
    }
    outln!("{}", text.trim_end());
    for line in machine.lines() {
        outln!("  {line}");
    }
    Ok(())
}
