//! `demo --heal`: ten nodes hold a model, each of its shards on four of them; three are killed at once
//! while another generates. The text goes on as if nothing had happened, and the survivors copy what
//! has become rare until every object has four copies again.
//!
//! The times are those of the slowest survivor: a dead node counts as noticed once no survivor counts
//! on it, and an object as healed once every survivor knows four live holders of it.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use super::children::{Children, NodeProcess};
use super::view::View;
use super::{Prepared, generate, prepare, reference, request, victims};
use crate::api::{PublishReply, PublishRequest};
use crate::args::DemoArgs;
use crate::client::Client;
use crate::copies::{CopiesRequest, ModelCopies};
use crate::output::outln;
use doppler_store::Replicas;
use doppler_store::manifest::Manifest;

/// The nodes that hold shards; one more asks.
const SEEDERS: usize = 9;
/// Copies that each object should have. At the beginning each shard has the fewest.
const REPLICAS: Replicas = Replicas { min: 4, max: 5 };
const KILLED: usize = 3;
/// Healing that takes longer has failed.
const HEALED_MAX: Duration = Duration::from_secs(120);
/// How long the nodes may take to hear of each other.
const MET_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The last line of `demo --heal --json`.
#[derive(Serialize)]
struct Outcome<'a> {
    nodes: usize,
    killed: usize,
    shards: usize,
    /// Objects that no survivor holds at the end.
    lost: usize,
    /// Seconds from the kill until no survivor counted on a dead node, and until every object had its
    /// copies again.
    detect_s: f64,
    heal_s: f64,
    identical: bool,
    /// Bytes that the survivors copied after the kill, and the bytes of copies that were missing then.
    copied_bytes: u64,
    least_bytes: u64,
    tokens: usize,
    text: &'a str,
    seconds: f64,
}

/// What the survivors saw.
struct Healed {
    shards: usize,
    lost: usize,
    detect_s: f64,
    heal_s: f64,
    /// Peer ids of those that were killed.
    dead: Vec<String>,
}

pub fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let Prepared { began, dir, children, model_dir, manifest, budgets, swarm } = prepare(args)?;
    let (mut seeders, model) = start((dir.path(), &children), &swarm, &manifest)?;
    let bootstrap: Vec<String> = seeders.iter().map(|node| node.address.clone()).collect();
    let asker =
        NodeProcess::start((dir.path(), &children), "asker", &swarm, &bootstrap, &budgets.flags())?;
    let ids: Vec<(String, String)> =
        seeders.iter().map(|node| (node.peer_id.clone(), node.name.clone())).collect();
    let mut view = View::new(args.json, args.tokens as u64, &ids);
    view.stage(format!("ten nodes of swarm {swarm} hear of each other"));
    let met = Instant::now() + MET_MAX;
    let everybody: Vec<Client> =
        seeders.iter().chain([&asker]).map(NodeProcess::client).collect::<anyhow::Result<_>>()?;
    while !everybody.iter().all(|node| is_at_least_min(node, &model)) {
        ensure!(Instant::now() < met, "the nodes did not hear of each other in {MET_MAX:?}");
        std::thread::sleep(LOOK_EVERY);
    }

    let request = request(args, model.clone());
    let (mut watching, mut before) = (None, None);
    let remote = generate(&asker, &request, &mut view, &mut |traffic, view| {
        let dead = victims(&mut seeders, traffic, KILLED, view)?;
        let alive = seeders.iter().filter(|node| !dead.contains(&node.peer_id)).chain([&asker]);
        let clients: Vec<Client> = alive.map(NodeProcess::client).collect::<anyhow::Result<_>>()?;
        // While the nodes were started one after another, some of them copied for those to come.
        let copied = copied_bytes(&clients)?;
        let least = missing_bytes(&copies(&asker.client()?, &model)?, &dead);
        before = Some((copied, least));
        watching = Some(watch(clients, model.clone(), dead));
        Ok(())
    })?;
    view.stage("the survivors copy what has become rare");
    let watching: JoinHandle<anyhow::Result<Healed>> = watching.context("nobody was killed")?;
    let Ok(healed) = watching.join() else { bail!("the survivors could not be watched") };
    let healed = healed?;
    let alive = seeders.iter().filter(|node| !healed.dead.contains(&node.peer_id)).chain([&asker]);
    let alive: Vec<Client> = alive.map(NodeProcess::client).collect::<anyhow::Result<_>>()?;
    let (copied_before, least_bytes) = before.context("nobody was killed")?;
    let copied_bytes = copied_bytes(&alive)?.saturating_sub(copied_before);
    view.stage("the same text on one node that holds everything");
    drop((seeders, asker));
    let local = reference::generate(&model_dir, &request)?;
    view.finish();

    let identical = local.text == remote.text && local.tokens == remote.tokens;
    let Healed { shards, lost, detect_s, heal_s, .. } = healed;
    let outcome = Outcome {
        nodes: SEEDERS + 1,
        killed: KILLED,
        shards,
        lost,
        detect_s,
        heal_s,
        identical,
        copied_bytes,
        least_bytes,
        tokens: remote.tokens.len(),
        text: &remote.text,
        seconds: began.elapsed().as_secs_f64(),
    };
    if args.json {
        outln!("{}", serde_json::to_string(&outcome)?);
    } else {
        outln!("{}{}\n", args.prompt, remote.text);
        outln!("{}", describe(&outcome));
    }
    ensure!(identical, "the swarm's text is not the single node's");
    ensure!(lost == 0, "{lost} objects are lost");
    Ok(())
}

/// Bytes that these nodes have copied since each started.
fn copied_bytes(nodes: &[Client]) -> anyhow::Result<u64> {
    let statuses = nodes.iter().map(|node| node.get::<crate::api::Status>("/control/v1/status"));
    statuses.map(|status| Ok(status?.healing.copied_bytes)).sum()
}

/// Bytes of the copies that are missing without the dead.
fn missing_bytes(seen: &ModelCopies, dead: &[String]) -> u64 {
    let missing = seen.objects.iter().map(|object| {
        let live = object.holders.iter().filter(|holder| !dead.contains(holder)).count();
        REPLICAS.min.saturating_sub(live) as u64 * object.size
    });
    missing.sum()
}

fn describe(outcome: &Outcome<'_>) -> String {
    let Outcome { nodes, killed, shards, lost, detect_s, heal_s, identical, .. } = outcome;
    let same = if *identical { "identical" } else { "NOT identical" };
    format!(
        "{killed} of {nodes} nodes killed; {shards} shards, {lost} lost; noticed in {detect_s:.1} s, \
         healed in {heal_s:.1} s; {:.1} MB copied of {:.1} at least; text {same}",
        outcome.copied_bytes as f64 / 1e6,
        outcome.least_bytes as f64 / 1e6,
    )
}

/// Starts the seeders, each with its shards. Returns them and the model's id.
fn start(
    place: (&Path, &Children),
    swarm: &str,
    manifest: &Manifest,
) -> anyhow::Result<(Vec<NodeProcess>, String)> {
    let mut seeders: Vec<NodeProcess> = Vec::new();
    let mut model = String::new();
    for number in 0..SEEDERS {
        let bootstrap: Vec<String> = seeders.iter().map(|node| node.address.clone()).collect();
        let name = format!("seeder {}", number + 1);
        let node = NodeProcess::start(place, &name, swarm, &bootstrap, &[])?;
        let request = PublishRequest {
            dir: place.0.join("model"),
            shards: Some(shards_of(number, manifest.shards.len())),
            replicas: REPLICAS,
            progress: false,
        };
        let reply: PublishReply = node.client()?.post("/control/v1/publish", &request)?;
        model = reply.model;
        seeders.push(node);
    }
    Ok((seeders, model))
}

/// The shards of a seeder: each shard is on as many seeders as it must have copies.
fn shards_of(seeder: usize, shards: usize) -> Vec<usize> {
    let holds = |shard: &usize| (seeder + SEEDERS - shard % SEEDERS) % SEEDERS < REPLICAS.min;
    (0..shards).filter(holds).collect()
}

fn copies(node: &Client, model: &str) -> anyhow::Result<ModelCopies> {
    node.post("/control/v1/models/copies", &CopiesRequest { model: model.to_owned() })
}

/// Whether a node knows the model, its target, and enough holders of each object.
fn is_at_least_min(node: &Client, model: &str) -> bool {
    copies(node, model).is_ok_and(|seen| {
        seen.model.replicas == REPLICAS
            && seen.objects.iter().all(|object| object.copies >= REPLICAS.min)
    })
}

/// Watches the survivors until everything is healed. Time begins now.
fn watch(
    survivors: Vec<Client>,
    model: String,
    dead: Vec<String>,
) -> JoinHandle<anyhow::Result<Healed>> {
    let killed_at = Instant::now();
    std::thread::spawn(move || {
        let mut detected: Option<f64> = None;
        loop {
            let seen = survivors.iter().map(|node| copies(node, &model));
            let seen = seen.collect::<anyhow::Result<Vec<ModelCopies>>>()?;
            let since = killed_at.elapsed().as_secs_f64();
            let objects = || seen.iter().flat_map(|node| &node.objects);
            let counts_on_dead = objects().any(|of| of.holders.iter().any(|id| dead.contains(id)));
            if !counts_on_dead {
                let detect_s = *detected.get_or_insert(since);
                if objects().all(|object| object.copies >= REPLICAS.min) {
                    let first = seen.first().context("nobody is left")?;
                    let lost = objects().filter(|object| object.copies == 0).count();
                    let shards = first.model.shards;
                    return Ok(Healed { shards, lost, detect_s, heal_s: since, dead });
                }
            }
            if killed_at.elapsed() > HEALED_MAX {
                let rare = objects().filter(|object| object.copies < REPLICAS.min).count();
                bail!(
                    "after {HEALED_MAX:?}, survivors still see {rare} objects with too few copies"
                );
            }
            std::thread::sleep(LOOK_EVERY);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shard_lives_on_as_many_seeders_as_it_must() {
        for shards in [1, 9, 11, 40] {
            for shard in 0..shards {
                let holders =
                    (0..SEEDERS).filter(|seeder| shards_of(*seeder, shards).contains(&shard));
                assert_eq!(holders.count(), REPLICAS.min, "shard {shard} of {shards}");
            }
        }
        const { assert!(KILLED < REPLICAS.min, "or a shard may be lost") };
    }
}
