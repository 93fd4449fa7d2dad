//! Compiles the protobuf schemas in `proto/` with protox: no protoc is needed.

use std::path::Path;

/// Every schema; a new one is listed here and included in `src/wire.rs`.
const SCHEMAS: [&str; 2] = ["proto/gossip.proto", "proto/shard.proto"];

pub fn compile() {
    for schema in SCHEMAS {
        println!("cargo::rerun-if-changed={schema}");
    }
    let descriptors = match protox::compile(SCHEMAS, [Path::new("proto")]) {
        Ok(descriptors) => descriptors,
        Err(error) => panic!("cannot compile proto/: {error}"),
    };
    if let Err(error) = prost_build::Config::new().compile_fds(descriptors) {
        panic!("cannot generate Rust from proto/: {error}");
    }
}
