//! The same norm as [`rms_norm`](super::rms_norm::rms_norm); the device's form for one token also packs
//! the result as whole numbers of 16 bits, within 1 / 65,024 of the largest of each sixteen.

pub use super::rms_norm::rms_norm as decode_norm;
