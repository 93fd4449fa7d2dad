//! Turns a node's configuration into a mesh: reads addresses and keys, adds what is known from
//! before, and takes the ports of the last run again if they are free.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::sync::Arc;

use anyhow::Context;

use super::address_book::{self, AddressBook};
use super::config::{Config, LISTEN_DEFAULT};
use super::epoch;
use super::identity;
use super::ports::{self, Ports};
use super::swarm_key;
use doppler_mesh::{Address, Mesh, MeshError, MeshHandle, MeshOptions, SwarmKey, Transport};
use doppler_store::ShardServe;

/// A mesh, and what was read on the way.
pub struct Joined {
    pub mesh: MeshHandle,
    pub book: AddressBook,
    pub key: Option<SwarmKey>,
    /// Peers are known from before, or were named.
    pub expects_peers: bool,
}

/// Starts the mesh. The data directory's lock is held by the caller.
///
/// # Errors
/// Name the argument that is wrong.
pub async fn join(
    config: &Config,
    seed: [u8; 32],
    serve: Arc<dyn ShardServe>,
) -> anyhow::Result<Joined> {
    let listen = listen(config)?;
    let file = ports::file(&config.data);
    let mut ports = Ports::load(&file);
    let key = config.swarm_key.as_deref().map(swarm_key::read).transpose();
    let key = key.context("--swarm-key")?;
    let book = AddressBook::load(&address_book::file(&config.data));
    let mut options = options(config, seed)?;
    options.swarm_key.clone_from(&key);
    if !config.alone {
        options.known = book.addresses();
    }
    options.listen = ports.apply(&listen);
    let expects_peers = !options.bootstrap.is_empty() || !options.known.is_empty();
    let mesh = match Mesh::start(options.clone(), Arc::clone(&serve)).await {
        // Somebody took a port just after it was seen to be free.
        Err(MeshError::Swarm(error)) if options.listen != listen => {
            tracing::warn!("{error}; other ports are taken");
            options.listen.clone_from(&listen);
            Mesh::start(options, serve).await?
        }
        started => started?,
    };
    if !config.alone
        && ports.note(&listen, &mesh.listen_addrs())
        && let Err(error) = ports.save(&file)
    {
        tracing::warn!("the ports are not kept: {error:#}");
    }
    Ok(Joined { mesh, book, key, expects_peers })
}

/// Where to listen. Of the addresses that nobody asked for, those of a family that this machine has
/// been built or booted without are left out.
fn listen(config: &Config) -> anyhow::Result<Vec<Address>> {
    let mut listen = addresses("--listen", &config.listen)?;
    if config.listen == LISTEN_DEFAULT {
        let works = |any: IpAddr| UdpSocket::bind((any, 0)).is_ok();
        let (v4, v6) = (works(Ipv4Addr::UNSPECIFIED.into()), works(Ipv6Addr::UNSPECIFIED.into()));
        if v4 || v6 {
            listen
                .retain(|address| address.ip().is_none_or(|ip| if ip.is_ipv4() { v4 } else { v6 }));
        }
    }
    Ok(listen)
}

/// What the configuration says; it listens nowhere yet.
fn options(config: &Config, seed: [u8; 32]) -> anyhow::Result<MeshOptions> {
    let mut options = MeshOptions::new(config.swarm.clone(), seed);
    options.epoch = epoch::begin(&config.data)?;
    options.external = addresses("--external-address", &config.external)?;
    let listen = addresses("--listen", &config.listen)?;
    if listen.iter().any(|address| address.transport() == Transport::WebRtc) {
        options.webrtc_certificate = Some(identity::load_or_create_certificate(&config.data)?);
    }
    if let Some(file) = &config.tls_ca {
        let pem = std::fs::read(file).map_err(|error| error.to_string());
        let roots = pem.and_then(|pem| doppler_mesh::certificates(&pem));
        options.tls_roots =
            roots.map_err(|error| anyhow::anyhow!("--tls-ca {}: {error}", file.display()))?;
    }
    options.bootstrap = addresses("--bootstrap", &config.bootstrap)?;
    options.mdns = config.mdns;
    options.relay = config.relay;
    options.ask_reach = !config.alone;
    options.upnp = config.upnp;
    options.find_timeout = config.find_timeout;
    options.upload_limit = config.upload_limit;
    options.download_limit = config.download_limit;
    Ok(options)
}

fn addresses(flag: &str, texts: &[String]) -> anyhow::Result<Vec<Address>> {
    texts
        .iter()
        .map(|text| text.parse().map_err(|error| anyhow::anyhow!("{flag} {text}: {error}")))
        .collect()
}
