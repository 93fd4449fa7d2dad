//! Keeps one line of a driver off standard error.
//!
//! Mesa's device-select layer sits between every Vulkan program and its drivers. wgpu supports
//! drawing on a Wayland display, so the layer looks for one, and libwayland complains that
//! `XDG_RUNTIME_DIR` is not set if nobody is logged in at a screen: on servers, in containers, over
//! ssh. Nothing is drawn here, but wgpu has no setting that leaves the display out. So while
//! adapters are enumerated, standard error is a file in memory. Everything in it except that line
//! is passed on afterwards, in order. If the variable is set, nothing is done.

/// The message of libwayland (`wl_display_connect`).
const LINE: &[u8] = b"error: XDG_RUNTIME_DIR is invalid or not set in the environment.";

/// Runs `work` and suppresses the line.
#[cfg(target_os = "linux")]
pub(super) fn without_line<T>(work: impl FnOnce() -> T) -> T {
    use std::os::fd::AsFd;
    use std::sync::{Mutex, PoisonError};

    // One call at a time: a second one would take the first one's file for standard error.
    static TURN: Mutex<()> = Mutex::new(());
    let is_set = std::env::var_os("XDG_RUNTIME_DIR")
        .is_some_and(|dir| std::path::Path::new(&dir).is_absolute());
    if is_set {
        return work();
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let real = std::io::stderr().as_fd().try_clone_to_owned();
    let file = rustix::fs::memfd_create("stderr", rustix::fs::MemfdFlags::CLOEXEC);
    let (Ok(real), Ok(file)) = (real, file) else { return work() };
    if rustix::stdio::dup2_stderr(&file).is_err() {
        return work();
    }
    let restore = Restore { real, file: file.into() };
    let done = work();
    drop(restore);
    done
}

#[cfg(not(target_os = "linux"))]
pub(super) fn without_line<T>(work: impl FnOnce() -> T) -> T {
    work()
}

/// Restores standard error, even if the work panics.
#[cfg(target_os = "linux")]
struct Restore {
    real: std::os::fd::OwnedFd,
    file: std::fs::File,
}

#[cfg(target_os = "linux")]
impl Drop for Restore {
    fn drop(&mut self) {
        use std::io::{Read, Seek, Write};
        let _ = rustix::stdio::dup2_stderr(&self.real);
        let mut said = Vec::new();
        let read = self.file.rewind().and_then(|()| self.file.read_to_end(&mut said));
        if read.is_ok() && !said.is_empty() {
            let _ = std::io::stderr().lock().write_all(&sift(&said));
        }
    }
}

/// The captured output, without the line.
fn sift(said: &[u8]) -> Vec<u8> {
    said.split_inclusive(|byte| *byte == b'\n')
        .filter(|line| line.trim_ascii_end() != LINE)
        .flatten()
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_line_is_left_out() {
        let line = String::from_utf8_lossy(LINE).into_owned();
        let said = format!("first\n{line}\n{line} And more\n{line}\nlast, unfinished");
        let left = String::from_utf8(sift(said.as_bytes())).unwrap();
        assert_eq!(left, format!("first\n{line} And more\nlast, unfinished"));
        assert_eq!(sift(b""), b"");
    }
}
