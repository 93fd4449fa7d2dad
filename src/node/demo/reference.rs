//! The text of a node that holds everything: a separate process, with every expert resident and no
//! swarm.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::api::GenerateRequest;
use crate::settings;

/// The part of `run --json` that the demo compares.
#[derive(Deserialize)]
pub struct Local {
    pub tokens: Vec<u32>,
    pub text: String,
}

/// Runs `run MODEL_DIR --json` greedily and reads its answer.
pub fn generate(model_dir: &Path, request: &GenerateRequest) -> anyhow::Result<Local> {
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let context = request.context.unwrap_or(0).max(1).to_string();
    let output = Command::new(program)
        .env(settings::VARIABLE, "")
        .arg("run")
        .arg(model_dir)
        .args(["--json", "--tokens", &request.tokens.to_string(), "--context", &context])
        .arg(format!("--prompt={}", request.prompt))
        .stdin(Stdio::null())
        .output()
        .context("cannot start the single node")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("the single node failed: {}", said.lines().last().unwrap_or("it said nothing"));
    }
    let line = output.stdout.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty());
    serde_json::from_slice(line.unwrap_or_default()).context("the single node's answer is damaged")
}
