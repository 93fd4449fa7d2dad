//! Signals that end a command: Ctrl-C, SIGTERM and a terminal that closes (SIGHUP).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

/// Resolves at the first of these signals with its usual exit code. This call installs the
/// handlers. If SIGHUP was ignored when the process started, it stays ignored, so that `nohup`
/// works.
#[cfg(unix)]
pub fn ending() -> anyhow::Result<impl Future<Output = u8>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut hangup = match ignores_hangup() {
        true => None,
        false => Some(signal(SignalKind::hangup()).context("cannot catch SIGHUP")?),
    };
    let hung_up = async move {
        match &mut hangup {
            Some(hangup) => hangup.recv().await,
            None => std::future::pending().await,
        }
    };
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => 130,
            _ = terminate.recv() => 143,
            _ = hung_up => 129,
        }
    })
}

#[cfg(not(unix))]
pub fn ending() -> anyhow::Result<impl Future<Output = u8>> {
    Ok(async {
        let _ = tokio::signal::ctrl_c().await;
        130
    })
}

/// Whether SIGHUP is ignored, as under `nohup`. Known on Linux only.
#[cfg(unix)]
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignored(&status).is_some_and(|mask| mask & 1 != 0)
}

/// The mask of ignored signals in Linux' /proc/self/status; bit 0 is signal 1, SIGHUP.
#[cfg(unix)]
fn ignored(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Set once a signal is ending the process.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Returns unless a signal is ending the process. Failures while its files are being removed need
/// not be reported.
pub fn unless_ending() {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// From now on such a signal runs `first`, removes `unfinished`, a directory that this process is
/// filling, and ends the process.
pub fn remove_when_ended(
    unfinished: PathBuf,
    first: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ended = {
        let _inside = runtime.enter();
        ending()?
    };
    let wait = move || {
        let code = runtime.block_on(ended);
        ENDING.store(true, Ordering::SeqCst);
        first();
        // The writer may add a file meanwhile, so that the directory is not empty.
        for _ in 0..100 {
            match std::fs::remove_dir_all(&unfinished) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {}
                _ => break,
            }
        }
        std::process::exit(code.into());
    };
    let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(wait);
    thread.map(drop).context("cannot start a thread")
}

/// From now on, Ctrl-C sets the flag instead of ending the process. If the flag is still set, because
/// whatever should look at it does not, it ends the process.
pub fn interrupts() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let set = flag.clone();
    let wait = move || {
        runtime.block_on(async {
            while tokio::signal::ctrl_c().await.is_ok() {
                if set.swap(true, Ordering::SeqCst) {
                    std::process::exit(130);
                }
            }
        });
    };
    let thread = std::thread::Builder::new().name("interrupts".to_owned()).spawn(wait);
    thread.context("cannot start a thread")?;
    Ok(flag)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read() {
        let status = "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n";
        assert_eq!(ignored(status), Some(0x1001));
        assert_eq!(ignored("Name:\tx\n"), None);
        assert_eq!(ignored("SigIgn:\tnone\n"), None);
    }
}
