//! The accept loop of the HTTP port, and each connection's task.
//!
//! Refuses: requests whose headers do not arrive within [`HEAD_TIME`] or are larger than
//! [`BUFFER_BYTES_MAX`], a request without one valid `Host` (RFC 9112, section 3.2), and more
//! requests at once than there are seats. `seats` decides which connection gives way.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::impatient::{Impatient, Pressure, Waiting};
use super::seats::{Asker, Id, Seats};
use super::{Refused, host};

/// Time from a connection's start, or its last answer, to the end of a request's headers.
const HEAD_TIME: Duration = Duration::from_secs(20);
/// Bytes of a connection's input, headers included, and of its output that wait in this process.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// Bytes of output that wait in the system, which doubles this. Small, so that a slow reader's
/// progress is visible, and many slow readers hold little.
const SEND_BUFFER_BYTES: u32 = 256 * 1024;
/// Connections that the system completes before they are accepted.
const BACKLOG: u32 = 1024;
/// How long a request waits for a seat before the client is told to retry. By then readers that
/// take nothing have been cut off.
const SEAT_WAIT: Duration = Duration::from_secs(4);
/// Wait after the system failed to accept a connection: it has no descriptors or no memory left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// Listens like any listener of axum, but with this port's buffers.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // As the standard library does on Unix. On Windows this would share the port.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    // Accepted connections inherit it.
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The address that a request comes from, as its extension.
#[derive(Debug, Clone, Copy)]
pub struct Remote(pub IpAddr);

impl Remote {
    /// Whether a request comes from this machine. One without an address does not.
    pub fn is_here<B>(request: &Request<B>) -> bool {
        request.extensions().get::<Self>().is_some_and(|from| from.0.is_loopback())
    }
}

/// Recognises the owner's requests.
pub type IsOwner = Arc<dyn Fn(&HeaderMap) -> bool + Send + Sync>;

/// What every connection of the port shares.
#[derive(Clone)]
pub struct Server {
    routes: TowerToHyperService<Router>,
    is_owner: IsOwner,
    pressure: Pressure,
    seats: Arc<Mutex<Seats<CancellationToken>>>,
    /// Notified whenever a seat is free again.
    freed: Arc<Notify>,
}

impl Server {
    pub fn new(routes: Router, is_owner: IsOwner, pressure: Pressure) -> Self {
        let seats = Arc::new(Mutex::new(Seats::new()));
        let routes = TowerToHyperService::new(routes);
        Self { routes, is_owner, pressure, seats, freed: Arc::default() }
    }

    /// Serves until `stopping`. Then no connection is accepted, silent ones are closed, and
    /// requests in service are answered.
    pub async fn run(self, listener: TcpListener, stopping: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                () = stopping.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, from)) => {
                    self.admit(stream, Remote(from.ip().to_canonical()), &stopping)
                }
                // It was gone before it was accepted.
                Err(error) if is_the_peers(&error) => {}
                Err(error) => {
                    tracing::warn!("the HTTP port cannot accept a connection: {error}");
                    if let Some(close) = self.seats().evict() {
                        close.cancel();
                    }
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    fn admit(&self, stream: TcpStream, from: Remote, stopping: &CancellationToken) {
        let close = CancellationToken::new();
        let (id, gone) = self.seats().enter(close.clone());
        if let Some(gone) = gone {
            gone.cancel();
        }
        let connection = Entered { id, server: self.clone() };
        let stopping = stopping.clone();
        tokio::spawn(async move {
            let stream = TokioIo::new(Impatient::new(stream, connection.server.pressure.clone()));
            let service = service_fn(|request| connection.server.serve(id, from, request));
            let mut serving = pin!(
                http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIME)
                    .max_buf_size(BUFFER_BYTES_MAX)
                    .serve_connection(stream, service)
            );
            let mut told = false;
            loop {
                tokio::select! {
                    // Broken, timed out or ended makes no difference here.
                    _ = serving.as_mut() => return,
                    () = close.cancelled() => return,
                    () = stopping.cancelled(), if !told => {
                        told = true;
                        serving.as_mut().graceful_shutdown();
                    }
                }
            }
        });
    }

    async fn serve(
        &self,
        id: Id,
        from: Remote,
        mut request: Request<Incoming>,
    ) -> Result<Response, Infallible> {
        request.extensions_mut().insert(from);
        if let Err(refused) = host::check(&request) {
            return Ok(closing(refused.into_response()));
        }
        let asker = if (self.is_owner)(request.headers()) { Asker::Owner } else { Asker::Guest };
        let seat = match self.seat(id, asker).await {
            Ok(seat) => seat,
            Err(retry_s) => {
                let refused = Refused::busy_for("too many requests at once", retry_s);
                return Ok(closing(refused.into_response()));
            }
        };
        let mut response = self.routes.call(request).await?;
        if response.status() == StatusCode::NOT_MODIFIED {
            // It would be the length of a 200's body (RFC 9110, section 8.6), not of an empty one.
            response.headers_mut().remove(header::CONTENT_LENGTH);
        }
        Ok(response.map(|body| Body::new(Seated { body, _seat: seat })))
    }

    /// A seat, or after how many seconds it may be worth asking again.
    async fn seat(&self, id: Id, asker: Asker) -> Result<Seat, u64> {
        let end = Instant::now() + SEAT_WAIT;
        let mut in_line = None;
        loop {
            let mut freed = pin!(self.freed.notified());
            // From here on, no freed seat is missed.
            freed.as_mut().enable();
            if let Some(seat) = self.free_seat(id, asker) {
                return Ok(seat);
            }
            in_line.get_or_insert_with(|| InLine::new(self, asker));
            if timeout_at(end, freed).await.is_err() {
                return Err(self.seats().retry_s(asker, Instant::now().into_std()));
            }
        }
    }

    fn free_seat(&self, id: Id, asker: Asker) -> Option<Seat> {
        let mut seats = self.seats();
        if !seats.begin(id, asker) {
            return None;
        }
        // The last seats are taken under pressure: the readers that hold the others must keep up.
        let pressure = seats.is_crowded().then(|| self.pressure.wait());
        drop(seats);
        Some(Seat { id, asker, server: self.clone(), _pressure: pressure })
    }

    fn seats(&self) -> MutexGuard<'_, Seats<CancellationToken>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether accepting failed for this one connection only.
fn is_the_peers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// A refusal after which the connection is useless.
fn closing(mut response: Response) -> Response {
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

/// A connection from its acceptance to its end.
struct Entered {
    id: Id,
    server: Server,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.server.seats().leave(self.id);
    }
}

/// A request that waits for a seat, until it has one or is gone.
struct InLine<'a> {
    server: &'a Server,
    asker: Asker,
}

impl<'a> InLine<'a> {
    fn new(server: &'a Server, asker: Asker) -> Self {
        server.seats().waits(asker, Instant::now().into_std());
        Self { server, asker }
    }
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.server.seats().gives_up(self.asker);
    }
}

/// A request in service, until its answer has been handed over for writing.
struct Seat {
    id: Id,
    asker: Asker,
    server: Server,
    _pressure: Option<Waiting>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.server.seats();
        seats.end(self.id, self.asker);
        seats.freed(self.asker, Instant::now().into_std());
        drop(seats);
        self.server.freed.notify_waiters();
    }
}

/// An answer's body, which holds its seat.
struct Seated {
    body: Body,
    _seat: Seat,
}

impl HttpBody for Seated {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
