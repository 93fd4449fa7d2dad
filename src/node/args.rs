//! What the user typed: clap's view of the command line, nothing resolved yet.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

pub use super::args_embed::*;
pub use super::args_logs::LogsArgs;
pub use super::args_measure::*;
pub use super::args_text::*;
use super::memory;
use super::size::{ByteRate, ByteSize, KeepAlive, SizeOrOff};
use super::trust::TrustPolicy;
use doppler_infer::load::Quantization;
use doppler_infer::slots::SlotBudget;
use doppler_mesh::RelayMode;
use doppler_store::signature::PublicKey;
use doppler_store::{PolicyKind, Replicas};

/// Runs models that do not fit this machine: weights are fetched from a swarm, proved and paged.
#[derive(Debug, Parser)]
#[command(name = "doppler-node", version, propagate_version = true)]
pub struct RawArgs {
    #[command(subcommand)]
    pub command: Command,

    /// What to log on standard error, in the syntax of RUST_LOG: `info`, or `doppler_mesh=debug`
    #[arg(long, global = true, env = "DOPPLER_LOG", default_value = "warn", value_name = "FILTER")]
    pub log: String,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start four nodes on this machine: three hold a model, the fourth runs it without having it
    Demo(DemoArgs),
    /// Join a swarm and stay: keep, fetch and serve shards, and answer the commands below
    Join(JoinArgs),
    /// Serve models to programs over the OpenAI and Anthropic APIs, without a swarm
    Serve(ServeArgs),
    /// Leave the swarm: the running node ends, with --drain once others hold what it holds
    Leave(LeaveArgs),
    /// Print a string by which others `join` the running node's swarm. A private swarm's is a secret
    Invite(ControlArgs),
    /// Print the address of the running node's page, with the key that lets it change the node. A secret
    Page(ControlArgs),
    /// Make the key of a private swarm
    SwarmKey(SwarmKeyArgs),
    /// Sign an RDRR model, store its shards in the running node, and announce it
    Publish(PublishArgs),
    /// List the models that the running node knows, or the copies of one model's objects
    Ls(LsArgs),
    /// Show the running node's page, addresses, tiers and traffic
    Status(ControlArgs),
    /// Show the model that the running node has loaded, and how many requests wait
    Ps(ControlArgs),
    /// Show the peers that the running node is connected to
    Peers(ControlArgs),
    /// Show what the node has logged, also after it has ended or crashed
    Logs(LogsArgs),
    /// Keep a model or an object from being evicted
    Pin(PinArgs),
    /// Allow a model or an object to be evicted again, but for what another pinned model has
    Unpin(UnpinArgs),
    /// Manage the publishers whose models may be used
    #[command(subcommand)]
    Trust(TrustCommand),
    /// Remove a model or an object from the store
    Rm(RmArgs),
    /// Evict unpinned objects, coldest first, until the rest fits the disk budget
    Gc(GcArgs),
    /// Check every stored byte against its hash
    Fsck(FsckArgs),
    /// Fetch a model from the Hugging Face Hub, convert it while it arrives, and keep it
    Pull(PullArgs),
    /// Convert a checkpoint (safetensors, GGUF) to RDRR or GGUF
    Convert(ConvertArgs),
    /// Show what an RDRR model, a manifest or a GGUF file contains
    Inspect(InspectArgs),
    /// Generate text with a model: a directory, or a model of the swarm
    Run(Box<RunArgs>),
    /// Talk with a model, turn by turn; see /help there
    Chat(ChatArgs),
    /// Turn texts into vectors with an embedding model
    Embed(EmbedArgs),
    /// Compare a model's logits and greedy text, or its states and embeddings, with a reference
    Check(CheckArgs),
    /// Measure a model's perplexity on a text
    Perplexity(PerplexityArgs),
    /// Write a model of a well-known shape with random weights, for measuring speed
    Synth(SynthArgs),
    /// Measure the speed of a model, of the store or of transfers
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Show what holds for a command's options, and whether it comes from config.toml, the environment
    /// or nowhere
    Config(ConfigArgs),
    /// Print the script by which a shell completes this program's words
    Completions(CompletionsArgs),
    /// Write a manual page for each command to a directory
    Man(ManArgs),
    /// Record which experts a run asks for, and try eviction policies on the record
    #[command(subcommand)]
    Trace(TraceCommand),
    /// Import, fetch and collect without end, and print what is durable (for crash tests)
    #[command(hide = true)]
    StoreExercise(ExerciseArgs),
}

/// Where a node keeps its data.
#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// The node's data directory [default: doppler-node in the user's data directory]
    #[arg(long, env = "DOPPLER_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,
}

/// What a node may use of the machine.
#[derive(Debug, Clone, Args)]
pub struct BudgetArgs {
    /// Device memory that a running model may take: resident weights, KV cache and expert slots
    /// (main memory with the CPU backend). A size needs a unit: 800MiB, 2GiB
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    pub vram_budget: ByteSize,

    /// Main memory that cached weights may take
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    pub ram_budget: ByteSize,

    /// Disk space that stored shards may take
    #[arg(long, value_name = "SIZE", default_value = "50GiB")]
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
    /// Address of a peer to start from, with its /p2p/ id (repeatable)
    #[arg(long, value_name = "MULTIADDR")]
    pub bootstrap: Vec<String>,

    /// Address to listen on (repeatable) [default: QUIC, TCP, WebSocket and WebRTC-direct on
    /// every interface, over IPv4 and IPv6, at the ports of the last run where they are free]
    #[arg(long, value_name = "MULTIADDR")]
    pub listen: Vec<String>,

    /// Address to announce that this node cannot see itself (repeatable), for example
    /// /dns4/HOST/tcp/443/wss of a proxy that ends TLS and forwards to the WebSocket port
    #[arg(long, value_name = "MULTIADDR")]
    pub external_address: Vec<String>,

    /// File with a private swarm's key (see `swarm-key`); peers without the key are refused
    #[arg(long, value_name = "FILE", env = "DOPPLER_SWARM_KEY")]
    pub swarm_key: Option<PathBuf>,

    /// PEM file of certificate authorities to accept for /wss addresses, besides the web's own
    #[arg(long, value_name = "FILE", env = "SSL_CERT_FILE")]
    pub tls_ca: Option<PathBuf>,

    /// Whether to be a relay and to use relays
    #[arg(long, value_enum, default_value_t)]
    pub relay: RelayChoice,

    /// Do not ask the router to forward the listening ports (UPnP)
    #[arg(long)]
    pub no_upnp: bool,

    /// Do not look for peers on the local network by mDNS
    #[arg(long)]
    pub no_mdns: bool,

    /// The most that may be sent to peers, for example 10MB/s; at least 64KiB/s [default: no limit]
    #[arg(long, value_name = "RATE")]
    pub upload_limit: Option<ByteRate>,

    /// The most that may be fetched from peers, for example 10MB/s; at least 64KiB/s
    /// [default: no limit]
    #[arg(long, value_name = "RATE")]
    pub download_limit: Option<ByteRate>,

    /// Public key of a publisher to trust from now on, as `ls` shows it (repeatable)
    #[arg(long, value_name = "PUBLISHER")]
    pub trust: Vec<PublicKey>,

    /// What to do with a model whose publisher is not trusted
    #[arg(long, value_enum, default_value_t)]
    pub trust_policy: TrustPolicy,

    /// How many seconds to look for a peer that holds a missing shard
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    pub find_timeout: f64,
}

impl NetworkArgs {
    /// Of a node that meets nobody.
    pub fn for_nobody() -> Self {
        Self {
            bootstrap: Vec::new(),
            listen: Vec::new(),
            external_address: Vec::new(),
            swarm_key: None,
            tls_ca: None,
            relay: RelayChoice::Off,
            no_upnp: true,
            no_mdns: true,
            upload_limit: None,
            download_limit: None,
            trust: Vec::new(),
            trust_policy: TrustPolicy::default(),
            find_timeout: 20.0,
        }
    }
}

/// What a node does with relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum RelayChoice {
    /// Be a relay while peers can dial this node; use peers' relays while they cannot
    #[default]
    Auto,
    /// Use relays, never be one
    Client,
    /// Be a relay in any case
    Server,
    /// Neither be one nor use any
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
    /// An invitation, which `invite` prints on a node of the swarm; - reads it from standard input
    #[arg(value_name = "INVITE", conflicts_with_all = ["swarm", "swarm_key"])]
    pub invite: Option<String>,
    /// The swarm's name; nodes that use the same name share models
    #[arg(long, value_name = "NAME", required_unless_present = "invite")]
    pub swarm: Option<String>,
    #[command(flatten)]
    pub network: NetworkArgs,
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// Disk space, of the disk budget, for copies of what too few nodes of the swarm hold; `off` for
    /// none [default: a quarter of the disk budget]
    #[arg(long, value_name = "SIZE|off")]
    pub replica_budget: Option<SizeOrOff>,
    /// The most that is fetched for such copies, for example 10MB/s; at least 64KiB/s
    /// [default: no limit, but what a token waits for comes first]
    #[arg(long, value_name = "RATE")]
    pub replica_rate: Option<ByteRate>,
    /// What to compute on
    #[arg(long, value_enum, default_value_t)]
    pub backend: BackendChoice,
    /// Address and port of the APIs, the page, the gateway and the control API; with port 0 the
    /// port of the last run, if it is free. An address that is not loopback needs --api-key, and
    /// only the APIs answer other machines [default: 127.0.0.1 and the port of the last run, else
    /// 3677, else any that is free]
    #[arg(long = "http", visible_alias = "control", value_name = "ADDRESS")]
    pub control: Option<SocketAddr>,
    #[command(flatten)]
    pub api: ApiArgs,
    /// How long a model stays loaded after its last request: 30s, 5m, 2h or forever
    #[arg(long, value_name = "DURATION", default_value = "forever")]
    pub keep_alive: KeepAlive,
    /// Disk space that keys and values of earlier prompts may take, so that a prompt which begins as
    /// one of them goes on from there, also after a restart; or off
    #[arg(long, value_name = "SIZE|off", default_value = "1GiB")]
    pub prefix_budget: SizeOrOff,
    /// Print events as JSON, one per line
    #[arg(long)]
    pub json: bool,
}

/// Who may use the APIs under /v1.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "API")]
pub struct ApiArgs {
    /// Key that each request to the APIs must show, as a bearer token or as x-api-key
    #[arg(long, value_name = "KEY", env = "DOPPLER_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Origin whose pages may use the APIs from a browser, like https://app.example (repeatable);
    /// pages of this machine always may
    #[arg(long, value_name = "ORIGIN")]
    pub cors: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A GGUF file, an RDRR or Hugging Face directory, the name of a model in the store at --data, or
    /// hf:ORG/MODEL as `pull` takes it; without it every model of the store is served
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// A LoRA adapter of this disk, which requests name with the model, as BASE+ADAPTER (repeatable)
    #[arg(long = "adapter", value_name = "PATH")]
    pub adapters: Vec<PathBuf>,
    /// What to compute on
    #[arg(long, value_enum, default_value_t)]
    pub backend: BackendChoice,
    /// Address and port to serve at; one that is not loopback needs --api-key
    #[arg(
        long,
        visible_alias = "control",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:3677"
    )]
    pub http: SocketAddr,
    #[command(flatten)]
    pub api: ApiArgs,
    /// How long a model stays loaded after its last request: 30s, 5m, 2h or forever
    #[arg(long, value_name = "DURATION", default_value = "forever")]
    pub keep_alive: KeepAlive,
    /// Disk space that keys and values of earlier prompts may take, so that a prompt which begins as
    /// one of them goes on from there, also after a restart; or off
    #[arg(long, value_name = "SIZE|off", default_value = "1GiB")]
    pub prefix_budget: SizeOrOff,
    /// Print events as JSON, one per line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// The command, for example join or serve
    #[arg(default_value = "join")]
    pub command: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// The directory, which must exist
    pub dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct SwarmKeyArgs {
    /// File to write the key to; it must not exist yet
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
pub struct LsArgs {
    /// A model's name or id: show each of its objects, how many nodes hold it, and which
    pub model: Option<String>,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct LeaveArgs {
    /// Go only when others hold copies of everything that is here; Ctrl-C calls it off
    #[arg(long)]
    pub drain: bool,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct PublishArgs {
    /// The RDRR model's directory (manifest.json and its shards), or a GGUF file or a LoRA adapter,
    /// which are converted first
    #[arg(value_name = "MODEL")]
    pub dir: PathBuf,
    /// Numbers of the shards to store, for example `0,2-5` [default: all]
    #[arg(long, value_name = "LIST")]
    pub shards: Option<String>,
    /// Of an adapter: the model that it is for, by its name or id [default: the known model with the
    /// name that the adapter states]
    #[arg(long, value_name = "MODEL")]
    pub base: Option<String>,
    /// How many nodes should hold each of its objects: at least MIN (1 or more), at most MAX (up to
    /// 64). If fewer do, others copy it
    #[arg(long, value_name = "MIN:MAX", default_value_t)]
    pub replicas: Replicas,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct PullArgs {
    /// Its safetensors, or the only GGUF model of the repository; :FILE.gguf or :QUANT, like
    /// :Q4_K_M, chooses one of several; @REVISION takes a branch, tag or commit instead of main
    #[arg(value_name = "hf:ORG/MODEL")]
    pub model: String,
    /// How to store the weights [default: q4_k_m, or as they are if they are quantised already]
    #[arg(long, value_name = "FORMAT", value_parser = quantizations())]
    pub quantize: Option<Quantization>,
    /// How many nodes should hold each of its objects: at least MIN (1 or more), at most MAX (up to
    /// 64). If fewer do, others copy it
    #[arg(long, value_name = "MIN:MAX", default_value_t)]
    pub replicas: Replicas,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct PinArgs {
    /// A model's name or id, or an object's id; the first 4 characters are enough where they are
    /// unambiguous
    pub target: String,
    /// Fetch what is missing first
    #[arg(long)]
    pub fetch: bool,
    /// With --fetch: public key of a publisher to trust from now on (repeatable)
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
        /// The publisher's public key, as `ls` shows it
        publisher: PublicKey,
        /// A note to yourself, at most 128 bytes
        #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
        note: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Stop trusting a publisher, and refuse it until it is added again
    Remove {
        /// The publisher's public key, as `trust list` shows it
        publisher: PublicKey,
        #[command(flatten)]
        control: ControlArgs,
    },
}

#[derive(Debug, Args)]
pub struct UnpinArgs {
    /// A model's name or id, or an object's id; the first 4 characters are enough where they are
    /// unambiguous
    pub target: String,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct RmArgs {
    /// A model's name or id, or an object's id; the first 4 characters are enough where they are
    /// unambiguous
    pub target: String,
    /// Remove pinned objects, too
    #[arg(long)]
    pub force: bool,
    /// Remove objects that no other peer is known to hold, too
    #[arg(long)]
    pub last_copy: bool,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct GcArgs {
    /// How much may stay stored, for example 20GiB [default: the running node's disk budget]
    #[arg(long, value_name = "SIZE")]
    pub disk_budget: Option<ByteSize>,
    /// Only say what would be evicted
    #[arg(long)]
    pub dry_run: bool,
    /// Evict objects that no other peer is known to hold, or too few, too
    #[arg(long)]
    pub last_copy: bool,
    #[command(flatten)]
    pub control: ControlArgs,
}

#[derive(Debug, Args)]
pub struct FsckArgs {
    /// Fetch damaged and missing ranges from peers (needs a running node)
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

/// Parses the ways to store matrices: all that the engine knows, except `keep`.
fn quantizations() -> impl TypedValueParser<Value = Quantization> {
    let known = Quantization::all().filter(|of| *of != Quantization::Keep);
    let value = |of: Quantization| {
        let bits = match of {
            Quantization::Q4KM => "mostly 4 bits: about 4.9 bits per weight".to_owned(),
            Quantization::Mxfp4Moe => "experts 4.25 bits per weight, other matrices 8.5".to_owned(),
            Quantization::Blocks(dtype) => {
                let bits = 8.0 * dtype.block_bytes() as f64 / dtype.block_len() as f64;
                format!("{bits} bits per weight")
            }
            Quantization::Bf16 | Quantization::Keep => {
                "not quantised: 16 bits per weight".to_owned()
            }
        };
        PossibleValue::new(of.name()).help(bits)
    };
    PossibleValuesParser::new(known.map(value)).try_map(|name| name.parse())
}

#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A GGUF file (of several parts the first), or a checkpoint's directory: config.json,
    /// *.safetensors, tokenizer.json
    #[arg(value_name = "CHECKPOINT")]
    pub source: PathBuf,
    /// Directory to write the model to: a new or an empty one; with `--to gguf`, a new file
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value_t)]
    pub to: Container,
    /// How to store the weights [default: q4_k_m, or as they are if they are quantised already]
    #[arg(long, value_name = "FORMAT", value_parser = quantizations())]
    pub quantize: Option<Quantization>,
    /// The largest shard to write: 4KiB to 64MiB, a multiple of 4KiB
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    pub shard_size: ByteSize,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// What `convert` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Container {
    /// A directory of shards, as this program runs and publishes it
    #[default]
    Rdrr,
    /// A file for llama.cpp: of Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma 2 and 3
    Gguf,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// An RDRR directory, a manifest file or a GGUF file
    pub path: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum BackendChoice {
    /// A hardware GPU if there is one, otherwise the CPU
    #[default]
    Auto,
    /// A GPU, or a software one if there is none (slow, for tests)
    Gpu,
    /// The CPU
    Cpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum KvChoice {
    /// Half precision, half the memory
    #[default]
    F16,
    /// Single precision
    F32,
}

/// Which model, and what to run it on.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// An RDRR directory, a Hugging Face directory or a GGUF file (converted in memory), the name or id
    /// of a model that the node at --data knows, or hf:ORG/MODEL as `pull` takes it. Write ./NAME for
    /// what is here if both exist
    pub model: PathBuf,
    #[command(flatten)]
    pub data: DataArgs,
    /// What to compute on
    #[arg(long, value_enum, default_value_t)]
    pub backend: BackendChoice,
    /// How to convert a directory or a file in memory [default: weights as they are]
    #[arg(long, value_name = "FORMAT", value_parser = quantizations())]
    pub quantize: Option<Quantization>,
    /// Device memory that the model may take, for example 8GiB [default: what it needs]
    #[arg(long, value_name = "SIZE")]
    pub vram_budget: Option<ByteSize>,
    /// Main memory for experts evicted from a GPU with memory of its own, for example 16GiB
    /// [default: half of the free memory]
    #[arg(long, value_name = "SIZE")]
    pub host_budget: Option<ByteSize>,
    /// Tokens of context to make room for [default: what the task needs]
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// Element type of the attention cache; a running node uses f16 [default: f16, but f32 for
    /// `check`]
    #[arg(long, value_enum)]
    pub kv: Option<KvChoice>,
    /// Which expert gives up its slot for another: lru, lfu or slru; a running node uses lfu
    /// [default: lfu]
    #[arg(long, value_name = "NAME")]
    pub policy: Option<PolicyKind>,
}

impl ModelArgs {
    /// The model as a name. No name contains bytes that are not UTF-8.
    pub fn name(&self) -> Cow<'_, str> {
        self.model.to_string_lossy()
    }

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

#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The reference, a safetensors file with `input_ids`, `logits` and `greedy`; of an embedding model
    /// with `input_ids`, `last_hidden_state` and `embedding`
    #[arg(long, value_name = "FILE")]
    pub expected: PathBuf,
    /// The largest difference allowed, as a fraction of the reference logits' standard deviation
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
    /// The text to measure on, a UTF-8 file
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchStoreArgs {
    /// Directory to make the measured store in [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// How much to move in each measurement, at least 4MiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub size: ByteSize,
    /// How many objects are in the store that is reopened
    #[arg(long, default_value_t = 10_000)]
    pub objects: usize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The text to continue
    #[arg(short, long, allow_hyphen_values = true, default_value = "ROMEO:\n")]
    pub prompt: String,
    /// How many tokens to generate, at least 3
    #[arg(short = 'n', long, default_value_t = 96)]
    pub tokens: usize,
    /// Start ten nodes instead, kill three of them at once, and show how the others copy what has
    /// become rare
    #[arg(long)]
    pub heal: bool,
    /// Show no live view, and print one JSON object as the last line
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

    /// Every option has a help text, and every text may begin with a hyphen.
    #[test]
    fn each_option_has_its_help_and_takes_any_text() {
        fn walk(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let name = arg.get_id();
                let hidden = command.is_hide_set() || ["help", "version"].contains(&name.as_str());
                assert!(hidden || arg.get_help().is_some(), "{path}: {name} has no help");
                if ["prompt", "note", "system", "stop"].contains(&name.as_str()) {
                    assert!(arg.is_allow_hyphen_values_set(), "{path}: {name} refuses \"- x\"");
                }
            }
            command.get_subcommands().for_each(|command| walk(command, &path));
        }
        walk(&RawArgs::command(), "");
        for words in [
            ["run", "m", "-p", "- milk"],
            ["trace", "record", "m", "--out=t"],
            ["demo", "-p", "-x", "--json"],
        ] {
            let args = ["doppler-node"].iter().chain(&words);
            RawArgs::try_parse_from(args).unwrap();
        }
        let args = ["doppler-node", "run", "m", "-p", "- milk", "-n", "3"];
        let Command::Run(run) = RawArgs::try_parse_from(args).unwrap().command else {
            panic!("not run")
        };
        assert_eq!((run.prompt.as_deref(), run.tokens), (Some("- milk"), 3));
        let refused = |words: &[&str]| {
            let args = ["doppler-node", "run", "m"].iter().chain(words);
            RawArgs::try_parse_from(args).is_err()
        };
        assert!(refused(&[]), "no prompt");
        assert!(refused(&["-p", "x", "--prompt-file", "f"]), "two prompts");
        assert!(refused(&["-p", "x", "--system", "s"]), "--system without --chat");
        assert!(refused(&["-p", "x", "--logit-bias", "7"]), "no bias");
        assert!(!refused(&["--prompt-file", "-", "--chat", "--system", "- s"]));
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
        let defaults = BudgetArgs::default();
        assert_eq!(join.budget.ram_budget, defaults.ram_budget);
        assert_eq!(join.budget.disk_budget, defaults.disk_budget);
        assert_eq!(join.network.bootstrap.len(), 2);
        assert!(RawArgs::try_parse_from(["doppler-node", "join"]).is_err());
    }
}
