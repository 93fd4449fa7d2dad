//! What the tests measured of each reference: `tests/data/measured.json`, and `docs/models.md`, which is
//! made from it.
//!
//! A golden test notes the error that it found. If the file has a figure of the same reference on the
//! same device, the error must not have grown; with `DOPPLER_UPDATE_DOCS=1` the figure is written
//! instead. A reference that is not in the file is only checked against the test's own bound. So nobody
//! types a figure. To make the page anew, run the golden tests with the variable, then this test.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::families;
use super::load;

/// How much larger an error may be than the one that was noted: other vector units sum in another
/// order.
const GROWTH_MAX: f64 = 4.0;
/// Errors below this are rounding alone, whatever the seed of a checkpoint.
const NOISE: f64 = 5e-5;

/// One reference.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Reference {
    architecture: String,
    family: String,
    /// The container, and the form of its weights.
    form: String,
    layers: usize,
    /// Of a token as one submission on a GPU; none if it runs op by op.
    dispatches: Option<usize>,
    /// By device, the largest error: a difference of two logits or elements of states over the
    /// reference's standard deviation.
    errors: BTreeMap<String, f64>,
}

type Record = BTreeMap<String, Reference>;

fn file() -> PathBuf {
    doppler_testing::root().join("tests/data/measured.json")
}

fn record() -> Record {
    match std::fs::read(file()) {
        Ok(bytes) => serde_json::from_slice(&bytes).expect("tests/data/measured.json is readable"),
        Err(_) => Record::new(),
    }
}

fn updates() -> bool {
    std::env::var_os("DOPPLER_UPDATE_DOCS").is_some()
}

/// Notes the largest error of a reference, of all ways in which a test ran it on one device.
/// `source` is what was opened, the directory `dir` or a file in it.
pub(crate) fn note(dir: &Path, source: &Path, device: &str, error: f64) {
    let name = dir.file_name().unwrap().to_string_lossy().into_owned();
    if !updates() {
        if let Some(noted) = record().get(&name).and_then(|one| one.errors.get(device).copied()) {
            let most = (GROWTH_MAX * noted).max(NOISE);
            assert!(error <= most, "{name} on {device}: {error:.1e}, and {noted:.1e} was noted");
        }
        return;
    }
    let checkpoint = load::open(source).unwrap();
    let config = checkpoint.config();
    let graph = families::read(config).unwrap().graph;
    let form = match checkpoint.quantization() {
        Some(form) if source.is_file() => format!("GGUF, {form}"),
        Some(form) => format!("safetensors, {form}"),
        None if source.is_file() => "GGUF".to_owned(),
        None => "safetensors".to_owned(),
    };
    // Tests run beside each other, in one process or in several.
    let lock = File::create(std::env::temp_dir().join("doppler-measured.lock")).unwrap();
    lock.lock().unwrap();
    let mut record = record();
    let one = record.entry(name).or_default();
    one.architecture = config["architectures"][0].as_str().unwrap_or_default().to_owned();
    one.family = families::name(config).unwrap().to_owned();
    one.form = form;
    one.layers = graph.layers;
    one.dispatches = super::gpu::tests::token::dispatches(&graph);
    // Two digits say enough, and small changes do not change the file.
    one.errors.insert(device.to_owned(), format!("{error:.1e}").parse().unwrap());
    let text = serde_json::to_string_pretty(&record).unwrap() + "\n";
    std::fs::write(file(), text).unwrap();
}

/// The page.
fn page(record: &Record) -> String {
    let mut page = String::from(
        "# Models\n\n\
         Generated from what the golden tests measured (`tests/data/measured.json`). Each row is a small \
         checkpoint with outputs of another implementation: Transformers', in f32, of the same weights. \
         The error is the largest difference of two logits over their standard deviation; all rows have \
         the same likeliest tokens and the same greedy text. A GPU runs a token as one submission of the \
         given number of dispatches; fused are families whose layers need no more than twelve.\n\n\
         A family or a format without a row is not supported.\n\n",
    );
    let devices: BTreeSet<&String> = record.values().flat_map(|one| one.errors.keys()).collect();
    let mut row = |family: &str, of: &str, form: &str, token: &str, errors: Vec<String>| {
        let _ = writeln!(page, "| {family} | {of} | {form} | {token} | {} |", errors.join(" | "));
    };
    let heads: Vec<String> = devices.iter().map(|device| format!("error, {device}")).collect();
    row("family", "reference", "stored as", "dispatches a layer", heads);
    row("---", "---", "---", "---", devices.iter().map(|_| "---".to_owned()).collect());
    let mut sorted: Vec<_> = record.iter().collect();
    sorted.sort_by_key(|(name, one)| (one.family.clone(), one.form.clone(), (*name).clone()));
    for (name, one) in sorted {
        let token = match one.dispatches {
            None => "op by op".to_owned(),
            Some(count) => {
                // The embedding, the last norm and the output matrix belong to no layer.
                let each = count.saturating_sub(3) as f64 / one.layers.max(1) as f64;
                let fused = if each <= 12.0 { ", fused" } else { "" };
                format!("{each:.1}{fused}")
            }
        };
        let error = |device: &&String| {
            one.errors.get(*device).map_or("-".to_owned(), |error| format!("{error:.1e}"))
        };
        let of = format!("{name} ({})", one.architecture);
        row(&one.family, &of, &one.form, &token, devices.iter().map(error).collect());
    }
    page
}

#[test]
fn docs_models_is_what_the_tests_measured() {
    let path = doppler_testing::root().join("docs/models.md");
    let record = record();
    let generated = page(&record);
    if updates() {
        std::fs::write(&path, &generated).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == generated,
        "docs/models.md is not what tests/data/measured.json says: run this test once with \
         DOPPLER_UPDATE_DOCS=1"
    );
    let families: BTreeSet<&str> = record.values().map(|one| one.family.as_str()).collect();
    for known in families::names() {
        assert!(families.contains(known), "no reference of the family {known} was measured");
    }
    for (name, one) in &record {
        for (device, error) in &one.errors {
            assert!(*error <= 3e-3, "{name} on {device}: {error:.1e}");
        }
    }
}

/// No reference that is here takes more dispatches than were noted.
#[test]
fn references_take_no_more_dispatches_than_were_noted() {
    for dir in doppler_testing::references() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let Some(noted) = record().remove(&name) else { continue };
        let checkpoint = load::open(&dir).unwrap();
        let graph = families::read(checkpoint.config()).unwrap().graph;
        assert_eq!(graph.layers, noted.layers, "{name}");
        let found = super::gpu::tests::token::dispatches(&graph);
        let fewer = noted.dispatches.is_none_or(|most| found.is_some_and(|count| count <= most));
        assert!(fewer, "{name}: {found:?} dispatches, and {:?} were noted", noted.dispatches);
    }
}
