//! Learns the swarm's models: follows announcements, fetches the manifests that `node::manifests`
//! chooses, keeps the models that `node::kept` lists, and tells the mesh which publishers this node
//! trusts.
//!
//! Invariant: a manifest of a stranger that was fetched unasked leaves disk and memory with the
//! last announcement of its model, unless it was pinned or the model was kept in the meantime.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use tokio::task::JoinSet;

use super::catalog::{Known, objects, sizes};
use super::events::NodeEvent;
use super::kept::{self, Here};
use super::manifests::{Candidate, Class, Fetch, Manifests, Outcome};
use super::resolve::Standing;
use super::service::Service;
use super::trust;
use doppler_store::manifest::Manifest;
use doppler_store::signature::SignedModel;
use doppler_store::{ModelId, ShardId};

/// How often the list of trusted publishers is reread, because another process may change it.
const TRUST_EVERY: Duration = Duration::from_secs(2);
/// How often kept models of which nothing is left are looked for.
const RELEASE_EVERY: Duration = Duration::from_secs(30);
/// How long changes of holdings are collected before manifests that nobody held are looked for
/// again.
const SETTLE: Duration = Duration::from_millis(100);

/// Follows announcements as long as the node runs. `report` is told of learned models.
pub async fn learn(service: Arc<Service>, report: impl Fn(NodeEvent) + Send + Sync + 'static) {
    let mut announced = service.mesh.watch_models();
    let mut changed = service.mesh.watch_changes();
    let mut fetching: JoinSet<(ModelId, anyhow::Result<NodeEvent>)> = JoinSet::new();
    let mut manifests = Manifests::default();
    let mut trusted = BTreeSet::new();
    let mut release_at = Instant::now() + RELEASE_EVERY;
    loop {
        announced.mark_unchanged();
        changed.mark_unchanged();
        service.follow();
        // A damaged list of trust is told where it decides; here it trusts nobody.
        let trust = service.trust.read().unwrap_or_default();
        let now: BTreeSet<_> = trust.trusted.iter().map(|one| one.publisher).collect();
        if now != trusted {
            service.mesh.trust(now.clone());
            trusted = now;
        }
        let known = service.manifest_candidates(&trust);
        service.drop_manifests(&manifests.forget_others(&known)).await;
        for Fetch { model, size } in manifests.choose(Instant::now(), &known) {
            let service = service.clone();
            fetching.spawn(async move { (model, service.learn_one(model, size).await) });
        }
        if release_at <= Instant::now() {
            release_at = Instant::now() + RELEASE_EVERY;
            service.review_kept().await;
        }
        let is_waiting = known.iter().any(|one| !one.is_learned && !one.is_reachable);
        let stirred = async {
            let stirred = changed.changed().await;
            tokio::time::sleep(SETTLE).await;
            stirred
        };
        let look_again = Instant::now() + TRUST_EVERY;
        let next_try = manifests.next_try(Instant::now());
        let wake = next_try.map_or(look_again, |next| next.min(look_again));
        tokio::select! {
            () = service.stopping.cancelled() => break,
            Some(done) = fetching.join_next(), if !fetching.is_empty() => match done {
                Ok((model, Ok(event))) => {
                    manifests.ended(Instant::now(), model, Outcome::Learned);
                    report(event);
                }
                Ok((model, Err(error))) => {
                    let hopeless = error.downcast_ref::<Senseless>().is_some();
                    let outcome = if hopeless { Outcome::Hopeless } else { Outcome::Failed };
                    manifests.ended(Instant::now(), model, outcome);
                    tracing::info!("model {model}: {error:#}");
                }
                // It panicked, which is reported elsewhere; its place stays taken.
                Err(_) => {}
            },
            changed = announced.changed() => if changed.is_err() { break },
            stirred = stirred, if is_waiting => if stirred.is_err() { break },
            () = tokio::time::sleep_until(wake.into()) => {}
        }
    }
}

/// Bytes that are a model's manifest, but an invalid one.
#[derive(Debug, thiserror::Error)]
#[error("its manifest makes no sense: {0}")]
struct Senseless(String);

/// The sizes of a manifest that its signers state, each once, in their order.
fn manifest_sizes(signed: &[SignedModel]) -> Vec<u64> {
    let mut sizes: Vec<u64> = Vec::new();
    for one in signed {
        if !sizes.contains(&one.manifest_size) {
            sizes.push(one.manifest_size);
        }
    }
    sizes
}

impl Service {
    /// Takes over the mesh's knowledge of models.
    pub(super) fn follow(&self) {
        let orphans = self.catalog.follow(|| self.mesh.announced());
        self.ladder.forget_sizes(&orphans);
    }

    /// Every known model, as `Manifests` sees it.
    fn manifest_candidates(&self, trust: &trust::Known) -> Vec<Candidate> {
        let candidate = |(model, Known { mut signed, manifest, .. }): (ModelId, Known)| {
            signed.sort_by_key(|one| self.standing(one.publisher, trust));
            let best = signed.first().map(|one| self.standing(one.publisher, trust));
            let class = match best {
                Some(Standing::Own) => Class::Kept,
                _ if self.kept.has(model) => Class::Kept,
                Some(Standing::Trusted) => Class::Trusted,
                // This node helps to keep them.
                Some(Standing::Stranger) if self.is_open_to_all() => Class::Trusted,
                Some(Standing::Refused) => Class::Refused,
                Some(Standing::Stranger) | None => Class::Stranger,
            };
            let sizes = manifest_sizes(&signed);
            let is_learned = manifest.is_some();
            let shard = model.manifest();
            let is_reachable =
                !is_learned && (self.disk.is_whole(shard) || !self.mesh.holders(shard).is_empty());
            Candidate { model, class, sizes, is_learned, is_reachable }
        };
        self.catalog.list().into_iter().map(candidate).collect()
    }

    /// Fetches a model's manifest that was requested, however large it is.
    ///
    /// # Errors
    /// If nobody sends it, or it makes no sense.
    pub(super) async fn learn_now(&self, model: ModelId) -> anyhow::Result<Arc<Manifest>> {
        let trust = self.trust.read()?;
        let mut signed = self.catalog.get(model).map(|known| known.signed).unwrap_or_default();
        signed.sort_by_key(|one| self.standing(one.publisher, &trust));
        let mut failure = anyhow!("model {model} was withdrawn meanwhile");
        for size in manifest_sizes(&signed) {
            match self.learn_one(model, size).await {
                Ok(_) => {
                    let manifest = self.catalog.get(model).and_then(|known| known.manifest);
                    return manifest
                        .with_context(|| format!("model {model} was withdrawn meanwhile"));
                }
                Err(error) => failure = error,
            }
        }
        Err(failure.context(format!("model {model} was announced, but no peer sent its manifest")))
    }

    async fn learn_one(&self, model: ModelId, size: u64) -> anyhow::Result<NodeEvent> {
        let bytes = self.whole(model.manifest(), size).await?;
        let senseless = |error: String| anyhow::Error::new(Senseless(error));
        let manifest = Manifest::parse(&bytes).map_err(|error| senseless(error.to_string()))?;
        objects(&manifest).map_err(|error| senseless(format!("{error:#}")))?;
        let bytes = manifest.total_size;
        self.know(model, Arc::new(manifest), size)?;
        let info = self.info_of(model)?;
        let publisher = info.publishers.into_iter().next().unwrap_or_default();
        Ok(NodeEvent::Model { id: info.id, name: info.name, bytes, publisher })
    }

    /// From here on the model's objects can be found, kept and served. `size` is its manifest's, in
    /// bytes.
    pub(super) fn know(
        &self,
        model: ModelId,
        manifest: Arc<Manifest>,
        size: u64,
    ) -> anyhow::Result<()> {
        let withdrawn = || format!("model {model} was withdrawn meanwhile");
        self.ladder.expect_sizes([(model.manifest(), size)]);
        self.catalog.get(model).with_context(withdrawn)?;
        self.mesh.register_model(model, objects(&manifest)?)?;
        ensure!(self.catalog.add_manifest(model, manifest), withdrawn());
        Ok(())
    }

    /// Call when a model may be used: from here on, the sizes in its manifest count.
    pub(super) fn rely_on(&self, manifest: &Manifest) {
        if let Ok(sizes) = sizes(manifest) {
            self.ladder.expect_sizes(sizes);
        }
    }

    /// Call when this node uses a model or has pinned it: its signers are then known after a
    /// restart, too, and announced.
    pub(super) fn keep(&self, model: ModelId) {
        self.declined.forget(model);
        self.keep_signers(model);
    }

    /// The same, when some of a model was copied here for the swarm.
    pub(super) fn keep_signers(&self, model: ModelId) {
        let Some(Known { mut signed, .. }) = self.catalog.get(model) else { return };
        // A damaged list of trust is told where it decides; here it trusts nobody.
        let trust = self.trust.read().unwrap_or_default();
        signed.sort_by_key(|one| self.standing(one.publisher, &trust));
        match self.kept.keep(Instant::now(), model, signed) {
            Ok(new) => self.tell_kept(new),
            Err(error) => tracing::warn!("model {model}: who signed it is not kept: {error:#}"),
        }
    }

    fn tell_kept(&self, signed: Vec<SignedModel>) {
        for one in signed {
            if let Err(error) = self.mesh.keep(one) {
                tracing::warn!("an announcement is not kept: {error}");
            }
        }
    }

    /// Resumes keeping what was kept when the node was last stopped.
    pub(super) async fn restore_kept(&self) {
        for (model, signed) in self.kept.restore(Instant::now()) {
            self.tell_kept(signed.clone());
            self.follow();
            // One that is damaged is fetched again.
            for size in manifest_sizes(&signed) {
                let Ok(manifest) = self.stored_manifest(model, size).await else { continue };
                if self.permit(model).is_ok() {
                    self.rely_on(&manifest);
                }
                if let Err(error) = self.know(model, Arc::new(manifest), size) {
                    tracing::warn!("model {model}: {error:#}");
                }
                break;
            }
        }
    }

    /// Keeps the models that were pinned, under what their publishers signed last, and stops keeping those of which nothing is here.
    async fn review_kept(&self) {
        let Ok(list) = self.disk.list().await else { return };
        let held: HashMap<ShardId, (u64, bool)> =
            list.into_iter().map(|one| (one.shard, (one.held, one.pinned))).collect();
        let pinned = |model: &ModelId| held.get(&model.manifest()).is_some_and(|(_, pin)| *pin);
        let known = self.catalog.list();
        for (model, Known { signed, .. }) in &known {
            let is_new = pinned(model) && !self.kept.has(*model);
            if is_new || self.kept.is_behind(*model, signed) {
                self.keep(*model);
            }
        }
        let lists: HashMap<ModelId, Vec<ShardId>> = known
            .iter()
            .filter(|(model, known)| self.kept.has(*model) || self.is_own(known))
            .filter_map(|(model, known)| Some((*model, objects(known.manifest.as_deref()?).ok()?)))
            .collect();
        let mut users: HashMap<ShardId, usize> = HashMap::new();
        for object in lists.values().flatten() {
            *users.entry(*object).or_default() += 1;
        }
        for model in self.kept.settled(Instant::now()) {
            // A manifest that is lost, and that nobody has sent since, matters only if it is
            // pinned.
            let objects = lists.get(&model).map_or(&[][..], Vec::as_slice);
            let here = |object: ShardId| {
                let (bytes, is_pinned) = held.get(&object).copied().unwrap_or_default();
                let is_anothers = users.get(&object).is_some_and(|users| *users > 1);
                Here { bytes, is_pinned, is_anothers }
            };
            if !kept::is_here(model, objects, here) {
                self.release(model);
            }
        }
    }

    fn is_own(&self, known: &Known) -> bool {
        known.signed.iter().any(|signed| signed.publisher == self.publisher())
    }

    fn release(&self, model: ModelId) {
        if let Err(error) = self.kept.release(model) {
            tracing::warn!("model {model}: {error:#}");
        }
        self.mesh.release(model, false);
    }

    /// Removes manifests that were fetched unasked and whose models nobody knows any more.
    async fn drop_manifests(&self, models: &[ModelId]) {
        if models.is_empty() {
            return;
        }
        let Ok(list) = self.disk.list().await else { return };
        for model in models.iter().filter(|model| !self.kept.has(**model)) {
            let shard = model.manifest();
            if list.iter().any(|one| one.shard == shard && !one.pinned)
                && let Err(error) = self.ladder.remove(shard).await
            {
                tracing::debug!(%error, "a manifest stays");
            }
        }
    }
}
