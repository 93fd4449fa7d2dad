//! `config`, `completions` and `man`: what options hold, and what shells and manuals know of them.

use std::path::Path;

use anyhow::{Context, ensure};
use clap::CommandFactory;

use super::print_json;
use crate::args::{CompletionsArgs, ConfigArgs, ManArgs, RawArgs};
use crate::output::{self, outln};
use crate::settings::{Origin, Settings};

/// The program's name, as shells and manuals know it.
const NAME: &str = "doppler-node";

pub fn config(args: &ConfigArgs) -> anyhow::Result<()> {
    let table = Settings::load()?.table(&args.command)?;
    let origin = |origin: &Origin| match origin {
        Origin::Default => "default".to_owned(),
        Origin::Environment(name) => name.clone(),
        Origin::File(path) => path.display().to_string(),
        Origin::Unset => String::new(),
    };
    if args.json {
        let row = |(name, value, from): &(String, String, Origin)| {
            let value = (*from != Origin::Unset).then_some(value);
            serde_json::json!({ "option": name, "value": value, "from": origin(from) })
        };
        return print_json(&table.iter().map(row).collect::<Vec<_>>());
    }
    let width = |text: fn(&(String, String, Origin)) -> &String| {
        table.iter().map(|row| text(row).chars().count()).max().unwrap_or(0)
    };
    let (names, values) = (width(|row| &row.0), width(|row| &row.1).min(40));
    for (name, value, from) in &table {
        let line = format!("--{name:names$}  {value:values$}  {}", origin(from));
        outln!("{}", line.trim_end());
    }
    Ok(())
}

pub fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut RawArgs::command(), NAME, &mut script);
    output::piece(&String::from_utf8(script).context("the script is no text")?);
    Ok(())
}

pub fn man(args: &ManArgs) -> anyhow::Result<()> {
    let dir: &Path = &args.dir;
    ensure!(dir.is_dir(), "{} is not a directory", dir.display());
    let written = clap_mangen::generate_to(RawArgs::command(), dir);
    written.with_context(|| format!("cannot write to {}", dir.display()))
}
