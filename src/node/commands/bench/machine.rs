//! The machine of a measurement, and records for people.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// The machine, the program, and the command line.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub host: String,
    pub threads: usize,
    /// The backend; for a GPU its adapter and driver.
    pub device: String,
    pub version: &'static str,
    /// The commit from which the binary was built, if the build knew it; with a `+` if files
    /// differed from it.
    pub commit: Option<&'static str>,
    pub command: String,
}

impl Machine {
    pub fn new(device: String) -> Self {
        Self {
            host: processor(),
            threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            device,
            version: env!("CARGO_PKG_VERSION"),
            commit: option_env!("DOPPLER_COMMIT"),
            command: crate::commands::command_line(),
        }
    }

    /// The lines that a record must contain.
    pub fn lines(&self) -> Vec<String> {
        let commit = self.commit.unwrap_or("unknown");
        vec![
            format!("host: {}, {} threads", self.host, self.threads),
            format!("device: {}", self.device),
            format!("doppler-node {}, commit {commit}", self.version),
            format!("command: `{}`", self.command),
        ]
    }
}

/// The processor's name, if the system tells it.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_owned()
}

/// The most memory that this process has used, in bytes, if the system tells it.
pub fn peak_rss_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// The memory that this process uses, in bytes, if the system tells it.
pub fn rss_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// The processor time that this process has used, in seconds, if the system tells it.
pub fn cpu_seconds() -> Option<f64> {
    // proc(5): user and system time are the 14th and 15th field, in hundredths of a second; the
    // 2nd, a name in brackets, may itself contain spaces.
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut times = fields.split(' ').skip(11).take(2).map(str::parse::<u64>);
    let (user, system) = (times.next()?.ok()?, times.next()?.ok()?);
    Some((user + system) as f64 / 100.0)
}

fn status_bytes(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// A Markdown file that is written after a measurement. It is created first, so that a path that
/// cannot be written is refused before anything is measured.
pub struct RecordFile {
    file: File,
    path: String,
}

impl RecordFile {
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let file = File::create_new(path).with_context(|| format!("cannot create {name}"))?;
        Ok(Self { file, path: name })
    }

    /// Writes a heading, the machine, and the result as printed.
    pub fn write(mut self, title: &str, machine: &Machine, result: &str) -> anyhow::Result<()> {
        let mut text = format!("# {title}\n\n");
        for line in machine.lines() {
            text += &format!("- {line}\n");
        }
        text += &format!("\n```\n{}\n```\n", result.trim_end());
        self.file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", self.path))
    }
}
