//! Wrong bytes: none is accepted, and none causes a panic.

#[path = "../../../fuzz/src/entries.rs"]
mod entries;
mod flips;
mod mutate;
