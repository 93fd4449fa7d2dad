//! What the user typed: clap's view of the command line, nothing resolved yet.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use super::args_measure::*;
use super::memory;
use super::size::{ByteRate, ByteSize};
use super::trust::TrustPolicy;
use doppler_infer::slots::SlotBudget;
use doppler_mesh::RelayMode;
use doppler_store::PolicyKind;
use doppler_store::signature::PublicKey;

/// Runs models that do not fit the machine: weights are fetched, proved and paged from a swarm.
#[derive(Debug, Parser)]
#[command(name = "doppler-node", version, about, propagate_version = true)]
pub struct RawArgs {
    #[command(subcommand)]
    pub command: Command,

    /// Log filter, as in RUST_LOG (for example `info` or `doppler_mesh=debug`)
    #[arg(long, global = true, env = "DOPPLER_LOG", default_value = "warn", value_name = "FILTER")]
    pub log: String,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Four nodes on this machine: three hold a model, the fourth runs it without having it
    Demo(DemoArgs),
    /// Join a swarm and stay: keep, fetch and serve shards, answer the commands below
    Join(JoinArgs),
    /// Make the key of a private swarm
    SwarmKey(SwarmKeyArgs),
    /// Sign an RDRR model, store its shards in the running node and announce it
    Publish(PublishArgs),
    /// List the models that the running node knows
    Ls(ControlArgs),
    /// Show the running node's addresses, tiers and traffic
    Status(ControlArgs),
    /// Show the peers that the running node is connected to
    Peers(ControlArgs),
    /// Never evict a model or an object
    Pin(PinArgs),
    /// Let a model or an object be evicted again
    Unpin(UnpinArgs),
    /// Say whose models may be used
    #[command(subcommand)]
    Trust(TrustCommand),
    /// Remove a model or an object from the store
    Rm(RmArgs),
    /// Evict unpinned objects until what is stored fits the disk budget
    Gc(GcArgs),
    /// Check every stored byte against its hash
    Fsck(FsckArgs),
    /// Convert a Hugging Face checkpoint (safetensors) to RDRR
    Convert(ConvertArgs),
    /// Show what an RDRR model or manifest contains
    Inspect(InspectArgs),
    /// Generate text with an RDRR directory, a Hugging Face directory or a model of the swarm
    Run(RunArgs),
    /// Compare a model's logits and greedy text with a reference
    Check(CheckArgs),
    /// Measure a model's perplexity on a text
    Perplexity(PerplexityArgs),
    /// Write a model of a well-known shape with random weights, for measuring speed
    Synth(SynthArgs),
    /// Measure a local model's speed, or the store's
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Record which experts a run asks for, and try eviction policies on it
    #[command(subcommand)]
    Trace(TraceCommand),
    /// Import, fetch and collect without end, saying what is durable (for crash tests)
    #[command(hide = true)]
    StoreExercise(ExerciseArgs),
}

/// Where a node keeps its data.
#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// The node's data directory [default: the user's data directory/doppler-node]
    #[arg(long, env = "DOPPLER_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,
}

/// What a node may use of the machine.
#[derive(Debug, Clone, Args)]
pub struct BudgetArgs {
    /// Device memory for a running model: trunk, KV cache and expert slots (main memory with the CPU backend)
    #[arg(long, value_name = "SIZE", default_value_t = Self::default().vram_budget)]
    pub vram_budget: ByteSize,

    /// Main memory for cached weights
    #[arg(long, value_name = "SIZE", default_value_t = Self::default().ram_budget)]
    pub ram_budget: ByteSize,

    /// Disk for stored shards
    #[arg(long, value_name = "SIZE", default_value_t = Self::default().disk_budget)]
    pub disk_budget: ByteSize,
}

impl Default for BudgetArgs {
    fn default() -> Self {
        Self {
            vram_budget: ByteSize(2 << 30),
            ram_budget: ByteSize(4 << 30),
            disk_budget: ByteSize(50 << 30),
        }
    }
}

/// How a node meets others.
#[derive(Debug, Clone, Args)]
pub struct NetworkArgs {
    /// A peer to start from, with its /p2p/ id (repeatable)
    #[arg(long, value_name = "MULTIADDR")]
    pub bootstrap: Vec<String>,

    /// An address to listen on (repeatable) [default: QUIC, TCP, WebSocket and WebRTC-direct on
    /// every IPv4 interface, at ports that the system chooses]
    #[arg(long, value_name = "MULTIADDR")]
    pub listen: Vec<String>,

    /// An address to announce that this node cannot see itself (repeatable), for example
    /// /dns4/HOST/tcp/443/wss of a proxy that ends TLS and passes on to the WebSocket port
    #[arg(long, value_name = "MULTIADDR")]
    pub external_address: Vec<String>,

    /// A private swarm's key file (see `swarm-key`): peers without the key are refused
    #[arg(long, value_name = "FILE", env = "DOPPLER_SWARM_KEY")]
    pub swarm_key: Option<PathBuf>,

    /// PEM file of authorities that may vouch for /wss addresses, beside those of the web
    #[arg(long, value_name = "FILE", env = "SSL_CERT_FILE")]
    pub tls_ca: Option<PathBuf>,

    /// What to do with relays: `auto` offers one while peers say that they reach this node,
    /// and uses theirs while they say that they do not; `server` offers one in any case,
    /// `client` never; `off` does neither
    #[arg(long, value_enum, default_value_t)]
    pub relay: RelayChoice,

    /// Do not ask the router to forward the listening ports (UPnP)
    #[arg(long)]
    pub no_upnp: bool,

    /// Do not look for peers on the local network by mDNS
    #[arg(long)]
    pub no_mdns: bool,

    /// Bytes of shards a second to send to peers, at most [default: no limit]
    #[arg(long, value_name = "RATE")]
    pub upload_limit: Option<ByteRate>,

    /// Bytes of shards a second to take from peers, at most [default: no limit]
    #[arg(long, value_name = "RATE")]
    pub download_limit: Option<ByteRate>,

    /// Trust this publisher from now on: its public key (repeatable)
    #[arg(long, value_name = "PUBLISHER")]
    pub trust: Vec<PublicKey>,

    /// What to do with models of publishers who are not trusted
    #[arg(long, value_enum, default_value_t)]
    pub trust_policy: TrustPolicy,

    /// Seconds to look for a holder of a missing shard before giving up
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    pub find_timeout: f64,
}

/// What a node does with relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum RelayChoice {
    #[default]
    Auto,
    Client,
    Server,
    Off,
}

impl From<RelayChoice> for RelayMode {
    fn from(choice: RelayChoice) -> Self {
        match choice {
            RelayChoice::Auto => Self::Auto,
            RelayChoice::Client => Self::Client,
            RelayChoice::Server => Self::Server,
            RelayChoice::Off => Self::Off,
        }
    }
}

#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The swarm's name: nodes of one name share models
    #[arg(long, value_name = "NAME")]
    pub swarm: String,
    #[command(flatten)]
    pub network: NetworkArgs,
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// What to compute on
    #[arg(long, value_enum, default_value_t)]
    pub backend: BackendChoice,
    /// Loopback address of the control API
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub control: SocketAddr,
    /// Print events as JSON, one a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SwarmKeyArgs {
    /// Where to write the key; it must not exist yet
    pub file: PathBuf,
}

/// Commands that talk to the node running on a data directory.
#[derive(Debug, Clone, Args)]
pub struct ControlArgs {
    #[command(flatten)]
    pub data: DataArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PublishArgs {
    /// The model's directory: manifest.json and its shards
    pub dir: PathBuf,
    /// Store only these shards, for example `0,2-5` [default: all]
    #[arg(long, value_name = "LIST")]
    pub shards: Option<String>,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct PinArgs {
    /// A model's name or id, or an object's id (the start of an id is enough)
    pub target: String,
    /// Fetch what is missing of it first
    #[arg(long)]
    pub fetch: bool,
    /// With --fetch: trust this publisher from now on (repeatable)
    #[arg(long, value_name = "PUBLISHER")]
    pub trust: Vec<PublicKey>,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Subcommand)]
pub enum TrustCommand {
    /// Show the trusted publishers
    List {
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Trust a publisher
    Add {
        /// Its public key, as `ls --json` shows it
        publisher: PublicKey,
        /// Why, for yourself
        #[arg(long, value_name = "TEXT", default_value = "")]
        note: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Trust a publisher no more
    Remove {
        publisher: PublicKey,
        #[command(flatten)]
        control: ControlArgs,
    },
}

#[derive(Debug, Args)]
pub struct UnpinArgs {
    /// A model's name or id, or an object's id (the start of an id is enough)
    pub target: String,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct RmArgs {
    /// A model's name or id, or an object's id (the start of an id is enough)
    pub target: String,
    /// Remove what is pinned too
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct GcArgs {
    /// How much may stay [default: what the running node was started with]
    #[arg(long, value_name = "SIZE")]
    pub disk_budget: Option<ByteSize>,
    /// Only say what would go
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct FsckArgs {
    /// Fetch damaged ranges again from peers
    #[arg(long)]
    pub repair: bool,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct ExerciseArgs {
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    #[arg(long)]
    pub seed: u64,
    /// Operations to do before ending by itself
    #[arg(long, default_value_t = u64::MAX)]
    pub operations: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantize {
    #[value(name = "q4_k_m")]
    Q4KM,
    #[value(name = "q8_0")]
    Q8_0,
    Bf16,
}

#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// The checkpoint's directory: config.json, *.safetensors, tokenizer.json
    pub hf_dir: PathBuf,
    /// Where to write the model; must not exist yet
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    #[arg(long, value_enum, default_value = "q4_k_m")]
    pub quantize: Quantize,
    /// The largest shard to write
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    pub shard_size: ByteSize,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// An RDRR directory or a manifest file
    pub path: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum BackendChoice {
    /// A hardware GPU if there is one, else the CPU
    #[default]
    Auto,
    /// Any wgpu adapter, a software one too
    Gpu,
    Cpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum KvChoice {
    /// Half precision: half the memory
    #[default]
    F16,
    F32,
}

/// Which model, and what to run it on.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// An RDRR directory, a Hugging Face directory (converted in memory), or a model id or name in the swarm
    pub model: String,
    #[arg(long, value_enum, default_value_t)]
    pub backend: BackendChoice,
    /// How to convert a Hugging Face directory in memory [default: weights as they are]
    #[arg(long, value_enum)]
    pub quantize: Option<Quantize>,
    /// Device memory for the model [default: whatever it takes]
    #[arg(long, value_name = "SIZE")]
    pub vram_budget: Option<ByteSize>,
    /// Main memory for experts that lost their slots on a GPU with memory of its own [default: half
    /// of what is free]
    #[arg(long, value_name = "SIZE")]
    pub host_budget: Option<ByteSize>,
    /// The longest context to make room for, tokens [default: what the task needs]
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// How the attention cache keeps its elements (local models; a node's are f16) [default: f16,
    /// but f32 for `check`]
    #[arg(long, value_enum)]
    pub kv: Option<KvChoice>,
    /// Which expert gives up its slot to another: lru, lfu or slru [default: lfu]
    #[arg(long, value_name = "NAME")]
    pub policy: Option<PolicyKind>,
}

impl ModelArgs {
    /// The device memory that the model may take.
    pub fn slots(&self) -> SlotBudget {
        self.vram_budget.map_or(SlotBudget::All, |size| SlotBudget::Device(size.0))
    }

    /// The main memory that evicted experts may take.
    pub fn host_bytes(&self) -> u64 {
        self.host_budget.map_or_else(|| memory::available() / 2, |size| size.0)
    }

    pub fn policy(&self) -> PolicyKind {
        self.policy.unwrap_or_default()
    }
}

/// How the next token is chosen.
#[derive(Debug, Clone, Args)]
pub struct SamplingArgs {
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Keep the likeliest tokens that add up to this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Above 1: make tokens that have appeared less likely
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Same seed, same text
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text to continue
    #[arg(short, long)]
    pub prompt: String,
    /// The most tokens to generate
    #[arg(short = 'n', long, default_value_t = 128)]
    pub tokens: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Join this swarm for the run, instead of asking the node running on the data directory
    #[arg(long, value_name = "NAME")]
    pub swarm: Option<String>,
    #[command(flatten)]
    pub network: NetworkArgs,
    #[command(flatten)]
    pub data: DataArgs,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The reference: a safetensors file with `input_ids`, `logits` and `greedy`
    #[arg(long, value_name = "FILE")]
    pub expected: PathBuf,
    /// The largest difference allowed, relative to the reference logits' standard deviation
    #[arg(long, default_value_t = 1e-3)]
    pub tolerance: f64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text to measure on
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchStoreArgs {
    /// Where to make the store that is measured [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Bytes to move in each measurement
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub size: ByteSize,
    /// Objects in the store that is reopened
    #[arg(long, default_value_t = 10_000)]
    pub objects: usize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The text to continue
    #[arg(short, long, default_value = "ROMEO:\n")]
    pub prompt: String,
    /// The tokens to generate
    #[arg(short = 'n', long, default_value_t = 96)]
    pub tokens: usize,
    /// Print one JSON object as the last line, and no live view
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        RawArgs::command().debug_assert();
    }

    #[test]
    fn sizes_and_lists_are_read() {
        let args = RawArgs::try_parse_from([
            "doppler-node",
            "join",
            "--swarm",
            "s",
            "--vram-budget",
            "3MiB",
            "--bootstrap",
            "/ip4/127.0.0.1/tcp/1",
            "--bootstrap",
            "/ip4/127.0.0.1/tcp/2",
        ])
        .unwrap();
        let Command::Join(join) = args.command else { panic!("not join") };
        assert_eq!(join.budget.vram_budget, ByteSize(3 << 20));
        assert_eq!(join.network.bootstrap.len(), 2);
        assert!(RawArgs::try_parse_from(["doppler-node", "join"]).is_err());
    }
}
