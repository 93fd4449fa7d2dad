//! The node: command line, configuration, wiring, control API, shutdown order.

// What prints is `output`.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod adapters;
mod address_book;
mod allocator;
pub mod api;
mod api_text;
pub mod args;
mod args_embed;
mod args_logs;
mod args_measure;
mod args_text;
mod catalog;
pub mod client;
mod commands;
pub mod config;
mod control;
mod copies;
mod dates;
mod declined;
mod demo;
mod drain;
mod embedded;
mod engine;
mod epoch;
mod events;
mod failures;
mod gateway;
mod generating;
mod generation;
mod healing;
mod held;
mod http;
mod hub;
mod identity;
mod invite;
mod joining;
mod journal;
mod kept;
mod last_copy;
mod learning;
mod leaving;
mod loading;
mod lookup;
mod manifests;
mod memory;
mod node_state;
mod notify;
mod opening;
mod output;
mod pace;
mod page_key;
mod panics;
mod pins;
mod ports;
mod progress;
mod pulling;
mod pulls;
#[cfg(test)]
mod reference;
mod resolve;
mod service;
mod settings;
mod signals;
mod size;
mod source;
mod storage;
mod store_access;
mod swarm_key;
mod targets;
mod trust;
mod trusting;
mod work;

use std::ffi::OsString;
use std::process::ExitCode;

use args::{Command, RawArgs};
use clap::Parser;
use output::{Ended, Log, colours, note};
use settings::Settings;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// The binary's entry point: parses the command line, runs the command, and prints an error as one
/// line. Exit codes: 0 for success, 2 for wrong usage (clap's), otherwise that of the failure
/// (`failures`). If the reader of standard output goes away, the command ends quietly.
pub fn main() -> ExitCode {
    doppler_mesh::install_crypto();
    let args = match arguments() {
        Ok(args) => args,
        Err(code) => return code,
    };
    if let Err(code) = begin_log(&args) {
        return code;
    }
    let done = match args.command {
        Command::Demo(args) => demo::run(&args),
        Command::Join(args) => commands::join(&args),
        Command::Serve(mut args) => {
            commands::serve_from_hub(&mut args).and_then(|()| commands::serve(&args))
        }
        Command::Invite(args) => commands::invite(&args),
        Command::Page(args) => commands::page(&args),
        Command::SwarmKey(args) => commands::swarm_key(&args),
        Command::Publish(args) => commands::publish(&args),
        Command::Ls(args) => commands::ls(&args),
        Command::Leave(args) => commands::leave(&args),
        Command::Status(args) => commands::status(&args),
        Command::Ps(args) => commands::ps(&args),
        Command::Peers(args) => commands::peers(&args),
        Command::Logs(args) => commands::logs(&args),
        Command::Pin(args) => commands::pin(&args),
        Command::Unpin(args) => commands::unpin(&args),
        Command::Trust(command) => commands::trust(&command),
        Command::Rm(args) => commands::rm(&args),
        Command::Gc(args) => commands::gc(&args),
        Command::Fsck(args) => commands::fsck(&args),
        Command::Convert(args) => commands::convert(&args),
        Command::Inspect(args) => commands::inspect(&args),
        Command::Pull(args) => commands::pull(&args),
        Command::Run(mut args) => {
            commands::from_hub(&mut args.model).and_then(|()| commands::run(&args))
        }
        Command::Chat(mut args) => {
            commands::from_hub(&mut args.model).and_then(|()| commands::chat(&args))
        }
        Command::Embed(mut args) => {
            commands::from_hub(&mut args.model).and_then(|()| commands::embed(&args))
        }
        Command::Check(mut args) => {
            commands::from_hub(&mut args.model).and_then(|()| commands::check(&args))
        }
        Command::Perplexity(mut args) => {
            commands::from_hub(&mut args.model).and_then(|()| commands::perplexity(&args))
        }
        Command::Synth(args) => commands::synth(&args),
        Command::Bench(command) => commands::bench(&command),
        Command::Config(args) => commands::config(&args),
        Command::Completions(args) => commands::completions(&args),
        Command::Man(args) => commands::man(&args),
        Command::Trace(command) => commands::trace(&command),
        Command::StoreExercise(args) => commands::exercise(&args),
    };
    end(done)
}

/// Logs on standard error what `--log` asks for, and if this is a node also in its data directory.
fn begin_log(args: &RawArgs) -> Result<(), ExitCode> {
    let asked = EnvFilter::try_new(&args.log).map_err(|error| {
        note!("error: --log {:?}: {error}", args.log);
        ExitCode::from(2)
    })?;
    // A directive of the user's own for the same target overrides these.
    let quiet = format!("{},{}", doppler_mesh::QUIET_LOGS, args.log);
    let filter = EnvFilter::try_new(&quiet).unwrap_or(asked);
    let coloured = colours(&std::io::stderr());
    let shown = tracing_subscriber::fmt::layer().with_ansi(coloured).with_writer(|| Log);
    let journal = match args.command {
        Command::Join(_) | Command::Serve(_) => journal::layer(&quiet, doppler_mesh::QUIET_LOGS),
        _ => None,
    };
    tracing_subscriber::registry().with(shown.with_filter(filter)).with(journal).init();
    Ok(())
}

/// What was asked for, on the command line, in the environment and in config.toml. Otherwise says what is
/// wrong, or gives help.
fn arguments() -> Result<RawArgs, ExitCode> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let settings = match Settings::load() {
        Ok(settings) => settings,
        Err(error) => match RawArgs::try_parse_from(&words) {
            // Help is there in any case.
            Err(usage) if !usage.use_stderr() => return Err(explain(&usage)),
            _ => {
                note!("error: {}", one_line(&error));
                return Err(ExitCode::from(2));
            }
        },
    };
    let completed = settings.complete(&words);
    RawArgs::try_parse_from(&completed).map_err(|usage| {
        let shown = explain(&usage);
        if usage.use_stderr() && completed != words {
            note!("options also come from {}", settings.path().display());
        }
        shown
    })
}

/// Reports what failed, if anything did: the command, or writing to standard output.
fn end(done: anyhow::Result<()>) -> ExitCode {
    signals::unless_ending();
    match (done, output::finish()) {
        (Ok(()), Ended::Whole | Ended::Closed) => ExitCode::SUCCESS,
        (Ok(()), Ended::Failed(error)) => {
            note!("error: cannot write to standard output: {error}");
            ExitCode::FAILURE
        }
        (Err(error), _) => {
            note!("error: {}", one_line(&error));
            ExitCode::from(failures::of(&error).exit)
        }
    }
}

/// Prints the requested help or version, or what is wrong with the arguments.
fn explain(usage: &clap::Error) -> ExitCode {
    let text = usage.render();
    if usage.use_stderr() {
        let text =
            if colours(&std::io::stderr()) { text.ansi().to_string() } else { text.to_string() };
        output::remark(format_args!("{text}"));
        return ExitCode::from(2);
    }
    let text = if colours(&std::io::stdout()) { text.ansi().to_string() } else { text.to_string() };
    output::piece(&text);
    end(Ok(()))
}

/// An error and its causes on one line. A cause that is already quoted is not repeated.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line.lines().map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_without_echoes() {
        let io = std::io::Error::other("disk\nfull");
        let error = anyhow::Error::new(io).context("a.bin: disk\nfull").context("cannot write");
        assert_eq!(one_line(&error), "cannot write: a.bin: disk; full");
    }
}
