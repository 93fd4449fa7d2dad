//! `GET /metrics`: counters in Prometheus' text format, version 0.0.4. Pure.

use std::fmt::Write as _;

use crate::api::Status;
use crate::engine::{LoadedModel, QUEUE_MAX, RUNNING_MAX, Shown};

pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A metric's name, kind and help.
type Metric = (&'static str, &'static str, &'static str);

/// One metric with its samples: labels (possibly none) and values.
fn metric(text: &mut String, (name, kind, help): Metric, samples: &[(&str, f64)]) {
    let _ = writeln!(text, "# HELP doppler_{name} {help}\n# TYPE doppler_{name} {kind}");
    for (labels, value) in samples {
        let _ = writeln!(text, "doppler_{name}{labels} {value}");
    }
}

/// A label's value, as the format quotes it.
fn quoted(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Everything that is counted.
pub fn text(status: &Status, engine: &Shown, waiting: usize) -> String {
    let mut text = String::new();
    of_engine(&mut text, engine, waiting);
    of_node(&mut text, status);
    text
}

fn of_engine(text: &mut String, engine: &Shown, waiting: usize) {
    let counts = &engine.counts;
    let n = |number: u64| number as f64;
    let ended = ("generations_total", "counter", "Generations that ended, by how.");
    let well = counts.ended.saturating_sub(counts.failed + counts.cancelled);
    let samples = [
        ("{end=\"done\"}", n(well)),
        ("{end=\"failed\"}", n(counts.failed)),
        ("{end=\"cancelled\"}", n(counts.cancelled)),
    ];
    metric(text, ended, &samples);
    let tokens = ("tokens_total", "counter", "Tokens of finished generations.");
    let samples = [
        ("{kind=\"prompt\"}", n(counts.prompt_tokens)),
        ("{kind=\"cached\"}", n(counts.reused_tokens)),
        ("{kind=\"generated\"}", n(counts.generated_tokens)),
    ];
    metric(text, tokens, &samples);
    let hits = ("expert_reads_total", "counter", "Experts that tokens needed, by tier.");
    let samples = [
        ("{tier=\"vram\"}", n(counts.hits.vram)),
        ("{tier=\"ram\"}", n(counts.hits.ram)),
        ("{tier=\"disk\"}", n(counts.hits.disk)),
        ("{tier=\"peer\"}", n(counts.hits.peer)),
    ];
    metric(text, hits, &samples);
    let queue = ("queue_length", "gauge", "Generations that wait for their turn.");
    metric(text, queue, &[("", waiting as f64)]);
    metric(text, ("queue_max", "gauge", "The most that may wait."), &[("", QUEUE_MAX as f64)]);
    let generating = ("generating", "gauge", "Generations that run.");
    metric(text, generating, &[("", engine.running as f64)]);
    let most = ("generating_max", "gauge", "The most that may run at once.");
    metric(text, most, &[("", RUNNING_MAX as f64)]);
    let loads = ("model_loads_total", "counter", "How often a model was loaded.");
    metric(text, loads, &[("", n(engine.loads))]);
    let labels =
        |model: &LoadedModel| format!("{{model=\"{}\",id=\"{}\"}}", quoted(&model.name), model.id);
    let loaded: Vec<(String, f64)> =
        engine.loaded.iter().map(|model| (labels(model), n(model.bytes))).collect();
    let loaded: Vec<(&str, f64)> =
        loaded.iter().map(|(labels, bytes)| (&labels[..], *bytes)).collect();
    let what = "Bytes of the device that a loaded model holds.";
    metric(text, ("model_loaded_bytes", "gauge", what), &loaded);
    let prefixes = ("prefix_bytes", "gauge", "Bytes of earlier prompts' keys and values on disk.");
    metric(text, prefixes, &[("", n(engine.prefixes.bytes))]);
}

fn of_node(text: &mut String, status: &Status) {
    let n = |number: u64| number as f64;
    let one =
        |text: &mut String, metric_: Metric, value: f64| metric(text, metric_, &[("", value)]);
    one(text, ("uptime_seconds", "gauge", "Since the node started."), status.uptime_s);
    let held = ("tier_bytes", "gauge", "Bytes that a tier holds.");
    let (ram, disk) = (&status.ram, &status.disk);
    let samples = [("{tier=\"ram\"}", n(ram.used)), ("{tier=\"disk\"}", n(disk.used))];
    metric(text, held, &samples);
    let budgets = ("tier_budget_bytes", "gauge", "Bytes that a tier may hold.");
    let samples = [
        ("{tier=\"vram\"}", n(status.vram_budget)),
        ("{tier=\"ram\"}", n(ram.budget)),
        ("{tier=\"disk\"}", n(disk.budget)),
    ];
    metric(text, budgets, &samples);
    let store = &status.store;
    one(text, ("evictions_total", "counter", "Objects evicted."), n(store.evictions));
    one(text, ("quarantines_total", "counter", "Objects found damaged."), n(store.quarantines));
    one(text, ("peers", "gauge", "Connected peers."), status.peers as f64);
    one(text, ("models", "gauge", "Known models."), status.models as f64);
    let traffic = &status.traffic;
    let received = ("received_bytes_total", "counter", "Bytes from peers, by whether they proved.");
    let samples = [
        ("{proof=\"valid\"}", n(traffic.verified_bytes)),
        ("{proof=\"wrong\"}", n(traffic.rejected_bytes)),
    ];
    metric(text, received, &samples);
    one(text, ("sent_bytes_total", "counter", "Bytes to peers."), n(status.uploaded_bytes));
    let heal = &status.healing;
    let lacking = ("heal_lacking_objects", "gauge", "Objects with too few copies.");
    one(text, lacking, heal.lacking as f64);
    one(text, ("heal_lost_objects", "gauge", "Objects without a copy."), heal.lost as f64);
    one(text, ("heal_lacking_bytes", "gauge", "Bytes of missing copies."), n(heal.lacking_bytes));
    one(text, ("heal_copied_bytes_total", "counter", "Bytes copied."), n(heal.copied_bytes));
    one(text, ("heal_dropped_total", "counter", "Surplus copies dropped."), n(heal.dropped));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Counts;
    use doppler_store::ModelId;

    #[test]
    fn each_sample_follows_its_help_and_type() {
        let counts =
            Counts { ended: 7, failed: 1, cancelled: 2, generated_tokens: 9, ..Counts::default() };
        let mut said = String::new();
        let model = |name: &str| LoadedModel {
            id: ModelId::of(name.as_bytes()),
            name: name.to_owned(),
            backend: "CPU".to_owned(),
            bytes: 12,
            idle_since: None,
        };
        let loaded = vec![model("a"), model("b\"")];
        of_engine(&mut said, &Shown { counts, running: 5, loaded, ..Shown::default() }, 3);
        let sample = |name: &str, quoted: &str| {
            let id = ModelId::of(name.as_bytes());
            format!("doppler_model_loaded_bytes{{model=\"{quoted}\",id=\"{id}\"}} 12")
        };
        let loaded = [sample("a", "a"), sample("b\"", "b\\\"")];
        for line in [
            "# TYPE doppler_generations_total counter",
            "doppler_generations_total{end=\"done\"} 4",
            "doppler_generations_total{end=\"cancelled\"} 2",
            "doppler_tokens_total{kind=\"generated\"} 9",
            "doppler_queue_length 3",
            "doppler_generating 5",
            "doppler_prefix_bytes 0",
            &loaded[0],
            &loaded[1],
        ] {
            assert!(said.lines().any(|have| have == line), "{line}\n{said}");
        }
        assert_eq!(quoted("a\"b\\c\n"), "a\\\"b\\\\c\\n");
    }
}
