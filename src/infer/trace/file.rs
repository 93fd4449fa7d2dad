//! A trace as a file: JSON, one object a line.
//!
//! The first line is the header:
//! `{"format":"doppler-routing-trace","version":1,"model":NAME,"layers":[{"layer":0,"experts":8,"top_k":2,"class":0},...]}`;
//! each further line is a step: `{"tokens":1,"experts":[[0,5],[2,7],...]}`, with the distinct
//! expert ids of every layer in ascending order, and `"spared":true` if slots were emptied before
//! it for a device that fills them by itself. `class` numbers the groups of layers that share
//! slots, from 0 without gaps.
//!
//! A file that breaks any of this is refused, with the number of the line. The sizes of lines,
//! layers and the file are checked before anything is allocated for them.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Trace, TraceLayer, TraceStep};

const FORMAT: &str = "doppler-routing-trace";
const VERSION: u32 = 1;

/// The largest file read.
const FILE_BYTES_MAX: u64 = 1 << 30;
/// The longest line: every expert of the largest model, many times over.
const LINE_BYTES_MAX: u64 = 16 << 20;
const LAYERS_MAX: usize = 4096;
const EXPERTS_MAX: usize = 1 << 16;

/// Why a trace could not be written, read or replayed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    /// The first line is not a header.
    #[error("{path} is not a routing trace: {problem}")]
    NotATrace { path: String, problem: String },
    #[error("{path} is a routing trace of version {version}; this program reads version {VERSION}")]
    Version { path: String, version: u32 },
    #[error("{path}, line {line}: {problem}")]
    Line { path: String, line: usize, problem: String },
    #[error("{path} is larger than {FILE_BYTES_MAX} bytes")]
    TooLarge { path: String },
    #[error("{slots} slots are less than one token needs: the smallest number is {smallest}")]
    TooFewSlots { slots: usize, smallest: usize },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    version: u32,
    model: String,
    layers: Vec<TraceLayer>,
}

/// The part of the header that all versions have.
#[derive(Deserialize)]
struct Versioned {
    format: String,
    version: u32,
}

/// Writes a trace to a file, replacing an existing one.
pub fn write(trace: &Trace, path: &Path) -> Result<(), TraceError> {
    let failed = |source| TraceError::Io { path: path.display().to_string(), source };
    let mut out = BufWriter::new(File::create(path).map_err(failed)?);
    let header = Header {
        format: FORMAT.to_owned(),
        version: VERSION,
        model: trace.model.clone(),
        layers: trace.layers.clone(),
    };
    let mut line = |value: String| writeln!(out, "{value}").map_err(failed);
    let json = |e: serde_json::Error| failed(e.into());
    line(serde_json::to_string(&header).map_err(json)?)?;
    for step in &trace.steps {
        line(serde_json::to_string(step).map_err(json)?)?;
    }
    out.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)
}

/// Reads a trace and checks everything that a replay relies on.
pub fn read(path: &Path) -> Result<Trace, TraceError> {
    let name = path.display().to_string();
    let failed = |source| TraceError::Io { path: name.clone(), source };
    let file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.len() > FILE_BYTES_MAX {
        return Err(TraceError::TooLarge { path: name });
    }
    parse(BufReader::new(file.take(FILE_BYTES_MAX)), &name)
}

/// `path` is for error messages.
pub(super) fn parse(mut file: impl BufRead, path: &str) -> Result<Trace, TraceError> {
    let mut line = Vec::new();
    let mut number = 0;
    let mut next = |line: &mut Vec<u8>| -> Result<bool, TraceError> {
        number += 1;
        line.clear();
        let failed = |source| TraceError::Io { path: path.to_owned(), source };
        file.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', line).map_err(failed)?;
        if line.len() as u64 == LINE_BYTES_MAX {
            let problem = format!("longer than {LINE_BYTES_MAX} bytes");
            return Err(TraceError::Line { path: path.to_owned(), line: number, problem });
        }
        Ok(!line.is_empty())
    };
    next(&mut line)?;
    let mut trace = header(&line, path)?;
    let mut read = 1;
    while next(&mut line)? {
        read += 1;
        let problem = |problem| TraceError::Line { path: path.to_owned(), line: read, problem };
        trace.steps.push(step(&line, &trace.layers).map_err(problem)?);
    }
    Ok(trace)
}

fn header(line: &[u8], path: &str) -> Result<Trace, TraceError> {
    let no_trace = |problem: String| TraceError::NotATrace { path: path.to_owned(), problem };
    let versioned: Versioned =
        serde_json::from_slice(line).map_err(|e| no_trace(format!("its first line: {e}")))?;
    if versioned.format != FORMAT {
        return Err(no_trace(format!("its format is {:?}", versioned.format)));
    }
    if versioned.version != VERSION {
        return Err(TraceError::Version { path: path.to_owned(), version: versioned.version });
    }
    let wrong = |problem| TraceError::Line { path: path.to_owned(), line: 1, problem };
    let header: Header = serde_json::from_slice(line).map_err(|e| wrong(e.to_string()))?;
    let layers = &header.layers;
    if !(1..=LAYERS_MAX).contains(&layers.len()) {
        return Err(wrong(format!("{} layers; 1 to {LAYERS_MAX} are possible", layers.len())));
    }
    let mut classes = 0;
    for (at, layer) in layers.iter().enumerate() {
        let TraceLayer { experts, top_k, class, .. } = *layer;
        if !(1..=EXPERTS_MAX).contains(&experts) || !(1..=experts).contains(&top_k) {
            return Err(wrong(format!("layer {at} sends a token to {top_k} of {experts} experts")));
        }
        if class > classes {
            return Err(wrong(format!(
                "layer {at} is of class {class}, but no layer is of class {classes}"
            )));
        }
        classes += u16::from(class == classes);
    }
    Ok(Trace { model: header.model, layers: header.layers, steps: Vec::new() })
}

fn step(line: &[u8], layers: &[TraceLayer]) -> Result<TraceStep, String> {
    let step: TraceStep = serde_json::from_slice(line).map_err(|e| e.to_string())?;
    if step.tokens == 0 {
        return Err("a step of 0 tokens".into());
    }
    if step.experts.len() != layers.len() {
        return Err(format!(
            "experts of {} layers instead of {}",
            step.experts.len(),
            layers.len()
        ));
    }
    for (at, (experts, layer)) in step.experts.iter().zip(layers).enumerate() {
        if !experts.is_sorted_by(|a, b| a < b) {
            return Err(format!("the experts of layer {at} are not distinct and ascending"));
        }
        if let Some(id) = experts.last().filter(|id| **id as usize >= layer.experts) {
            return Err(format!("layer {at} has no expert {id}, only {}", layer.experts));
        }
        if experts.len() > step.tokens.saturating_mul(layer.top_k) {
            let (asked, tokens) = (experts.len(), step.tokens);
            return Err(format!("layer {at} asks for {asked} experts for {tokens} tokens"));
        }
    }
    Ok(step)
}
