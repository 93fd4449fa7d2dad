//! The gateway of a node in a private swarm. What it serves belongs to the swarm, so a client must
//! show that it has the key, with a token derived from it (`SwarmKey::gateway_token`).
//!
//! The page itself is served to anybody, because it asks its user for the key. A request without
//! the token learns the node's peer id, from which the token is derived and which any connection
//! reveals.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// The expected token, and what a refusal contains.
pub struct Lock {
    pub token: String,
    pub peer_id: String,
}

#[derive(Serialize)]
struct Locked {
    error: &'static str,
    code: &'static str,
    peer_id: String,
}

impl Lock {
    fn opens(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
        let given = given.and_then(|value| value.strip_prefix(b"Bearer "));
        // Hashes are compared in constant time.
        given.is_some_and(|given| blake3::hash(given) == blake3::hash(self.token.as_bytes()))
    }
}

/// Admits requests that have the token or ask for a file of the page.
pub async fn lock(State(lock): State<Arc<Lock>>, request: Request, next: Next) -> Response {
    if super::page::is_page(request.uri().path()) || lock.opens(request.headers()) {
        return next.run(request).await;
    }
    let locked = Locked {
        error: "this node's swarm is private: show its key (docs/swarm-key.md)",
        code: "locked",
        peer_id: lock.peer_id.clone(),
    };
    let headers = [(header::CACHE_CONTROL, "no-store"), (header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, headers, Json(locked)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_opens() {
        let lock = Lock { token: "ab12".into(), peer_id: "12D3".into() };
        let asked = |value: &str| {
            let pair = (header::AUTHORIZATION, value.parse().unwrap());
            lock.opens(&HeaderMap::from_iter([pair]))
        };
        assert!(asked("Bearer ab12"));
        for wrong in ["", "Bearer", "Bearer ", "Bearer ab1", "Bearer ab123", "ab12", "Basic ab12"] {
            assert!(!asked(wrong), "{wrong:?}");
        }
        assert!(!lock.opens(&HeaderMap::new()));
    }
}
