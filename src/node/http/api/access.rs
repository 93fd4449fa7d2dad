//! Who may use the APIs: the pure rule, and the middleware that applies it.
//!
//! Without a key only this machine may ask, by a name that no DNS server can give to another
//! (`Host`), and in a private swarm with its token, as at the gateway. With a key whoever shows it
//! may ask, from wherever the port listens. A page may ask if it is of this machine or its origin
//! was named with `--cors`. The owner's token of `control.json` always opens.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::failed::{Failed, Form};
use super::submit;
use crate::gateway::{is_loopback, is_own_page};
use crate::http::{self, IsOwner, Remote};

/// How long a browser may remember what a preflight allowed.
const PREFLIGHT_S: &str = "600";

/// The rule's knowledge.
pub struct Access {
    /// The key that the user set.
    pub key: Option<String>,
    /// What is asked for if there is no key: the gateway's token of a private swarm.
    pub token: Option<String>,
    pub cors: Vec<String>,
    pub is_owner: IsOwner,
}

/// What is known of a request.
struct Asked<'a> {
    headers: &'a HeaderMap,
    host: Option<&'a str>,
    is_here: bool,
    is_preflight: bool,
}

impl Access {
    /// The origin to answer to, if the request has one.
    ///
    /// # Errors
    /// Why the request is refused.
    fn admit(&self, asked: &Asked<'_>) -> Result<Option<HeaderValue>, Failed> {
        let forbidden = |why: &str| Failed::new("forbidden", why);
        if self.key.is_none() {
            if !asked.is_here {
                return Err(forbidden("other machines need this node to have an API key"));
            }
            if !asked.host.is_some_and(is_loopback) {
                let why = "the Host header must name this machine: use 127.0.0.1 or localhost";
                return Err(forbidden(why));
            }
        }
        let origin = asked.headers.get(header::ORIGIN);
        if let Some(origin) = origin {
            let text = origin.to_str().unwrap_or("?");
            let is_named = self.cors.iter().any(|named| named.eq_ignore_ascii_case(text));
            let may_ask = is_named || (asked.is_here && is_own_page(text));
            if !may_ask {
                let why = format!("pages of {text} may not ask: --cors {text} allows them");
                return Err(forbidden(&why));
            }
        } else if asked.headers.get("sec-fetch-site").is_some_and(|site| site == "cross-site") {
            return Err(forbidden("other sites may not ask without an origin"));
        }
        if !asked.is_preflight && !self.opens(asked) {
            let why = if self.key.is_some() { "the API key" } else { "the swarm's gateway token" };
            return Err(Failed::new("unauthorized", format!("{why} is missing or wrong")));
        }
        Ok(origin.cloned())
    }

    fn opens(&self, asked: &Asked<'_>) -> bool {
        let Some(wanted) = self.key.as_ref().or(self.token.as_ref()) else { return true };
        let bearer = asked.headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        let bearer = bearer.and_then(|value| value.strip_prefix(b"Bearer "));
        let given = bearer.or_else(|| asked.headers.get("x-api-key").map(HeaderValue::as_bytes));
        let is_key = given.is_some_and(|given| http::is_same_secret(given, wanted.as_bytes()));
        is_key || (asked.is_here && (self.is_owner)(asked.headers))
    }
}

/// Applies the rule, names each answer, and tells browsers who may read it.
pub async fn guard(State(access): State<Arc<Access>>, request: Request, next: Next) -> Response {
    let form = Form::of(request.uri().path());
    let is_preflight = request.method() == Method::OPTIONS;
    let asked = Asked {
        headers: request.headers(),
        host: http::named(&request),
        is_here: Remote::is_here(&request),
        is_preflight,
    };
    let origin = match access.admit(&asked) {
        Ok(origin) => origin,
        Err(failed) => return labelled(failed.response(form)),
    };
    let wished = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let mut response = match is_preflight && origin.is_some() {
        true => StatusCode::NO_CONTENT.into_response(),
        false => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        let exposed = HeaderValue::from_static("x-request-id, request-id, retry-after");
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        if is_preflight {
            let methods = HeaderValue::from_static("GET, POST, OPTIONS");
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            // Clients send many headers of their own, and none of them changes anything here.
            if let Some(wished) = wished {
                headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wished);
            }
            let age = HeaderValue::from_static(PREFLIGHT_S);
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, age);
        }
    }
    labelled(response)
}

/// Gives an answer an id, under the names that the clients look for.
fn labelled(mut response: Response) -> Response {
    if let Ok(id) = HeaderValue::from_str(&submit::id("req_")) {
        response.headers_mut().insert("x-request-id", id.clone());
        response.headers_mut().insert("request-id", id);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(key: Option<&str>, token: Option<&str>) -> Access {
        let (key, token) = (key.map(str::to_owned), token.map(str::to_owned));
        let is_owner: IsOwner = Arc::new(|headers| {
            headers.get("authorization").is_some_and(|value| value == "Bearer owner")
        });
        Access { key, token, cors: vec!["https://app.example".into()], is_owner }
    }

    fn ask(access: &Access, is_here: bool, pairs: &[(&'static str, &str)]) -> &'static str {
        let pairs =
            pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        let headers: HeaderMap = pairs.collect();
        let host = headers.get("host").map(|host| host.to_str().unwrap());
        let asked = Asked { headers: &headers, host, is_here, is_preflight: false };
        match access.admit(&asked) {
            Ok(_) => "ok",
            Err(failed) if failed.label == "forbidden" => "forbidden",
            Err(failed) => {
                assert_eq!(failed.label, "unauthorized");
                "unauthorized"
            }
        }
    }

    #[test]
    fn without_a_key_only_this_machine_asks_by_its_own_name() {
        let open = access(None, None);
        let local = ("host", "127.0.0.1:3677");
        assert_eq!(ask(&open, true, &[local]), "ok");
        assert_eq!(ask(&open, true, &[local, ("authorization", "Bearer anything")]), "ok");
        assert_eq!(ask(&open, true, &[("host", "evil.example")]), "forbidden");
        assert_eq!(ask(&open, true, &[]), "forbidden");
        assert_eq!(ask(&open, false, &[local]), "forbidden");
    }

    #[test]
    fn a_key_opens_from_everywhere_and_nothing_else_does() {
        let locked = access(Some("sesame"), None);
        for is_here in [true, false] {
            let host = ("host", "node.example");
            assert_eq!(ask(&locked, is_here, &[host, ("authorization", "Bearer sesame")]), "ok");
            assert_eq!(ask(&locked, is_here, &[host, ("x-api-key", "sesame")]), "ok");
            for wrong in ["", "Bearer", "Bearer ", "Bearer sesam", "Bearer sesame2", "sesame"] {
                let said = ask(&locked, is_here, &[host, ("authorization", wrong)]);
                assert_eq!(said, "unauthorized", "{wrong}");
            }
            assert_eq!(ask(&locked, is_here, &[host]), "unauthorized");
        }
        let owner = ("authorization", "Bearer owner");
        assert_eq!(ask(&locked, true, &[owner]), "ok");
        assert_eq!(ask(&locked, false, &[owner]), "unauthorized", "only on this machine");
    }

    #[test]
    fn a_private_swarms_models_need_its_token() {
        let private = access(None, Some("t"));
        let local = ("host", "localhost");
        assert_eq!(ask(&private, true, &[local]), "unauthorized");
        assert_eq!(ask(&private, true, &[local, ("authorization", "Bearer t")]), "ok");
    }

    #[test]
    fn pages_ask_if_they_are_of_this_machine_or_named() {
        let open = access(None, None);
        let local = ("host", "localhost");
        let from = |origin| ask(&open, true, &[local, ("origin", origin)]);
        assert_eq!(from("http://localhost:5173"), "ok");
        assert_eq!(from("https://app.example"), "ok");
        for origin in
            ["https://evil.example", "null", "http://app.example", "https://app.example.x"]
        {
            assert_eq!(from(origin), "forbidden", "{origin}");
        }
        assert_eq!(ask(&open, true, &[local, ("sec-fetch-site", "cross-site")]), "forbidden");
        let locked = access(Some("k"), None);
        let far = [("origin", "http://localhost"), ("x-api-key", "k")];
        assert_eq!(ask(&locked, false, &far), "forbidden", "the page of another machine");
    }
}
