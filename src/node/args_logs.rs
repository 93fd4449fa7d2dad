//! Arguments of `logs`.

use clap::Args;

use super::args::DataArgs;
use super::journal::Level;

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// How many of the last entries to show
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 200)]
    pub lines: usize,
    /// Go on with what the node logs from now on, also after it is started again; Ctrl-C stops
    #[arg(short, long)]
    pub follow: bool,
    /// Leave out what is less serious
    #[arg(long, value_enum, default_value_t = Level::Trace)]
    pub level: Level,
    #[command(flatten)]
    pub data: DataArgs,
    /// Print each entry as a line of JSON
    #[arg(long)]
    pub json: bool,
}
