//! `join`: a node that stays until it is told to stop.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::args::JoinArgs;
use crate::config::Config;
use crate::control::ControlServer;
use crate::events::NodeEvent;
use crate::journal::{self, Level};
use crate::notify;
use crate::one_line;
use crate::service::Service;
use crate::{memory, panics, signals};

/// How long an orderly stop may take if a part of the node has failed.
const STOP_BROKEN_MAX: Duration = Duration::from_secs(10);

/// Where a node answers over HTTP.
pub struct Listen {
    pub address: String,
    /// Whether its APIs ask for a key.
    pub has_key: bool,
}

pub fn join(args: &JoinArgs) -> anyhow::Result<()> {
    let config = Config::for_join(args)?;
    memory::use_small_pages(true);
    stay(config, args.json, async |service: &Service, listen: Listen| {
        Ok(NodeEvent::Ready {
            peer_id: service.peer_id(),
            swarm: service.config().swarm.clone(),
            addresses: service.addresses(),
            control: listen.address,
        })
    })
}

/// Runs a node until it is told to stop. `ready` does what is left to do once it answers, and says
/// so.
pub fn stay(
    config: Config,
    json: bool,
    ready: impl AsyncFnOnce(&Service, Listen) -> anyhow::Result<NodeEvent>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(serve(config, json, ready));
    if let Err(error) = &served {
        journal::report(Level::Error, one_line(error));
    }
    journal::flush();
    if served.is_err() {
        // A failed part may have left work that never ends.
        runtime.shutdown_timeout(STOP_BROKEN_MAX);
    }
    served
}

async fn serve(
    config: Config,
    json: bool,
    ready: impl AsyncFnOnce(&Service, Listen) -> anyhow::Result<NodeEvent>,
) -> anyhow::Result<()> {
    // Installed before anything slow, so that a signal during start-up is not lost.
    let stop = signals::ending()?;
    let panicked = panics::first();
    let listen = config.control;
    let (data, has_key) = (config.data.clone(), config.api.key.is_some());
    let service = Service::start(config, move |event| event.print(json)).await?;
    let control = ControlServer::start(listen, &data, Arc::clone(&service)).await?;
    let listen = Listen { address: control.address.to_string(), has_key };
    notify::tell(notify::READY);
    let began = async {
        ready(&service, listen).await?.print(json);
        std::future::pending::<anyhow::Result<()>>().await
    };

    let mut failed = None;
    let broken = tokio::select! {
        _ = stop => None,
        () = service.leave.cancelled() => None,
        what = panicked => Some(what),
        began = began => {
            failed = began.err();
            None
        }
    };
    notify::tell(notify::STOPPING);
    let stopping = async {
        control.stop().await;
        service.stop().await;
    };
    let Some(what) = broken else {
        stopping.await;
        if let Some(error) = failed {
            return Err(error);
        }
        NodeEvent::Stopped.print(json);
        return Ok(());
    };
    // The remaining parts may wait for the failed one.
    let _ = tokio::time::timeout(STOP_BROKEN_MAX, stopping).await;
    bail!("a part of the node failed, so all of it stops: {what}; start it again")
}
