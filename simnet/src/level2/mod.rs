//! Level 2: real swarms in one process. Everything of a node but its sockets is real: the mesh, its
//! actor, libp2p with noise and yamux, a store on disk. The lines between them are memory, and can
//! be slow, lossy, cut in one direction or both, and torn.
//!
//! Time is real here, so a run does not repeat exactly; level 1 does.

pub mod fleet;
pub mod network;
mod pipe;
pub mod relaying;
#[cfg(test)]
mod tests;
