//! Compiles the protobuf schemas without a protoc.

pub fn compile() {}
