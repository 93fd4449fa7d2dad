//! The number of a node's run, in the file `epoch` of its data directory: larger in each run than in
//! all earlier ones, so that what peers hear from a node that was restarted is newer than whatever
//! they heard before, and a message of an earlier run is never news.
//!
//! The number is the wall clock's or one more than the last, whichever is larger. So a clock that
//! was set back does no harm, and neither does the loss of the file while the clock is right.
//! Invariant: the number is durable before anything is said under it.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use doppler_store::regular;
use tracing::warn;

use crate::identity::write_private;

/// Numbers beyond this are damage: a clock reaches it in 285,000 years, and a page counts to it
/// exactly.
const EPOCH_MAX: u64 = (1 << 53) - 1;

/// Begins a run: returns its number, which is stored.
pub fn begin(data: &Path) -> anyhow::Result<u64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    begin_at(data, u64::try_from(since.as_millis()).unwrap_or(0))
}

fn begin_at(data: &Path, clock_ms: u64) -> anyhow::Result<u64> {
    let path = data.join("epoch");
    let last = match regular::read_text(&path) {
        Ok(text) => {
            let number = text.trim().parse().ok().filter(|number| *number < EPOCH_MAX);
            if number.is_none() {
                warn!("{} is damaged; the number of this run is the clock's", path.display());
            }
            number.unwrap_or(0)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => 0,
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let epoch = clock_ms.max(last + 1).min(EPOCH_MAX);
    write_private(&path, format!("{epoch}\n").as_bytes())?;
    Ok(epoch)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_run_has_a_larger_number_whatever_the_clock_says() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        assert_eq!(begin_at(data, 5000).unwrap(), 5000);
        assert_eq!(begin_at(data, 9000).unwrap(), 9000);
        assert_eq!(begin_at(data, 7000).unwrap(), 9001, "the clock was set back");
        assert_eq!(begin_at(data, 0).unwrap(), 9002);
        fs::remove_file(data.join("epoch")).unwrap();
        assert_eq!(begin_at(data, 9500).unwrap(), 9500, "the file was lost");
        for damaged in ["", "x", "-1", "18446744073709551615", "9007199254740991"] {
            fs::write(data.join("epoch"), damaged).unwrap();
            assert_eq!(begin_at(data, 9600).unwrap(), 9600, "{damaged:?}");
        }
        fs::remove_file(data.join("epoch")).unwrap();
        fs::create_dir(data.join("epoch")).unwrap();
        let error = format!("{:#}", begin_at(data, 1).unwrap_err());
        assert!(error.contains("epoch"), "{error}");
        assert!(begin(tempfile::tempdir().unwrap().path()).unwrap() > 1_700_000_000_000);
    }
}
