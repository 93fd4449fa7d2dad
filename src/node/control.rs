//! The control API: HTTP on loopback, JSON in and out, a bearer token from `control.json`.
//!
//! Refuses requests without the token, so that neither another user of the machine nor a web page
//! can control the node. The routes that the node's own page needs are open to that page, too, if it
//! shows the page's key (`page_key`). The gateway and the page (`gateway`), which only read, and the APIs under
//! `/v1` (`http::api`) share its port and need none.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::StreamExt;
use futures::stream;
use rand::Rng;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::api::{
    ApiError, ControlFile, FsckRequest, GcRequest, GenerateEvent, GenerateRequest, ModelInfo,
    PageLink, Peer, Ps, PublishRequest, ResolveRequest, Status, TargetReply, TargetRequest,
};
use super::client::{Answered, control_file};
use super::copies::{CopiesRequest, ModelCopies};
use super::failures;
use super::gateway;
use super::http::{self, IsOwner, Pressure, Remote, Server};
use super::identity::write_private;
use super::invite::Invite;
use super::leaving::LeaveRequest;
use super::page_key::PageKey;
use super::pulls::{PullRequest, PullState, StopRequest};
use super::service::Service;
use super::swarm_key;
use super::trusting::{TrustList, TrustRequest};
use super::work;
use doppler_store::{Collected, regular};

/// The longest request for text: a prompt, however its characters are escaped, within reason.
const GENERATE_BYTES_MAX: usize = 32 << 20;

/// The port at which `serve`, and `join` if it is free, answer unless they are told another.
const USUAL_PORT: u16 = 3677;

/// A running API server; `stop` ends it and removes `control.json`.
pub struct ControlServer {
    pub address: SocketAddr,
    file: PathBuf,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl ControlServer {
    pub async fn start(
        listen: SocketAddr,
        data: &Path,
        service: Arc<Service>,
    ) -> anyhow::Result<Self> {
        let usual = service.config().usual_port.then_some(USUAL_PORT);
        let listener = bind(listen, usual, data)?;
        let address = listener.local_addr().context("the control API has no address")?;
        service.answers_at(address);
        let mut secret = [0; 16];
        rand::rng().fill_bytes(&mut secret);
        let token: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();

        let bearer = format!("Bearer {token}");
        let has_token: IsOwner = Arc::new(move |headers| {
            let given = headers.get(header::AUTHORIZATION);
            given.is_some_and(|given| http::is_same_secret(given.as_bytes(), bearer.as_bytes()))
        });
        let page_key = Arc::new(PageKey::load_or_create(data)?);
        let is_owner: IsOwner = {
            let (has_token, page_key) = (Arc::clone(&has_token), Arc::clone(&page_key));
            Arc::new(move |headers| has_token(headers) || page_key.opens(headers))
        };
        let page_link = page_key.link(&page_address(address));
        let pressure = Pressure::default();
        let routes = command_routes(&service, has_token, page_link)
            .merge(page_routes(&service, Arc::clone(&is_owner)))
            .merge(http::api::routes(Arc::clone(&service), Arc::clone(&is_owner)))
            .merge(gateway::routes(service, pressure.clone()));
        let stop = CancellationToken::new();
        let server = Server::new(routes, is_owner, pressure);
        let task = tokio::spawn(server.run(listener, stop.clone()));

        let file = control_file(data);
        let control = ControlFile { address: address.to_string(), token, pid: std::process::id() };
        write_private(&file, &serde_json::to_vec(&control)?)?;
        Ok(Self { address, file, stop, task })
    }

    pub async fn stop(self) {
        let _ = std::fs::remove_file(&self.file);
        // A client that keeps a stream open does not delay the node: only accepting stops here.
        self.stop.cancel();
        let _ = self.task.await;
    }
}

/// Where a browser of this machine finds the page.
fn page_address(listens: SocketAddr) -> String {
    let port = listens.port();
    match listens.ip() {
        ip if !ip.is_unspecified() => format!("http://{listens}"),
        IpAddr::V4(_) => format!("http://127.0.0.1:{port}"),
        IpAddr::V6(_) => format!("http://[::1]:{port}"),
    }
}

/// What only the node's commands may ask.
fn command_routes(service: &Arc<Service>, has_token: IsOwner, page_link: String) -> Router {
    let link = PageLink { url: page_link };
    Router::new()
        .route("/control/v1/invite", get(invite))
        .route("/control/v1/page", get(async move || Json(link.clone())))
        .route("/control/v1/models/resolve", post(resolve))
        .route("/control/v1/leave", post(leave))
        .route(
            "/control/v1/generate",
            post(generate).layer(DefaultBodyLimit::max(GENERATE_BYTES_MAX)),
        )
        .route("/control/v1/store/gc", post(gc))
        .route("/control/v1/store/fsck", post(fsck))
        .route("/control/v1/status", get(status))
        .with_state(Arc::clone(service))
        .route_layer(middleware::from_fn_with_state(has_token, authorise))
}

/// What the page may ask, too. Nothing of it tells a secret, stops the node, or says more of the
/// machine than the page needs.
fn page_routes(service: &Arc<Service>, is_owner: IsOwner) -> Router {
    Router::new()
        .route("/control/v1/ps", get(ps))
        .route("/control/v1/models", get(models))
        .route("/control/v1/models/copies", post(copies))
        .route("/control/v1/peers", get(peers))
        .route("/control/v1/publish", post(publish))
        .route("/control/v1/pull", post(pull))
        .route("/control/v1/pull/stop", post(stop_pull))
        .route("/control/v1/trust", get(trusted).post(trust))
        .route("/control/v1/store/pin", post(pin))
        .route("/control/v1/store/unpin", post(unpin))
        .route("/control/v1/store/rm", post(remove))
        .with_state(Arc::clone(service))
        .route_layer(middleware::from_fn_with_state(is_owner, authorise))
}

/// Binds `listen`. With port 0 the port that was used last, else the usual one if there is one, if it
/// is free: a page's storage belongs to its address, port included, so the address should outlive a
/// restart.
fn bind(listen: SocketAddr, usual: Option<u16>, data: &Path) -> anyhow::Result<TcpListener> {
    let file = data.join("http.port");
    let last = regular::read_text(&file).ok().and_then(|text| text.trim().parse().ok());
    let again = last
        .or(usual)
        .filter(|_| listen.port() == 0)
        .map(|port| SocketAddr::new(listen.ip(), port));
    let listener = match again {
        Some(again) => http::listen(again).ok(),
        None => None,
    };
    let listener = match listener {
        Some(listener) => listener,
        None => http::listen(listen)
            .with_context(|| format!("the control API cannot listen on {listen}"))?,
    };
    if listen.port() == 0 {
        let port = listener.local_addr().context("the control API has no address")?.port();
        // Without it, the next start merely gets another address.
        let _ = std::fs::write(&file, port.to_string());
    }
    Ok(listener)
}

async fn authorise(State(is_owner): State<IsOwner>, request: Request, next: Next) -> Response {
    if !Remote::is_here(&request) {
        let error = "other machines may use /v1 only".to_owned();
        let error = ApiError { error, label: "forbidden".to_owned(), untrusted: None };
        Refusal { status: StatusCode::FORBIDDEN, error, retry_s: None }.into_response()
    } else if is_owner(request.headers()) {
        next.run(request).await
    } else {
        let error = "the token of control.json is missing or wrong".to_owned();
        let label = "unauthorized".to_owned();
        let error = ApiError { error, label, untrusted: None };
        Refusal { status: StatusCode::UNAUTHORIZED, error, retry_s: None }.into_response()
    }
}

/// An answer that is not 200.
struct Refusal {
    status: StatusCode,
    error: ApiError,
    /// After how many seconds it may be worth asking again, if that is known.
    retry_s: Option<u64>,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.error)).into_response();
        if let Some(retry_s) = self.retry_s {
            response.headers_mut().insert(header::RETRY_AFTER, retry_s.into());
        }
        response
    }
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        let status = failures::of(&error).status;
        // The table's numbers are all statuses.
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, error: ApiError::of(&error), retry_s: failures::retry_s(&error) }
    }
}

async fn status(State(service): State<Arc<Service>>) -> Json<Status> {
    Json(service.status().await)
}

async fn invite(State(service): State<Arc<Service>>) -> Result<Json<Invite>, Refusal> {
    let config = service.config();
    let key = config.swarm_key.as_deref().map(swarm_key::digits).transpose()?;
    Ok(Json(Invite::new(&config.swarm, &service.addresses(), key)))
}

async fn ps(State(service): State<Arc<Service>>) -> Json<Ps> {
    Json(service.ps())
}

async fn models(State(service): State<Arc<Service>>) -> Json<Vec<ModelInfo>> {
    Json(service.models())
}

async fn resolve(
    State(service): State<Arc<Service>>,
    Json(request): Json<ResolveRequest>,
) -> Result<Json<ModelInfo>, Refusal> {
    Ok(Json(service.resolve(&request).await?))
}

async fn copies(
    State(service): State<Arc<Service>>,
    Json(request): Json<CopiesRequest>,
) -> Result<Json<ModelCopies>, Refusal> {
    Ok(Json(service.model_copies(&request)?))
}

async fn leave(
    State(service): State<Arc<Service>>,
    Json(request): Json<LeaveRequest>,
) -> Result<Response, Refusal> {
    Ok(lines(None, service.leave(&request)?))
}

async fn peers(State(service): State<Arc<Service>>) -> Json<Vec<Peer>> {
    Json(service.peers())
}

async fn publish(
    State(service): State<Arc<Service>>,
    Json(request): Json<PublishRequest>,
) -> Result<Response, Refusal> {
    if !request.progress {
        return Ok(Json(service.publish(request, &work::quietly()).await?).into_response());
    }
    Ok(lines(None, work::begin(|report| async move { service.publish(request, &report).await })))
}

async fn generate(
    State(service): State<Arc<Service>>,
    Json(request): Json<GenerateRequest>,
) -> Result<Response, Refusal> {
    let mut events = service.generate(request).await?;
    // A load that fails has a status of its own: the answer begins with its first event.
    match events.recv().await {
        Some(GenerateEvent::Error { label, message }) => {
            Err(anyhow::Error::new(Answered { label, message }).into())
        }
        first => Ok(lines(first, events)),
    }
}

/// Events as one JSON object a line, `first` before the others; ends when their sender does.
fn lines<E: Serialize + Send + 'static>(first: Option<E>, events: mpsc::Receiver<E>) -> Response {
    let others = stream::unfold(events, |mut events| async move {
        let event = events.recv().await?;
        Some((event, events))
    });
    let lines = stream::iter(first).chain(others).map(|event| {
        let mut line = serde_json::to_vec(&event).map_err(std::io::Error::other)?;
        line.push(b'\n');
        Ok::<_, std::io::Error>(Bytes::from(line))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

async fn pull(
    State(service): State<Arc<Service>>,
    Json(request): Json<PullRequest>,
) -> Result<Json<PullState>, Refusal> {
    Ok(Json(service.pull_from_hub(&request)?))
}

async fn stop_pull(
    State(service): State<Arc<Service>>,
    Json(request): Json<StopRequest>,
) -> Result<Json<PullState>, Refusal> {
    Ok(Json(service.stop_pull(&request)?))
}

async fn trusted(State(service): State<Arc<Service>>) -> Result<Json<TrustList>, Refusal> {
    Ok(Json(service.trust_list()?))
}

async fn trust(
    State(service): State<Arc<Service>>,
    Json(request): Json<TrustRequest>,
) -> Result<Json<TrustList>, Refusal> {
    Ok(Json(service.change_trust(&request)?))
}

async fn pin(
    State(service): State<Arc<Service>>,
    Json(request): Json<TargetRequest>,
) -> Result<Response, Refusal> {
    if !request.progress {
        return Ok(Json(service.pin(&request, &work::quietly()).await?).into_response());
    }
    Ok(lines(None, work::begin(|report| async move { service.pin(&request, &report).await })))
}

async fn unpin(
    State(service): State<Arc<Service>>,
    Json(request): Json<TargetRequest>,
) -> Result<Json<TargetReply>, Refusal> {
    Ok(Json(service.unpin(&request).await?))
}

async fn remove(
    State(service): State<Arc<Service>>,
    Json(request): Json<TargetRequest>,
) -> Result<Json<TargetReply>, Refusal> {
    Ok(Json(service.remove(&request).await?))
}

async fn gc(
    State(service): State<Arc<Service>>,
    Json(request): Json<GcRequest>,
) -> Result<Json<Collected>, Refusal> {
    Ok(Json(service.collect(&request).await?))
}

async fn fsck(
    State(service): State<Arc<Service>>,
    Json(request): Json<FsckRequest>,
) -> Result<Response, Refusal> {
    Ok(lines(None, service.fsck(&request)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_port_is_the_last_one_unless_it_is_taken_or_another_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let first = bind(any, None, dir.path()).unwrap();
        let address = first.local_addr().unwrap();
        let second = bind(any, None, dir.path()).unwrap();
        let other = second.local_addr().unwrap();
        assert_ne!(address, other, "the first one is taken");
        drop(second);
        assert_eq!(bind(any, None, dir.path()).unwrap().local_addr().unwrap(), other);
        assert!(bind(address, None, dir.path()).is_err(), "a port that is named is meant");
        std::fs::write(dir.path().join("http.port"), "no port").unwrap();
        assert!(bind(any, None, dir.path()).is_ok());
    }

    #[tokio::test]
    async fn a_port_is_the_last_one_else_the_usual_one_else_any() {
        let dir = tempfile::tempdir().unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let usual = bind(any, None, dir.path()).unwrap();
        let usual_port = usual.local_addr().unwrap().port();
        let forget = || std::fs::remove_file(dir.path().join("http.port")).unwrap();
        forget();
        let port = |usual| bind(any, usual, dir.path()).unwrap().local_addr().unwrap().port();
        let other = port(Some(usual_port));
        assert_ne!(other, usual_port, "it is taken");
        drop(usual);
        assert_eq!(port(Some(usual_port)), other, "the last one comes first");
        forget();
        assert_eq!(port(Some(usual_port)), usual_port);
    }
}
