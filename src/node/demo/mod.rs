//! `demo`: a fresh node joins a swarm and runs a model whose weights it does not have.
//!
//! Four nodes run as separate processes on loopback. Three seed the embedded model: every shard is
//! on two of them, all shards on none. The fourth starts empty, with less memory than the experts
//! take, and generates. After a third of the tokens one seeder is killed. The text must equal that
//! of a node that holds everything. With `--heal`, ten nodes lose three (`heal`).

mod children;
mod heal;
mod placement;
mod reference;
mod view;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use rand::Rng;
use serde::Serialize;
use tempfile::TempDir;

use super::api::{GenerateEvent, GenerateRequest, Hits, PublishReply, PublishRequest, Traffic};
use super::args::DemoArgs;
use super::embedded;
use super::output::outln;
use super::signals;
use children::{Children, NodeProcess};
use doppler_store::Replicas;
use doppler_store::manifest::Manifest;
use placement::SEEDERS;
use view::{Summary, View};

/// The last line of `demo --json`.
#[derive(Serialize)]
struct Outcome<'a> {
    tokens: usize,
    text: &'a str,
    identical_to_local: bool,
    tok_s: f64,
    hits: Hits,
    peer_bytes: &'a BTreeMap<String, u64>,
    verified_bytes: u64,
    rejected_bytes: u64,
    killed_peer: &'a str,
    seconds: f64,
}

/// What the fourth node may use, in bytes. Device memory and RAM are each below the experts' total.
struct Budgets {
    vram: u64,
    ram: u64,
    disk: u64,
}

impl Budgets {
    /// The flags of `join`.
    fn flags(&self) -> Vec<String> {
        let budget = |flag: &str, bytes: u64| [flag.to_owned(), format!("{bytes}B")];
        [
            budget("--vram-budget", self.vram),
            budget("--ram-budget", self.ram),
            budget("--disk-budget", self.disk),
        ]
        .concat()
    }

    /// Room for the trunk and a quarter of the experts on the device, a fifth of the experts in
    /// RAM, and half of the model on disk. Every tier is too small, so bytes come from peers until
    /// the end.
    fn of(manifest: &Manifest, tokens: usize) -> anyhow::Result<Self> {
        let (experts, trunk) = (manifest.expert_bytes(), manifest.trunk_bytes());
        let fixed = trunk + ACTIVATION_BYTES + experts / 4 + CONTEXT_PROMPT as u64 * KV_BYTES;
        let tokens_max = (experts - 1).saturating_sub(fixed) / KV_BYTES;
        ensure!(
            tokens as u64 <= tokens_max,
            "-n {tokens}: at most {tokens_max} tokens, or their KV cache would make the device's \
             budget larger than the experts, which is what the demo is about"
        );
        Ok(Self {
            vram: fixed + tokens as u64 * KV_BYTES,
            ram: experts / 5,
            disk: manifest.total_size / 2,
        })
    }
}

/// Device bytes for the embedded model's activations and the padding of repacked weights.
const ACTIVATION_BYTES: u64 = 1 << 20;

/// KV cache bytes per token of the embedded model: 4 layers, 4 heads of 32, keys and values, f32.
const KV_BYTES: u64 = 4 * 4 * 32 * 2 * 4;

/// Positions for the prompt, in addition to the generated tokens.
const CONTEXT_PROMPT: usize = 64;

/// What the demo asks for.
fn request(args: &DemoArgs, model: String) -> GenerateRequest {
    GenerateRequest {
        model,
        prompt: args.prompt.clone(),
        tokens: args.tokens,
        context: Some(args.tokens + CONTEXT_PROMPT),
        ..GenerateRequest::default()
    }
}

/// What both demonstrations begin with. Nodes run as children, and a signal ends them and removes the
/// directory.
struct Prepared {
    began: Instant,
    dir: TempDir,
    children: Children,
    /// The embedded model, in `model` below `dir`.
    model_dir: PathBuf,
    manifest: Manifest,
    /// Those of the node that asks.
    budgets: Budgets,
    swarm: String,
}

fn prepare(args: &DemoArgs) -> anyhow::Result<Prepared> {
    let began = Instant::now();
    ensure!(args.tokens >= 3, "-n {}: the demo needs at least 3 tokens", args.tokens);
    let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
    let children = Children::default();
    let all = children.clone();
    signals::remove_when_ended(dir.path().to_owned(), move || all.kill())?;
    let model_dir = dir.path().join("model");
    embedded::extract(&model_dir)?;
    let manifest = Manifest::read_dir(&model_dir)?;
    let budgets = Budgets::of(&manifest, args.tokens)?;
    let swarm = format!("demo-{:08x}", rand::rng().next_u32());
    Ok(Prepared { began, dir, children, model_dir, manifest, budgets, swarm })
}

pub fn run(args: &DemoArgs) -> anyhow::Result<()> {
    if args.heal {
        return heal::run(args);
    }
    let Prepared { began, dir, children, model_dir, manifest, budgets, swarm } = prepare(args)?;
    let (mut seeders, fourth, model) = start((dir.path(), &children), &swarm, &manifest, &budgets)?;
    let ids: Vec<(String, String)> =
        seeders.iter().map(|node| (node.peer_id.clone(), node.name.clone())).collect();
    let names: BTreeMap<String, String> = ids.iter().cloned().collect();
    let mut view = View::new(args.json, args.tokens as u64, &ids);
    view.stage(format!("the fourth node joins swarm {swarm}, empty, and learns the manifest"));

    let request = request(args, model);
    let mut killed = String::new();
    let remote = generate(&fourth, &request, &mut view, &mut |traffic, view| {
        killed = victims(&mut seeders, traffic, 1, view)?.concat();
        Ok(())
    })?;
    view.stage("the same on one node that holds everything");
    drop((seeders, fourth));
    let local = reference::generate(&model_dir, &request)?;
    view.finish();

    let identical = local.text == remote.text && local.tokens == remote.tokens;
    let seconds = began.elapsed().as_secs_f64();
    if args.json {
        let outcome = Outcome {
            tokens: remote.tokens.len(),
            text: &remote.text,
            identical_to_local: identical,
            tok_s: remote.tok_s,
            hits: remote.traffic.hits,
            peer_bytes: &remote.traffic.peer_bytes,
            verified_bytes: remote.traffic.verified_bytes,
            rejected_bytes: remote.traffic.rejected_bytes,
            killed_peer: &killed,
            seconds,
        };
        outln!("{}", serde_json::to_string(&outcome)?);
    } else {
        outln!("{}{}\n", args.prompt, remote.text);
        outln!(
            "{}",
            view::table(&Summary {
                model: &manifest.model_id,
                model_bytes: manifest.total_size,
                expert_bytes: manifest.expert_bytes(),
                vram_budget: budgets.vram,
                ram_budget: budgets.ram,
                tokens: remote.tokens.len(),
                tok_s: remote.tok_s,
                seconds,
                traffic: &remote.traffic,
                names: &names,
                killed: &killed,
                identical,
            })
            .trim_end()
        );
    }
    ensure!(identical, "the swarm's text is not the single node's");
    Ok(())
}

/// Starts the seeders with their shards, and the fourth node with nothing.
/// Returns them and the model's id.
fn start(
    place: (&Path, &Children),
    swarm: &str,
    manifest: &Manifest,
    budgets: &Budgets,
) -> anyhow::Result<(Vec<NodeProcess>, NodeProcess, String)> {
    let mut seeders: Vec<NodeProcess> = Vec::new();
    let mut model = String::new();
    for (number, shards) in placement::place(manifest.shards.len()).into_iter().enumerate() {
        let bootstrap: Vec<String> = seeders.iter().map(|node| node.address.clone()).collect();
        let name = format!("seeder {}", number + 1);
        let node = NodeProcess::start(place, &name, swarm, &bootstrap, &[])?;
        let request = PublishRequest {
            dir: place.0.join("model"),
            shards: Some(shards),
            replicas: Replicas::DEFAULT,
            progress: false,
        };
        let reply: PublishReply = node.client()?.post("/control/v1/publish", &request)?;
        model = reply.model;
        seeders.push(node);
    }
    debug_assert_eq!(seeders.len(), SEEDERS);
    let bootstrap: Vec<String> = seeders.iter().map(|node| node.address.clone()).collect();
    let fourth = NodeProcess::start(place, "fourth", swarm, &bootstrap, &budgets.flags())?;
    Ok((seeders, fourth, model))
}

/// What a node generated, and with what.
struct Remote {
    tokens: Vec<u32>,
    text: String,
    tok_s: f64,
    traffic: Traffic,
}

/// What happens after a third of the tokens; it is told what has come from whom by then.
type Kill<'a> = &'a mut dyn FnMut(&Traffic, &View) -> anyhow::Result<()>;

/// Generates on a node; after a third of the tokens, kills.
fn generate(
    node: &NodeProcess,
    request: &GenerateRequest,
    view: &mut View,
    kill: Kill<'_>,
) -> anyhow::Result<Remote> {
    let kill_at = request.tokens / 3;
    let name = &node.name;
    let mut tokens = Vec::new();
    let mut end = None;
    let mut failure = None;
    let mut first: Option<Instant> = None;
    node.client()?.generate(request, |event| {
        match event {
            GenerateEvent::Loading(_) => {}
            GenerateEvent::Start { prompt_tokens, backend } => {
                view.stage(format!("generating on {backend} after {prompt_tokens} prompt tokens"));
            }
            GenerateEvent::Token { id, text, traffic, .. } => {
                let since = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
                let tok_s = if since > 0.0 { tokens.len() as f64 / since } else { 0.0 };
                tokens.push(id);
                view.token(&text, tok_s, &traffic);
                if tokens.len() == kill_at
                    && let Err(error) = kill(&traffic, view)
                {
                    failure = Some(error);
                }
            }
            GenerateEvent::End { text, tok_s, traffic, .. } => end = Some((text, tok_s, traffic)),
            GenerateEvent::Error { message, .. } => {
                failure = Some(anyhow::anyhow!("the node {name:?}: {message}"));
            }
        }
        failure.is_none()
    })?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    let (text, tok_s, traffic) =
        end.with_context(|| format!("the node {name:?} stopped without an answer"))?;
    if tokens.len() < kill_at {
        bail!(
            "only {} tokens came before the model ended its text: nobody was killed",
            tokens.len()
        );
    }
    Ok(Remote { tokens, text, tok_s, traffic })
}

/// Kills the seeders that have sent the most, at once. Returns their peer ids.
fn victims(
    seeders: &mut [NodeProcess],
    traffic: &Traffic,
    number: usize,
    view: &View,
) -> anyhow::Result<Vec<String>> {
    let sent = |node: &NodeProcess| traffic.peer_bytes.get(&node.peer_id).copied().unwrap_or(0);
    let mut victims: Vec<&mut NodeProcess> = seeders.iter_mut().collect();
    ensure!(victims.len() >= number, "too few seeders to kill {number}");
    victims.sort_by_key(|node| std::cmp::Reverse(sent(node)));
    victims.truncate(number);
    for victim in &mut victims {
        victim.kill().with_context(|| format!("cannot kill {}", victim.name))?;
        view.mark(&victim.peer_id, "✗");
        view.note(&format!("  killed {} (SIGKILL) in mid-generation", victim.name));
    }
    Ok(victims.iter().map(|victim| victim.peer_id.clone()).collect())
}
