//! Commands on stored objects: `pin`, `unpin`, `rm`, `gc`, `fsck`. They ask the node that runs on
//! the data directory, or work by themselves if none does.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};

use super::print_json;
use super::trust::{asking, can_ask};
use crate::api::{
    Damage, FsckEvent, FsckRequest, FsckSummary, GcRequest, TargetReply, TargetRequest,
};
use crate::args::{ControlArgs, FsckArgs, GcArgs, PinArgs, RmArgs, UnpinArgs};
use crate::config::data_dir;
use crate::declined::Declined;
use crate::output::outln;
use crate::pins;
use crate::progress;
use crate::size::{ByteSize, count};
use crate::storage::{self, Target};
use crate::store_access::StoreAccess;
use doppler_store::ByteRange;
use doppler_store::disk::{Collected, DiskTier};

/// The most damaged ranges of an object that are printed for people.
const RANGES_SHOWN: usize = 8;
/// Objects with pins of their own that are printed for people, at most.
const OBJECTS_SHOWN: usize = 16;

/// Finds a target in a store that this process has open.
async fn resolve(disk: &DiskTier, data: &Path, text: &str) -> anyhow::Result<Target> {
    let models = storage::stored_models(disk).await?;
    let objects = disk.list().await?.into_iter().map(|object| object.shard).collect();
    Target::resolve(text, &storage::candidates(data, &models), models, &objects)
}

fn access(control: &ControlArgs) -> anyhow::Result<StoreAccess> {
    StoreAccess::open(&data_dir(&control.data)?)
}

pub fn pin(args: &PinArgs) -> anyhow::Result<()> {
    let reply = match access(&args.control)? {
        StoreAccess::Node(client) => asking(|answered| {
            let fetching = progress::spinner("pinning");
            let trust = args.trust.iter().copied().chain(answered).collect();
            let request = TargetRequest {
                trust,
                can_ask: can_ask(),
                fetch: args.fetch,
                progress: true,
                ..request(&args.target)
            };
            let reply = client.work("/control/v1/store/pin", &request, |progress| {
                fetching.set_message(progress::describe("fetching", progress));
            });
            fetching.finish_and_clear();
            reply
        })?,
        StoreAccess::Here { disk, runtime, data } => {
            ensure!(!args.fetch, "--fetch asks peers: start a node on this directory first");
            runtime.block_on(async {
                pins::pin(&disk, &resolve(&disk, &data, &args.target).await?).await
            })?
        }
    };
    tell(&args.control, "pinned", &reply)
}

pub fn unpin(args: &UnpinArgs) -> anyhow::Result<()> {
    let reply = match access(&args.control)? {
        StoreAccess::Node(client) => {
            client.post("/control/v1/store/unpin", &request(&args.target))?
        }
        StoreAccess::Here { disk, runtime, data } => runtime.block_on(async {
            pins::unpin(&disk, &resolve(&disk, &data, &args.target).await?).await
        })?,
    };
    tell(&args.control, "unpinned", &reply)
}

pub fn rm(args: &RmArgs) -> anyhow::Result<()> {
    let reply = match access(&args.control)? {
        StoreAccess::Node(client) => {
            let (force, last_copy) = (args.force, args.last_copy);
            client.post(
                "/control/v1/store/rm",
                &TargetRequest { force, last_copy, ..request(&args.target) },
            )?
        }
        StoreAccess::Here { disk, runtime, data } => {
            runtime.block_on(remove(&disk, &data, args))?
        }
    };
    tell(&args.control, "removed", &reply)
}

async fn remove(disk: &DiskTier, data: &Path, args: &RmArgs) -> anyhow::Result<TargetReply> {
    let target = resolve(disk, data, &args.target).await?;
    let models = storage::stored_models(disk).await?;
    let plan = storage::plan_removal(disk, &target, &models, args.force).await?;
    let is_held = plan.objects.iter().any(|(_, bytes)| *bytes > 0);
    ensure!(
        args.last_copy || !is_held,
        "{}: no node runs here, so it is not known whether another peer holds {}; start one and \
         ask it, or give --last-copy",
        plan.reply.target,
        count(plan.objects.len(), "stored object")
    );
    if let Some(model) = target.model() {
        disk.unpin_model(model).await?;
    }
    for (shard, _) in &plan.objects {
        if disk.groups(*shard).await.is_some() {
            disk.remove(*shard).await?;
        }
    }
    if let Some(model) = target.model() {
        storage::withdraw(data, model)?;
        Declined::load(data).add(model)?;
    }
    Ok(plan.reply)
}

fn request(target: &str) -> TargetRequest {
    TargetRequest {
        target: target.to_owned(),
        fetch: false,
        force: false,
        last_copy: false,
        progress: false,
        trust: Vec::new(),
        can_ask: false,
    }
}

fn tell(control: &ControlArgs, done: &str, reply: &TargetReply) -> anyhow::Result<()> {
    if control.json {
        return print_json(reply);
    }
    let objects = count(reply.objects, "object");
    outln!("{done} {}: {objects}, {}", reply.target, ByteSize(reply.bytes));
    if reply.missing > 0 && done == "pinned" {
        outln!("  not here whole: {} (--fetch fetches them)", count(reply.missing, "object"));
    }
    if reply.last_copies > 0 {
        outln!("  held by no other peer that is known: {}", count(reply.last_copies, "object"));
    }
    if reply.shared > 0 {
        let shared = count(reply.shared, "object");
        match done {
            "unpinned" => {
                outln!("  still pinned by another model or by themselves: {shared}");
            }
            _ => outln!("  kept because another model here uses them: {shared}"),
        }
    }
    Ok(())
}

pub fn gc(args: &GcArgs) -> anyhow::Result<()> {
    let budget = args.disk_budget.map(|size| size.0);
    let done: Collected = match access(&args.control)? {
        StoreAccess::Node(client) => client.post(
            "/control/v1/store/gc",
            &GcRequest { budget, dry_run: args.dry_run, last_copy: args.last_copy },
        )?,
        StoreAccess::Here { disk, runtime, .. } => {
            let budget = budget.context(
                "no node runs here, so its budget is not known: give --disk-budget SIZE",
            )?;
            runtime.block_on(collect(&disk, budget, args))?
        }
    };
    if args.control.json {
        return print_json(&done);
    }
    let would = if args.dry_run { "would evict" } else { "evicted" };
    let evicted = count(done.evicted.len(), "object");
    outln!("{would} {evicted}, {}", ByteSize(done.freed_bytes));
    let (used, pinned) = (ByteSize(done.used_bytes), ByteSize(done.pinned_bytes));
    outln!("  {used} stored, {pinned} of it pinned; the budget is {}", ByteSize(done.budget_bytes));
    if done.guarded_bytes > 0 {
        let guarded = ByteSize(done.guarded_bytes);
        outln!(
            "  {guarded} of it stay because too few others hold it (unless --last-copy is given)"
        );
    } else if done.used_bytes > done.budget_bytes {
        outln!("  what exceeds the budget is pinned");
    }
    if !done.pinned_alone.is_empty() {
        let bytes = ByteSize(done.pinned_alone.iter().map(|(_, bytes)| bytes).sum());
        let alone = count(done.pinned_alone.len(), "object");
        outln!(
            "  pinned by themselves and by no model: {alone}, {bytes} (unpin ID lets go of one)"
        );
        for (shard, bytes) in done.pinned_alone.iter().take(OBJECTS_SHOWN) {
            outln!("    {shard}  {}", ByteSize(*bytes));
        }
        if done.pinned_alone.len() > OBJECTS_SHOWN {
            outln!("    and {} more (--json lists them)", done.pinned_alone.len() - OBJECTS_SHOWN);
        }
    }
    if !done.reserve_held {
        outln!("  the disk is too full to set the reserve aside");
    }
    Ok(())
}

/// Evicts in a store that no node has open.
async fn collect(disk: &DiskTier, budget: u64, args: &GcArgs) -> anyhow::Result<Collected> {
    let plan = disk.collect(Some(budget), true).await?;
    if args.dry_run {
        return Ok(plan);
    }
    ensure!(
        args.last_copy || plan.evicted.is_empty(),
        "no node runs here, so it is not known whether other peers hold the {} ({}) that would be \
         evicted; start one and ask it, or give --last-copy",
        count(plan.evicted.len(), "object"),
        ByteSize(plan.freed_bytes)
    );
    Ok(disk.collect(Some(budget), false).await?)
}

/// # Errors
/// If damage is left when it is done.
pub fn fsck(args: &FsckArgs) -> anyhow::Result<()> {
    let mut listener = Listener { json: args.control.json, ..Listener::default() };
    match access(&args.control)? {
        StoreAccess::Node(client) => {
            let request = FsckRequest { repair: args.repair };
            client.stream("/control/v1/store/fsck", &request, |event| listener.hear(event))?;
        }
        StoreAccess::Here { disk, runtime, .. } => {
            ensure!(
                !args.repair,
                "--repair fetches from peers: start a node on this directory, then run it again"
            );
            let mut events = runtime.block_on(async { storage::fsck(disk, None, ()) });
            while let Some(event) = events.blocking_recv() {
                listener.hear(event);
            }
        }
    }
    listener.verdict()
}

/// Follows a check and reports its results.
#[derive(Default)]
struct Listener {
    json: bool,
    bar: Option<indicatif::ProgressBar>,
    unrepaired: u64,
    end: Option<FsckSummary>,
    failed: Option<String>,
}

impl Listener {
    fn hear(&mut self, event: FsckEvent) -> bool {
        if self.json {
            // A closed standard output does not matter, because the exit code gives the result.
            let _ = print_json(&event);
        }
        match event {
            FsckEvent::Start { bytes, .. } => {
                self.bar = (!self.json).then(|| progress::bar(bytes, "checking"));
            }
            FsckEvent::Checked { bytes, .. } => self.advance(bytes),
            FsckEvent::Damage(damage) => {
                self.advance(damage.checked_bytes);
                self.unrepaired += u64::from(!damage.repaired);
                if !self.json {
                    let text = describe(&damage);
                    match &self.bar {
                        Some(bar) => bar.suspend(|| outln!("{text}")),
                        None => outln!("{text}"),
                    }
                }
            }
            FsckEvent::End(summary) => self.end = Some(summary),
            FsckEvent::Error { message } => self.failed = Some(message),
        }
        true
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn verdict(self) -> anyhow::Result<()> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if let Some(message) = self.failed {
            return Err(anyhow!(message));
        }
        let end = self.end.context("the check ended early")?;
        if !self.json {
            outln!(
                "checked {}, {}, in {:.1} s",
                count(end.objects, "object"),
                ByteSize(end.checked_bytes),
                end.seconds
            );
            if end.damaged_objects + end.outboards_rewritten > 0 {
                outln!(
                    "  damaged: {} in {}; rebuilt: {}; repaired: {}",
                    ByteSize(end.damaged_bytes),
                    count(end.damaged_objects, "object"),
                    count(end.outboards_rewritten, "hash tree"),
                    count(end.repaired_objects, "object")
                );
            }
        }
        ensure!(
            self.unrepaired == 0,
            "damaged or incomplete: {} (fsck --repair on a running node fetches them again; an \
             unpinned one is fetched when it is next read)",
            count(self.unrepaired, "object")
        );
        Ok(())
    }
}

fn describe(damage: &Damage) -> String {
    let shard = damage.shard;
    if damage.outboard_only {
        return format!("{shard}: sound, but its hash tree was damaged; rebuilt");
    }
    let mut ranges: Vec<String> =
        damage.ranges.iter().take(RANGES_SHOWN).map(ByteRange::to_string).collect();
    if damage.ranges.len() > RANGES_SHOWN {
        ranges.push(format!("and {} more", damage.ranges.len() - RANGES_SHOWN));
    }
    let is_damaged = !ranges.is_empty();
    let what = match (is_damaged, damage.checked_bytes, damage.size) {
        (true, _, size) => format!("damaged at {} of {size} bytes", ranges.join(", ")),
        (false, 0, 0) => "pinned, but its file is missing".to_owned(),
        (false, 0, size) => format!("pinned, but its file of {size} bytes is missing"),
        (false, _, size) => format!("not here whole of {size} bytes"),
    };
    let end = match (&damage.detail, damage.repaired) {
        (_, true) => "; repaired".to_owned(),
        (Some(detail), false) => format!("; not repaired: {detail}"),
        (None, false) if is_damaged => "; taken out of what is held".to_owned(),
        (None, false) => String::new(),
    };
    format!("{shard}: {what}{end}")
}
