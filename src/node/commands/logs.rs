//! `logs`: what the node of a data directory has logged. Reads its files, so no node need run.

use std::cell::Cell;
use std::time::Duration;

use anyhow::Context;

use crate::args::LogsArgs;
use crate::config::data_dir;
use crate::journal::{Entry, tail};
use crate::output;

/// How often the file is looked at for more.
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub fn logs(args: &LogsArgs) -> anyhow::Result<()> {
    let data = data_dir(&args.data)?;
    let text = || format!("cannot read the log in {}", data.display());
    let found = tail(&data, args.level, args.lines).with_context(text)?;
    let (entries, mut follower) = found.with_context(|| {
        format!(
            "there is no log in {0}: no node has run there yet (start one: doppler-node join \
             --swarm NAME --data {0})",
            data.display()
        )
    })?;
    let goes_on = Cell::new(true);
    let mut show = |entry: Entry| {
        let line = match args.json {
            true => serde_json::to_string(&entry).unwrap_or_default(),
            false => entry.to_string(),
        };
        goes_on.set(goes_on.get() && output::piece(&format!("{line}\n")));
    };
    entries.into_iter().for_each(&mut show);
    while args.follow && goes_on.get() {
        follower.more(&mut show).with_context(text)?;
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}
