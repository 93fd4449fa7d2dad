//! Fuzzes `entries::config`.
#![no_main]

#[path = "../src/entries.rs"]
#[allow(dead_code)] // each target uses its own
mod entries;

libfuzzer_sys::fuzz_target!(|data: &[u8]| entries::config(data));
