//! The mesh: who is there, who holds what, and bytes that prove themselves.
//!
//! Knows the store's vocabulary and `wire`; libp2p stays behind `doppler_swarm`.
