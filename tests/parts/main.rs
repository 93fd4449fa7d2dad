//! The parts in one process: the store's tiers, the mesh over loopback sockets, hostile bytes, and
//! the rules of the house.

mod hostile;
mod licences;
mod mesh;
mod store;
mod tidy;
mod transports;
