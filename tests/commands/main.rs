//! The binary as users see it: its commands, nodes as child processes, and the page in a
//! browser.

#[path = "../common/mod.rs"]
mod common;

mod adapter_cli;
mod api;
mod bench;
mod catalogue_cli;
mod chat_cli;
mod cli;
#[cfg(unix)]
mod crash;
mod crowd;
mod demo;
mod embed_cli;
mod goldens;
mod heal;
mod hub_cli;
#[cfg(unix)]
mod install;
mod logs_cli;
mod meeting;
mod output;
mod pins_cli;
mod settings_cli;
#[cfg(target_os = "linux")]
#[path = "../common/small.rs"]
mod small;
mod storage_cli;
mod swarm_cli;
mod trust_cli;
mod web;
