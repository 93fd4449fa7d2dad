//! The store over its public API: what is stored stays, what is damaged is
//! found, budgets hold, and one read climbs RAM, disk and peers once.

#[cfg(target_os = "linux")]
mod adverse;
#[cfg(unix)]
mod care;
mod disk;
mod ladder;
mod support;
