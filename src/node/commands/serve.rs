//! `serve`: models for programs, without a swarm. A node that meets nobody.

use std::io::IsTerminal;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use tokio::time::Instant;

use super::join::{Listen, stay};
use crate::args::ServeArgs;
use crate::client::Client;
use crate::config::Config;
use crate::events::NodeEvent;
use crate::output::note;
use crate::service::Service;
use crate::{failures, memory, source};

/// How often progress is told where no bar shows it.
const TELL_EVERY: Duration = Duration::from_secs(5);

pub fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let config = Config::for_serve(args)?;
    let data = config.data.clone();
    memory::use_small_pages(true);
    let (model, adapters) = (args.model.clone(), args.adapters.clone());
    let json = args.json;
    stay(config, json, async move |service: &Service, listen: Listen| {
        for path in &adapters {
            let text = || path.display().to_string();
            service.add_adapter(path).await.with_context(text)?;
        }
        let served = match &model {
            Some(model) if source::is_path(model) => {
                let (address, text) = (listen.address.clone(), model.display().to_string());
                NodeEvent::Reading { address, model: text.clone() }.print(json);
                Some(read(service, model).await.context(text)?)
            }
            Some(model) => Some(find(service, model).await?),
            None => None,
        };
        Ok(NodeEvent::Serving { address: listen.address, model: served, key: listen.has_key })
    })
    .map_err(|error| match (failures::of(&error).label, Client::find(&data)) {
        ("locked", Ok(Some(node))) => error.context(format!(
            "the node that runs on {} answers at {}/v1 already; give another --data to serve by \
             another",
            data.display(),
            node.address()
        )),
        _ => error,
    })
}

/// Reads the model at a path. Says from time to time how far it is, unless a terminal shows a bar.
async fn read(service: &Service, model: &Path) -> anyhow::Result<String> {
    let mut added = pin!(service.add_local(model));
    let mut tick = tokio::time::interval_at(Instant::now() + TELL_EVERY, TELL_EVERY);
    loop {
        tokio::select! {
            added = &mut added => return added,
            _ = tick.tick() => {
                let opening = service.opening().filter(|_| !std::io::stderr().is_terminal());
                if let Some(opening) = opening {
                    note!("{}", opening.describe());
                }
            }
        }
    }
}

/// The name of the model of the store that is served.
async fn find(service: &Service, model: &Path) -> anyhow::Result<String> {
    let text = model.to_string_lossy();
    let ready = service.ready(&text, &[], false).await;
    let ready = ready.with_context(|| source::not_a_directory(&text))?;
    Ok(ready.opened.model.manifest.model_id.clone())
}
