//! A running node: the store, the mesh, the catalogue and the engine wired together,
//! started and stopped in order. The control API and the commands call this.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::adapters::{self, Adapters};
use super::address_book::{self, AddressBook};
use super::api::{
    AwayPeer, BootstrapStatus, FsckEvent, FsckRequest, GcRequest, ModelInfo, NodeInfo, Peer,
    PublishReply, PublishRequest, ReachStatus, Signer, Status, StoreStatus, TargetReply,
    TargetRequest, TierUse, Traffic, Via,
};
use super::catalog::{Catalog, Known, shard_ids, sizes};
use super::config::Config;
use super::declined::Declined;
use super::engine::{Engine, EngineOptions, Prefixes};
use super::events::NodeEvent;
use super::generating::Locals;
use super::healing::Healer;
use super::identity;
use super::joining::{self, Joined};
use super::journal;
use super::kept::Kept;
use super::pulls::Pulls;
use super::resolve::{Standing, resolve};
use super::storage::{self, StoredModel, Target};
use super::trust::{self, How, TrustStore};
use super::work::Report;
use super::{healing, last_copy, learning, pins};
use doppler_mesh::{MeshHandle, Meter, PROTOCOL_VERSION, PeerInfo, topic};
use doppler_store::disk::{Collected, DiskOptions, DiskTier, ImportMethod};
use doppler_store::ladder::{Ladder, LadderOptions};
use doppler_store::manifest::Manifest;
use doppler_store::signature::{PublicKey, SignedModel};
use doppler_store::{
    BadReplicas, ModelId, Priority, ReadError, Replicas, ShardId, ShardServe, regular,
};

/// Peers that are away and that `status` lists, at most.
const AWAY_MAX: usize = 64;
/// How often, at most, the addresses of connected peers are saved.
const REMEMBER_EVERY: Duration = Duration::from_secs(1);
/// How long fetching an object for a page may take: 64 MiB from a tab on a slow line.
const BRING_MAX: Duration = Duration::from_secs(120);

/// Everything a node is, for as long as it runs.
pub struct Service {
    config: Config,
    seed: [u8; 32],
    pub(super) trust: TrustStore,
    pub(super) started: Instant,
    /// Peers are known from before, or were named.
    pub(super) expects_peers: bool,
    pub(super) ladder: Ladder,
    pub(super) disk: Arc<DiskTier>,
    pub(super) mesh: MeshHandle,
    /// The address of the page and the control API, once they answer.
    http: OnceLock<String>,
    /// The token that this node's gateway requires in a private swarm.
    gateway_token: Option<String>,
    pub(super) catalog: Arc<Catalog>,
    /// Models that were used or pinned here.
    pub(super) kept: Kept,
    /// Models that were removed here.
    pub(super) declined: Declined,
    pub(super) healer: Healer,
    /// Pulls from the Hub that the page asked for.
    pub(super) pulls: Pulls,
    /// Cancelled once the owner has asked this node to leave, and it may go.
    pub(super) leave: CancellationToken,
    pub(super) engine: Engine,
    /// Models of this disk that `serve` was given.
    pub(super) locals: Locals,
    /// Adapters that are open.
    pub(super) adapters: Adapters,
    /// Held while the store is checked, so that only one check runs at a time.
    checking: Arc<Semaphore>,
    pub(super) stopping: CancellationToken,
    /// The task that saves peers' addresses. Awaited at the end.
    remembering: Mutex<Option<JoinHandle<()>>>,
}

impl Service {
    /// Opens the store, joins the swarm and begins to learn its models.
    /// `report` is told of models learned.
    pub async fn start(
        config: Config,
        report: impl Fn(NodeEvent) + Send + Sync + 'static,
    ) -> anyhow::Result<Arc<Self>> {
        std::fs::create_dir_all(&config.data)
            .with_context(|| format!("cannot create {}", config.data.display()))?;
        // The disk tier takes the data directory's lock: before anything else is written there.
        let disk = open_disk(&config).await?;
        if let Err(error) = journal::open(&config.data) {
            tracing::warn!("{}: its log is not kept: {error}", config.data.display());
        }
        let version = env!("CARGO_PKG_VERSION");
        tracing::info!(version, pid = std::process::id(), "the node starts");
        let seed = identity::load_or_create(&config.data)?;
        let trust = TrustStore::open(&config.data)?;
        if !config.trust.is_empty() {
            trust.add(&config.trust, How::Added, "")?;
        }
        let ladder = Ladder::new(
            LadderOptions { ram_budget: config.ram_budget },
            Some(disk.clone()),
            None,
            Vec::new(),
        );

        let joined = joining::join(&config, seed, Arc::new(ladder.clone())).await?;
        let Joined { mesh, book, key, expects_peers } = joined;
        ladder.set_peers(Arc::new(mesh.clone()));

        let traffic = {
            let mesh = mesh.clone();
            move || traffic_of(&mesh)
        };
        let options = EngineOptions {
            backend: config.backend,
            vram_budget: config.vram_budget,
            host_budget: config.ram_budget,
            keep_alive: config.keep_alive,
        };
        let prefixes = match config.prefix_budget {
            0 => None,
            budget => {
                let dir = config.data.join("prefixes");
                let shown = dir.display().to_string();
                Some(Prefixes::open(dir, budget).with_context(|| format!("cannot open {shown}"))?)
            }
        };
        let engine = Engine::start(options, prefixes, traffic)?;
        let service = Arc::new(Self {
            seed,
            trust,
            started: Instant::now(),
            expects_peers,
            http: OnceLock::new(),
            ladder,
            disk,
            gateway_token: key.map(|key| key.gateway_token(mesh.peer_id())),
            mesh,
            catalog: Arc::default(),
            kept: Kept::new(&config.data),
            declined: Declined::load(&config.data),
            healer: Healer::new(config.replica_budget, config.replica_rate),
            pulls: Pulls::default(),
            leave: CancellationToken::new(),
            engine,
            locals: Locals::default(),
            adapters: Adapters::default(),
            checking: Arc::new(Semaphore::new(1)),
            stopping: CancellationToken::new(),
            remembering: Mutex::default(),
            config,
        });
        service.restore_published().await;
        service.restore_kept().await;
        tokio::spawn(learning::learn(service.clone(), report));
        tokio::spawn(healing::heal(service.clone()));
        let remembering = tokio::spawn(remember(service.clone(), book));
        *service.remembering.lock().unwrap_or_else(PoisonError::into_inner) = Some(remembering);
        Ok(service)
    }

    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// The token that this node's gateway requires. `None` in an open swarm.
    pub fn gateway_token(&self) -> Option<String> {
        self.gateway_token.clone()
    }

    /// The key that this node signs with.
    pub fn publisher(&self) -> PublicKey {
        PublicKey::of_seed(&self.seed)
    }

    /// Sets the address of the page and the control API.
    pub fn answers_at(&self, address: SocketAddr) {
        // Only the first call counts: a node serves HTTP once.
        let _ = self.http.set(address.to_string());
    }

    pub fn peer_id(&self) -> String {
        self.mesh.peer_id().to_string()
    }

    /// Dialable addresses, each with the node's `/p2p/` id.
    pub fn addresses(&self) -> Vec<String> {
        self.mesh.listen_addrs().iter().map(ToString::to_string).collect()
    }

    /// Those of them that a page can dial.
    pub fn browser_addresses(&self) -> Vec<String> {
        self.mesh.browser_addrs().iter().map(ToString::to_string).collect()
    }

    /// Stops in order: new work, the engine, the mesh, and the disk last.
    pub async fn stop(&self) {
        self.stopping.cancel();
        let remembering = self.remembering.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(remembering) = remembering {
            // An error means that it panicked. It has ended in any case.
            let _ = remembering.await;
        }
        self.engine.stop().await;
        self.mesh.shutdown().await;
        if let Err(error) = self.ladder.flush().await {
            tracing::warn!("the store was not flushed: {error}");
        }
    }

    pub async fn status(&self) -> Status {
        let disk = self.disk.stats();
        let ladder = self.ladder.stats();
        let twins = self.mesh.twins();
        let engine = self.engine.shown();
        Status {
            peer_id: self.peer_id(),
            publisher: self.publisher().to_string(),
            swarm: self.config.swarm.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            page: self.http.get().map(|address| format!("http://{address}")),
            addresses: self.addresses(),
            browser_addresses: self.browser_addresses(),
            reach: ReachStatus::of(self.mesh.reach()),
            bootstrap: self.mesh.bootstrap().iter().map(BootstrapStatus::of).collect(),
            twins: twins.iter().map(|twin| self.mesh.describe_twin(twin)).collect(),
            away: self.mesh.away().iter().take(AWAY_MAX).map(AwayPeer::of).collect(),
            private: self.config.swarm_key.is_some(),
            gateway_token: self.gateway_token(),
            refused_peers: self.mesh.stats().counts.refused_peers,
            data: self.config.data.to_string_lossy().into_owned(),
            backend: engine.backend,
            uptime_s: self.started.elapsed().as_secs_f64(),
            peers: self.mesh.peers().len(),
            models: self.catalog.len(),
            loaded: engine.loaded.into_iter().map(|model| model.name).collect(),
            loads: engine.loads,
            vram_budget: self.config.vram_budget,
            ram: TierUse { used: ladder.ram_used_bytes, budget: self.config.ram_budget },
            disk: TierUse { used: disk.used_bytes, budget: self.config.disk_budget },
            store: StoreStatus {
                whole_objects: disk.whole_objects,
                part_objects: disk.part_objects,
                pinned_bytes: disk.pinned_bytes,
                evictions: disk.evictions,
                quarantines: disk.quarantines,
                damaged_bytes: disk.damaged_bytes,
                repaired_reads: ladder.repaired_reads,
                repaired_bytes: ladder.repaired_bytes,
                reserve_held: disk.reserve_held,
            },
            healing: self.healer.status(),
            traffic: traffic_of(&self.mesh),
            uploaded_bytes: self.mesh.stats().peers.values().map(|peer| peer.bytes_out).sum(),
            load: self.mesh.stats().load,
            tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
        }
    }

    pub fn peers(&self) -> Vec<Peer> {
        let peer = |info: PeerInfo| Peer {
            id: info.id.to_string(),
            addresses: info.addresses,
            agent: info.agent,
            via: Via::of(info.path),
            in_swarm: info.in_swarm,
            connected_s: info.connected_s,
            bytes_in: info.bytes_in,
            bytes_out: info.bytes_out,
            score: info.score,
            shards_held: info.shards_held,
        };
        self.mesh.peers().into_iter().map(peer).collect()
    }

    /// What this node serves to peers and the gateway.
    pub fn serve(&self) -> Arc<dyn ShardServe> {
        Arc::new(self.ladder.clone())
    }

    /// Brings an object of a known model here from peers, a tab among them, and keeps it as
    /// long as there is room. `None` if no manifest known here names it. Whoever asks shows no
    /// token, so nobody is trusted by it.
    ///
    /// # Errors
    /// The outer error: no model that names it may be used. The inner one is a read's error: nobody
    /// has it, nobody sent it within [`BRING_MAX`], or it cannot be written to disk.
    pub async fn bring(&self, shard: ShardId) -> anyhow::Result<Option<anyhow::Result<u64>>> {
        let named = self.catalog.list().into_iter().filter_map(|(model, known)| {
            let sizes = sizes(known.manifest.as_deref()?).ok()?;
            sizes.into_iter().find(|(id, _)| *id == shard).map(|(_, size)| (model, size))
        });
        let mut refusal = None;
        let mut wanted = None;
        for (model, size) in named {
            match self.permit(model) {
                Ok(()) => wanted = wanted.or(Some((model, size))),
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        let Some((model, size)) = wanted else { return refusal.map_or(Ok(None), Err) };
        self.keep(model);
        if let Ok(Some(manifest)) = self.usable(model) {
            self.rely_on(&manifest);
        }
        if !self.disk.is_whole(shard) {
            let deadline = Some(Instant::now() + BRING_MAX);
            if let Err(error) = self.fetch_whole(shard, size, deadline).await {
                return Ok(Some(Err(error)));
            }
        }
        Ok(Some(Ok(size)))
    }

    /// The manifest of a model that a page wants to run; `None` if it is not known here. As with
    /// [`Self::bring`], no publisher becomes trusted by this.
    ///
    /// # Errors
    /// Its publisher is not trusted, and the policy does not let it be used.
    pub fn usable(&self, model: ModelId) -> anyhow::Result<Option<Arc<Manifest>>> {
        let Some(known) = self.catalog.get(model) else { return Ok(None) };
        self.permit(model)?;
        Ok(known.manifest)
    }

    /// What a page needs to join the swarm.
    pub fn info(&self) -> NodeInfo {
        NodeInfo {
            peer_id: self.peer_id(),
            swarm: self.config.swarm.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            topic: topic(&self.config.swarm).unwrap_or_default(),
            protocol_version: PROTOCOL_VERSION.to_owned(),
            private: self.config.swarm_key.is_some(),
            addresses: self.addresses(),
            peers: self.peers(),
        }
    }

    pub fn models(&self) -> Vec<ModelInfo> {
        // A damaged trust list is reported where it decides something. Here it means that nobody is
        // trusted.
        let trust = self.trust.read().unwrap_or_default();
        self.catalog
            .list()
            .into_iter()
            .map(|(id, known)| self.describe(id, &known, &trust))
            .collect()
    }

    /// What is known of one model.
    ///
    /// # Errors
    /// If it is not known any more.
    pub(super) fn info_of(&self, model: ModelId) -> anyhow::Result<ModelInfo> {
        let known = self.catalog.get(model);
        let known = known.with_context(|| format!("model {model} was withdrawn meanwhile"))?;
        Ok(self.describe(model, &known, &self.trust.read().unwrap_or_default()))
    }

    fn describe(&self, id: ModelId, known: &Known, trust: &trust::Known) -> ModelInfo {
        let shards = known.manifest.as_ref().and_then(|m| shard_ids(m).ok()).unwrap_or_default();
        let is_here = |shard: &&ShardId| self.disk.is_whole(**shard);
        let here = shards.iter().filter(is_here).count();
        let reachable = shards
            .iter()
            .filter(|shard| is_here(shard) || !self.mesh.holders(**shard).is_empty())
            .count();
        let mut signers: Vec<Signer> = known
            .signed
            .iter()
            .map(|signed| Signer {
                name: signed.name.clone(),
                publisher: signed.publisher.to_string(),
                trust: self.standing(signed.publisher, trust),
            })
            .collect();
        signers.sort_by(|a, b| (a.trust, &a.publisher).cmp(&(b.trust, &b.publisher)));
        let first = signers.first();
        ModelInfo {
            id: id.to_string(),
            name: first.map(|signer| signer.name.clone()).unwrap_or_default(),
            publishers: signers.iter().map(|signer| signer.publisher.clone()).collect(),
            trust: first.map_or(Standing::Stranger, |signer| signer.trust),
            bytes: known.manifest.as_ref().map_or(0, |manifest| manifest.total_size),
            replicas: self.wanted_copies(known, trust),
            shards: shards.len(),
            shards_here: here,
            shards_reachable: reachable,
            pinned: self.disk.is_pinned(id.manifest()),
            copies: self.copies_of(id, known),
            base: known.manifest.as_ref().and_then(|manifest| adapters::base_of(manifest)),
            manifest: known.manifest.is_some(),
            signers,
        }
    }

    /// Imports shards of an RDRR directory (pinned), signs its manifest and announces it.
    ///
    /// # Errors
    /// A number of copies out of bounds, a damaged manifest, a shard whose bytes are not its hash's, or no room: nothing is announced then.
    pub async fn publish(
        &self,
        request: PublishRequest,
        report: &Report,
    ) -> anyhow::Result<PublishReply> {
        let copies = request.replicas;
        ensure!(copies.is_valid(), BadReplicas(copies.to_string()));
        let path = request.dir.join("manifest.json");
        let bytes =
            regular::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let manifest = Manifest::parse(&bytes).with_context(|| format!("{}", path.display()))?;
        let model = ModelId::of(&bytes);
        let shards = shard_ids(&manifest)?;
        let chosen = match request.shards {
            Some(chosen) => chosen,
            None => (0..shards.len()).collect(),
        };
        let mut imports: Vec<(&str, ShardId, u64)> = Vec::new();
        for index in chosen {
            let shard = manifest.shards.get(index).with_context(|| {
                format!("--shards: there is no shard {index}, the model has {}", shards.len())
            })?;
            imports.push((&shard.filename, shards[index], shard.size));
        }
        let shards_stored = imports.len();
        let mut pinned = vec![(model.manifest(), bytes.len() as u64)];
        if let Some(tokenizer) = &manifest.tokenizer
            && let (Some(id), Some(size)) = (tokenizer.id, tokenizer.size)
        {
            imports.push((&tokenizer.file, id, size));
        }
        pinned.extend(imports.iter().map(|(_, id, size)| (*id, *size)));
        self.disk.check_room(pinned.iter().copied())?;
        // Pinned only once all of it is here, so that the rest of a failed or interrupted
        // publication may be evicted.
        let _hold = self.disk.hold(pinned.iter().map(|(id, _)| *id));
        let bytes_stored = imports.iter().map(|(.., size)| size).sum();
        let bytes_copied = self.import(&request.dir, &imports, report).await?;
        let manifest_size = bytes.len() as u64;
        self.ladder.put(bytes.into(), false).await?;
        let before = self.disk.model_pins().remove(&model);
        let name = manifest.model_id.clone();
        self.disk.pin_model(model, name.clone(), pinned).await?;
        if let Err(error) = self.sign_and_announce(manifest, manifest_size, request.replicas) {
            if before.is_none() {
                self.disk.unpin_model(model).await?;
            }
            return Err(error);
        }
        Ok(PublishReply {
            model: model.to_string(),
            name,
            publisher: self.publisher().to_string(),
            shards_stored,
            bytes_stored,
            bytes_copied,
        })
    }

    /// Signs a model whose objects are pinned. Its signature outlives the node.
    fn sign_and_announce(
        &self,
        manifest: Manifest,
        manifest_size: u64,
        replicas: Replicas,
    ) -> anyhow::Result<()> {
        let model = manifest.model_id_hash();
        // Later than what this node signed before, even if its clock was set back.
        let known = self.catalog.get(model).map(|known| known.signed).unwrap_or_default();
        let own = known.iter().filter(|signed| signed.publisher == self.publisher());
        let before = own.map(|signed| signed.signed_ms).max().unwrap_or(0);
        let now = before.saturating_add(1).max(unix_ms());
        let name = &manifest.model_id;
        let signed = SignedModel::sign_at(&self.seed, model, name, manifest_size, replicas, now)?;
        let file = storage::published_file(&self.config.data, model);
        let dir = self.published_dir();
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
        identity::write_private(&file, &serde_json::to_vec(&signed)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        self.announce(signed, Arc::new(manifest))
    }

    /// Takes files of a directory into the store; bytes that had to be copied.
    async fn import(
        &self,
        dir: &Path,
        imports: &[(&str, ShardId, u64)],
        report: &Report,
    ) -> anyhow::Result<u64> {
        let mut meter = Meter::new(Instant::now(), imports.iter().map(|(.., size)| size).sum());
        let (mut done, mut copied) = (0, 0);
        for (file, id, size) in imports {
            let imported = self.ladder.import_file(dir.join(file), *id, false).await?;
            done += size;
            copied += if imported.how == Some(ImportMethod::Copied) { *size } else { 0 };
            report(meter.note(Instant::now(), done));
        }
        Ok(copied)
    }

    /// Protects a model or an object from eviction. First fetches what is missing, if asked to.
    pub async fn pin(
        &self,
        request: &TargetRequest,
        report: &Report,
    ) -> anyhow::Result<TargetReply> {
        if request.fetch
            && let Ok(model) = resolve(&request.target, &self.candidates()?)
        {
            // Its manifest may not have been fetched until now.
            self.wanted_by_id(model, &request.target, &request.trust, request.can_ask).await?;
        }
        let target = self.target(&request.target, request.fetch).await?;
        if let Some(model) = target.model() {
            self.keep(model);
        }
        // Until all of it is pinned, what is here already must not be evicted for the rest.
        let _hold = self.disk.hold(target.objects().into_iter().map(|(shard, _)| shard));
        if request.fetch {
            self.fetch_missing(&target, report).await?;
        }
        let reply = pins::pin(&self.disk, &target).await?;
        // Again, because fetching may have taken longer than a model of which nothing is here
        // stays kept.
        if let Some(model) = target.model() {
            self.keep(model);
        }
        Ok(reply)
    }

    pub async fn unpin(&self, request: &TargetRequest) -> anyhow::Result<TargetReply> {
        pins::unpin(&self.disk, &self.target(&request.target, false).await?).await
    }

    /// Removes a model's objects, or one object, from disk and RAM. If this node published the
    /// model, it is not announced again after the next start.
    pub async fn remove(&self, request: &TargetRequest) -> anyhow::Result<TargetReply> {
        let target = self.target(&request.target, false).await?;
        let models = self.stored_models();
        let mut plan = storage::plan_removal(&self.disk, &target, &models, request.force).await?;
        let elsewhere = self.are_elsewhere(plan.objects.iter().map(|(shard, _)| *shard));
        plan.reply.last_copies =
            last_copy::guard(&plan.reply.target, &plan.objects, &elsewhere, request.last_copy)?;
        if let Some(model) = target.model() {
            // First, so that nothing of it is copied again for the swarm.
            self.declined.add(model)?;
            self.disk.unpin_model(model).await?;
        }
        for (shard, _) in &plan.objects {
            // A pinned object of which nothing was here went with its pin.
            if self.disk.groups(*shard).await.is_some() {
                self.ladder.remove(*shard).await?;
            }
        }
        for shard in &plan.unneeded {
            self.ladder.forget_in_ram(*shard);
        }
        if let Some(model) = target.model() {
            self.engine.models().close(model);
            storage::withdraw(&self.config.data, model)?;
            self.kept.release(model)?;
            self.mesh.release(model, true);
            self.follow();
        }
        Ok(plan.reply)
    }

    /// Evicts unpinned objects until the rest fits. What too few others hold stays.
    ///
    /// # Errors
    /// If objects would have to be evicted that no other peer is known to hold, unless the request
    /// allows it.
    pub async fn collect(&self, request: &GcRequest) -> anyhow::Result<Collected> {
        let GcRequest { budget, dry_run, last_copy } = *request;
        if dry_run || last_copy {
            return Ok(self.disk.collect_all(budget, dry_run).await?);
        }
        let plan = self.disk.collect_all(budget, true).await?;
        let elsewhere = self.are_elsewhere(plan.evicted.iter().map(|(shard, _)| *shard));
        last_copy::guard("the store", &plan.evicted, &elsewhere, false)?;
        // The swarm may have changed since: the disk plans anew, and spares what too few hold now.
        Ok(self.disk.collect(budget, false).await?)
    }

    /// Starts a check of everything stored; the events end with it.
    pub fn fsck(&self, request: &FsckRequest) -> anyhow::Result<mpsc::Receiver<FsckEvent>> {
        let checking = Arc::clone(&self.checking).try_acquire_owned();
        let checking = checking.ok().context("the store is being checked already")?;
        let ladder = request.repair.then(|| self.ladder.clone());
        Ok(storage::fsck(DiskTier::clone(&self.disk), ladder, checking))
    }

    fn stored_models(&self) -> Vec<StoredModel> {
        let known = self.catalog.list().into_iter();
        known.filter_map(|(id, known)| StoredModel::new(id, known.manifest.as_deref()?)).collect()
    }

    /// What `text` means: a model that is known or pinned here, or an object that is stored
    /// here. `or_known`: an object of a known model, too.
    async fn target(&self, text: &str, or_known: bool) -> anyhow::Result<Target> {
        let (mut models, mut named) = (self.stored_models(), self.candidates()?);
        pins::add_pinned_and_names(&self.disk, &self.config.data, &mut models, &mut named).await;
        let stored = self.disk.list().await?.into_iter().map(|object| object.shard);
        let known = models.iter().filter(|_| or_known).flat_map(StoredModel::objects);
        let objects = stored.chain(known).collect();
        Target::resolve(text, &named, models, &objects)
    }

    /// A whole object: a manifest or a tokenizer.
    pub(super) async fn whole(&self, id: ShardId, size: u64) -> Result<Bytes, ReadError> {
        self.ladder.get_whole(id, size, Priority::Token, None).await
    }

    fn announce(&self, signed: SignedModel, manifest: Arc<Manifest>) -> anyhow::Result<()> {
        let (model, size) = (signed.model, signed.manifest_size);
        self.declined.forget(model);
        self.mesh.publish(signed)?;
        self.follow();
        self.rely_on(&manifest);
        self.know(model, manifest, size)
    }

    fn published_dir(&self) -> PathBuf {
        self.config.data.join("published")
    }

    /// Announces again what this node published before it was last stopped.
    async fn restore_published(&self) {
        let Ok(entries) = std::fs::read_dir(self.published_dir()) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            if let Err(error) = self.restore(&path).await {
                tracing::warn!("{}: not announced again: {error:#}", path.display());
            }
        }
    }

    async fn restore(&self, path: &Path) -> anyhow::Result<()> {
        let signed: SignedModel = serde_json::from_slice(&regular::read(path)?)?;
        signed.verify()?;
        let manifest = self.stored_manifest(signed.model, signed.manifest_size).await?;
        self.announce(signed, Arc::new(manifest))
    }

    /// The manifest of a model, if it is here.
    pub(super) async fn stored_manifest(
        &self,
        model: ModelId,
        size: u64,
    ) -> anyhow::Result<Manifest> {
        let shard = model.manifest();
        ensure!(self.disk.is_whole(shard), "its manifest is no longer stored");
        Ok(Manifest::parse(&self.whole(shard, size).await?)?)
    }
}

async fn open_disk(config: &Config) -> anyhow::Result<Arc<DiskTier>> {
    let dir = config.data.clone();
    let options = DiskOptions { budget: config.disk_budget };
    let disk = tokio::task::spawn_blocking(move || DiskTier::open_guarded(&dir, options)).await??;
    Ok(Arc::new(disk))
}

/// The wall clock, which numbers what this node signs.
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(0)
}

fn traffic_of(mesh: &MeshHandle) -> Traffic {
    let stats = mesh.stats();
    Traffic {
        hits: super::api::Hits::default(),
        verified_bytes: stats.counts.verified_bytes,
        rejected_bytes: stats.counts.rejected_bytes,
        peer_bytes: stats.peers.into_iter().map(|(peer, t)| (peer, t.bytes_in)).collect(),
    }
}

/// Keeps the address book current while peers come and go.
async fn remember(service: Arc<Service>, mut book: AddressBook) {
    let path = address_book::file(&service.config.data);
    let mut changes = service.mesh.watch_changes();
    loop {
        let ends = service.stopping.is_cancelled();
        changes.borrow_and_update();
        let peers = service.mesh.peers();
        // `|` instead of `||`, so that each peer is noted whatever the others brought.
        let is_news =
            peers.iter().fold(false, |news, peer| book.note(peer.id, &peer.reached) | news);
        if is_news && let Err(error) = book.save(&path) {
            tracing::warn!("known addresses are not kept: {error:#}");
        }
        if ends {
            return;
        }
        // Holdings and loads change all the time; the set of peers rarely does.
        tokio::select! {
            () = service.stopping.cancelled() => {}
            () = tokio::time::sleep(REMEMBER_EVERY) => {}
        }
        tokio::select! {
            () = service.stopping.cancelled() => {}
            _ = changes.changed() => {}
        }
    }
}
