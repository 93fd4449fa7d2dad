//! Compiles the protobuf schemas in `proto/` with protox: no protoc is needed.

use std::path::Path;

/// All schemas. A new one must be listed here and included in `wire.rs`.
const SCHEMAS: [&str; 2] = ["gossip.proto", "shard.proto"];

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
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
