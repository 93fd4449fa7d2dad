//! The node's HTTP port: whom it accepts, how long it waits for whom, who gives way when it is
//! crowded. What is said on it is the control API's and the gateway's.
//!
//! Invariant: nobody's silence keeps another out, a reader's slowness does so for
//! `STALL_PRESSED_MAX` at most, and the node's owner is served however many others ask.

mod host;
mod impatient;
mod refused;
mod seats;
mod server;

pub use host::named;
pub use impatient::Pressure;
pub use refused::Refused;
pub use server::{IsOwner, Server, listen};
