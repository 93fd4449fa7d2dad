//! Compiles the protobuf schemas in `proto/` with protox: no protoc is needed.

use std::env;
use std::path::PathBuf;

/// All schemas. A new one must be listed here and included in `wire.rs`.
const SCHEMAS: [&str; 2] = ["gossip.proto", "shard.proto"];

fn main() {
    // When it runs: a build folder may serve several checkouts.
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../proto");
    for schema in SCHEMAS {
        println!("cargo::rerun-if-changed={}", root.join(schema).display());
    }
    let descriptors = match protox::compile(SCHEMAS, [&root]) {
        Ok(descriptors) => descriptors,
        Err(error) => panic!("cannot compile proto/: {error}"),
    };
    if let Err(error) = prost_build::Config::new().compile_fds(descriptors) {
        panic!("cannot generate Rust from proto/: {error}");
    }
}
