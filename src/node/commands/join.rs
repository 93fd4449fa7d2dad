//! `join`: a node that stays until it is told to stop.

use std::sync::Arc;

use anyhow::Context;

use crate::args::JoinArgs;
use crate::config::Config;
use crate::control::ControlServer;
use crate::events::NodeEvent;
use crate::memory;
use crate::service::Service;

pub fn join(args: &JoinArgs) -> anyhow::Result<()> {
    let config = Config::for_join(args)?;
    memory::use_small_pages(true);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(config, args.json))
}

async fn serve(config: Config, json: bool) -> anyhow::Result<()> {
    // Before anything slow, so that a signal during start-up is not lost.
    let stop = stop_signal()?;
    let listen = config.control;
    let data = config.data.clone();
    let service = Service::start(config, move |event| event.print(json)).await?;
    let control = ControlServer::start(listen, &data, Arc::clone(&service)).await?;
    NodeEvent::Ready {
        peer_id: service.peer_id(),
        swarm: service.config().swarm.clone(),
        addresses: service.addresses(),
        control: control.address.to_string(),
    }
    .print(json);

    stop.await;
    control.stop().await;
    service.stop().await;
    NodeEvent::Stopped.print(json);
    Ok(())
}

/// Resolves at Ctrl-C or, on Unix, SIGTERM. The handlers are installed by this call.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
        Ok(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        })
    }
    #[cfg(not(unix))]
    Ok(async {
        let _ = tokio::signal::ctrl_c().await;
    })
}
