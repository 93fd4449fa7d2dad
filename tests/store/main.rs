//! The store over its public API: what is stored stays, what is damaged is
//! found, budgets hold, and one read climbs RAM, disk and peers once.

mod disk;
mod ladder;
mod support;
