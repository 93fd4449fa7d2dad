//! A small file system of a test's own, to be filled.
#![allow(dead_code)] // each test binary uses its part

use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// A small tmpfs, unmounted when dropped.
pub struct Small {
    pub at: PathBuf,
    _dir: tempfile::TempDir,
}

impl Small {
    /// Mounts it. Prints the reason and returns `None` if that is not possible.
    pub fn mount(bytes: u64) -> Option<Self> {
        Self::mount_with(bytes, "mode=700")
    }

    /// As [`Self::mount`], with another option of tmpfs.
    pub fn mount_with(bytes: u64, option: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().to_owned();
        let small = Self { at: at.clone(), _dir: dir };
        let options = format!("size={bytes},{option}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(&at)
            .output()
            .is_ok_and(|output| output.status.success());
        if mounted {
            return Some(small);
        }
        println!("skipped: a small tmpfs cannot be mounted (not root?)");
        None
    }

    pub fn remount(&self, how: &str) -> bool {
        let options = format!("remount,{how}");
        let status = Command::new("mount").args(["-o", &options]).arg(&self.at).status();
        status.is_ok_and(|status| status.success())
    }

    /// Makes empty files until no more can be made, and returns them.
    pub fn spend_inodes(&self) -> Vec<PathBuf> {
        let names = (0..).map(|n| self.at.join(format!("empty-{n}")));
        names.take_while(|name| fs::File::create(name).is_ok()).collect()
    }

    /// Fills the file system until `left` bytes are free.
    pub fn fill(&self, left: u64) {
        let ballast = vec![0x55; 1 << 16];
        let mut file = fs::File::create(self.at.join("ballast")).unwrap();
        while std::io::Write::write_all(&mut file, &ballast).is_ok() {}
        let len = file.metadata().unwrap().len();
        file.set_len(len.saturating_sub(left)).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).output();
    }
}
