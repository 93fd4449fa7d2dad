//! Arguments of the commands that generate text: `run` and `chat`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::adapters::weighed;
use super::args::{ModelArgs, NetworkArgs};
use doppler_store::signature::PublicKey;

/// How the next token is chosen.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Choosing tokens")]
pub struct SamplingArgs {
    /// Randomness of the choice; 0 always takes the likeliest token
    #[arg(long, visible_alias = "temp", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Choose among this many of the likeliest tokens; 0 keeps all
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have this probability; 1 keeps all
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    pub top_p: f32,
    /// Choose among tokens at least this share as likely as the likeliest; 0 keeps all
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub min_p: f32,
    /// Makes tokens that have appeared less likely if above 1; 1 changes nothing
    #[arg(long, visible_alias = "repeat-penalty", value_name = "FACTOR", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that have appeared
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens for each time that they have appeared
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// How many recent tokens these penalties look at, prompt included
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub repeat_last_n: usize,
    /// Add to a token's logit, for example 42+1.5 or 42-100 (repeatable); -100 all but bans it
    #[arg(long, value_name = "ID(+|-)NUMBER", value_parser = logit_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random choice; the same seed gives the same text
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub seed: u64,
    /// End the answer before this text (repeatable, at most 16)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
}

/// Reads `42+1.5` and `42-100`.
fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let at = text.find(['+', '-']).unwrap_or(text.len());
    let (token, bias) = text.split_at(at);
    let parsed = token.trim().parse().ok().zip(bias.trim().parse().ok());
    parsed.ok_or_else(|| "write a token's id, a sign and a number, as in 42+1.5".to_owned())
}

/// Whether a model that can think before it answers does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Thinking {
    On,
    Off,
}

/// An adapter and its weight.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterArg {
    /// A name, an id or a path.
    pub adapter: String,
    pub weight: f32,
}

/// Reads `ADAPTER[:WEIGHT]`.
fn adapter(text: &str) -> Result<AdapterArg, String> {
    let (adapter, weight) = weighed(text);
    if adapter.is_empty() {
        return Err("expected NAME, a path, or either with :WEIGHT".into());
    }
    Ok(AdapterArg { adapter: adapter.to_owned(), weight })
}

#[derive(Debug, Args)]
pub struct AdapterArgs {
    /// A LoRA adapter to attach, with its weight [default: 1] (repeatable): a PEFT directory, a
    /// manifest of Doppler's (*.json), a GGUF file, or the name of a published one
    #[arg(long = "adapter", value_name = "NAME|PATH[:WEIGHT]", value_parser = adapter)]
    pub adapters: Vec<AdapterArg>,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// The text to continue; with --chat, what is said to the model
    #[arg(
        short,
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        required_unless_present = "prompt_file",
        conflicts_with = "prompt_file"
    )]
    pub prompt: Option<String>,
    /// File with that text, taken as it is; - is standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// How many tokens to generate at most
    #[arg(short = 'n', long, default_value_t = 128)]
    pub tokens: usize,
    /// Join this swarm for the run instead of asking the node that runs on --data
    #[arg(long, value_name = "NAME")]
    pub swarm: Option<String>,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Report the probability of each token and of this many of the likeliest (up to 20), in the
    /// JSON object
    #[arg(long, value_name = "TOKENS", requires = "json")]
    pub logprobs: Option<usize>,
    #[command(flatten)]
    pub form: FormArgs,
    #[command(flatten)]
    pub turn: TurnArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub network: RunNetworkArgs,
}

/// What the text must look like.
#[derive(Debug, Args)]
#[command(next_help_heading = "Form of the text")]
pub struct FormArgs {
    /// File with a JSON schema that the text must fit; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["grammar", "regex"])]
    pub json_schema: Option<PathBuf>,
    /// File with a grammar that the text must fit, in llguidance's form of Lark; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "regex")]
    pub grammar: Option<PathBuf>,
    /// Regular expression that the whole text must match
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    pub regex: Option<String>,
}

/// One turn of a conversation.
#[derive(Debug, Args)]
#[command(next_help_heading = "Chat")]
pub struct TurnArgs {
    /// Say the prompt to the model as one message, through the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// What the model is told first: who it is, how to answer
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, requires = "chat")]
    pub system: Option<String>,
    /// File with a JSON list of functions that the model may call
    #[arg(long, value_name = "FILE", requires = "chat")]
    pub tools: Option<PathBuf>,
    /// Whether the model thinks before it answers [default: as its template has it]
    #[arg(long, value_enum, requires = "chat")]
    pub thinking: Option<Thinking>,
}

/// How a run with --swarm meets others.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network, with --swarm")]
pub struct RunNetworkArgs {
    #[command(flatten)]
    pub network: NetworkArgs,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// What the model is told first: who it is, how to answer
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Whether the model thinks before it answers [default: as its template has it]
    #[arg(long, value_enum)]
    pub thinking: Option<Thinking>,
    /// How many tokens an answer has at most [default: until the context is full]
    #[arg(short = 'n', long)]
    pub tokens: Option<usize>,
    /// Public key of a publisher to trust from now on, as `ls` shows it (repeatable)
    #[arg(long, value_name = "PUBLISHER")]
    pub trust: Vec<PublicKey>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_are_read_with_their_signs() {
        assert_eq!(logit_bias("42+1.5"), Ok((42, 1.5)));
        assert_eq!(logit_bias("7-100"), Ok((7, -100.0)));
        for bad in ["", "42", "+1", "x-1", "42=1", "42+", "-1-1"] {
            assert!(logit_bias(bad).is_err(), "{bad}");
        }
    }
}
