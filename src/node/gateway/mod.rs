//! The trustless HTTP gateway and the browser's page: what is held here, proved, for anything
//! on this machine that speaks HTTP.
//!
//! It owns no bytes: everything comes from the store through `ShardServe`, as peers get it.
//! `guard` says who may ask; it needs no token, but in a private swarm (`lock`). It changes nothing but this: a page may have the
//! node fetch an object of a model that it knows, within the node's budgets.

mod connections;
mod embedded;
mod guard;
mod lock;
mod objects;
mod page;
mod program;
mod select;

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde::Serialize;
use tokio::sync::Semaphore;

pub use connections::{Connections, Pressure};

use self::embedded::WithEmbedded;
use self::lock::Lock;
use self::objects::{Objects, Wanted};
use super::api::{ModelInfo, NodeInfo};
use super::service::Service;
use doppler_store::{BadHash, ModelId};

/// Seconds after which a busy gateway may be asked again.
const RETRY_S: u64 = 1;

/// Objects fetched at once because pages asked.
const BRINGING_MAX: usize = 2;

/// An answer that is not 2xx, as JSON.
#[derive(Debug)]
pub struct Refused {
    status: StatusCode,
    /// A stable name.
    code: &'static str,
    error: String,
    /// The object's size, where a range was outside it.
    size: Option<u64>,
}

#[derive(Serialize)]
struct RefusedBody {
    error: String,
    code: &'static str,
}

impl Refused {
    const fn new(status: StatusCode, code: &'static str, error: String) -> Self {
        Self { status, code, error, size: None }
    }

    fn busy(why: &str) -> Self {
        let error = format!("{why}; ask again in {RETRY_S} s");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", error)
    }

    fn bad_id(error: &BadHash) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", error.to_string())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let body = RefusedBody { error: self.error, code: self.code };
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_S));
        }
        if let Some(size) = self.size
            && let Ok(range) = HeaderValue::from_str(&format!("bytes */{size}"))
        {
            headers.insert(header::CONTENT_RANGE, range);
        }
        response
    }
}

/// Every route that does not need the control API's token.
/// `pressure` is told of requests that wait for what readers hold.
pub fn routes(service: Arc<Service>, pressure: Pressure) -> Router {
    let objects = Objects::new(Arc::new(WithEmbedded::new(service.serve())), pressure);
    let lock = service.gateway_token().map(|token| Lock { token, peer_id: service.peer_id() });
    let runnable = Router::new()
        .route("/models/{id}/program", get(program::program))
        .with_state(Arc::clone(&service))
        .route("/models/embedded", get(program::embedded_model))
        .route("/kernels", get(program::kernels))
        .route("/kernels/{hash}", get(program::kernel));
    let known = Router::new()
        .route("/models", get(models))
        .route("/node", get(node))
        .route("/shards/{id}/bring", post(bring))
        .with_state(Bringing { service, room: Arc::new(Semaphore::new(BRINGING_MAX)) });
    let manifests =
        Router::new().route("/models/{id}/manifest", get(manifest)).with_state(objects.clone());
    let open = shards(objects).merge(known).merge(manifests).merge(runnable).fallback(other);
    let routes = match lock {
        None => open,
        Some(lock) => open.layer(middleware::from_fn_with_state(Arc::new(lock), lock::lock)),
    };
    routes.layer(middleware::from_fn(guard::guard))
}

fn shards(objects: Objects) -> Router {
    Router::new().route("/shards/{id}", get(objects::shard)).with_state(objects)
}

/// A file of the page, or nothing.
async fn other(uri: Uri) -> Response {
    page::file(uri.path()).unwrap_or_else(|| {
        let error = format!("{}: there is no such thing here", uri.path());
        Refused::new(StatusCode::NOT_FOUND, "not_found", error).into_response()
    })
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

/// `POST /shards/{id}/bring`: the node fetches an object of a model that it knows, so that a
/// page can have what only another tab holds: tabs have no way to each other.
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
                let (code, error) = (error.label(), error.to_string());
                Err(Refused::new(StatusCode::BAD_GATEWAY, code, error))
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
    headers: HeaderMap,
) -> Response {
    let reply = match id.parse::<ModelId>() {
        Ok(model) => objects.reply(model.manifest(), "application/json", &headers, &wanted).await,
        Err(error) => Err(Refused::bad_id(&error)),
    };
    reply.unwrap_or_else(IntoResponse::into_response)
}
