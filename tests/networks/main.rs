//! Nodes in networks of their own: namespaces, routers between them, wrong clocks.

#[path = "../common/mod.rs"]
mod common;

mod clock;
mod link;
mod mdns;
mod nat;
mod partition;
mod slow;
mod soak;
