//! `GET /shards/ID`: an object that is held here, whole or ranges of it, raw or with its proof.
//!
//! Refuses: objects that are not held, ids that are not hashes, ranges outside the object, and more
//! pieces in memory at once than `PIECES_MAX`. Everything sent was verified by [`ShardServe`]; if a
//! part is damaged, the reply is aborted before it.
//!
//! A bao reply consists of the encodings of the range, cut at every `PIECE_BYTES` of the object,
//! one after another. Each starts from the root, so the reply can be verified while it arrives.
//!
//! Invariant: a piece waits for its reader no longer than `http` allows a reader to be slow. So a
//! reply waits that long at most for other readers, however slow and however many they are.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::conditions::{Verdict, failed, judge, not_modified};
use super::ranges::{self, Spec};
use super::select::{Asked, BAO_TYPE, Form, Selection, etag, select};
use crate::http::{Pressure, Refused};
use doppler_store::verified::{Encoded, OBJECT_BYTES_MAX, encoded_bytes};
use doppler_store::{ByteRange, ReadError, ShardId, ShardServe};

/// Bytes of the object that are read and verified at a time.
pub const PIECE_BYTES: u64 = 1 << 20;
/// Pieces of one reply in memory, including the one being written.
const AHEAD: usize = 2;
/// Pieces in memory at once, over all replies: 64 MiB and their proofs.
const PIECES_MAX: usize = 64;
/// How long a reply waits for its first piece's place before the client is told to retry. By then
/// readers that take nothing have been cut off (`STALL_PRESSED_MAX`), even if they had every seat.
const PIECE_WAIT: Duration = Duration::from_secs(8);
/// How long one piece's disk read may take.
const READ_MAX: Duration = Duration::from_secs(10);
/// Bytes given to the connection at once, so that few wait there.
const SLICE_BYTES: usize = 64 * 1024;

/// Gives the size of the whole object with every reply.
const SIZE_HEADER: HeaderName = HeaderName::from_static("x-doppler-size");

/// What the gateway reads from.
#[derive(Clone)]
pub struct Objects {
    serve: Arc<dyn ShardServe>,
    places: Arc<Semaphore>,
    /// Told of those who wait for one.
    pressure: Pressure,
}

/// `?format=raw|bao&bytes=FIRST-LAST`
#[derive(Debug, Default, Deserialize)]
pub struct Wanted {
    format: Option<String>,
    bytes: Option<String>,
}

/// A piece's bytes, which keep its place until the last of them is written.
struct Placed {
    bytes: Bytes,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Placed {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A range that is read at once, and the text that follows it in a multipart body.
struct Piece {
    range: ByteRange,
    after: Bytes,
}

/// An answer before its bytes are read.
struct Plan {
    status: StatusCode,
    kind: HeaderValue,
    /// `Content-Range`
    range: Option<HeaderValue>,
    length: u64,
    /// Text before the first piece.
    opening: Bytes,
    pieces: Vec<Piece>,
}

impl Objects {
    pub fn new(serve: Arc<dyn ShardServe>, pressure: Pressure) -> Self {
        Self { serve, places: Arc::new(Semaphore::new(PIECES_MAX)), pressure }
    }

    /// Answers for one object. `kind` is the media type of its bytes.
    pub async fn reply(
        &self,
        shard: ShardId,
        kind: &'static str,
        method: &Method,
        headers: &HeaderMap,
        wanted: &Wanted,
    ) -> Result<Response, Refused> {
        let Selection { form, asked } =
            select(shard, method, headers, wanted.format.as_deref(), wanted.bytes.as_deref())?;
        let tag = etag(shard, form);
        let place = timeout(PIECE_WAIT, self.place()).await;
        let place = place.map_err(|_| Refused::busy("too many replies at once"))??;
        let size = self.size(shard, &asked).await?;

        let mut reply = Response::new(Body::empty());
        let fields = reply.headers_mut();
        fields.insert(header::ETAG, value(&tag)?);
        fields.insert(
            header::CACHE_CONTROL,
            HeaderValue::from_static("public, max-age=31536000, immutable"),
        );
        fields.insert(header::VARY, HeaderValue::from_static("accept"));
        fields.insert(SIZE_HEADER, HeaderValue::from(size));
        let ranged = form == Form::Raw && !matches!(asked, Asked::Part(_));
        let accepts = if ranged { "bytes" } else { "none" };
        fields.insert(header::ACCEPT_RANGES, HeaderValue::from_static(accepts));

        // A part that does not exist is an error of the request. Ranges are evaluated after
        // preconditions.
        let part = match &asked {
            Asked::Part(spec) => Some(spec.within(size).ok_or_else(|| outside(shard, size))?),
            Asked::Whole | Asked::Ranges(_) => None,
        };
        match judge(headers, Some(tag.as_bytes())) {
            Verdict::Proceed => {}
            Verdict::NotModified => return Ok(not_modified(reply)),
            Verdict::Failed => return Err(failed()),
        }
        let plan = match &asked {
            Asked::Ranges(specs) if !is_all_of_nothing(specs, size) => {
                let ranges = ranges::within(specs, size);
                if ranges.is_empty() {
                    return Err(outside(shard, size));
                }
                Plan::parts(&ranges, size, kind)?
            }
            _ => Plan::whole(part.or(ByteRange::new(0, size)), size, form, kind),
        };
        *reply.status_mut() = plan.status;
        let fields = reply.headers_mut();
        fields.insert(header::CONTENT_LENGTH, HeaderValue::from(plan.length));
        fields.insert(header::CONTENT_TYPE, plan.kind);
        fields.extend(plan.range.map(|range| (header::CONTENT_RANGE, range)));
        // Missing or damaged bytes at the start give an error message; later they end the reply.
        let mut begun = vec![plan.opening];
        let mut pieces = plan.pieces.into_iter();
        if let Some(first) = pieces.next() {
            begun.extend(self.piece(shard, first, form, place).await?);
        }
        *reply.body_mut() = Body::from_stream(self.body(shard, form, begun, pieces.collect()));
        Ok(reply)
    }

    /// A place for a piece. While it waits, the readers that hold places are under pressure.
    async fn place(&self) -> Result<OwnedSemaphorePermit, Refused> {
        let _waiting = self.pressure.wait();
        let place = Arc::clone(&self.places).acquire_owned().await;
        // The semaphore is never closed.
        place.map_err(|_| Refused::busy("the gateway is stopping"))
    }

    /// The object's size, learned from any byte of it that is held.
    async fn size(&self, shard: ShardId, asked: &Asked) -> Result<u64, Refused> {
        // No object is that long, and the refusal says how long this one is.
        for start in [OBJECT_BYTES_MAX].into_iter().chain(asked.probes()) {
            let Some(probe) = ByteRange::at(start, 1) else { continue };
            match self.encode(shard, probe).await? {
                Ok(Encoded { size, .. }) | Err(ReadError::OutOfRange { size, .. }) => {
                    return Ok(size);
                }
                Err(ReadError::NotFound { .. }) => {}
                Err(error) => return Err(refused(shard, error)),
            }
        }
        Err(not_held(shard))
    }

    async fn encode(
        &self,
        shard: ShardId,
        range: ByteRange,
    ) -> Result<Result<Encoded, ReadError>, Refused> {
        let encoded = timeout(READ_MAX, self.serve.encode(shard, range)).await;
        encoded.map_err(|_| Refused::busy("the disk does not answer"))
    }

    /// A piece in the form asked for, and the text after it. It keeps its place until it is written.
    async fn piece(
        &self,
        shard: ShardId,
        Piece { range, after }: Piece,
        form: Form,
        place: OwnedSemaphorePermit,
    ) -> Result<Vec<Bytes>, Refused> {
        let encoded = self.encode(shard, range).await?.map_err(|error| refused(shard, error))?;
        let bytes = Bytes::from_owner(Placed { bytes: encoded.bytes, _place: place });
        let mut parts = match form {
            Form::Bao => slices(&bytes),
            Form::Raw => Encoded { size: encoded.size, bytes }.data(range).ok_or_else(|| {
                Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "bad encoding".into())
            })?,
        };
        parts.push(after);
        Ok(parts)
    }

    /// The reply's bytes. Reads at most `AHEAD` pieces ahead of the reader.
    fn body(
        &self,
        shard: ShardId,
        form: Form,
        begun: Vec<Bytes>,
        rest: Vec<Piece>,
    ) -> impl Stream<Item = std::io::Result<Bytes>> + Send + use<> {
        let objects = self.clone();
        let rest = stream::iter(rest)
            .map(move |piece| {
                let objects = objects.clone();
                async move {
                    let place = objects.place().await?;
                    objects.piece(shard, piece, form, place).await
                }
            })
            .buffered(AHEAD);
        stream::once(async { Ok(begun) }).chain(rest).flat_map(|parts: Result<_, Refused>| {
            let parts = match parts {
                Ok(parts) => parts.into_iter().filter(|part| !part.is_empty()).map(Ok).collect(),
                Err(refused) => vec![Err(std::io::Error::other(refused.error))],
            };
            stream::iter(parts)
        })
    }
}

impl Plan {
    /// 200: the whole of a representation, which is the object or a part of it that the query
    /// selects.
    fn whole(range: Option<ByteRange>, size: u64, form: Form, kind: &'static str) -> Self {
        let ranges = range.map(cut).unwrap_or_default();
        let length = match form {
            Form::Raw => range.map_or(0, |range| range.len()),
            Form::Bao => ranges.iter().filter_map(|piece| encoded_bytes(size, *piece)).sum(),
        };
        let kind = if form == Form::Bao { BAO_TYPE } else { kind };
        let pieces = ranges.into_iter().map(|range| Piece { range, after: Bytes::new() });
        Self {
            status: StatusCode::OK,
            kind: HeaderValue::from_static(kind),
            range: None,
            length,
            opening: Bytes::new(),
            pieces: pieces.collect(),
        }
    }

    /// 206: one range, or several as `multipart/byteranges` (RFC 9110, sections 15.3.7 and 14.6).
    fn parts(ranges: &[ByteRange], size: u64, kind: &'static str) -> Result<Self, Refused> {
        let place =
            |range: &ByteRange| format!("bytes {}-{}/{size}", range.start(), range.end() - 1);
        if let [range] = ranges {
            let mut plan = Self::whole(Some(*range), size, Form::Raw, kind);
            plan.status = StatusCode::PARTIAL_CONTENT;
            plan.range = Some(value(&place(range))?);
            return Ok(plan);
        }
        // Random, so that no object contains it, except by an improbable chance.
        let boundary = format!("doppler-{:032x}", rand::random::<u128>());
        let head = |range: &ByteRange| {
            let place = place(range);
            format!("--{boundary}\r\nContent-Type: {kind}\r\nContent-Range: {place}\r\n\r\n")
        };
        let opening = Bytes::from(ranges.first().map(head).unwrap_or_default());
        let mut length = opening.len() as u64;
        let mut pieces = Vec::new();
        for (at, range) in ranges.iter().enumerate() {
            let after = match ranges.get(at + 1) {
                Some(next) => format!("\r\n{}", head(next)),
                None => format!("\r\n--{boundary}--\r\n"),
            };
            length += range.len() + after.len() as u64;
            pieces
                .extend(cut(*range).into_iter().map(|range| Piece { range, after: Bytes::new() }));
            if let Some(last) = pieces.last_mut() {
                last.after = after.into();
            }
        }
        let (status, range) = (StatusCode::PARTIAL_CONTENT, None);
        let kind = value(&format!("multipart/byteranges; boundary={boundary}"))?;
        Ok(Self { status, kind, range, length, opening, pieces })
    }
}

/// Whether a suffix of an empty object is requested. It is the whole object, which no range can
/// express.
fn is_all_of_nothing(specs: &[Spec], size: u64) -> bool {
    size == 0 && specs.iter().any(|spec| matches!(spec, Spec::Last(1..)))
}

/// A piece as a sequence of small slices.
fn slices(bytes: &Bytes) -> Vec<Bytes> {
    let starts = (0..bytes.len()).step_by(SLICE_BYTES);
    starts.map(|at| bytes.slice(at..(at + SLICE_BYTES).min(bytes.len()))).collect()
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

fn outside(shard: ShardId, size: u64) -> Refused {
    let error = format!("shard {shard}: the range is outside its {size} bytes");
    let refused = Refused::new(StatusCode::RANGE_NOT_SATISFIABLE, "out_of_range", error);
    Refused { size: Some(size), ..refused }
}

fn not_held(shard: ShardId) -> Refused {
    let error = format!("shard {shard} is not held here");
    Refused::new(StatusCode::NOT_FOUND, "not_found", error)
}

fn refused(shard: ShardId, error: ReadError) -> Refused {
    let label = error.label();
    match error {
        ReadError::NotFound { .. } => not_held(shard),
        ReadError::OutOfRange { size, .. } => outside(shard, size),
        ReadError::Overloaded(_) => Refused::busy("the store is busy"),
        other => Refused::new(StatusCode::INTERNAL_SERVER_ERROR, label, other.to_string()),
    }
}

/// `GET /shards/{id}`
pub async fn shard(
    State(objects): State<Objects>,
    Path(id): Path<String>,
    Query(wanted): Query<Wanted>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let kind = "application/octet-stream";
    let reply = match id.parse() {
        Ok(shard) => objects.reply(shard, kind, &method, &headers, &wanted).await,
        Err(error) => Err(Refused::bad_id(&error)),
    };
    reply.unwrap_or_else(IntoResponse::into_response)
}

#[cfg(test)]
#[path = "objects_tests.rs"]
pub mod tests;
