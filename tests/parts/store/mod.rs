//! The store through its public API: stored objects survive, damage is found,
//! budgets hold, and concurrent reads share one fetch.

#[cfg(target_os = "linux")]
mod adverse;
#[cfg(unix)]
mod care;
mod disk;
#[cfg(unix)]
mod intruders;
mod ladder;
mod pins;
mod support;
