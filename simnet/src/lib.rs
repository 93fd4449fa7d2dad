//! A swarm in one process under virtual time: the very core that a node's mesh runs, and the
//! store's policies, against a network, disks and peers that do what they should not.
//!
//! Refuses, but for [`level2`]: clocks, sockets, payloads. Bytes are counted and either right or wrong.
//! Invariant: the same options give the same schedule, on any machine and any number of threads.

mod batch;
mod check;
mod crew;
mod crowd;
mod disk;
mod faults;
mod gossip;
mod heal;
pub mod level2;
mod measure;
mod models;
mod net;
mod node;
mod options;
mod queue;
pub mod report;
mod rng;
mod rules;
mod shrink;
#[cfg(test)]
mod tests;
mod topics;
mod transfer;
mod work;
mod world;

pub use check::{Stats, Violation};
pub use crowd::News;
pub use doppler_mesh::core::planted::Plant;
pub use faults::{Fault, plan};
pub use heal::Healed;
pub use options::{Options, Scenario};
pub use shrink::shrink;
pub use world::{Outcome, World};
