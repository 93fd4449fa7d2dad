//! Output that cannot be written: a reader that went away, a full disk, a log that cannot be
//! written; and redirected output, which must be plain text.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

use super::common::{Node, PATIENCE, command, golden, model, run};

/// Commands that print: short ones and a long-running one.
fn printing() -> Vec<Vec<String>> {
    let model = model().to_str().unwrap().to_owned();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    vec![
        words(&["--help"]),
        words(&["run", "--help"]),
        words(&["--version"]),
        words(&["inspect", &model]),
        words(&["inspect", &model, "--json"]),
        words(&["run", &model, "-p", "Once", "-n", "2000", "--context", "64", "--backend", "cpu"]),
    ]
}

#[test]
fn a_reader_that_goes_away_ends_a_command_quietly() {
    for args in printing() {
        let mut child =
            command().args(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_under_standard_output_is_an_error() {
    for args in printing() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let child = command().args(&args).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.starts_with("error: cannot write to standard output: "), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn errors_that_cannot_be_written_change_no_exit_code() {
    for (args, code) in [(vec!["inspect", "/no/such/dir"], 1), (vec!["dance"], 2)] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let status = command().args(&args).stdout(Stdio::null()).stderr(full).status().unwrap();
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}

/// A node keeps working when nobody reads its log and its reports.
#[test]
fn a_node_outlives_its_log() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let mut join = command();
    join.args(["join", "--json", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"]);
    join.args(["--swarm", "mute", "--log", "debug", "--data"]).arg(&data);
    let mut first = Node::spawn_mute(join, &data);
    // Each of these logs something, also in the swarm's task.
    let model = model();
    first.ask(&["publish", model.to_str().unwrap()]).ok();
    for name in ["b", "c"] {
        let mut other = Node::start(&dir.path().join(name), "mute", &[&first.address], &[]);
        assert_eq!(other.event("model")["name"], "tiny-mixtral-q4_k_m");
        other.signal("TERM");
        assert_eq!(other.wait(), Some(0));
    }
    first.ask(&["unpin", "tiny-mixtral-q4_k_m"]).ok();
    first.ask(&["gc", "--disk-budget", "0", "--last-copy"]).ok();
    assert_eq!(first.ask(&["status", "--json"]).ok().json()["disk"]["used"], 0);
    first.signal("TERM");
    assert_eq!(first.wait(), Some(0), "nobody read its reports, which is no failure");
}

/// A pipe that nobody empties, and that takes no more.
#[cfg(target_os = "linux")]
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    use std::io::Write;
    let (reader, writer) = std::io::pipe().unwrap();
    let mut filling = writer.try_clone().unwrap();
    let (sender, filled) = std::sync::mpsc::channel();
    // Linux gives a pipe 64 KiB, or less to users with many pipes: then this thread stays.
    std::thread::spawn(move || sender.send(filling.write_all(&[b'x'; 65_536]).is_ok()));
    let _ = filled.recv_timeout(std::time::Duration::from_secs(1));
    (reader, writer)
}

/// A node does not wait for a terminal that is held, nor for a parent that reads nothing.
#[cfg(target_os = "linux")]
#[test]
fn a_node_waits_for_no_reader() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let ((_out_reader, out), (_err_reader, err)) = (full_pipe(), full_pipe());
    let mut join = command();
    join.args(["join", "--json", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"]);
    join.args(["--swarm", "held", "--log", "debug", "--data"]).arg(&data);
    let mut held = join.stdout(out).stderr(err).spawn().unwrap();
    let ask = |args: &[&str]| {
        run(args.iter().map(std::ffi::OsStr::new).chain(["--data".as_ref(), data.as_os_str()]))
    };
    let began = std::time::Instant::now();
    let status = loop {
        let said = ask(&["status", "--json"]);
        if said.code == Some(0) {
            break said.json();
        }
        assert!(began.elapsed() < PATIENCE, "{}", said.err);
    };
    let model = model();
    ask(&["publish", model.to_str().unwrap()]).ok();
    let address = status["addresses"][0].as_str().unwrap();
    let mut other = Node::start(&dir.path().join("b"), "held", &[address], &[]);
    assert_eq!(other.event("model")["name"], "tiny-mixtral-q4_k_m");
    let pid = held.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert_eq!(held.wait().unwrap().code(), Some(0));
}

/// On a GPU, also a software one, the Vulkan loader's layers must not mention displays.
#[test]
fn standard_error_is_this_programs_own() {
    let model = model();
    let mut run = command();
    run.args(["run", model.to_str().unwrap(), "-p", "Once", "-n", "2", "--backend", "gpu"]);
    let output = run.env_remove("XDG_RUNTIME_DIR").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains("XDG_RUNTIME_DIR"), "{said}");
    let ours = ["2 tokens at ", "stopped after ", "experts from "];
    let is_ours = |line: &str| ours.iter().any(|begin| line.starts_with(begin));
    if said.contains("no GPU or software adapter found") {
        eprintln!("skipped: no Vulkan adapter at all");
        return;
    }
    assert!(output.status.success() && said.lines().all(is_ours), "{said}");
}

#[test]
fn redirected_output_has_no_colours() {
    let dir = tempfile::tempdir().unwrap();
    let source = golden("mixtral");
    let out = dir.path().join("out");
    let plain = |args: &[&str]| {
        let output = command().env("TERM", "xterm-256color").args(args).output().unwrap();
        for text in [&output.stdout, &output.stderr] {
            assert!(!text.contains(&0x1b), "{args:?}: {}", String::from_utf8_lossy(text));
        }
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    plain(&["--help"]);
    let help = command().arg("--help").output().unwrap().stdout;
    assert!(help.starts_with(b"Runs models that do not fit this machine"));
    plain(&["dance"]);
    plain(&["inspect", "/no/such/dir"]);
    plain(&["convert", source.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    // A run that logs, because nobody listens at that port.
    let data = dir.path().join("data");
    let args = ["run", "none", "-p", "x", "--swarm", "s", "--no-mdns", "--find-timeout", "0.5"];
    let more = ["--listen", "/ip4/127.0.0.1/tcp/0", "--log", "debug", "--backend", "cpu"];
    let log = plain(&[&args[..], &more, &["--data", data.to_str().unwrap()]].concat());
    assert!(log.contains("DEBUG"), "{log}");
}
