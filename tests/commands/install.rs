//! `install.sh` with archives of a stub: what it installs, refuses, replaces and removes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{Said, root};

/// A home directory of its own, with archives in it.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// An archive with these files, and its checksum beside it. The program says its version.
    fn archive(&self, version: &str, more: &[&str]) -> String {
        let name = format!("doppler-node-{version}-stub");
        let tree = self.at(&name);
        let write = |path: &str, text: &str| {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        let program =
            write("bin/doppler-node", &format!("#!/bin/sh\necho doppler-node {version}\n"));
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
        more.iter().for_each(|path| drop(write(path, version)));
        let file = format!("{name}.tar.gz");
        self.pack(&name);
        fs::write(self.at(&format!("{file}.sha256")), format!("{}  {file}\n", self.sum(&file)))
            .unwrap();
        self.at(&file).to_str().unwrap().to_owned()
    }

    /// Makes NAME.tar.gz of the directory NAME.
    fn pack(&self, name: &str) {
        let mut tar = Command::new("tar");
        tar.arg("-C")
            .arg(self.0.path())
            .arg("-czf")
            .arg(self.at(&format!("{name}.tar.gz")))
            .arg(name);
        assert!(tar.status().unwrap().success());
    }

    fn sum(&self, file: &str) -> String {
        let sum = Command::new("sha256sum").arg(self.at(file)).output().unwrap().stdout;
        String::from_utf8(sum).unwrap()[..64].to_owned()
    }

    fn run(&self, args: &[&str]) -> Said {
        let mut install = Command::new("sh");
        install.arg(root().join("install.sh")).args(args).current_dir(self.0.path());
        install
            .env("HOME", self.0.path())
            .env_remove("XDG_DATA_HOME")
            .env_remove("XDG_CONFIG_HOME");
        Said::of(install.output().unwrap())
    }

    /// Asserts that it fails, with these words.
    fn refuses(&self, args: &[&str], words: &[&str]) {
        let said = self.run(args);
        assert_eq!(said.code, Some(1), "{args:?}: {}", said.err);
        assert!(words.iter().all(|word| said.err.contains(word)), "{words:?}: {}", said.err);
    }
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}

#[test]
fn the_scripts_are_what_shellcheck_calls_clean() {
    let scripts = ["install.sh", "packaging/tree.sh", "packaging/release.sh"];
    let scripts = scripts.map(|script| root().join(script));
    let Ok(output) = Command::new("shellcheck").args(&scripts).output() else {
        eprintln!("skipped: shellcheck is not installed");
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    // dash knows nothing that POSIX does not.
    for script in scripts {
        assert!(Command::new("sh").arg("-n").arg(&script).status().unwrap().success());
    }
}

#[test]
fn a_prebuilt_archive_is_installed_replaced_and_removed_and_the_data_stays() {
    let home = Home::new();
    let man = "share/man/man1/doppler-node.1";
    let old = home.archive("1.0.0", &[man, "share/doc/doppler-node/old"]);
    let data = home.at(".local/share/doppler-node/identity.key");
    fs::create_dir_all(data.parent().unwrap()).unwrap();
    fs::write(&data, "mine").unwrap();
    let said = home.run(&["--from", &old]).ok();
    let program = home.at(".local/bin/doppler-node");
    assert!(
        said.out.contains("installed doppler-node 1.0.0") && said.out.contains("PATH"),
        "{}",
        said.out
    );
    assert!(
        is_file(&home.at(".local").join(man))
            && is_file(&home.at(".local/share/doc/doppler-node/old"))
    );
    assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o777, 0o755);

    // Another version replaces it, and takes along what it no longer has.
    let new = home.archive("1.1.0", &[man]);
    home.run(&["--from", &new]).ok();
    assert_eq!(fs::read_to_string(home.at(".local").join(man)).unwrap(), "1.1.0");
    assert!(!home.at(".local/share/doc/doppler-node/old").exists());
    let version = Command::new(&program).output().unwrap().stdout;
    assert_eq!(version, b"doppler-node 1.1.0\n");

    let said = home.run(&["--uninstall"]).ok();
    assert!(said.out.contains("stay where they are"), "{}", said.out);
    assert!(!program.exists() && !home.at(".local").join(man).exists());
    assert_eq!(fs::read_to_string(&data).unwrap(), "mine", "the data directory has the same name");
    home.refuses(&["--uninstall"], &["nothing is installed"]);
}

#[test]
fn what_is_not_what_was_meant_is_refused_and_leaves_all_as_it_was() {
    let home = Home::new();
    let archive = home.archive("1.0.0", &[]);
    let prefix = ["--prefix", "there"];
    let with = |args: &[&'static str]| [&["--from", archive.as_str()], args, &prefix].concat();
    let wrong = "0000000000000000000000000000000000000000000000000000000000000000";
    home.refuses(&with(&["--sha256", wrong]), &["SHA-256", "damaged"]);
    assert!(!home.at("there").exists());
    let sum = home.sum("doppler-node-1.0.0-stub.tar.gz").to_uppercase();
    home.run(&["--from", &archive, "--sha256", &sum, "--prefix", "there"]).ok();
    assert!(is_file(&home.at("there/bin/doppler-node")));

    // Damage, a missing checksum, and a program of another machine leave the old one.
    let mut bytes = fs::read(&archive).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&archive, bytes).unwrap();
    home.refuses(&with(&[]), &["SHA-256"]);
    fs::remove_file(format!("{archive}.sha256")).unwrap();
    home.refuses(&with(&[]), &[".sha256"]);
    let foreign = home.archive("3.0.0", &[]);
    let tree = home.at("doppler-node-3.0.0-stub");
    fs::write(tree.join("bin/doppler-node"), b"\x7fELF of another machine").unwrap();
    home.pack("doppler-node-3.0.0-stub");
    let sum = home.sum("doppler-node-3.0.0-stub.tar.gz");
    let args = ["--from", &foreign, "--sha256", &sum, "--prefix", "there"];
    home.refuses(&args, &["does not run here"]);
    let version = Command::new(home.at("there/bin/doppler-node")).output().unwrap().stdout;
    assert_eq!(version, b"doppler-node 1.0.0\n");

    home.refuses(&["--from", "ftp://example/x.tar.gz"], &["only https://"]);
    home.refuses(&["--sha256", wrong], &["--from"]);
    home.refuses(&["--frm", "x"], &["--frm", "--help"]);
    home.refuses(&["--from"], &["needs a value"]);
    assert!(home.run(&["--help"]).ok().out.contains("--uninstall"));
}
