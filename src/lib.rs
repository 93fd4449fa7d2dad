//! doppler-node: a swarm node that keeps model weights as content-addressed
//! shards over four tiers (VRAM, RAM, disk, peers) and runs models whose
//! weights do not fit the machine.
//!
//! Who may know whom is in ARCHITECTURE.md and enforced by `tests/tidy.rs`.

pub mod infer;
pub mod mesh;
pub mod node;
pub mod store;
#[cfg(test)]
mod testing;
pub mod wire;
