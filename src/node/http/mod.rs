//! The node's HTTP port: which connections it accepts, how long it waits for them, and which give
//! way when it is crowded. The requests themselves belong to `api`, the control API and the gateway.
//!
//! Invariant: a silent connection never keeps another out, a slow reader does so for
//! `STALL_PRESSED_MAX` at most, and the node's owner is served however many others send requests.

pub mod api;
mod host;
mod impatient;
mod refused;
mod seats;
mod server;

pub use host::named;
pub use impatient::Pressure;
pub use refused::Refused;
pub use server::{IsOwner, Remote, Server, listen};

/// Whether two secrets are the same. It takes as long where they differ early as where they differ
/// late: their hashes are compared, in constant time.
pub fn is_same_secret(a: &[u8], b: &[u8]) -> bool {
    blake3::hash(a) == blake3::hash(b)
}
