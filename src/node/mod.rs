//! The node: command line, configuration, wiring, control API, shutdown order.

use std::process::ExitCode;

/// The binary's entry point.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
