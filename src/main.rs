//! Arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    doppler_node_lib::main()
}
