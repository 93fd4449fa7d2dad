//! `trust`: whose models may be used, and the question that is asked before an unknown publisher's
//! model is used.

use std::io::{BufRead, IsTerminal};

use super::print_json;
use crate::args::{ControlArgs, TrustCommand};
use crate::config::data_dir;
use crate::output::{self, outln};
use crate::trust::{How, Known, TrustStore, Untrusted};
use doppler_store::signature::PublicKey;

pub fn trust(command: &TrustCommand) -> anyhow::Result<()> {
    match command {
        TrustCommand::List { control } => list(control),
        TrustCommand::Add { publisher, note, control } => {
            let new = open(control)?.add(&[*publisher], How::Added, note)?;
            tell(control, *publisher, if new { "trusted" } else { "trusted already" })
        }
        TrustCommand::Remove { publisher, control } => {
            let known = open(control)?.remove(*publisher)?;
            tell(control, *publisher, if known { "removed" } else { "was not trusted" })?;
            if !control.json {
                outln!("  refused under every trust policy until it is added");
            }
            Ok(())
        }
    }
}

fn open(control: &ControlArgs) -> anyhow::Result<TrustStore> {
    TrustStore::open(&data_dir(&control.data)?)
}

fn list(control: &ControlArgs) -> anyhow::Result<()> {
    let Known { trusted, refused } = open(control)?.read()?;
    if control.json {
        return print_json(&trusted);
    }
    if trusted.is_empty() {
        outln!("nobody is trusted yet (doppler-node trust add PUBLISHER)");
    }
    for one in trusted {
        let how = match one.how {
            How::Added => "added",
            How::FirstUse => "first use",
        };
        outln!("{}  {how:<9}  {}", one.publisher, one.note);
    }
    for publisher in refused {
        outln!("{publisher}  refused");
    }
    Ok(())
}

fn tell(control: &ControlArgs, publisher: PublicKey, what: &str) -> anyhow::Result<()> {
    if control.json {
        return print_json(&serde_json::json!({ "publisher": publisher, "result": what }));
    }
    outln!("{publisher} {what}");
    Ok(())
}

/// Whether there is a person to ask.
pub fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Runs `work` with no further publishers trusted. If it is refused because the publisher is not
/// trusted and a person agrees, runs it again with those publishers trusted.
pub fn asking<T>(mut work: impl FnMut(Vec<PublicKey>) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let error = match work(Vec::new()) {
        Ok(done) => return Ok(done),
        Err(error) => error,
    };
    match error.downcast_ref::<Untrusted>() {
        Some(untrusted) if can_ask() && !untrusted.removed => {
            let mut publishers = Vec::new();
            for publisher in untrusted.publishers.iter().take(1) {
                publishers.push(publisher.parse()?);
            }
            let agreed = !publishers.is_empty() && ask(untrusted, &mut std::io::stdin().lock())?;
            if agreed { work(publishers) } else { Err(error) }
        }
        _ => Err(error),
    }
}

/// Asks on standard error. Anything but a yes means no.
fn ask(untrusted: &Untrusted, answer: &mut impl BufRead) -> anyhow::Result<bool> {
    let publisher = untrusted.publishers.first().map_or("nobody", String::as_str);
    output::remark(format_args!(
        "Model {} is signed by {publisher}, whom nobody here has trusted yet.\n\
         Use it, and trust that publisher from now on? [y/N] ",
        untrusted.name
    ));
    let mut line = String::new();
    answer.read_line(&mut line)?;
    Ok(matches!(line.trim().to_lowercase().as_str(), "y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_yes_is_yes() {
        let untrusted = Untrusted {
            model: "id".into(),
            name: "tiny".into(),
            publishers: vec![PublicKey([7; 32]).to_string()],
            removed: false,
        };
        for (text, agreed) in
            [("y\n", true), (" YES \n", true), ("\n", false), ("", false), ("yeah\n", false)]
        {
            assert_eq!(ask(&untrusted, &mut text.as_bytes()).unwrap(), agreed, "{text:?}");
        }
    }

    #[test]
    fn other_errors_are_passed_on_and_without_a_person_refusals_too() {
        let mut times = 0;
        let failed = asking(|_| -> anyhow::Result<()> {
            times += 1;
            anyhow::bail!("broken")
        });
        assert_eq!((failed.unwrap_err().to_string().as_str(), times), ("broken", 1));
    }
}
