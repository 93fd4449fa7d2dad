//! The binary as users see it: its commands, nodes as child processes, and the page in a
//! browser.

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod cli;
#[cfg(unix)]
mod crash;
mod demo;
mod goldens;
mod meeting;
mod output;
mod storage_cli;
mod swarm_cli;
mod trust_cli;
mod web;
