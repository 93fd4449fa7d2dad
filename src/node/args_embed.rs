//! Arguments of `embed`.

use clap::Args;

use super::args::ModelArgs;

#[derive(Debug, Args)]
pub struct EmbedArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A text to embed (repeatable)
    #[arg(long, value_name = "TEXT", required = true, allow_hyphen_values = true)]
    pub text: Vec<String>,
    /// Put the model's prompt of this name before each text, for example query or document
    #[arg(long, value_name = "NAME")]
    pub prompt_name: Option<String>,
    /// Print JSON: the vectors, and how many tokens each text has
    #[arg(long)]
    pub json: bool,
}
