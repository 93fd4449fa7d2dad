//! The command reference, `docs/commands.md`, generated from clap's definitions.
//!
//! A test compares the file with what is generated; `DOPPLER_UPDATE_DOCS=1` writes it.

use std::fmt::Write as _;

use clap::{Arg, Command, CommandFactory};

use super::args::RawArgs;

/// Markdown with one section per command: its usage, and its arguments and options in order.
fn reference() -> String {
    let mut root = RawArgs::command();
    root.build();
    let mut text = String::from(
        "# Commands\n\nGenerated from the program's own help (`doppler-node COMMAND --help`).\n",
    );
    section(&root, "doppler-node", &mut text);
    text
}

fn section(command: &Command, path: &str, text: &mut String) {
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string);
    let _ = write!(text, "\n## {path}\n\n{}\n", about.unwrap_or_default().trim());
    let usage = command.clone().render_usage().to_string();
    let _ = write!(text, "\n    {}\n", usage.trim_start_matches("Usage: ").trim());
    let is_root = !path.contains(' ');
    let shown = command.get_arguments().filter(|arg| {
        let builtin = ["help", "version"].contains(&arg.get_id().as_str());
        // Global options are listed once.
        let again = arg.is_global_set() && !is_root;
        !(arg.is_hide_set() || builtin || again)
    });
    let lines: Vec<String> = shown.map(argument).collect();
    if !lines.is_empty() {
        let _ = write!(text, "\n{}\n", lines.join("\n"));
    }
    for sub in command.get_subcommands() {
        if !sub.is_hide_set() && sub.get_name() != "help" {
            section(sub, &format!("{path} {}", sub.get_name()), text);
        }
    }
}

/// `- --name VALUE: help (default: D) (one of: A, B) (environment: E)`
fn argument(arg: &Arg) -> String {
    let values: Vec<String> =
        arg.get_value_names().unwrap_or_default().iter().map(ToString::to_string).collect();
    let value = if arg.get_action().takes_values() { values.join(" ") } else { String::new() };
    let name = match (arg.get_long(), arg.get_short()) {
        (Some(long), Some(short)) => format!("-{short}, --{long} {value}"),
        (Some(long), None) => format!("--{long} {value}"),
        (None, Some(short)) => format!("-{short} {value}"),
        (None, None) => value,
    };
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut line = format!("- `{}`: {help}", name.trim());
    let defaults = arg.get_default_values();
    if !defaults.is_empty() && arg.get_action().takes_values() {
        let defaults: Vec<_> = defaults.iter().map(|value| value.to_string_lossy()).collect();
        let _ = write!(line, " (default: `{}`)", defaults.join(" "));
    }
    let choices = arg.get_possible_values();
    if !choices.is_empty() && arg.get_action().takes_values() {
        let choices: Vec<_> =
            choices.iter().map(|choice| format!("`{}`", choice.get_name())).collect();
        let _ = write!(line, " (one of {})", choices.join(", "));
    }
    if let Some(variable) = arg.get_env() {
        let _ = write!(line, " (environment: `{}`)", variable.to_string_lossy());
    }
    line
}

#[test]
fn docs_commands_is_what_the_program_says() {
    let path = doppler_testing::root().join("docs/commands.md");
    let generated = reference();
    if std::env::var_os("DOPPLER_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = written.lines().zip(generated.lines()).find(|(old, new)| old != new);
    assert!(
        written == generated,
        "docs/commands.md is not what the program says (first difference: {differs:?}): run this test \
         once with DOPPLER_UPDATE_DOCS=1"
    );
}
