//! Who may use the gateway: the pure rule, and the middleware that applies it.
//!
//! It answers this machine only, wherever the port listens. In an open swarm the gateway has no token, because it serves only what any peer can get. But a
//! web page from elsewhere must not learn through the user's browser what this node holds, so:
//! - the host asked for must be a loopback address or `localhost` (a foreign name that
//!   resolves to loopback is DNS rebinding);
//! - an `Origin` must be a page of this machine, which is then named in the reply's CORS headers;
//! - a browser's cross-site request without an origin (an image, a script, a link) gets at most the
//!   page, never data.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::http::{self, Refused, Remote};

/// Methods and headers that a page of this machine may use across origins.
const ALLOW_METHODS: &str = "GET, HEAD, POST";
const ALLOW_HEADERS: &str = "accept, authorization, range, if-match, if-none-match, if-range";
const EXPOSE_HEADERS: &str = "accept-ranges, content-length, content-range, etag, x-doppler-size";

/// Whether a `host[:port]` names this machine whatever a DNS server says.
pub fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(host, _)| host),
        None => authority.split_once(':').map_or(authority, |(host, _)| host),
    };
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether an `Origin` is a page of this machine.
pub fn is_own_page(origin: &str) -> bool {
    let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    authority.is_some_and(|authority| !authority.contains(['/', '@']) && is_loopback(authority))
}

/// The origin to answer to, if the request has one. `host` is the host that the request is
/// addressed to.
///
/// # Errors
/// Why the request is refused.
fn admit(
    host: Option<&str>,
    headers: &HeaderMap,
    page: bool,
) -> Result<Option<HeaderValue>, Refused> {
    let forbidden = |error: &str| Refused::new(StatusCode::FORBIDDEN, "forbidden", error.into());
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or("?"));
    if !host.is_some_and(is_loopback) {
        return Err(forbidden(
            "the Host header must name this machine: use 127.0.0.1 or localhost",
        ));
    }
    match text(header::ORIGIN) {
        Some(origin) if is_own_page(origin) => Ok(headers.get(header::ORIGIN).cloned()),
        Some(_) => Err(forbidden("pages of other machines may not read this node's gateway")),
        None if !page && headers.get("sec-fetch-site").is_some_and(|site| site == "cross-site") => {
            Err(forbidden("other sites may not read this node's gateway"))
        }
        None => Ok(None),
    }
}

/// Applies the rules, and tells browsers who may read the answer.
pub async fn guard(request: Request, next: Next) -> Response {
    if !Remote::is_here(&request) {
        let error = "other machines may use /v1 only".to_owned();
        return Refused::new(StatusCode::FORBIDDEN, "forbidden", error).into_response();
    }
    let page = super::page::is_page(request.uri().path());
    let origin = match admit(http::named(&request), request.headers(), page) {
        Ok(origin) => origin,
        Err(refused) => return refused.into_response(),
    };
    let preflight = request.method() == Method::OPTIONS && origin.is_some();
    let mut response =
        if preflight { StatusCode::NO_CONTENT.into_response() } else { next.run(request).await };
    let headers = response.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-site"));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static(EXPOSE_HEADERS),
        );
        if preflight {
            let methods = HeaderValue::from_static(ALLOW_METHODS);
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            let names = HeaderValue::from_static(ALLOW_HEADERS);
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names);
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(pairs: &[(&'static str, &str)], page: bool) -> Result<Option<HeaderValue>, Refused> {
        let pairs =
            pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        let headers = pairs.collect::<HeaderMap>();
        admit(headers.get("host").map(|host| host.to_str().unwrap()), &headers, page)
    }

    #[test]
    fn only_names_of_this_machine_are_hosts() {
        for host in ["127.0.0.1:80", "localhost", "LOCALHOST:9", "[::1]:80", "127.9.9.9"] {
            assert!(asked(&[("host", host)], false).is_ok(), "{host}");
        }
        for host in
            ["evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]:80", "[::1", ""]
        {
            assert!(asked(&[("host", host)], true).is_err(), "{host}");
        }
        assert!(asked(&[], true).is_err(), "no host at all");
    }

    #[test]
    fn pages_of_other_machines_are_refused() {
        let from = |origin| asked(&[("host", "localhost"), ("origin", origin)], false);
        for origin in ["http://127.0.0.1:5173", "http://localhost", "https://[::1]:1"] {
            assert_eq!(from(origin).unwrap().unwrap(), origin);
        }
        for origin in ["null", "https://evil.example", "http://localhost@evil.example", "file://"] {
            assert!(from(origin).is_err(), "{origin}");
        }
        let cross = [("host", "localhost"), ("sec-fetch-site", "cross-site")];
        assert!(asked(&cross, false).is_err());
        assert!(asked(&cross, true).is_ok(), "a link may lead to the page");
    }
}
