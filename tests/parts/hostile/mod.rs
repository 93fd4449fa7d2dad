//! Bytes that are not what they should be: none is admitted, none panics.

#[path = "../../../fuzz/src/entries.rs"]
mod entries;
mod flips;
mod mutate;
