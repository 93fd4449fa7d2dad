//! `leave`: the running node leaves its swarm and ends, after a drain if it is asked for.

use anyhow::bail;

use super::print_json;
use crate::args::LeaveArgs;
use crate::client::{Client, told};
use crate::config::data_dir;
use crate::leaving::{Drain, LeaveEvent, LeaveRequest};
use crate::output::outln;
use crate::progress;
use crate::size::{ByteSize, count};

/// # Errors
/// If the node stays: nobody can take what only it holds.
pub fn leave(args: &LeaveArgs) -> anyhow::Result<()> {
    let client = Client::open(&data_dir(&args.control.data)?)?;
    let waiting = (!args.control.json).then(|| progress::spinner("leaving"));
    let mut left = None;
    let mut failed = None;
    let ended = client.stream("/control/v1/leave", &LeaveRequest { drain: args.drain }, |event| {
        if args.control.json {
            // A closed standard output does not matter, because the exit code gives the result.
            let _ = print_json(&event);
        }
        match event {
            LeaveEvent::Draining(drain) => {
                if let Some(waiting) = &waiting {
                    waiting.set_message(describe(&drain));
                }
            }
            LeaveEvent::Leaving { last_copies, last_bytes } => {
                left = Some((last_copies, last_bytes));
            }
            LeaveEvent::Failed(error) => failed = Some(told(error)),
        }
        failed.is_none()
    });
    if let Some(waiting) = &waiting {
        waiting.finish_and_clear();
    }
    if let Some(failed) = failed {
        return Err(failed);
    }
    // The answer breaks off when the process ends.
    let Some((objects, bytes)) = left else {
        ended?;
        bail!("the node ended before it had left");
    };
    if !args.control.json {
        outln!("left");
        if objects > 0 {
            let (objects, bytes) = (count(objects, "object"), ByteSize(bytes));
            outln!("  held by no other peer: {objects}, {bytes}; kept in the data directory");
        }
    }
    Ok(())
}

/// How far a drain is, for people.
fn describe(drain: &Drain) -> String {
    if drain.objects == 0 {
        return "others hold everything; waiting for their word".to_owned();
    }
    let objects = count(drain.objects, "object");
    let last = match drain.last {
        0 => String::new(),
        last => format!(", {last} of them held by nobody else"),
    };
    let copying = progress::describe("others are copying", &drain.progress);
    format!("{copying}; {objects} to go{last}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppler_mesh::Progress;

    #[test]
    fn a_drain_is_told_in_objects_bytes_rate_and_time_left() {
        let progress = Progress {
            done: 1 << 20,
            total: 3 << 20,
            rate: Some(1024.0 * 1024.0),
            left_s: Some(2.0),
            slow: None,
        };
        let said = describe(&Drain { objects: 2, last: 1, progress });
        for word in
            ["1.00 MiB of 3.00 MiB", "1.00 MiB/s", "2 s left", "2 objects to go", "1 of them"]
        {
            assert!(said.contains(word), "{word:?} is not in {said:?}");
        }
        assert!(describe(&Drain::default()).contains("waiting"));
    }
}
