//! `GET /v1/models`: the models that can be asked, in a form that both OpenAI's and Anthropic's
//! clients read.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Api;
use super::failed::{Failed, Form};
use crate::dates;
use crate::service::Service;

/// `created`: when its file was written, or this node learned of the model.
fn entry(name: &str, id: &str, owner: &str, created: SystemTime) -> Value {
    let seconds = created.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    json!({
        "id": name,
        "object": "model",
        "created": seconds,
        "owned_by": owner,
        "type": "model",
        "display_name": name,
        "created_at": date(seconds),
        "hash": id,
    })
}

/// A time in RFC 3339's form, in UTC.
fn date(seconds: u64) -> String {
    format!("{}Z", dates::rfc3339(seconds))
}

/// Every model under a text that means it: its name, or its id if others have the name, too.
fn entries(service: &Service) -> Vec<Value> {
    let local = service.locals.list().into_iter();
    let adapters = service.adapters.names();
    let local = local.flat_map(|(name, id, written)| {
        // With each of the adapters that `serve` was given, too.
        let with = adapters.iter().map(|adapter| format!("{name}+{adapter}"));
        let names: Vec<String> = std::iter::once(name.clone()).chain(with).collect();
        let written = written.unwrap_or(UNIX_EPOCH);
        names.into_iter().map(move |name| (name, id.to_string(), "local".to_owned(), written))
    });
    // An adapter alone cannot be asked.
    let known = service.models().into_iter();
    let known = known.filter(|model| model.manifest && model.base.is_none());
    let known = known.map(|model| {
        let owner = model.publishers.into_iter().next().unwrap_or_default();
        let since = model.id.parse().ok().and_then(|id| service.known_since(id));
        (model.name, model.id, owner, since.unwrap_or(UNIX_EPOCH))
    });
    let all: Vec<_> = local.chain(known).collect();
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for (name, ..) in &all {
        *names.entry(name.to_lowercase()).or_default() += 1;
    }
    all.iter()
        .map(|(name, id, owner, created)| {
            let is_only = names.get(&name.to_lowercase()) == Some(&1);
            entry(if is_only { name } else { id }, id, owner, *created)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_868_799, "2000-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
