//! Notices a panic of any thread or task of a running node. Otherwise that part would be missing
//! from then on while the rest answers as before.
//!
//! Ignores two libraries. Panics of sled, which happen with a damaged index, are caught by the
//! store, which rebuilds the index. Panics of the webrtc crates end the task of one connection, and
//! a stranger could provoke them.

use std::panic::{self, Location, PanicHookInfo};
use std::sync::Arc;

use tokio::sync::watch;

use super::journal::{self, Level};

/// Crates whose panics are handled elsewhere, recognised by the paths of their sources.
const LEFT_ALONE: [&str; 2] = ["/sled-", "/webrtc-"];

/// Resolves with the first panic of this process after the call: its message and its place.
pub fn first() -> impl Future<Output = String> + Send + use<> {
    let (sender, mut seen) = watch::channel(None);
    let sender = Arc::new(sender);
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        journal::report(Level::Error, format!("panicked: {}", describe(info)));
        if !is_left_alone(info) {
            sender.send_if_modified(|first| {
                let is_first = first.is_none();
                first.get_or_insert_with(|| describe(info));
                is_first
            });
        }
        // Prints it, and may have to wait for that.
        before(info);
    }));
    async move {
        let first = seen.wait_for(Option::is_some).await.map(|first| first.clone());
        match first {
            Ok(first) => first.unwrap_or_default(),
            // The hook, and with it the sender, stays for the life of the process.
            Err(_) => std::future::pending().await,
        }
    }
}

fn is_left_alone(info: &PanicHookInfo<'_>) -> bool {
    let among = |place: &Location<'_>| LEFT_ALONE.iter().any(|name| place.file().contains(name));
    info.location().is_some_and(among)
}

fn describe(info: &PanicHookInfo<'_>) -> String {
    let said = info.payload_as_str().unwrap_or("a value that is no text");
    match info.location() {
        Some(place) => format!("{said} ({}:{})", place.file(), place.line()),
        None => said.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_of_any_thread_or_task_is_noticed_once() {
        let first = first();
        let thread = std::thread::spawn(|| panic!("the engine broke"));
        assert!(thread.join().is_err());
        assert!(tokio::spawn(async { panic!("later") }).await.is_err());
        let said = first.await;
        assert!(said.starts_with("the engine broke (") && said.contains("panics.rs:"), "{said}");
    }
}
