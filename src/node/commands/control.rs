//! Commands that ask the running node: `publish`, `ls`, `status`, `peers`.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::print_json;
use crate::api::{
    BootstrapStatus, ModelInfo, Peer, PublishReply, PublishRequest, Signer, Status, Via,
};
use crate::args::{ControlArgs, LsArgs, PublishArgs};
use crate::client::Client;
use crate::config::data_dir;
use crate::copies::{Copies, CopiesRequest, ModelCopies};
use crate::healing::HealStatus;
use crate::output::{note, outln};
use crate::progress;
use crate::resolve::{Candidate, resolve};
use crate::signals;
use crate::size::{ByteSize, count};
use doppler_infer::adapter;
use doppler_infer::load::{DirSink, SHARD_BYTES_DEFAULT};
use doppler_store::ModelId;

fn connect(args: &ControlArgs) -> anyhow::Result<Client> {
    Client::open(&data_dir(&args.data)?)
}

pub fn publish(args: &PublishArgs) -> anyhow::Result<()> {
    let dir = std::path::absolute(&args.dir)
        .with_context(|| format!("{} is not a usable path", args.dir.display()))?;
    let shards = args.shards.as_deref().map(shard_list).transpose()?;
    let client = connect(&args.control)?;
    let is_stored = dir.join("manifest.json").is_file();
    let converted = match adapter::is_here(&dir) {
        true if !is_stored => Some(Converted::adapter(&dir, args, &client)?),
        false if dir.is_file() => Some(Converted::new(&dir, args)?),
        _ => None,
    };
    ensure!(
        args.base.is_none() || converted.as_ref().is_some_and(|converted| converted.is_adapter),
        "--base is for adapters that are converted"
    );
    let dir = converted.as_ref().map_or(dir, |converted| converted.dir.clone());
    let storing = progress::spinner("the node is verifying and storing the shards");
    let replicas = args.replicas;
    let request = PublishRequest { dir, shards, replicas, progress: true };
    let reply = client.work("/control/v1/publish", &request, |progress| {
        storing.set_message(progress::describe("storing", progress));
    });
    storing.finish_and_clear();
    let reply: PublishReply = reply?;
    if args.control.json {
        return print_json(&reply);
    }
    outln!("published {} as {}", reply.name, reply.model);
    outln!("  signed by {}", reply.publisher);
    let copied = match reply.bytes_copied {
        0 => "without a copy".to_owned(),
        bytes => format!("{} of them copied", ByteSize(bytes)),
    };
    let shards = count(reply.shards_stored, "shard");
    outln!("  stored {shards}, {}, {copied}", ByteSize(reply.bytes_stored));
    Ok(())
}

/// A file's model or an adapter, converted into the data directory, so that the node can take its shards over
/// without a copy. Removes what is left of it when dropped.
struct Converted {
    dir: PathBuf,
    is_adapter: bool,
}

impl Converted {
    fn new(file: &Path, args: &PublishArgs) -> anyhow::Result<Self> {
        let dir = Self::dir(args)?;
        super::convert::into_dir(file, &dir, None, ByteSize(SHARD_BYTES_DEFAULT))?;
        Ok(Self { dir, is_adapter: false })
    }

    fn adapter(path: &Path, args: &PublishArgs, client: &Client) -> anyhow::Result<Self> {
        let adapter = adapter::open(path)?;
        // Of a name like ORGANISATION/MODEL, the model.
        let stated = adapter.base.rsplit('/').next().unwrap_or_default().to_owned();
        let text = args.base.clone().unwrap_or(stated);
        let known = (!text.is_empty()).then(|| base_id(client, &text));
        let hint = "say with --base which model the adapter is for, by its name or id";
        let base = known.context(hint)?.context(hint)?;
        let dir = Self::dir(args)?;
        let mut sink = DirSink::new(&dir)?;
        signals::remove_when_ended(sink.unfinished().to_owned(), || ())?;
        adapter::store(&adapter, base, &mut sink)?;
        Ok(Self { dir, is_adapter: true })
    }

    fn dir(args: &PublishArgs) -> anyhow::Result<PathBuf> {
        let home = data_dir(&args.control.data)?;
        Ok(home.join(format!(".publish-{}", std::process::id())))
    }
}

/// The id of a model that the node knows.
fn base_id(client: &Client, text: &str) -> anyhow::Result<ModelId> {
    let models: Vec<ModelInfo> = client.get("/control/v1/models")?;
    let candidates = models.iter().map(|model| {
        let (name, publisher) = (model.name.clone(), String::new());
        Ok(Candidate { id: model.id.parse()?, name, publisher, standing: model.trust })
    });
    Ok(resolve(text, &candidates.collect::<anyhow::Result<Vec<_>>>()?)?)
}

impl Drop for Converted {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            note!("{} could not be removed: {error}", self.dir.display());
        }
    }
}

/// Reads `0,2-5` as `[0, 2, 3, 4, 5]`.
fn shard_list(text: &str) -> anyhow::Result<Vec<usize>> {
    /// More shards than the largest manifest may have; keeps a typed range from filling memory.
    const SHARDS_MAX: usize = 1 << 20;
    let mut shards = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            text.trim()
                .parse::<usize>()
                .ok()
                .filter(|number| *number < SHARDS_MAX)
                .with_context(|| format!("--shards: {part:?} is not a shard number or a range"))
        };
        let (first, last) = (number(first)?, number(last)?);
        anyhow::ensure!(first <= last, "--shards: {part:?} runs backwards");
        shards.extend(first..=last);
    }
    shards.sort_unstable();
    shards.dedup();
    Ok(shards)
}

pub fn ls(args: &LsArgs) -> anyhow::Result<()> {
    let LsArgs { model, control: args } = args;
    if let Some(model) = model {
        return objects(args, model);
    }
    let models: Vec<ModelInfo> = connect(args)?.get("/control/v1/models")?;
    if args.json {
        return print_json(&models);
    }
    if models.is_empty() {
        outln!("no models yet (publish one: doppler-node publish DIR)");
        return Ok(());
    }
    outln!(
        "{:<12} {:<36} {:>11} {:>7} {:>10} {:>8}  {:<7}  PUBLISHER",
        "ID",
        "NAME",
        "SIZE",
        "HERE",
        "REACHABLE",
        "COPIES",
        "TRUSTED"
    );
    for model in models {
        for line in lines(&model) {
            outln!("{line}");
        }
    }
    Ok(())
}

/// A model's lines: one for each name that its signers gave it, the best known signer's first.
fn lines(model: &ModelInfo) -> Vec<String> {
    let mut names: Vec<(&str, Vec<&Signer>)> = Vec::new();
    for signer in &model.signers {
        match names.iter_mut().find(|(name, _)| *name == signer.name) {
            Some((_, signers)) => signers.push(signer),
            None => names.push((&signer.name, vec![signer])),
        }
    }
    let of = |count: usize| match model.manifest {
        true => format!("{count}/{}", model.shards),
        // It is fetched when the model is used.
        false => "-".to_owned(),
    };
    let line = |(name, signers): (&str, Vec<&Signer>)| {
        let first = signers.first().map_or("", |signer| &signer.publisher);
        let more = match signers.len() {
            0 | 1 => String::new(),
            more => format!(" and {} more", more - 1),
        };
        let size = if model.manifest { ByteSize(model.bytes).to_string() } else { "-".into() };
        format!(
            "{:<12} {name:<36} {size:>11} {:>7} {:>10} {:>8}  {:<7}  {first}{more}",
            model.id.get(..10).unwrap_or(&model.id),
            of(model.shards_here),
            of(model.shards_reachable),
            copies(model),
            signers.first().map_or(model.trust, |signer| signer.trust),
        )
    };
    names.into_iter().map(line).collect()
}

/// The fewest and the most copies of a model's objects; `!` if some have too few.
fn copies(model: &ModelInfo) -> String {
    let Some(copies) = model.copies else { return "-".to_owned() };
    let mark = if copies.lacking > 0 { "!" } else { "" };
    match copies {
        Copies { fewest, most, .. } if fewest == most => format!("{fewest}{mark}"),
        Copies { fewest, most, .. } => format!("{fewest}-{most}{mark}"),
    }
}

/// Lists the objects of one model.
fn objects(args: &ControlArgs, model: &str) -> anyhow::Result<()> {
    let request = CopiesRequest { model: model.to_owned() };
    let ModelCopies { model, objects } =
        connect(args)?.post("/control/v1/models/copies", &request)?;
    if args.json {
        return print_json(&ModelCopies { model, objects });
    }
    outln!("{} ({})", model.name, model.id);
    outln!("  {} copies of each object are wanted", model.replicas);
    if let Some(Copies { lacking: 1.., .. }) = model.copies {
        outln!("  {}", lacking(&model));
    }
    outln!("{:<12} {:<14} {:>11} {:>6}  {:<8} HOLDERS", "ID", "WHAT", "SIZE", "COPIES", "HERE");
    for object in objects {
        let id = object.id.to_string();
        let here = if object.is_copying { "copying" } else { object.here.word() };
        outln!(
            "{:<12} {:<14} {:>11} {:>6}  {here:<8} {}",
            id.get(..10).unwrap_or(&id),
            object.what,
            ByteSize(object.size),
            object.copies,
            object.holders.join(" "),
        );
    }
    Ok(())
}

/// What a model lacks, for people.
fn lacking(model: &ModelInfo) -> String {
    let Copies { lacking, lacking_bytes, left_s, .. } = model.copies.unwrap_or_default();
    let left = left_s.map_or_else(String::new, |left| format!(", {} left", progress::time(left)));
    let (few, bytes) = (count(lacking, "object"), ByteSize(lacking_bytes));
    format!("too few copies: {few}, {bytes} to be copied{left}")
}

pub fn status(args: &ControlArgs) -> anyhow::Result<()> {
    let status: Status = connect(args)?.get("/control/v1/status")?;
    if args.json {
        return print_json(&status);
    }
    let row = |key: &str, value: String| outln!("{key:<12} {value}");
    row("peer id", status.peer_id);
    row("publisher", status.publisher);
    let private = if status.private { " (private)" } else { "" };
    row("swarm", format!("{}{private}", status.swarm));
    if status.refused_peers > 0 {
        row(
            "refused",
            format!("{}, without the swarm's key", count(status.refused_peers, "connection")),
        );
    }
    if let Some(page) = status.page {
        row("page", page);
    }
    for address in status.addresses {
        row("address", address);
    }
    row("reach", status.reach.to_string());
    for problem in status.bootstrap.iter().filter_map(BootstrapStatus::problem) {
        row("bootstrap", problem);
    }
    for twins in status.twins {
        row("identity", twins);
    }
    for away in &status.away {
        row("looking for", away.describe());
    }
    row("data", status.data);
    row("backend", status.backend);
    let loaded = match &status.loaded[..] {
        [] => "nothing".to_owned(),
        loaded => loaded.join(", "),
    };
    row("loaded", loaded);
    row("vram budget", ByteSize(status.vram_budget).to_string());
    for (name, tier) in [("ram", status.ram), ("disk", status.disk)] {
        row(name, format!("{} of {}", ByteSize(tier.used), ByteSize(tier.budget)));
    }
    let store = status.store;
    let (whole, part) = (store.whole_objects, store.part_objects);
    row(
        "stored",
        format!("{whole} whole, {part} in part, {} pinned", ByteSize(store.pinned_bytes)),
    );
    if store.quarantines > 0 {
        let (found, bytes) = (store.quarantines, ByteSize(store.damaged_bytes));
        let repaired = store.repaired_reads;
        row("damage", format!("{bytes} in {found} objects; {repaired} reads repaired from peers"));
    }
    for (key, value) in healing(&status.healing) {
        row(key, value);
    }
    row("peers", status.peers.to_string());
    row("models", status.models.to_string());
    row("received", format!("{} verified", ByteSize(status.traffic.verified_bytes)));
    row("refused", format!("{} wrong", ByteSize(status.traffic.rejected_bytes)));
    row("served", ByteSize(status.uploaded_bytes).to_string());
    row("up", format!("{:.0} s", status.uptime_s));
    Ok(())
}

/// What this node keeps for the swarm, and what the swarm lacks.
fn healing(status: &HealStatus) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let (kept, budget) = (ByteSize(status.replica_bytes), ByteSize(status.budget));
    match status.budget {
        0 => rows.push(("replicas", "off".to_owned())),
        _ => rows.push(("replicas", format!("{kept} of {budget}"))),
    }
    if status.lacking > 0 {
        let (few, bytes) = (count(status.lacking, "object"), ByteSize(status.lacking_bytes));
        let lost = match status.lost {
            0 => String::new(),
            lost => format!(", {lost} of them held by nobody"),
        };
        let here = match status.under_way {
            0 => String::new(),
            some => format!("; {some} are copied here"),
        };
        let left = status.left_s.map(|left| format!(", {} left", progress::time(left)));
        let left = left.unwrap_or_default();
        rows.push(("lacking", format!("copies of {few}{lost}, {bytes}{left}{here}")));
    }
    if status.is_leaving {
        rows.push(("leaving", "as soon as others hold what is here".to_owned()));
    }
    rows
}

pub fn peers(args: &ControlArgs) -> anyhow::Result<()> {
    let client = connect(args)?;
    let peers: Vec<Peer> = client.get("/control/v1/peers")?;
    let status: Status = client.get("/control/v1/status")?;
    // On standard error, because the table, and the JSON for scripts, list only connected peers.
    let problems = status.bootstrap.iter().filter_map(BootstrapStatus::problem);
    for problem in problems {
        note!("bootstrap address {problem}");
    }
    for twins in &status.twins {
        note!("{twins}");
    }
    for away in &status.away {
        note!("looking for {}", away.describe());
    }
    if args.json {
        return print_json(&peers);
    }
    if peers.is_empty() {
        outln!("no peers (give one with --bootstrap, or start another node on this network)");
        return Ok(());
    }
    outln!(
        "{:<54} {:>12} {:>12} {:>6}  {:<11}  ADDRESS",
        "PEER",
        "RECEIVED",
        "SERVED",
        "SCORE",
        "WAY"
    );
    for peer in peers {
        outln!(
            "{:<54} {:>12} {:>12} {:>6.2}  {:<11}  {}",
            peer.id,
            ByteSize(peer.bytes_in).to_string(),
            ByteSize(peer.bytes_out).to_string(),
            peer.score,
            match peer.via {
                _ if !peer.in_swarm => "other swarm",
                Via::Direct => "direct",
                Via::Relay { .. } => "relay",
            },
            peer.addresses.first().map_or("", String::as_str),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resolve::Standing;
    use doppler_store::Replicas;

    #[test]
    fn every_name_of_a_model_is_listed() {
        let signer = |name: &str, publisher: &str, trust| Signer {
            name: name.into(),
            publisher: publisher.into(),
            trust,
        };
        let signers = vec![
            signer("later-name", "trusted-key", Standing::Trusted),
            signer("first-name", "key-1", Standing::Stranger),
            signer("first-name", "key-2", Standing::Stranger),
        ];
        let mut model = ModelInfo {
            id: "0123456789abcdef".into(),
            name: "later-name".into(),
            publishers: signers.iter().map(|signer| signer.publisher.clone()).collect(),
            trust: Standing::Trusted,
            bytes: 4096,
            replicas: Replicas::DEFAULT,
            shards: 11,
            shards_here: 0,
            shards_reachable: 11,
            pinned: false,
            copies: Some(Copies { fewest: 2, most: 4, lacking: 3, lacking_bytes: 9, left_s: None }),
            base: None,
            manifest: true,
            signers,
        };
        let all = lines(&model);
        assert_eq!(all.len(), 2);
        for (line, words) in all.iter().zip([
            ["later-name", "11/11     2-4!", "trusted ", "trusted-key"],
            ["first-name", "4.00 KiB", "no", "key-1 and 1 more"],
        ]) {
            assert!(words.iter().all(|word| line.contains(word)), "{line}");
        }
        model.manifest = false;
        assert!(!lines(&model)[0].contains('/'), "nothing is known of its shards");
    }

    #[test]
    fn shard_lists_are_numbers_and_ranges() {
        assert_eq!(shard_list("0, 2-4,3").unwrap(), [0, 2, 3, 4]);
        for text in ["", "a", "3-1", "1-", "0-99999999999"] {
            assert!(shard_list(text).is_err(), "{text}");
        }
    }
}
