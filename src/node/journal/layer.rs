//! Turns the program's events into entries of the log.

use std::fmt::Debug;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{EnvFilter, FilterExt};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use super::{Entry, begin, note};

/// What is kept whatever `--log` says: this project's own, and others' warnings.
const KEPT: &str = "warn,doppler=info";

/// Keeps this process's log from now on: what is kept in any case, less `quiet`, and what `asked`
/// (`--log`) lets through. `None` if these are no directives.
pub fn layer<S>(asked: &str, quiet: &str) -> Option<impl Layer<S>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let asked = EnvFilter::try_new(asked).ok()?;
    let kept = EnvFilter::try_new(format!("{quiet},{KEPT}")).ok()?;
    begin();
    Some(Journal.with_filter(FilterExt::or(kept, asked)))
}

struct Journal;

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        note(&entry(event));
    }
}

fn entry(event: &Event<'_>) -> Entry {
    let mut said = Said::default();
    event.record(&mut said);
    let of = event.metadata();
    let entry = Entry::now((*of.level()).into(), of.target(), said.message);
    Entry { fields: said.fields, ..entry }
}

/// What an event says.
#[derive(Default)]
struct Said {
    message: String,
    fields: Map<String, Value>,
}

impl Said {
    fn take(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => {
                self.fields.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.take(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.take(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.take(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.take(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.take(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;
    use crate::journal::Level;

    /// Keeps what the layer would write.
    struct Kept(Arc<Mutex<Vec<Entry>>>);

    impl<S: Subscriber> Layer<S> for Kept {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(entry(event));
        }
    }

    /// What is kept of a few events with this `--log`.
    fn kept(asked: &str) -> Vec<Entry> {
        let entries = Arc::default();
        let filter = |text: &str| EnvFilter::try_new(text).unwrap();
        let layer = Kept(Arc::clone(&entries));
        let layer = layer.with_filter(FilterExt::or(filter(KEPT), filter(asked)));
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "doppler_mesh::x", peer = %"p", bytes = 7, ok = true, "learned");
            tracing::debug!(target: "doppler_mesh::x", "detail");
            tracing::info!(target: "quinn", "chatter");
            tracing::warn!(target: "quinn", "{} failed", 1);
        });
        entries.lock().unwrap().clone()
    }

    #[test]
    fn what_matters_is_kept_whatever_goes_to_standard_error() {
        let texts = |asked| kept(asked).into_iter().map(|one| one.message).collect::<Vec<_>>();
        for quiet in ["off", "error", "warn"] {
            assert_eq!(texts(quiet), ["learned", "1 failed"], "{quiet}");
        }
        assert_eq!(texts("doppler_mesh=debug"), ["learned", "detail", "1 failed"]);
        assert_eq!(texts("debug"), ["learned", "detail", "chatter", "1 failed"]);
    }

    #[test]
    fn an_event_keeps_its_fields() {
        let entry = kept("warn").remove(0);
        assert_eq!((entry.level, &*entry.target), (Level::Info, "doppler_mesh::x"));
        let fields = Value::Object(entry.fields);
        assert_eq!(fields, serde_json::json!({ "peer": "p", "bytes": 7, "ok": true }));
    }
}
