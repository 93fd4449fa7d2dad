//! The browser's peer: a page that comes with the binary. It is built from `web/` with
//! `npm run build`. The build is committed, so that building the node needs no Node.js.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// Path, media type, bytes.
const FILES: [(&str, &str, &[u8]); 6] = [
    ("/", "text/html; charset=utf-8", include_bytes!("../../../web/dist/index.html")),
    ("/app.css", "text/css; charset=utf-8", include_bytes!("../../../web/dist/app.css")),
    ("/app.js", "text/javascript; charset=utf-8", include_bytes!("../../../web/dist/app.js")),
    ("/worker.js", "text/javascript; charset=utf-8", include_bytes!("../../../web/dist/worker.js")),
    ("/prover.js", "text/javascript; charset=utf-8", include_bytes!("../../../web/dist/prover.js")),
    (
        "/licences.txt",
        "text/plain; charset=utf-8",
        include_bytes!("../../../web/dist/licences.txt"),
    ),
];

/// The page runs only its own scripts, and may connect to peers anywhere.
const POLICY: &str = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; \
    style-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:; worker-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Whether a path is part of the page (and not data).
pub fn is_page(path: &str) -> bool {
    FILES.iter().any(|(name, ..)| *name == path)
}

/// The files' entity tags, in their order.
static TAGS: LazyLock<[String; FILES.len()]> =
    LazyLock::new(|| FILES.map(|(.., bytes)| format!("\"{}\"", blake3::hash(bytes))));

/// A file of the page; `None` for other paths.
pub fn file(path: &str) -> Option<Response> {
    let at = FILES.iter().position(|(name, ..)| *name == path)?;
    let (_, kind, bytes) = &FILES[at];
    let headers = [
        (header::CONTENT_TYPE, *kind),
        // A newer binary on the same port must not meet an old page.
        (header::CACHE_CONTROL, "no-cache"),
        (header::ETAG, &TAGS[at]),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    Some((headers, *bytes).into_response())
}
