//! The commit from which a binary was built, for records of measurements.
//!
//! Emits `DOPPLER_COMMIT` if git knows it: the commit's short name, with a `+` if tracked files
//! differ from it. The build checks again when HEAD or a source changes.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=DOPPLER_COMMIT");
    if std::env::var_os("DOPPLER_COMMIT").is_some() {
        return; // The builder has set it: a package, a container.
    }
    for source in ["src", "kernels", "proto", "Cargo.lock"] {
        println!("cargo:rerun-if-changed=../../{source}");
    }
    // HEAD names a branch; the branch's file, or the packed list, changes with each commit.
    for file in ["HEAD", "logs/HEAD"] {
        let Some(path) = git(&["rev-parse", "--git-path", file]) else { return };
        if Path::new(&path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let mark = if changed.is_some_and(|changed| !changed.is_empty()) { "+" } else { "" };
    println!("cargo:rustc-env=DOPPLER_COMMIT={commit}{mark}");
}

/// What git prints. `None` without git or outside a repository.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
