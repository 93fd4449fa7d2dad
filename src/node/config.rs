//! What the user asked for, validated and resolved once: everything that a node needs to start.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use super::args::{ApiArgs, BackendChoice, BudgetArgs, DataArgs, JoinArgs, NetworkArgs, ServeArgs};
use super::invite::{INVITE_CHARS_MAX, Invite};
use super::size::ByteSize;
use super::trust::TrustPolicy;
use doppler_mesh::{LIMIT_MIN, RelayMode};
use doppler_store::signature::PublicKey;

/// Names longer than this would not fit the gossip topic's bound.
const SWARM_NAME_MAX: usize = 64;

/// Where a node listens by default: every transport over both families, at ports that the system
/// chooses.
pub const LISTEN_DEFAULT: [&str; 8] = [
    "/ip4/0.0.0.0/udp/0/quic-v1",
    "/ip4/0.0.0.0/tcp/0",
    "/ip4/0.0.0.0/tcp/0/ws",
    "/ip4/0.0.0.0/udp/0/webrtc-direct",
    "/ip6/::/udp/0/quic-v1",
    "/ip6/::/tcp/0",
    "/ip6/::/tcp/0/ws",
    "/ip6/::/udp/0/webrtc-direct",
];

/// One part in this many of the disk budget is for copies that the swarm needs, unless the user says
/// otherwise.
const REPLICA_SHARE: u64 = 4;

/// Everything a node needs to start.
#[derive(Debug, Clone)]
pub struct Config {
    pub swarm: String,
    pub data: PathBuf,
    pub listen: Vec<String>,
    pub external: Vec<String>,
    /// The file with a private swarm's key.
    pub swarm_key: Option<PathBuf>,
    /// A file of certificate authorities for /wss addresses.
    pub tls_ca: Option<PathBuf>,
    pub bootstrap: Vec<String>,
    pub mdns: bool,
    pub relay: RelayMode,
    /// Whether to ask the router to forward ports.
    pub upnp: bool,
    /// How long to look for a holder of a missing shard.
    pub find_timeout: Duration,
    /// Bytes of shards a second to and from peers.
    pub upload_limit: Option<u64>,
    pub download_limit: Option<u64>,
    /// Publishers to trust from now on, and what to do with models of others.
    pub trust: Vec<PublicKey>,
    pub trust_policy: TrustPolicy,
    pub vram_budget: u64,
    pub ram_budget: u64,
    pub disk_budget: u64,
    /// Bytes of copies that this node keeps for the swarm, part of the disk budget.
    pub replica_budget: u64,
    /// Bytes of such copies a second.
    pub replica_rate: Option<u64>,
    pub backend: BackendChoice,
    /// How long a model stays loaded after its last request. `None`: as long as the node runs.
    pub keep_alive: Option<Duration>,
    /// Bytes of earlier prompts' keys and values on disk. 0: none are kept.
    pub prefix_budget: u64,
    /// The HTTP port.
    pub control: SocketAddr,
    /// With port 0: take the usual port if the last one is not known.
    pub usual_port: bool,
    /// Who may use `/v1` there.
    pub api: ApiOptions,
    /// The node meets nobody and listens for nobody.
    pub alone: bool,
}

/// Who may use the APIs under `/v1`.
#[derive(Debug, Clone, Default)]
pub struct ApiOptions {
    /// The key that every request must show.
    pub key: Option<String>,
    /// Origins whose pages may ask, besides those of this machine.
    pub cors: Vec<String>,
}

impl ApiOptions {
    /// # Errors
    /// If a key cannot be a header's value, or an origin is none.
    fn of(args: &ApiArgs) -> anyhow::Result<Self> {
        if let Some(key) = &args.api_key {
            let plain = |c: char| c.is_ascii_graphic();
            ensure!(
                (1..=KEY_BYTES_MAX).contains(&key.len()) && key.chars().all(plain),
                "--api-key: a key is 1 to {KEY_BYTES_MAX} visible ASCII characters"
            );
        }
        for origin in &args.cors {
            let host = origin.split_once("://").map(|(_, host)| host);
            ensure!(
                host.is_some_and(|host| !host.is_empty() && !host.contains(['/', ' ', '*'])),
                "--cors {origin}: an origin is written like https://app.example or \
                 http://localhost:3000"
            );
        }
        Ok(Self { key: args.api_key.clone(), cors: args.cors.clone() })
    }
}

/// The longest API key.
const KEY_BYTES_MAX: usize = 512;
/// Where a node answers over HTTP that is not told where.
const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// The swarm's name of a node without one.
const ALONE: &str = "alone";

impl Config {
    pub fn for_join(args: &JoinArgs) -> anyhow::Result<Self> {
        let invite = args.invite.as_deref().map(invitation).transpose()?;
        let mut network = args.network.clone();
        if let Some(invite) = &invite {
            network.bootstrap.extend(invite.addresses.iter().cloned());
            network.swarm_key = invite.keep_key(&data_dir(&args.data)?)?;
        }
        let swarm = invite.as_ref().map(|invite| &invite.swarm).or(args.swarm.as_ref());
        let config = Self::resolve(
            swarm.map_or("", String::as_str),
            &network,
            &args.data,
            &args.budget,
            args.backend,
            args.control.unwrap_or(ANY_PORT),
        )?;
        let disk = config.disk_budget;
        let replica_budget =
            args.replica_budget.map_or(disk / REPLICA_SHARE, |budget| budget.bytes());
        ensure!(
            replica_budget <= disk,
            "--replica-budget {}: it is part of --disk-budget, {}",
            ByteSize(replica_budget),
            ByteSize(disk)
        );
        let replica_rate = args.replica_rate.map(|rate| rate.0);
        check_limit("--replica-rate", replica_rate)?;
        let (api, keep_alive) = (ApiOptions::of(&args.api)?, args.keep_alive.0);
        check_address(config.control, &api)?;
        let usual_port = args.control.is_none();
        let prefix_budget = args.prefix_budget.bytes();
        Ok(Self {
            replica_budget,
            replica_rate,
            api,
            keep_alive,
            prefix_budget,
            usual_port,
            ..config
        })
    }

    /// What a node without a swarm needs.
    pub fn for_serve(args: &ServeArgs) -> anyhow::Result<Self> {
        let network = NetworkArgs::for_nobody();
        let (data, budget) = (&args.data, &args.budget);
        let config = Self::resolve(ALONE, &network, data, budget, args.backend, args.http)?;
        let (api, keep_alive) = (ApiOptions::of(&args.api)?, args.keep_alive.0);
        check_address(config.control, &api)?;
        let (prefix_budget, listen) = (args.prefix_budget.bytes(), Vec::new());
        Ok(Self { api, keep_alive, prefix_budget, alone: true, listen, ..config })
    }

    /// What a node needs that keeps no copies for others. The error names the wrong argument.
    pub fn resolve(
        swarm: &str,
        network: &NetworkArgs,
        data: &DataArgs,
        budget: &BudgetArgs,
        backend: BackendChoice,
        control: SocketAddr,
    ) -> anyhow::Result<Self> {
        ensure!(
            !swarm.is_empty()
                && swarm.len() <= SWARM_NAME_MAX
                && swarm.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)),
            "--swarm {swarm:?}: a name is 1 to {SWARM_NAME_MAX} letters, digits, '-', '_' or '.'"
        );
        ensure!(
            network.find_timeout.is_finite()
                && network.find_timeout > 0.0
                && network.find_timeout <= 86_400.0,
            "--find-timeout {}: give seconds, more than 0 and at most a day",
            network.find_timeout
        );
        check_limit("--upload-limit", network.upload_limit.map(|limit| limit.0))?;
        check_limit("--download-limit", network.download_limit.map(|limit| limit.0))?;
        let listen = if network.listen.is_empty() {
            LISTEN_DEFAULT.map(str::to_owned).to_vec()
        } else {
            network.listen.clone()
        };
        Ok(Self {
            swarm: swarm.to_owned(),
            data: data_dir(data)?,
            listen,
            external: network.external_address.clone(),
            swarm_key: network.swarm_key.clone(),
            tls_ca: network.tls_ca.clone(),
            bootstrap: network.bootstrap.clone(),
            mdns: !network.no_mdns,
            relay: network.relay.into(),
            upnp: !network.no_upnp,
            find_timeout: Duration::from_secs_f64(network.find_timeout),
            upload_limit: network.upload_limit.map(|limit| limit.0),
            download_limit: network.download_limit.map(|limit| limit.0),
            trust: network.trust.clone(),
            trust_policy: network.trust_policy,
            vram_budget: budget.vram_budget.0,
            ram_budget: budget.ram_budget.0,
            disk_budget: budget.disk_budget.0,
            replica_budget: 0,
            replica_rate: None,
            backend,
            keep_alive: None,
            prefix_budget: 0,
            control,
            usual_port: false,
            api: ApiOptions::default(),
            alone: false,
        })
    }
}

/// An invitation that was given, or is read from standard input.
fn invitation(text: &str) -> anyhow::Result<Invite> {
    if text != "-" {
        return Invite::parse(text);
    }
    let mut text = String::new();
    let most = INVITE_CHARS_MAX as u64 + 64;
    std::io::stdin().take(most).read_to_string(&mut text).context("cannot read standard input")?;
    Invite::parse(&text)
}

/// Other machines need a key.
fn check_address(http: SocketAddr, api: &ApiOptions) -> anyhow::Result<()> {
    ensure!(
        http.ip().is_loopback() || api.key.is_some(),
        "--http {http}: other machines could ask; set --api-key (or DOPPLER_API_KEY), or use a \
         loopback address"
    );
    Ok(())
}

/// Checks a limit in bytes a second, which the flag set.
fn check_limit(flag: &str, limit: Option<u64>) -> anyhow::Result<()> {
    let limit = limit.unwrap_or(u64::MAX);
    ensure!(
        limit >= LIMIT_MIN,
        "{flag} {limit} bytes/s: give at least 64KiB/s, slower transfers count as stalled"
    );
    Ok(())
}

/// `--data`, or the platform's place for an application's data.
pub fn data_dir(args: &DataArgs) -> anyhow::Result<PathBuf> {
    if let Some(dir) = &args.data {
        return Ok(dir.clone());
    }
    let base = if cfg!(target_os = "macos") {
        home()?.join("Library/Application Support")
    } else if cfg!(windows) {
        std::env::var_os("LOCALAPPDATA").map(PathBuf::from).context("LOCALAPPDATA is not set")?
    } else {
        match std::env::var_os("XDG_DATA_HOME").map(PathBuf::from) {
            Some(dir) if dir.is_absolute() => dir,
            _ => home()?.join(".local/share"),
        }
    };
    Ok(base.join("doppler-node"))
}

/// The platform's directory for what a user configures. `None` if there is none.
pub fn config_dir() -> Option<PathBuf> {
    let base = if cfg!(target_os = "macos") {
        home().ok()?.join("Library/Application Support")
    } else if cfg!(windows) {
        std::env::var_os("APPDATA").map(PathBuf::from)?
    } else {
        match std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from) {
            Some(dir) if dir.is_absolute() => dir,
            _ => home().ok()?.join(".config"),
        }
    };
    Some(base.join("doppler-node"))
}

/// The platform's directory for data that can be recreated. `None` if there is none.
pub fn cache_dir() -> Option<PathBuf> {
    let base = if cfg!(target_os = "macos") {
        home().ok()?.join("Library/Caches")
    } else if cfg!(windows) {
        PathBuf::from(std::env::var_os("LOCALAPPDATA")?)
    } else {
        match std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from) {
            Some(dir) if dir.is_absolute() => dir,
            _ => home().ok()?.join(".cache"),
        }
    };
    Some(base.join("doppler-node"))
}

fn home() -> anyhow::Result<PathBuf> {
    match std::env::home_dir() {
        Some(dir) if dir != Path::new("") => Ok(dir),
        _ => bail!("there is no home directory; choose a data directory with --data DIR"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Command, RawArgs};

    fn resolve(extra: &[&str]) -> anyhow::Result<Config> {
        let mut words = vec!["doppler-node", "join", "--data", "/nowhere", "--swarm"];
        words.extend_from_slice(extra);
        match RawArgs::try_parse_from(words)?.command {
            Command::Join(args) => Config::for_join(&args),
            _ => unreachable!("join was asked for"),
        }
    }

    #[test]
    fn defaults_need_no_flags() {
        let config = resolve(&["lab"]).unwrap();
        assert_eq!(config.listen, LISTEN_DEFAULT);
        assert!(config.mdns && config.upnp);
        assert_eq!(config.relay, RelayMode::Auto);
        let config = resolve(&["lab", "--relay", "off", "--no-upnp"]).unwrap();
        assert_eq!((config.relay, config.upnp), (RelayMode::Off, false));
        assert_eq!(config.ram_budget, 4 << 30);
        assert_eq!((config.replica_budget, config.replica_rate), (50 << 28, None));
        for (text, budget) in [("off", 0), ("0", 0), ("3MiB", 3 << 20)] {
            let config = resolve(&["lab", "--replica-budget", text, "--replica-rate", "1MB/s"]);
            let config = config.unwrap();
            assert_eq!((config.replica_budget, config.replica_rate), (budget, Some(1_000_000)));
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        for (extra, named) in [
            (vec!["no spaces"], "--swarm"),
            (vec![""], "--swarm"),
            (vec!["lab", "--control", "0.0.0.0:80"], "--http 0.0.0.0:80: other machines could ask"),
            (vec!["lab", "--api-key", "a b"], "--api-key"),
            (vec!["lab", "--cors", "app.example"], "--cors app.example"),
            (vec!["lab", "--cors", "*"], "--cors *"),
            (vec!["lab", "--find-timeout", "0"], "--find-timeout"),
            (vec!["lab", "--upload-limit", "10KB/s"], "--upload-limit"),
            (vec!["lab", "--download-limit", "0"], "--download-limit"),
            (vec!["lab", "--replica-rate", "1KB/s"], "--replica-rate"),
            (vec!["lab", "--replica-budget", "51GiB"], "--replica-budget 51.00 GiB"),
            (vec!["lab", "--replica-budget", "some"], "--replica-budget"),
        ] {
            let error = resolve(&extra).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
