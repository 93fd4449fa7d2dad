//! The trustless HTTP gateway and the browser's page: serves what is held here, verified, to
//! anything on this machine that speaks HTTP.
//!
//! It owns no bytes: everything comes from the store through `ShardServe`, as for peers. `guard`
//! decides who may use it; it needs no token, except in a private swarm (`lock`). It changes
//! nothing, with one exception: a page may have the node fetch an object of a known model, within
//! the node's budgets.

mod conditions;
mod embedded;
mod guard;
mod lock;
mod objects;
mod page;
mod program;
mod prompt;
mod ranges;
mod select;

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde::Serialize;
use tokio::sync::Semaphore;

use self::conditions::conditional;
use self::embedded::WithEmbedded;
pub use self::guard::{is_loopback, is_own_page};
use self::lock::Lock;
use self::objects::{Objects, Wanted};
use super::api::{ModelInfo, NodeInfo};
use super::copies::CopiesRequest;
use super::http::{Pressure, Refused};
use super::node_state::NodeState;
use super::service::Service;
use super::{failures, one_line};
use doppler_store::ModelId;

/// The most objects fetched at once for pages.
const BRINGING_MAX: usize = 2;

/// Every route that does not need the control API's token.
/// `pressure` is told of requests that wait for what readers hold.
pub fn routes(service: Arc<Service>, pressure: Pressure) -> Router {
    let objects = Objects::new(Arc::new(WithEmbedded::new(service.serve())), pressure);
    let lock = service.gateway_token().map(|token| Lock { token, peer_id: service.peer_id() });
    let runnable = Router::new()
        .route("/models/{id}/program", get(program::program))
        .route("/models/{id}/prompt", post(prompt::prompt))
        .with_state(Arc::clone(&service))
        .route("/models/embedded", get(program::embedded_model))
        .route("/kernels", get(program::kernels))
        .route("/kernels/{hash}", get(program::kernel));
    let known = Router::new()
        .route("/models", get(models))
        .route("/models/{id}/copies", get(copies))
        .route("/node", get(node))
        .route("/node/state", get(node_state))
        .route("/shards/{id}/bring", post(bring))
        .with_state(Bringing { service, room: Arc::new(Semaphore::new(BRINGING_MAX)) });
    let open = assembled(objects, known.merge(runnable));
    let routes = match lock {
        None => open,
        Some(lock) => open.layer(middleware::from_fn_with_state(Arc::new(lock), lock::lock)),
    };
    routes.layer(middleware::from_fn(guard::guard))
}

/// The routes of stored objects, `others`, and the page for all other paths.
fn assembled(objects: Objects, others: Router) -> Router {
    let stored = Router::new()
        .route("/shards/{id}", get(objects::shard))
        .route("/models/{id}/manifest", get(manifest))
        .with_state(objects);
    // Objects evaluate preconditions themselves, before they read anything.
    let others = others.fallback(other).layer(middleware::from_fn(conditional));
    stored.merge(others).method_not_allowed_fallback(no_such_method)
}

/// Serves a file of the page, or answers 404.
async fn other(method: Method, uri: Uri) -> Response {
    match page::file(uri.path()) {
        Some(file) if matches!(method, Method::GET | Method::HEAD) => file,
        Some(_) => {
            let allow = [(header::ALLOW, HeaderValue::from_static("GET, HEAD"))];
            (allow, no_such_method(method, uri).await).into_response()
        }
        None => {
            let error = format!("{}: there is no such thing here", uri.path());
            Refused::new(StatusCode::NOT_FOUND, "not_found", error).into_response()
        }
    }
}

async fn no_such_method(method: Method, uri: Uri) -> Response {
    let error = format!("{}: {method} is not for this", uri.path());
    Refused::new(StatusCode::METHOD_NOT_ALLOWED, "bad_request", error).into_response()
}

/// The node, and how many objects pages may have it fetch at once.
#[derive(Clone)]
struct Bringing {
    service: Arc<Service>,
    room: Arc<Semaphore>,
}

async fn models(State(Bringing { service, .. }): State<Bringing>) -> Json<Vec<ModelInfo>> {
    Json(service.models())
}

async fn node(State(Bringing { service, .. }): State<Bringing>) -> Json<NodeInfo> {
    Json(service.info())
}

async fn node_state(State(Bringing { service, .. }): State<Bringing>) -> Json<NodeState> {
    Json(service.node_state())
}

/// `GET /models/{id}/copies`: who holds each object of a model.
async fn copies(State(state): State<Bringing>, Path(id): Path<String>) -> Response {
    let copies = id.parse::<ModelId>().map_err(|error| Refused::bad_id(&error));
    let copies = copies.and_then(|model| {
        let request = CopiesRequest { model: model.to_string() };
        let missing = |error| Refused::new(StatusCode::NOT_FOUND, "not_found", one_line(&error));
        state.service.model_copies(&request).map_err(missing)
    });
    match copies {
        Ok(copies) => Json(copies).into_response(),
        Err(refused) => refused.into_response(),
    }
}

/// `POST /shards/{id}/bring`: the node fetches an object of a known model, so that a page can get
/// what only another tab holds. Tabs cannot connect to each other.
async fn bring(State(state): State<Bringing>, Path(id): Path<String>) -> Response {
    let bring = async {
        let shard = id.parse().map_err(|error| Refused::bad_id(&error))?;
        let room =
            state.room.try_acquire().map_err(|_| Refused::busy("enough is being fetched"))?;
        let brought = state.service.bring(shard).await;
        drop(room);
        let brought = brought.map_err(|error| {
            Refused::new(StatusCode::FORBIDDEN, "untrusted", format!("{error:#}"))
        })?;
        match brought {
            None => {
                let error = format!("{shard}: no model known here has such a shard");
                Err(Refused::new(StatusCode::NOT_FOUND, "not_found", error))
            }
            Some(Err(error)) => {
                let failure = failures::of(&error);
                let status = match failure.status {
                    507 => StatusCode::INSUFFICIENT_STORAGE,
                    _ => StatusCode::BAD_GATEWAY,
                };
                Err(Refused::new(status, failure.label, one_line(&error)))
            }
            Some(Ok(size)) => Ok(Json(Brought { size }).into_response()),
        }
    };
    bring.await.unwrap_or_else(IntoResponse::into_response)
}

#[derive(Serialize)]
struct Brought {
    size: u64,
}

/// `GET /models/{id}/manifest`: a manifest is an object like any other; its id is the model's.
async fn manifest(
    State(objects): State<Objects>,
    Path(id): Path<String>,
    Query(wanted): Query<Wanted>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let kind = "application/json";
    let reply = match id.parse::<ModelId>() {
        Ok(model) => objects.reply(model.manifest(), kind, &method, &headers, &wanted).await,
        Err(error) => Err(Refused::bad_id(&error)),
    };
    reply.unwrap_or_else(IntoResponse::into_response)
}

#[cfg(test)]
mod rfc9110_tests;
