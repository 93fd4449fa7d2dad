//! Progress bars on standard error; they draw nothing where that is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use doppler_infer::load::Progress;

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

/// A conversion's bar, in bytes of the source.
pub struct ConvertBar(ProgressBar);

impl ConvertBar {
    pub fn new(what: &'static str) -> Self {
        Self(bar(0, what))
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
