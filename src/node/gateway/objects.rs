//! `GET /shards/ID`: an object that is held here, whole or a range of it, raw or with its proof.
//!
//! Refuses: what is not held, ids that are no hashes, ranges outside the object, more replies
//! at once than `REPLIES_MAX`, a reader slower than `RATE_MIN`. Everything sent was proved by
//! [`ShardServe`]; a part that turns out damaged breaks the reply off before it.
//!
//! A bao reply is the encodings of the range cut at every `PIECE_BYTES` of the object, one
//! after another, each starting from the root; so it is proved while it arrives.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::Refused;
use super::connections::Pressure;
use super::select::{BAO_TYPE, Form, Selection, etag, select};
use doppler_store::verified::encoded_bytes;
use doppler_store::{ByteRange, ReadError, ShardId, ShardServe};

/// Bytes of the object read and proved at once.
pub const PIECE_BYTES: u64 = 1 << 20;
/// Pieces of one reply in memory while another is written.
const AHEAD: usize = 2;
/// Replies at once: with `AHEAD` they bound 48 MiB in memory.
const REPLIES_MAX: usize = 16;
/// Wait for a place among them before the asker is told to come again.
/// By then a reader that holds one and takes nothing has been cut off (`STALL_PRESSED_MAX`).
const SLOT_WAIT: Duration = Duration::from_millis(3500);
/// How long one piece's disk read may take.
const READ_MAX: Duration = Duration::from_secs(10);
/// A reply slower than this is broken off, however steadily it drips, after `RATE_GRACE`.
const RATE_MIN: u64 = 32 * 1024;
const RATE_GRACE: Duration = Duration::from_secs(10);

/// The size of the whole object, with every reply.
const SIZE_HEADER: HeaderName = HeaderName::from_static("x-doppler-size");

/// What the gateway reads from.
#[derive(Clone)]
pub struct Objects {
    serve: Arc<dyn ShardServe>,
    slots: Arc<Semaphore>,
    /// Told of those who wait for one.
    pressure: Pressure,
}

/// `?format=raw|bao&bytes=FIRST-LAST`
#[derive(Debug, Default, Deserialize)]
pub struct Wanted {
    format: Option<String>,
    bytes: Option<String>,
}

impl Objects {
    pub fn new(serve: Arc<dyn ShardServe>, pressure: Pressure) -> Self {
        Self { serve, slots: Arc::new(Semaphore::new(REPLIES_MAX)), pressure }
    }

    /// Answers for one object. `kind` is the media type of its bytes.
    pub async fn reply(
        &self,
        shard: ShardId,
        kind: &'static str,
        headers: &HeaderMap,
        wanted: &Wanted,
    ) -> Result<Response, Refused> {
        let Selection { form, asked, unchanged } =
            select(shard, headers, wanted.format.as_deref(), wanted.bytes.as_deref())?;
        let tag = etag(shard, form);
        let waiting = self.pressure.wait();
        let slot = timeout(SLOT_WAIT, Arc::clone(&self.slots).acquire_owned()).await;
        drop(waiting);
        // The semaphore is never closed.
        let Ok(Ok(slot)) = slot else { return Err(Refused::busy("too many replies at once")) };

        // One group, for the object's size and to know that it is held.
        let first = ByteRange::at(asked.first(), 1).ok_or_else(|| unsatisfiable(shard, None))?;
        let size = self.encode(shard, first, form).await?.0;
        let range = asked.within(size).ok_or_else(|| unsatisfiable(shard, Some(size)))?;
        let mut reply = Response::new(Body::empty());
        let fields = reply.headers_mut();
        fields.insert(header::ETAG, value(&tag)?);
        fields.insert(
            header::CACHE_CONTROL,
            HeaderValue::from_static("public, max-age=31536000, immutable"),
        );
        fields.insert(header::VARY, HeaderValue::from_static("accept"));
        fields.insert(SIZE_HEADER, HeaderValue::from(size));
        if unchanged {
            *reply.status_mut() = StatusCode::NOT_MODIFIED;
            return Ok(reply);
        }
        let pieces = cut(range);
        let length = match form {
            Form::Raw => range.len(),
            Form::Bao => pieces.iter().filter_map(|piece| encoded_bytes(size, *piece)).sum(),
        };
        fields.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        let kind = if form == Form::Bao { BAO_TYPE } else { kind };
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        if form == Form::Raw {
            fields.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
            if headers.contains_key(header::RANGE) && range.len() < size || wanted.bytes.is_some() {
                let range = format!("bytes {}-{}/{size}", range.start(), range.end() - 1);
                fields.insert(header::CONTENT_RANGE, value(&range)?);
                *reply.status_mut() = StatusCode::PARTIAL_CONTENT;
            }
        }
        // What is missing or damaged at the start is said in words; later it ends the reply.
        let first = self.encode(shard, pieces[0], form).await?.1;
        *reply.body_mut() = Body::from_stream(self.body(shard, form, first, pieces, slot));
        Ok(reply)
    }

    /// The object's size and a range of it, in the form asked for.
    async fn encode(
        &self,
        shard: ShardId,
        range: ByteRange,
        form: Form,
    ) -> Result<(u64, Vec<Bytes>), Refused> {
        let encoded = timeout(READ_MAX, self.serve.encode(shard, range)).await;
        let encoded = encoded.map_err(|_| Refused::busy("the disk does not answer"))?;
        let encoded = encoded.map_err(|error| refused(shard, error))?;
        let size = encoded.size;
        let parts = match form {
            Form::Bao => vec![encoded.bytes],
            Form::Raw => encoded.data(range).ok_or_else(|| {
                Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "bad encoding".into())
            })?,
        };
        Ok((size, parts))
    }

    /// The reply's bytes. Reads ahead by `AHEAD` pieces, and only as the reader takes them.
    fn body(
        &self,
        shard: ShardId,
        form: Form,
        first: Vec<Bytes>,
        pieces: Vec<ByteRange>,
        slot: OwnedSemaphorePermit,
    ) -> impl Stream<Item = std::io::Result<Bytes>> + Send + use<> {
        let objects = self.clone();
        let rest = stream::iter(pieces.into_iter().skip(1))
            .map(move |piece| {
                let objects = objects.clone();
                async move { objects.encode(shard, piece, form).await.map(|(_, parts)| parts) }
            })
            .buffered(AHEAD);
        let parts = stream::once(async { Ok(first) }).chain(rest).flat_map(|parts| {
            let parts = match parts {
                Ok(parts) => parts.into_iter().map(Ok).collect(),
                Err(refused) => vec![Err(std::io::Error::other(refused.error))],
            };
            stream::iter(parts)
        });
        let (started, mut sent) = (Instant::now(), 0);
        parts.map(move |part| {
            // Held until the last byte is taken: that is what bounds memory.
            let _slot = &slot;
            let part = part?;
            let elapsed = started.elapsed();
            if elapsed > RATE_GRACE && sent < RATE_MIN * elapsed.as_secs() {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            sent += part.len() as u64;
            Ok(part)
        })
    }
}

/// A range cut at every `PIECE_BYTES` of the object.
fn cut(range: ByteRange) -> Vec<ByteRange> {
    let mut pieces = Vec::with_capacity((range.len() / PIECE_BYTES) as usize + 2);
    let mut start = range.start();
    while start < range.end() {
        let end = ((start / PIECE_BYTES + 1) * PIECE_BYTES).min(range.end());
        pieces.extend(ByteRange::new(start, end));
        start = end;
    }
    pieces
}

fn value(text: &str) -> Result<HeaderValue, Refused> {
    HeaderValue::from_str(text).map_err(|error| {
        Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", error.to_string())
    })
}

fn unsatisfiable(shard: ShardId, size: Option<u64>) -> Refused {
    let size = size.map_or_else(|| "its size".into(), |size| format!("its {size} bytes"));
    let error = format!("shard {shard}: the range is outside {size}");
    Refused::new(StatusCode::RANGE_NOT_SATISFIABLE, "out_of_range", error)
}

fn refused(shard: ShardId, error: ReadError) -> Refused {
    let label = error.label();
    match error {
        ReadError::NotFound { .. } => {
            let error = format!("shard {shard} is not held here");
            Refused::new(StatusCode::NOT_FOUND, label, error)
        }
        ReadError::OutOfRange { size, .. } => {
            let mut refused = unsatisfiable(shard, Some(size));
            refused.size = Some(size);
            refused
        }
        ReadError::Overloaded(_) => Refused::busy("the store is busy"),
        other => Refused::new(StatusCode::INTERNAL_SERVER_ERROR, label, other.to_string()),
    }
}

/// `GET /shards/{id}`
pub async fn shard(
    State(objects): State<Objects>,
    Path(id): Path<String>,
    Query(wanted): Query<Wanted>,
    headers: HeaderMap,
) -> Response {
    let reply = match id.parse() {
        Ok(shard) => objects.reply(shard, "application/octet-stream", &headers, &wanted).await,
        Err(error) => Err(Refused::bad_id(&error)),
    };
    reply.unwrap_or_else(IntoResponse::into_response)
}

#[cfg(test)]
#[path = "objects_tests.rs"]
mod tests;
