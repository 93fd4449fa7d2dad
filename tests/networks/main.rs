//! Nodes in networks of their own: namespaces, routers between them, clocks that are wrong.

#[path = "../common/mod.rs"]
mod common;

mod clock;
mod link;
mod mdns;
mod nat;
