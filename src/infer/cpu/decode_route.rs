//! The same choice as [`route`](super::route::route); the device's form for one token also looks up the
//! experts' slots and halts the step where one has none.

pub use super::route::route as decode_route;
