//! Dependencies must have permissive licences: every crate in the build offers one from the list.

use std::collections::BTreeSet;
use std::process::Command;

/// SPDX ids of licences that require notices at most.
const PERMISSIVE: [&str; 13] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Whether an SPDX expression can be met with permissive licences alone.
/// Understands `OR`, `AND`, parentheses, `WITH` exceptions and the old `/`.
fn permissive(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = any_of(&words, &mut at);
    met && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize) -> bool {
    let mut met = all_of(words, at);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        // Not only `||`: the right side must be parsed even if the left is permissive.
        let right = all_of(words, at);
        met = met || right;
    }
    met
}

fn all_of(words: &[&str], at: &mut usize) -> bool {
    let mut met = one(words, at);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        let right = one(words, at);
        met = met && right;
    }
    met
}

fn one(words: &[&str], at: &mut usize) -> bool {
    match words.get(*at) {
        Some(&"(") => {
            *at += 1;
            let met = any_of(words, at);
            let closed = words.get(*at) == Some(&")");
            *at += 1;
            met && closed
        }
        Some(licence) => {
            *at += 1;
            if words.get(*at) == Some(&"WITH") {
                *at += 2;
            }
            PERMISSIVE.contains(licence)
        }
        None => false,
    }
}

#[test]
fn licence_expressions_follow_spdx() {
    for good in
        ["MIT", "MIT OR GPL-3.0", "MIT/Apache-2.0", "(MIT OR GPL-2.0) AND ISC", "GPL-3.0 OR MIT"]
    {
        assert!(permissive(good), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "", "(MIT", "MPL-2.0"] {
        assert!(!permissive(bad), "{bad}");
    }
}

#[test]
fn every_dependency_is_permissive() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--workspace", "--locked", "--offline", "--prefix", "none"])
        .args(["--edges", "normal,build,dev", "--format", "{p}\t{l}"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listing = String::from_utf8(output.stdout).unwrap();
    let packages: BTreeSet<(&str, &str)> =
        listing.lines().filter_map(|line| line.trim_end_matches(" (*)").split_once('\t')).collect();
    assert!(packages.len() > 100, "only {} packages", packages.len());
    let wrong: Vec<String> = packages
        .iter()
        .filter(|(_, licence)| !permissive(licence))
        .map(|(package, licence)| format!("{package}: {licence}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
