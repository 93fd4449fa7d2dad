//! The engine: graphs of ops, model families, backends, the expert pager and the session that runs
//! one token after another.
//!
//! Knows `store`. Never the mesh: bytes come through `store::RangeReader`.

pub mod adapter;
mod ahead;
pub mod backend;
pub mod check;
pub mod check_states;
pub mod cpu;
pub mod embedding;
pub mod engine;
pub mod error;
pub mod extras;
pub mod families;
pub mod generate;
pub mod gpu;
pub mod grammar;
pub mod graph;
pub mod kernel_bench;
pub mod kv;
pub mod load;
pub mod model;
pub mod odds;
pub mod pager;
pub mod perplexity;
pub mod quant;
pub mod reader;
pub mod recurrent;
pub mod request;
pub mod residency;
pub mod sampler;
pub mod sequence;
pub mod session;
pub mod slots;
pub mod source;
pub mod stops;
pub mod template;
#[cfg(test)]
mod template_tests;
pub mod tokenizer;
pub mod trace;
mod walk;

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod many_tests;
#[cfg(test)]
mod measured;
#[cfg(test)]
mod paging_tests;
#[cfg(test)]
mod real_embeddings_tests;
#[cfg(test)]
mod real_weights_tests;
#[cfg(test)]
mod sequence_tests;
#[cfg(test)]
pub mod testing;
