//! `GET /v1/models`: the models that can be asked, in a form that both OpenAI's and Anthropic's
//! clients read.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Api;
use super::failed::{Failed, Form};
use crate::service::Service;

/// Nothing is known of when a model was made.
const EPOCH: &str = "1970-01-01T00:00:00Z";

fn entry(name: &str, id: &str, owner: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": owner,
        "type": "model",
        "display_name": name,
        "created_at": EPOCH,
        "hash": id,
    })
}

/// Every model under a text that means it: its name, or its id if others have the name, too.
fn entries(service: &Service) -> Vec<Value> {
    let local = service.locals.list().into_iter();
    let adapters = service.adapters.names();
    let local = local.flat_map(|(name, id)| {
        // With each of the adapters that `serve` was given, too.
        let with = adapters.iter().map(|adapter| format!("{name}+{adapter}"));
        let names: Vec<String> = std::iter::once(name.clone()).chain(with).collect();
        names.into_iter().map(move |name| (name, id.to_string(), "local".to_owned()))
    });
    // An adapter alone cannot be asked.
    let known = service.models().into_iter();
    let known = known.filter(|model| model.manifest && model.base.is_none());
    let known = known.map(|model| {
        let owner = model.publishers.into_iter().next().unwrap_or_default();
        (model.name, model.id, owner)
    });
    let all: Vec<_> = local.chain(known).collect();
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for (name, ..) in &all {
        *names.entry(name.to_lowercase()).or_default() += 1;
    }
    all.iter()
        .map(|(name, id, owner)| {
            let is_only = names.get(&name.to_lowercase()) == Some(&1);
            entry(if is_only { name } else { id }, id, owner)
        })
        .collect()
}

pub async fn list(State(api): State<Api>) -> Json<Value> {
    let data = entries(&api.service);
    let id = |entry: Option<&Value>| entry.map(|entry| entry["id"].clone());
    let (first, last) = (id(data.first()), id(data.last()));
    Json(json!({
        "object": "list", "data": data, "has_more": false, "first_id": first, "last_id": last,
    }))
}

pub async fn one(State(api): State<Api>, Path(name): Path<String>) -> Response {
    let means = |entry: &&Value| entry["id"] == *name || entry["hash"] == *name;
    match entries(&api.service).iter().find(means) {
        Some(entry) => Json(entry.clone()).into_response(),
        None => {
            let message = format!("no model {name:?} is known here (GET /v1/models lists them)");
            Failed::new("unknown_model", message).response(Form::OpenAi)
        }
    }
}
