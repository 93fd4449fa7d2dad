//! Tests of the parts within one process: the store's tiers, the mesh over loopback sockets, hostile
//! bytes, and the rules of the code base.

mod docs;
mod hostile;
mod licences;
mod mesh;
#[cfg(target_os = "linux")]
#[path = "../common/small.rs"]
mod small;
mod store;
mod tidy;
mod transports;
