//! A running node: the store, the mesh, the catalogue and the engine wired together,
//! started and stopped in order. The control API and the commands call this.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::address_book::{self, AddressBook};
use super::api::{
    AwayPeer, BootstrapStatus, FsckEvent, FsckRequest, GcRequest, GenerateEvent, GenerateRequest,
    ModelInfo, NodeInfo, Peer, PublishReply, PublishRequest, ReachStatus, Status, StoreStatus,
    TargetReply, TargetRequest, TierUse, Traffic, Via,
};
use super::catalog::{Catalog, objects, shard_ids, sizes};
use super::config::Config;
use super::engine::{Engine, EngineError, EngineOptions, Job, Opened, check_request};
use super::events::NodeEvent;
use super::identity;
use super::joining::{self, Joined};
use super::resolve::Standing;
use super::storage::{self, StoredModel, Target};
use super::trust::{How, TrustStore};
use super::work::Report;
use super::{last_copy, loading};
use doppler_infer::reader::WeightReader;
use doppler_mesh::{MeshHandle, Meter, PROTOCOL_VERSION, PeerInfo, topic};
use doppler_store::disk::{Collected, DiskOptions, DiskTier, ImportMethod};
use doppler_store::ladder::{Ladder, LadderOptions};
use doppler_store::manifest::Manifest;
use doppler_store::signature::{PublicKey, SignedModel};
use doppler_store::{ModelId, Priority, ReadError, ShardId, ShardServe};

/// Manifests fetched at once.
const LEARNING_MAX: usize = 4;

/// Peers that are away of which `status` tells.
const AWAY_MAX: usize = 64;
/// Connected peers are looked at this often, at most, for addresses to keep.
const REMEMBER_EVERY: Duration = Duration::from_secs(1);
/// How long an object may take that a page asks for: 64 MiB from a tab on a slow line.
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
    /// Where the page and the control API answer; set once they do.
    http: OnceLock<String>,
    /// Shows a private swarm's key to this node's gateway.
    gateway_token: Option<String>,
    pub(super) catalog: Arc<Catalog>,
    engine: Engine,
    /// Held while the store is checked: once at a time.
    checking: Arc<Semaphore>,
    stopping: CancellationToken,
    /// Writes down where peers are; awaited at the end.
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
        };
        let engine = Engine::start(options, traffic)?;
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
            engine,
            checking: Arc::new(Semaphore::new(1)),
            stopping: CancellationToken::new(),
            remembering: Mutex::default(),
            config,
        });
        service.restore_published().await?;
        tokio::spawn(learn(service.clone(), report));
        let remembering = tokio::spawn(remember(service.clone(), book));
        *service.remembering.lock().unwrap_or_else(PoisonError::into_inner) = Some(remembering);
        Ok(service)
    }

    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// What this node's gateway asks for; nothing in an open swarm.
    pub fn gateway_token(&self) -> Option<String> {
        self.gateway_token.clone()
    }

    /// The key that this node signs with.
    pub fn publisher(&self) -> PublicKey {
        PublicKey::of_seed(&self.seed)
    }

    /// Says where the page and the control API answer.
    pub fn answers_at(&self, address: SocketAddr) {
        // The first one stands: a node serves HTTP once.
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

    /// Ends in order: no new work, the engine, the mesh, and the disk last.
    pub async fn stop(&self) {
        self.stopping.cancel();
        let remembering = self.remembering.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(remembering) = remembering {
            // An error means that it panicked: it has ended all the same.
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
            backend: self.engine.describe(),
            uptime_s: self.started.elapsed().as_secs_f64(),
            peers: self.mesh.peers().len(),
            models: self.catalog.len(),
            loaded: self.engine.loaded(),
            loads: self.engine.loads(),
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

    /// What this node gives to others, peers or the gateway.
    pub fn serve(&self) -> Arc<dyn ShardServe> {
        Arc::new(self.ladder.clone())
    }

    /// Brings an object of a known model here from peers, a tab among them, and keeps it as
    /// long as there is room. `None` if no manifest known here names it, or its publisher is
    /// not trusted.
    ///
    /// # Errors
    /// As reads err: nobody has it, or nobody sent it within [`BRING_MAX`].
    pub async fn bring(&self, shard: ShardId) -> Option<Result<u64, ReadError>> {
        let (model, size) = self.catalog.list().into_iter().find_map(|(model, known)| {
            let sizes = sizes(known.manifest.as_deref()?).ok()?;
            sizes.into_iter().find(|(id, _)| *id == shard).map(|(_, size)| (model, size))
        })?;
        self.admit(model, &[], false).ok()?;
        if !self.disk.is_whole(shard) {
            let deadline = Some(Instant::now() + BRING_MAX);
            let fetched = self.ladder.get_whole(shard, size, Priority::Bulk, deadline).await;
            if let Err(error) = fetched {
                return Some(Err(error));
            }
            if let Err(error) = self.ladder.flush().await {
                return Some(Err(error.into()));
            }
        }
        Some(Ok(size))
    }

    /// The manifest of a model that a page wants to run; `None` if it is not known here.
    ///
    /// # Errors
    /// Its publisher is not trusted, and the policy does not let it be used.
    pub fn usable(&self, model: ModelId) -> anyhow::Result<Option<Arc<Manifest>>> {
        let Some(known) = self.catalog.get(model) else { return Ok(None) };
        self.admit(model, &[], false)?;
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
        // A damaged list of trust is told where it decides; here it trusts nobody.
        let trusted = self.trusted().unwrap_or_default();
        self.catalog
            .list()
            .into_iter()
            .map(|(id, known)| {
                let shards =
                    known.manifest.as_ref().and_then(|m| shard_ids(m).ok()).unwrap_or_default();
                let here = shards.iter().filter(|shard| self.disk.is_whole(**shard)).count();
                let reachable = shards
                    .iter()
                    .filter(|shard| {
                        self.disk.is_whole(**shard) || !self.mesh.holders(**shard).is_empty()
                    })
                    .count();
                let mut signers: Vec<_> = known
                    .signed
                    .iter()
                    .map(|signed| (self.standing(signed.publisher, &trusted), signed.publisher))
                    .collect();
                signers.sort_unstable();
                ModelInfo {
                    id: id.to_string(),
                    name: known.name().to_owned(),
                    publishers: signers.iter().map(|(_, signer)| signer.to_string()).collect(),
                    trust: signers.first().map_or(Standing::Stranger, |(standing, _)| *standing),
                    bytes: known.manifest.as_ref().map_or(0, |manifest| manifest.total_size),
                    shards: shards.len(),
                    shards_here: here,
                    shards_reachable: reachable,
                    manifest: known.manifest.is_some(),
                }
            })
            .collect()
    }

    /// Imports shards of an RDRR directory (pinned), signs its manifest and announces it.
    ///
    /// # Errors
    /// A damaged manifest, a shard whose bytes are not its hash's, or no room: nothing is announced then.
    pub async fn publish(
        &self,
        request: PublishRequest,
        report: &Report,
    ) -> anyhow::Result<PublishReply> {
        let path = request.dir.join("manifest.json");
        let bytes = tokio::fs::read(&path)
            .await
            .with_context(|| format!("cannot read {}", path.display()))?;
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
        if let Some(tokenizer) = &manifest.tokenizer
            && let (Some(id), Some(size)) = (tokenizer.id, tokenizer.size)
        {
            imports.push((&tokenizer.file, id, size));
        }
        self.disk.check_room(imports.iter().map(|(_, id, size)| (*id, *size)))?;
        let bytes_stored = imports.iter().map(|(.., size)| size).sum();
        let bytes_copied = self.import(&request.dir, &imports, report).await?;
        let manifest_size = bytes.len() as u64;
        self.ladder.put(bytes.into(), true).await?;

        let signed = SignedModel::sign(&self.seed, model, &manifest.model_id, manifest_size)?;
        let file = storage::published_file(&self.config.data, model);
        std::fs::create_dir_all(self.published_dir())?;
        identity::write_private(&file, &serde_json::to_vec(&signed)?)?;
        self.announce(signed, Arc::new(manifest))?;
        let name = self.catalog.get(model).map(|known| known.name().to_owned());
        Ok(PublishReply {
            model: model.to_string(),
            name: name.unwrap_or_default(),
            publisher: self.publisher().to_string(),
            shards_stored,
            bytes_stored,
            bytes_copied,
        })
    }

    /// Takes files of a directory into the store, pinned; bytes that had to be copied.
    async fn import(
        &self,
        dir: &Path,
        imports: &[(&str, ShardId, u64)],
        report: &Report,
    ) -> anyhow::Result<u64> {
        let mut meter = Meter::new(Instant::now(), imports.iter().map(|(.., size)| size).sum());
        let (mut done, mut copied) = (0, 0);
        for (file, id, size) in imports {
            let imported = self.ladder.import_file(dir.join(file), *id, true).await?;
            done += size;
            copied += if imported.how == Some(ImportMethod::Copied) { *size } else { 0 };
            report(meter.note(Instant::now(), done));
        }
        Ok(copied)
    }

    /// Generates; the events arrive on the returned channel, an error as the last of them.
    ///
    /// # Errors
    /// A request that the model cannot do is refused before it waits for the engine.
    pub async fn generate(
        &self,
        request: GenerateRequest,
    ) -> anyhow::Result<mpsc::Receiver<GenerateEvent>> {
        check_request(&request)?;
        let (model, manifest) = self.wanted(&request.model).await?;
        self.admit(model, &request.trust, request.can_ask)?;
        let opened = self.opened(model, manifest.clone()).await?;
        let missing = match request.progress {
            true => loading::resident_missing(&self.disk, &manifest).await,
            false => 0,
        };
        // Long prompts take a while to tokenize.
        let check = tokio::task::spawn_blocking(move || Job::check(opened, &request));
        let events = self.engine.submit(check.await??)?;
        Ok(match missing {
            0 => events,
            missing => loading::follow(self.mesh.clone(), missing, events),
        })
    }

    /// A model's graph and tokenizer, kept by the engine from one request to the next.
    async fn opened(&self, model: ModelId, manifest: Arc<Manifest>) -> anyhow::Result<Arc<Opened>> {
        if let Some(opened) = self.engine.models().get(model) {
            return Ok(opened);
        }
        let tokenizer = manifest.tokenizer.as_ref();
        let (id, size) = tokenizer
            .and_then(|tokenizer| tokenizer.id.zip(tokenizer.size))
            .ok_or(EngineError::NoTokenizer(model))?;
        let tokenizer = self.whole(id, size).await?;
        let runtime = tokio::runtime::Handle::current();
        let reader = WeightReader::new(Arc::new(self.ladder.clone()), runtime);
        let models = self.engine.models().clone();
        let open = move || models.open(model, Manifest::clone(&manifest), &tokenizer, reader);
        Ok(tokio::task::spawn_blocking(open).await??)
    }

    /// Never evict what is here of a model or an object; fetches what is not
    /// here first, if asked to.
    pub async fn pin(
        &self,
        request: &TargetRequest,
        report: &Report,
    ) -> anyhow::Result<TargetReply> {
        let target = self.target(&request.target).await?;
        if request.fetch {
            if let Some(model) = target.model() {
                self.admit(model, &request.trust, request.can_ask)?;
            }
            self.fetch_missing(&target, report).await?;
        }
        storage::pin(&self.disk, &target).await
    }

    /// Whether a model may be used: its publisher is trusted, or the policy lets it be.
    pub(super) fn admit(
        &self,
        model: ModelId,
        trust: &[PublicKey],
        can_ask: bool,
    ) -> anyhow::Result<()> {
        if !trust.is_empty() {
            self.trust.add(trust, How::Added, "")?;
        }
        let Some(known) = self.catalog.get(model) else { return Ok(()) };
        let publishers: Vec<PublicKey> = known.signed.iter().map(|s| s.publisher).collect();
        // What this node itself has published needs no approval.
        if publishers.contains(&self.publisher()) {
            return Ok(());
        }
        let policy = self.config.trust_policy;
        self.trust.admit(policy, &model.to_string(), known.name(), &publishers, can_ask)
    }

    pub async fn unpin(&self, request: &TargetRequest) -> anyhow::Result<TargetReply> {
        storage::unpin(&self.disk, &self.target(&request.target).await?).await
    }

    /// Removes a model's objects, or one object, from disk and RAM. A model of
    /// this node's own is not announced again after the next start.
    pub async fn remove(&self, request: &TargetRequest) -> anyhow::Result<TargetReply> {
        let target = self.target(&request.target).await?;
        let models = self.stored_models();
        let mut plan = storage::plan_removal(&self.disk, &target, &models, request.force).await?;
        plan.reply.last_copies = last_copy::guard(
            &plan.reply.target,
            &plan.objects,
            |shard| self.is_elsewhere(shard),
            request.last_copy,
        )?;
        for (shard, _) in &plan.objects {
            self.ladder.remove(*shard).await?;
        }
        if let Some(model) = target.model() {
            storage::withdraw(&self.config.data, model)?;
        }
        Ok(plan.reply)
    }

    /// Whether another peer says that it holds all of an object.
    fn is_elsewhere(&self, shard: ShardId) -> bool {
        !self.mesh.holders(shard).is_empty()
    }

    /// Evicts unpinned objects until the rest fits.
    ///
    /// # Errors
    /// If objects would go that no other peer is known to hold, unless the request says so.
    pub async fn collect(&self, request: &GcRequest) -> anyhow::Result<Collected> {
        if !request.dry_run {
            let plan = self.disk.collect(request.budget, true).await?;
            let is_elsewhere = |shard| self.is_elsewhere(shard);
            last_copy::guard("the store", &plan.evicted, is_elsewhere, request.last_copy)?;
        }
        Ok(self.disk.collect(request.budget, request.dry_run).await?)
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

    async fn target(&self, text: &str) -> anyhow::Result<Target> {
        let objects = self.disk.list().await?;
        Target::resolve(text, &self.candidates()?, self.stored_models(), &objects)
    }

    /// A whole object: a manifest or a tokenizer.
    async fn whole(&self, id: ShardId, size: u64) -> anyhow::Result<Bytes> {
        Ok(self.ladder.get_whole(id, size, Priority::Token, None).await?)
    }

    fn announce(&self, signed: SignedModel, manifest: Arc<Manifest>) -> anyhow::Result<()> {
        let model = signed.model;
        self.catalog.announce(signed.clone());
        self.know(model, manifest)?;
        self.mesh.publish(signed)?;
        Ok(())
    }

    /// From here on the model's objects can be found, kept and served.
    fn know(&self, model: ModelId, manifest: Arc<Manifest>) -> anyhow::Result<()> {
        self.ladder.expect_sizes(sizes(&manifest)?);
        self.mesh.register_model(model, objects(&manifest)?)?;
        self.catalog.add_manifest(model, manifest);
        Ok(())
    }

    fn published_dir(&self) -> PathBuf {
        self.config.data.join("published")
    }

    /// Announces again what this node published before it was last stopped.
    async fn restore_published(&self) -> anyhow::Result<()> {
        let Ok(entries) = std::fs::read_dir(self.published_dir()) else { return Ok(()) };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            if let Err(error) = self.restore(&path).await {
                tracing::warn!("{}: not announced again: {error:#}", path.display());
            }
        }
        Ok(())
    }

    async fn restore(&self, path: &Path) -> anyhow::Result<()> {
        let signed: SignedModel = serde_json::from_slice(&std::fs::read(path)?)?;
        signed.verify()?;
        let manifest = self.disk_only_manifest(&signed).await?;
        self.announce(signed, Arc::new(manifest))
    }

    async fn disk_only_manifest(&self, signed: &SignedModel) -> anyhow::Result<Manifest> {
        let shard = signed.model.manifest();
        ensure!(self.disk.is_whole(shard), "its manifest is no longer stored");
        Ok(Manifest::parse(&self.whole(shard, signed.manifest_size).await?)?)
    }
}

async fn open_disk(config: &Config) -> anyhow::Result<Arc<DiskTier>> {
    let dir = config.data.clone();
    let options = DiskOptions { budget: config.disk_budget };
    let disk = tokio::task::spawn_blocking(move || DiskTier::open(&dir, options)).await??;
    Ok(Arc::new(disk))
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

/// Keeps the address book up to date while peers come and go.
async fn remember(service: Arc<Service>, mut book: AddressBook) {
    let path = address_book::file(&service.config.data);
    let mut changes = service.mesh.watch_changes();
    loop {
        let ends = service.stopping.is_cancelled();
        changes.borrow_and_update();
        let peers = service.mesh.peers();
        // `|` and not `||`: each peer is noted, whatever the others brought.
        let is_news =
            peers.iter().fold(false, |news, peer| book.note(peer.id, &peer.reached) | news);
        if is_news && let Err(error) = book.save(&path) {
            tracing::warn!("known addresses are not kept: {error:#}");
        }
        if ends {
            return;
        }
        // Holdings and loads change all the time; who is there changes seldom.
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

/// Follows announcements: each new model's manifest is fetched by its hash and checked.
async fn learn(service: Arc<Service>, report: impl Fn(NodeEvent) + Send + Sync + 'static) {
    let mut announced = service.mesh.watch_models();
    let mut fetching: JoinSet<ModelId> = JoinSet::new();
    let mut under_way: HashSet<ModelId> = HashSet::new();
    let report = Arc::new(report);
    loop {
        let list = announced.borrow_and_update().clone();
        for signed in list.iter() {
            let wanted = service.catalog.announce(signed.clone());
            if !wanted || under_way.len() >= LEARNING_MAX || !under_way.insert(signed.model) {
                continue;
            }
            let (service, report, signed) = (service.clone(), report.clone(), signed.clone());
            fetching.spawn(async move {
                match learn_one(&service, &signed).await {
                    Ok(event) => report(event),
                    // Gossip says it again, and then it is tried again.
                    Err(error) => tracing::warn!("model {}: {error:#}", signed.model),
                }
                signed.model
            });
        }
        tokio::select! {
            () = service.stopping.cancelled() => break,
            Some(done) = fetching.join_next(), if !fetching.is_empty() => {
                if let Ok(model) = done {
                    under_way.remove(&model);
                }
            }
            changed = announced.changed() => if changed.is_err() { break },
        }
    }
}

async fn learn_one(service: &Service, signed: &SignedModel) -> anyhow::Result<NodeEvent> {
    let bytes = service.whole(signed.model.manifest(), signed.manifest_size).await?;
    let manifest = Manifest::parse(&bytes)?;
    let bytes = manifest.total_size;
    service.know(signed.model, Arc::new(manifest))?;
    Ok(NodeEvent::Model {
        id: signed.model.to_string(),
        name: signed.name.clone(),
        bytes,
        publisher: signed.publisher.to_string(),
    })
}
