//! The demo's live view while the fourth node generates, and the table that sums it up.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::api::{Hits, Traffic};
use crate::size::ByteSize;

/// Progress bars on standard error: tokens, hits by tier, bytes by peer. Draws nothing if it is not
/// a terminal.
pub struct View {
    bars: MultiProgress,
    stage: ProgressBar,
    tokens: ProgressBar,
    tiers: ProgressBar,
    peers: Vec<(String, ProgressBar)>,
    text: ProgressBar,
    written: String,
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl View {
    /// `seeders` has the peer id and the name of each.
    pub fn new(quiet: bool, tokens: u64, seeders: &[(String, String)]) -> Self {
        let target = if quiet {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr_with_hz(15)
        };
        let bars = MultiProgress::with_draw_target(target);
        let line = |bar: ProgressBar, template: &str| bars.add(bar.with_style(style(template)));
        let stage = line(ProgressBar::new_spinner(), "{spinner:.cyan} {msg}");
        let tokens = line(
            ProgressBar::new(tokens),
            "  tokens     {bar:32.cyan/dim} {pos:>4}/{len:<4} {msg}",
        );
        let tiers = line(ProgressBar::new_spinner(), "  experts    {msg}");
        let peers = seeders
            .iter()
            .map(|(id, name)| {
                let bar = line(ProgressBar::new_spinner(), "  {prefix:<11}{msg}");
                bar.set_prefix(name.clone());
                (id.clone(), bar)
            })
            .collect();
        let text = line(ProgressBar::new_spinner(), "\n{msg}");
        stage.enable_steady_tick(Duration::from_millis(100));
        Self { bars, stage, tokens, tiers, peers, text, written: String::new() }
    }

    pub fn stage(&self, what: impl Into<String>) {
        self.stage.set_message(what.into());
    }

    /// Prints a line above the bars.
    pub fn note(&self, what: &str) {
        let _ = self.bars.println(what);
    }

    pub fn token(&mut self, text: &str, tok_s: f64, traffic: &Traffic) {
        self.written.push_str(text);
        self.tokens.inc(1);
        self.tokens.set_message(format!("{tok_s:.1} tokens/s"));
        let Hits { vram, ram, disk, peer } = traffic.hits;
        self.tiers.set_message(format!("vram {vram}   ram {ram}   disk {disk}   peers {peer}"));
        for (id, bar) in &self.peers {
            let bytes = traffic.peer_bytes.get(id).copied().unwrap_or(0);
            bar.set_message(ByteSize(bytes).to_string());
        }
        self.text.set_message(self.written.clone());
    }

    pub fn mark(&self, peer: &str, what: &str) {
        if let Some((_, bar)) = self.peers.iter().find(|(id, _)| id == peer) {
            let name = bar.prefix();
            bar.set_prefix(format!("{name} {what}"));
        }
    }

    pub fn finish(&self) {
        let _ = self.bars.clear();
    }
}

/// The results of a demo run.
pub struct Summary<'a> {
    pub model: &'a str,
    pub model_bytes: u64,
    pub expert_bytes: u64,
    pub vram_budget: u64,
    pub ram_budget: u64,
    pub tokens: usize,
    pub tok_s: f64,
    pub seconds: f64,
    pub traffic: &'a Traffic,
    pub names: &'a BTreeMap<String, String>,
    pub killed: &'a str,
    pub identical: bool,
}

/// The table of results.
pub fn table(summary: &Summary<'_>) -> String {
    let Summary { traffic, names, .. } = summary;
    let mut out = String::new();
    let mut row = |key: &str, value: String| {
        let _ = writeln!(out, "  {key:<22} {value}");
    };
    row("model", format!("{} ({})", summary.model, ByteSize(summary.model_bytes)));
    row("experts in total", ByteSize(summary.expert_bytes).to_string());
    row("vram budget", ByteSize(summary.vram_budget).to_string());
    row("ram budget", ByteSize(summary.ram_budget).to_string());
    row("tokens", format!("{} at {:.1} tokens/s", summary.tokens, summary.tok_s));
    let Hits { vram, ram, disk, peer } = traffic.hits;
    let all = (vram + ram + disk + peer).max(1) as f64;
    for (name, hits) in [("vram", vram), ("ram", ram), ("disk", disk), ("peers", peer)] {
        row(
            &format!("experts from {name}"),
            format!("{hits:>6}  {:>5.1} %", 100.0 * hits as f64 / all),
        );
    }
    for (id, bytes) in &traffic.peer_bytes {
        let name = names.get(id).map_or("another peer", String::as_str);
        let fate = if id == summary.killed { "   killed while serving" } else { "" };
        row(&format!("bytes from {name}"), format!("{}{fate}", ByteSize(*bytes)));
    }
    row("verified", ByteSize(traffic.verified_bytes).to_string());
    row("rejected", ByteSize(traffic.rejected_bytes).to_string());
    let verdict = if summary.identical { "yes, token for token" } else { "NO" };
    row("same as one node", verdict.to_owned());
    row("time", format!("{:.1} s", summary.seconds));
    out
}
