//! The engine: graphs of ops, model families, backends, the expert pager and
//! the session that drives one token after another.
//!
//! Knows `store`. Never the mesh: bytes come through `store::RangeReader`.

pub mod backend;
pub mod cpu;
pub mod families;
pub mod gpu;
pub mod graph;
pub mod load;
pub mod quant;
pub mod tokenizer;
