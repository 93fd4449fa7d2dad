//! `serve`: models for programs, without a swarm. A node that meets nobody.

use std::path::Path;

use anyhow::Context;

use super::join::{Listen, stay};
use crate::args::ServeArgs;
use crate::client::Client;
use crate::config::Config;
use crate::events::NodeEvent;
use crate::service::Service;
use crate::{failures, memory, source};

pub fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let config = Config::for_serve(args)?;
    let data = config.data.clone();
    memory::use_small_pages(true);
    let (model, adapters) = (args.model.clone(), args.adapters.clone());
    stay(config, args.json, async move |service: &Service, listen: Listen| {
        for path in &adapters {
            let text = || path.display().to_string();
            service.add_adapter(path).await.with_context(text)?;
        }
        let served = match &model {
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

/// The name of the model that is served: one at a path, or one of the store.
async fn find(service: &Service, model: &Path) -> anyhow::Result<String> {
    let text = model.to_string_lossy();
    if source::is_path(model) {
        return service.add_local(model).await.with_context(|| text.into_owned());
    }
    let ready = service.ready(&text, &[], false).await;
    let ready = ready.with_context(|| source::not_a_directory(&text))?;
    Ok(ready.opened.model.manifest.model_id.clone())
}
