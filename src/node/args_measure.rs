//! What the user typed for measurements: `synth`, `bench`, `trace`.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};

use super::args::{BackendChoice, BenchStoreArgs, ModelArgs};
use super::size::ByteSize;
use doppler_infer::load::Arch;
use doppler_infer::trace::ReplayPolicy;
use doppler_store::PolicyKind;

#[derive(Debug, Args)]
pub struct SynthArgs {
    /// The shape of the model
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Arch::ALL.map(Arch::name)))]
    pub arch: String,
    /// How many layers to write [default: all]
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Seed of the random weights; the same seed gives the same weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Make some experts more popular than others: `zipf:S` with S from 0 to 4, or
    /// `zipf:S,stick:P`, where the next token keeps a share P (0 to 0.95) of a token's experts
    /// [default: all alike]
    #[arg(long, value_name = "zipf:S[,stick:P]")]
    pub routing: Option<String>,
    /// Directory to write the model to: a new or an empty one
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Decoding: one token after another
    Decode {
        #[command(flatten)]
        args: BenchArgs,
        /// How many tokens to decode in a run
        #[arg(short = 'n', long, default_value_t = 64)]
        tokens: usize,
    },
    /// Reading a prompt, in batches
    Prefill {
        #[command(flatten)]
        args: BenchArgs,
    },
    /// Decoding several sequences side by side: all their tokens a second, for each number of them
    Streams {
        #[command(flatten)]
        args: BenchArgs,
        /// How many tokens of each sequence to decode in a run
        #[arg(short = 'n', long, default_value_t = 64)]
        tokens: usize,
        /// Numbers of sequences
        #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,4,8,16")]
        streams: Vec<usize>,
    },
    /// Decoding with fewer slots than experts, against all of them resident
    Paging {
        #[command(flatten)]
        args: BenchArgs,
        /// How many tokens to decode in a run
        #[arg(short = 'n', long, default_value_t = 64)]
        tokens: usize,
        /// Slots for experts: a number, or a percentage of all experts
        #[arg(long, value_name = "N|P%", default_value = "50%")]
        slots: SlotCount,
        /// Eviction policies to compare, in a session each: lru, lfu, slru [default: that of --policy]
        #[arg(long, value_name = "NAME,...", value_delimiter = ',', conflicts_with = "policy")]
        policies: Vec<PolicyKind>,
    },
    /// Each kernel that reads weights, at the model's shapes
    Kernels(KernelArgs),
    /// The store: verifying, importing, reading, checking and reopening
    Store(BenchStoreArgs),
    /// Verified transfers between nodes of this process, compared with a raw stream
    Mesh(BenchMeshArgs),
}

#[derive(Debug, Args)]
pub struct BenchMeshArgs {
    /// How much to move in each measurement, 1MiB to 4GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub size: ByteSize,
    /// How many times to measure each thing
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// How many peers connect and leave while memory is watched; 0 leaves this out
    #[arg(long, default_value_t = 2000)]
    pub connects: usize,
    /// Address that the nodes listen on; it decides the transport
    #[arg(long, value_name = "MULTIADDR", default_value = "/ip4/127.0.0.1/tcp/0")]
    pub listen: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct KernelArgs {
    /// Directory of the model whose shapes to take; its weights are not read
    #[arg(required_unless_present = "arch", conflicts_with = "arch")]
    pub model: Option<PathBuf>,
    /// Take the shapes of a well-known model instead: one that `synth` knows
    #[arg(long, value_name = "NAME")]
    pub arch: Option<String>,
    /// What to compute on
    #[arg(long, value_enum, default_value_t)]
    pub backend: BackendChoice,
    /// Measure only kernels whose name contains this [default: all]
    #[arg(long, value_name = "NAME")]
    pub kernel: Option<String>,
    /// How many runs to measure, 1 to 1000; their median is the result
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
    /// Also write a record in Markdown; the file must not exist yet
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// How many runs to measure, 1 to 1000; their median is the result
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
    /// Also write a record in Markdown; the file must not exist yet
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Tokens to measure with.
#[derive(Debug, Clone, Args)]
pub struct PromptArgs {
    /// Take prompts and what follows them from this UTF-8 file [default: fixed token ids]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// How many tokens a prompt has
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub prompt_tokens: usize,
    /// How many different prompts to use in turn, 1 to 1000
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub prompts: usize,
}

#[derive(Debug, Subcommand)]
pub enum TraceCommand {
    /// Run a model and record which experts each step asks for
    Record(RecordArgs),
    /// Show how eviction policies would have done on a recorded run
    Replay(ReplayArgs),
}

#[derive(Debug, Args)]
pub struct RecordArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A text to continue (repeatable) [default: passages of --text, or fixed token ids]
    #[arg(short, long, value_name = "TEXT", conflicts_with = "text", allow_hyphen_values = true)]
    pub prompt: Vec<String>,
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// How many tokens to generate after each prompt
    #[arg(short = 'n', long, default_value_t = 64)]
    pub tokens: usize,
    /// Slots for experts: a number, or a percentage of all experts [default: all]
    #[arg(long, value_name = "N|P%", conflicts_with = "vram_budget")]
    pub slots: Option<SlotCount>,
    /// File to write the trace to
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Print the engine's own counters as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// A trace that `trace record` wrote
    pub file: PathBuf,
    /// Slots to replay with: numbers, or percentages of all experts
    #[arg(long, value_name = "N|P%,...", value_delimiter = ',', default_value = "25%,50%,75%")]
    pub slots: Vec<SlotCount>,
    /// Policies to try: lru, lfu, slru, optimal (Belady's, which knows the future) or all
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = "all")]
    pub policy: Vec<PolicyChoice>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Policies to replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyChoice {
    All,
    One(ReplayPolicy),
}

impl std::str::FromStr for PolicyChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let unknown = |_| format!("unknown policy {text:?} (known: lru, lfu, slru, optimal, all)");
        text.parse().map(Self::One).map_err(unknown)
    }
}

/// A number of slots: `40`, or `50%` of all experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SlotCount {
    Slots(usize),
    Percent(f64),
}

impl std::str::FromStr for SlotCount {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!("{text:?} is neither a number of slots nor a percentage above 0 and up to 100")
        };
        match text.strip_suffix('%') {
            Some(percent) => match percent.parse() {
                Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(Self::Percent(percent)),
                _ => Err(bad()),
            },
            None => text.parse().ok().filter(|n| *n > 0).map(Self::Slots).ok_or_else(bad),
        }
    }
}

impl SlotCount {
    /// The number of slots for this many experts, rounded down but at least 1.
    pub fn of(self, experts: usize) -> usize {
        match self {
            Self::Slots(slots) => slots,
            Self::Percent(percent) => ((experts as f64 * percent / 100.0) as usize).max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_numbers_or_percentages() {
        assert_eq!("40".parse::<SlotCount>().unwrap().of(64), 40);
        assert_eq!("50%".parse::<SlotCount>().unwrap().of(65), 32);
        assert_eq!("0.1%".parse::<SlotCount>().unwrap().of(64), 1);
        for text in ["", "0", "-1", "%", "0%", "101%", "NaN%", "half"] {
            assert!(text.parse::<SlotCount>().is_err(), "{text}");
        }
    }
}
