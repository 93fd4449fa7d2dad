//! `config.toml`: values of options that neither the command line nor the environment gives.
//!
//! A key is an option's long name, without its dashes. What stands at the top is for every command that
//! has such an option, what stands in a table of a command's name is for that command, and wins. A
//! value becomes an argument, so clap checks it as if it had been typed. A key that no command has is an
//! error: one that is misspelt must not go unnoticed.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory};
use toml::{Table, Value};

use super::args::RawArgs;

/// The longest file that is read, in bytes.
const BYTES_MAX: u64 = 256 * 1024;
/// Where the file is, if not in the user's directory of configurations; empty for none.
pub const VARIABLE: &str = "DOPPLER_CONFIG";

/// Where the value of an option comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Default,
    Environment(String),
    File(PathBuf),
    /// It has none.
    Unset,
}

/// A file's settings.
#[derive(Debug, Default)]
pub struct Settings {
    path: PathBuf,
    root: Table,
}

/// The file that holds: the one that the environment names, or the user's.
fn path() -> Option<PathBuf> {
    match std::env::var_os(VARIABLE) {
        Some(path) => (!path.is_empty()).then(|| path.into()),
        None => Some(super::config::config_dir()?.join("config.toml")),
    }
}

impl Settings {
    /// The settings of the user. Without a file there are none.
    ///
    /// # Errors
    /// If the file cannot be read, or a key or a value in it is none.
    pub fn load() -> anyhow::Result<Self> {
        let Some(path) = path() else { return Ok(Self::default()) };
        match std::fs::metadata(&path) {
            Ok(file) => {
                ensure!(
                    file.len() <= BYTES_MAX,
                    "{}: longer than {BYTES_MAX} bytes",
                    path.display()
                );
            }
            // A file that was named must be there.
            Err(_) if std::env::var_os(VARIABLE).is_none() => return Ok(Self::default()),
            Err(error) => bail!("{}: {error} ({VARIABLE} names it)", path.display()),
        }
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Self::parse(&text, &path)
    }

    fn parse(text: &str, path: &Path) -> anyhow::Result<Self> {
        let name = path.display();
        let root: Table = text.parse().map_err(|error| anyhow::anyhow!("{name}: {error}"))?;
        let command = built();
        let has = |command: &Command, key: &str| command.get_arguments().any(|arg| takes(arg, key));
        for (key, value) in &root {
            let Some(table) = value.as_table() else {
                let any = has(&command, key) || command.get_subcommands().any(|one| has(one, key));
                ensure!(any, "{name}: no command has an option --{key}");
                words(key, value).with_context(|| name.to_string())?;
                continue;
            };
            let Some(command) = command.find_subcommand(key) else {
                bail!("{name}: [{key}] is no command");
            };
            for (option, value) in table {
                ensure!(has(command, option), "{name}: {key} has no option --{option}");
                words(option, value).with_context(|| format!("{name}: [{key}]"))?;
            }
        }
        Ok(Self { path: path.to_owned(), root })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value for an option of a command.
    fn get(&self, command: &str, key: &str) -> Option<&Value> {
        let own = self.root.get(command).and_then(Value::as_table).and_then(|own| own.get(key));
        own.or_else(|| self.root.get(key).filter(|value| !value.is_table()))
    }

    /// The command line with what it leaves open. `words` begin with the program's name.
    ///
    /// # Errors
    /// Never for words that clap refuses anyway: those are left as they are.
    pub fn complete(&self, words: &[OsString]) -> Vec<OsString> {
        let mut words = words.to_vec();
        let Some((name, matches, command)) = chosen(&words) else { return words };
        let more: Vec<OsString> = command
            .get_arguments()
            .filter_map(|arg| {
                let key = arg.get_long()?;
                let value = self.get(&name, key)?;
                let is_open =
                    matches!(source(&matches, arg), None | Some(ValueSource::DefaultValue));
                let is_excluded = excludes(&command, &matches, arg);
                (is_open && !is_excluded).then(|| self::words(key, value).unwrap_or_default())
            })
            .flatten()
            .collect();
        let at = words.iter().position(|word| *word == *OsStr::new(&name));
        if let Some(at) = at {
            words.splice(at + 1..at + 1, more);
        }
        words
    }

    /// Each option of a command with its values as text, and where they come from.
    ///
    /// # Errors
    /// If there is no such command.
    pub fn table(&self, command: &str) -> anyhow::Result<Vec<(String, String, Origin)>> {
        let typed: Vec<OsString> = vec!["doppler-node".into(), command.into()];
        let (_, before, found) =
            chosen(&typed).with_context(|| format!("there is no command {command:?}"))?;
        let (_, after, _) = chosen(&self.complete(&typed)).context("the command is gone")?;
        let row = |arg: &Arg| {
            let long = arg.get_long().filter(|_| !arg.is_hide_set())?;
            let id = arg.get_id().as_str();
            let values = after.try_get_raw(id).ok().flatten().into_iter().flatten();
            let values: Vec<_> = values.map(|value| value.to_string_lossy().into_owned()).collect();
            let origin = match (source(&before, arg), source(&after, arg)) {
                (_, None) => Origin::Unset,
                (_, Some(ValueSource::EnvVariable)) => Origin::Environment(
                    arg.get_env().unwrap_or_default().to_string_lossy().into_owned(),
                ),
                (_, Some(ValueSource::CommandLine)) => Origin::File(self.path.clone()),
                _ => Origin::Default,
            };
            let shown = match arg.is_hide_env_values_set() && origin != Origin::Unset {
                true => "(secret)".to_owned(),
                false => values.join(" "),
            };
            Some((long.to_owned(), shown, origin))
        };
        let help = |arg: &&Arg| !matches!(arg.get_long(), Some("help" | "version"));
        Ok(found.get_arguments().filter(help).filter_map(row).collect())
    }
}

fn built() -> Command {
    let mut command = RawArgs::command();
    command.build();
    command
}

fn takes(arg: &Arg, key: &str) -> bool {
    arg.get_long() == Some(key) && !matches!(key, "help" | "version")
}

/// The command that the words choose, its name, and what they say of its options.
fn chosen(words: &[OsString]) -> Option<(String, ArgMatches, Command)> {
    let lenient = built().ignore_errors(true);
    let matches = lenient.try_get_matches_from(words).ok()?;
    let (name, matches) = matches.subcommand()?;
    let command = built().find_subcommand(name)?.clone();
    Some((name.to_owned(), matches.clone(), command))
}

fn source(matches: &ArgMatches, arg: &Arg) -> Option<ValueSource> {
    let id = arg.get_id().as_str();
    matches.try_contains_id(id).ok()?;
    matches.value_source(id)
}

/// Whether the words have an option that this one must not be beside.
fn excludes(command: &Command, matches: &ArgMatches, arg: &Arg) -> bool {
    let given = |other: &&Arg| matches!(source(matches, other), Some(ValueSource::CommandLine));
    let conflicts = |one: &Arg, other: &Arg| {
        command.get_arg_conflicts_with(one).iter().any(|found| found.get_id() == other.get_id())
    };
    command
        .get_arguments()
        .filter(given)
        .any(|other| conflicts(arg, other) || conflicts(other, arg))
}

/// An option with its value, as words of a command line.
fn words(key: &str, value: &Value) -> anyhow::Result<Vec<OsString>> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(format!("--{key}={text}").into()),
        Value::Integer(number) => Ok(format!("--{key}={number}").into()),
        Value::Float(number) => Ok(format!("--{key}={number}").into()),
        _ => bail!("{key}: it is a text, a number, true, false or a list of texts"),
    };
    match value {
        Value::Boolean(true) if is_flag(key) => Ok(vec![format!("--{key}").into()]),
        Value::Boolean(false) if is_flag(key) => Ok(Vec::new()),
        Value::Array(list) => list.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

fn is_flag(key: &str) -> bool {
    let flag = |arg: &Arg| takes(arg, key) && matches!(arg.get_action(), ArgAction::SetTrue);
    let command = built();
    command.get_subcommands().any(|one| one.get_arguments().any(flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Settings {
        Settings::parse(text, Path::new("c.toml")).unwrap()
    }

    fn completed(text: &str, words: &[&str]) -> Vec<String> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        let all = settings(text).complete(&words);
        all.into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    const FILE: &str = "backend = 'cpu'\nram-budget = '1GiB'\n[join]\nswarm = 'lab'\n\
                        no-mdns = true\nbootstrap = ['a', 'b']\nram-budget = '2GiB'\n[run]\ntokens = 9\n";

    #[test]
    fn what_the_words_leave_open_comes_from_the_file() {
        let got = completed(FILE, &["doppler-node", "join", "--json"]);
        assert_eq!(got[..2], ["doppler-node", "join"]);
        let mut more = got[2..got.len() - 1].to_vec();
        more.sort_unstable();
        let want = [
            "--backend=cpu",
            "--bootstrap=a",
            "--bootstrap=b",
            "--no-mdns",
            "--ram-budget=2GiB",
            "--swarm=lab",
        ];
        assert_eq!(more, want);
        let got =
            completed(FILE, &["doppler-node", "run", "m", "-p", "x", "-n", "4", "--backend=gpu"]);
        assert!(!got.iter().any(|word| word.starts_with("--tokens")), "{got:?}");
        assert_eq!(got.iter().filter(|word| word.starts_with("--backend")).count(), 1, "{got:?}");
        let plain = ["doppler-node", "status"];
        assert_eq!(completed(FILE, &plain), plain, "it has none of them");
        for words in
            [&["doppler-node"][..], &["doppler-node", "--version"], &["doppler-node", "nonsense"]]
        {
            assert_eq!(completed(FILE, words), words);
        }
    }

    #[test]
    fn what_no_command_has_is_refused_by_name() {
        for (text, why) in [
            ("swarn = 'x'", "--swarn"),
            ("[join]\ntokens = 3", "join has no option --tokens"),
            ("[jion]\nswarm = 'x'", "[jion] is no command"),
            ("swarm = 1979-05-27", "swarm"),
            ("swarm = ", "c.toml"),
            ("help = true", "--help"),
        ] {
            let error = Settings::parse(text, Path::new("c.toml")).unwrap_err();
            let said = format!("{error:#}");
            assert!(said.contains(why) && said.contains("c.toml"), "{text}: {said}");
        }
    }

    #[test]
    fn the_table_tells_what_holds_and_from_where() {
        let table = settings(FILE).table("join").unwrap();
        let row = |name: &str| table.iter().find(|row| row.0 == name).unwrap().clone();
        let file = || Origin::File("c.toml".into());
        assert_eq!(row("swarm"), ("swarm".into(), "lab".into(), file()));
        assert_eq!(row("bootstrap").1, "a b");
        assert_eq!(row("disk-budget"), ("disk-budget".into(), "50GiB".into(), Origin::Default));
        assert_eq!(row("swarm-key").2, Origin::Unset);
        assert!(settings("").table("nonsense").is_err());
    }
}
