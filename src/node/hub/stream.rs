//! One request for a range of a weight file, and how far its answer has come.

use ureq::http::header;

use super::client::{Client, Failed, Reply, answer};
use super::error::HubError;
use super::fetch::{Shared, Target, Weight};
use super::listing;
use super::pieces::At;

/// Bytes read at a time.
pub const BUFFER_BYTES: usize = 256 << 10;

/// How far a run of pieces has come.
pub struct Cursor {
    /// The piece that is being filled.
    pub at: At,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Of the piece.
    pub hash: blake3::Hasher,
}

impl Cursor {
    pub fn new(at: At, offset: u64) -> Self {
        Self { at, offset, hash: blake3::Hasher::new() }
    }

    pub fn next_piece(&mut self) {
        self.at.1 += 1;
        self.hash.reset();
    }
}

/// Asks for a range, at the place where the last redirect led. If that has expired, at the Hub again.
pub fn request(shared: &Shared, target: &Target, range: (u64, u64)) -> Result<Reply, Failed> {
    let lock = || target.located.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let located = lock().clone();
    let url = located.as_deref().unwrap_or(&target.of.url);
    let reply = match shared.client.once(url, Some(range)) {
        Err(Failed::Refused { .. }) if located.is_some() => {
            *lock() = None;
            shared.client.once(&target.of.url, Some(range))?
        }
        Err(error) => {
            // Perhaps another host has it.
            *lock() = None;
            return Err(error);
        }
        Ok(reply) => reply,
    };
    check(&reply, range, target.of.size)?;
    *lock() = Some(reply.url.clone());
    Ok(reply)
}

/// Whether an answer is the range that was asked for, or begins with it.
fn check(reply: &Reply, (start, _): (u64, u64), size: u64) -> Result<(), Failed> {
    let wrong = |problem: &str| Err(Failed::Final(answer(&reply.url, problem)));
    if reply.response.status() != 206 {
        return wrong("it does not send parts of files (HTTP ranges)");
    }
    let field = reply.response.headers().get(header::CONTENT_RANGE);
    let field = field.and_then(|field| field.to_str().ok()).unwrap_or_default();
    let parts = field.strip_prefix("bytes ").and_then(|text| text.split_once('/'));
    let Some((sent, whole)) = parts else { return wrong("it sends a part and does not say which") };
    let first = sent.split('-').next().and_then(|first| first.parse().ok());
    if first != Some(start) || whole != "*" && whole.parse() != Ok(size) {
        return wrong(&format!("asked from byte {start} of {size}, it sends {field:?}"));
    }
    Ok(())
}

/// The error for a file that is not sent.
pub fn refused(client: &Client, of: &Weight, failed: Failed) -> HubError {
    match failed {
        Failed::Refused { status, url, .. } if status != 401 && status != 403 => {
            answer(&url, &format!("it answers {status} for {}", of.name))
        }
        failed => listing::explain(client, &of.repo, None, failed),
    }
}
