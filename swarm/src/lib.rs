//! The libp2p swarm behind plain channels.
