//! Progress bars on standard error. They draw nothing if it is not a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::size::ByteSize;
use doppler_infer::load::Progress;
use doppler_mesh::Progress as Transfer;

/// A bar over `total` steps with a message at its end.
pub fn bar(total: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(total).with_prefix(what);
    let style = ProgressStyle::with_template(
        "{spinner:.cyan} {prefix} {bar:32.cyan/dim} {percent:>3} % {eta:>4} {msg}",
    );
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// A spinner for work whose length is not known; ends with `finish_and_clear`.
pub fn spinner(what: impl Into<std::borrow::Cow<'static, str>>) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what);
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

/// A transfer's progress in words: bytes, rate, time left.
pub fn describe(what: &str, progress: &Transfer) -> String {
    let mut text = format!("{what}: {} of {}", ByteSize(progress.done), ByteSize(progress.total));
    if let Some(rate) = progress.rate {
        text += &format!(", {}/s", ByteSize(rate as u64));
    }
    if let Some(left) = progress.left_s {
        text += &format!(", {} left", time(left));
    }
    if let Some(peer) = &progress.slow {
        text += &format!("; waiting for {peer}, which is slow");
    }
    text
}

/// A duration in seconds, for people.
pub fn time(seconds: f64) -> String {
    let seconds = seconds.ceil().clamp(0.0, 1e9) as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A conversion's bar, in bytes of the source.
pub struct ConvertBar(ProgressBar);

impl ConvertBar {
    pub fn new(what: &'static str) -> Self {
        let bar = bar(0, what);
        let style = ProgressStyle::with_template(
            "{spinner:.cyan} {prefix} {bar:24.cyan/dim} {binary_bytes} of {binary_total_bytes}, \
             {binary_bytes_per_sec}, {eta} left  {msg}",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self(bar)
    }

    pub fn show(&self, progress: Progress<'_>) {
        self.0.set_length(progress.total);
        self.0.set_position(progress.done);
        self.0.set_message(progress.tensor.to_owned());
    }

    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_is_told_in_bytes_rate_and_time_left() {
        let mut progress = Transfer { done: 1 << 20, total: 3 << 30, ..Transfer::default() };
        assert_eq!(describe("fetching", &progress), "fetching: 1.00 MiB of 3.00 GiB");
        (progress.rate, progress.left_s) = (Some(2.5 * 1024.0 * 1024.0), Some(1228.4));
        let text = describe("fetching", &progress);
        assert_eq!(text, "fetching: 1.00 MiB of 3.00 GiB, 2.50 MiB/s, 21 min left");
        assert_eq!(progress.clone().naming(|| Some("a peer".into())).slow, None, "it is not slow");
        progress.rate = Some(1000.0);
        let slow = describe("fetching", &progress.naming(|| Some("a peer".into())));
        assert!(slow.ends_with("waiting for a peer, which is slow"), "{slow}");
        assert_eq!(
            [0.0, 59.2, 61.0, 3600.0, 9000.0].map(time),
            ["0 s", "1 min", "2 min", "1 h 0 min", "2 h 30 min"]
        );
    }
}
