//! The host that a request is addressed to (RFC 9110, section 7.2; RFC 9112, section 3.2). Pure.

use axum::extract::Request;
use axum::http::{StatusCode, Version, header};

use super::Refused;

/// Checks that a request names its host once and validly.
///
/// # Errors
/// If HTTP/1.1 comes without a `Host`, or any version with two of them or an invalid one.
pub fn check<B>(request: &Request<B>) -> Result<(), Refused> {
    let bad = |error: &str| Refused::new(StatusCode::BAD_REQUEST, "bad_request", error.to_owned());
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) if request.version() < Version::HTTP_11 => {}
        (None, _) => return Err(bad("a request of HTTP/1.1 needs a Host header")),
        (Some(_), Some(_)) => return Err(bad("a request has one Host header, not several")),
        (Some(host), None) if host.to_str().is_ok_and(is_host) => {}
        (Some(_), None) => return Err(bad("the Host header is no HOST or HOST:PORT")),
    }
    match request.uri().authority() {
        Some(authority) if !is_host(authority.as_str()) => Err(bad("the target names no host")),
        _ => Ok(()),
    }
}

/// The `HOST` or `HOST:PORT` that the request is addressed to: from its target, else from its
/// `Host`.
pub fn named<B>(request: &Request<B>) -> Option<&str> {
    match request.uri().authority() {
        Some(authority) => Some(authority.as_str()),
        None => request.headers().get(header::HOST)?.to_str().ok(),
    }
}

/// `uri-host [ ":" port ]` of RFC 3986, not empty.
fn is_host(text: &str) -> bool {
    let (host_is_valid, rest) = match text.strip_prefix('[') {
        Some(inside) => {
            let Some((address, rest)) = inside.split_once(']') else { return false };
            (address.parse::<std::net::Ipv6Addr>().is_ok(), rest)
        }
        None => {
            let end = text.find(':').unwrap_or(text.len());
            let (name, rest) = text.split_at(end);
            let valid =
                |byte: u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(&byte);
            (!name.is_empty() && name.bytes().all(valid), rest)
        }
    };
    let port = rest.strip_prefix(':').unwrap_or(rest);
    let is_port = port.bytes().all(|byte| byte.is_ascii_digit());
    host_is_valid && is_port && (rest.is_empty() || rest.starts_with(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_and_perhaps_a_port() {
        for host in ["localhost", "127.0.0.1:80", "[::1]", "[::1]:80", "localhost:", "a_b.example"]
        {
            assert!(is_host(host), "{host}");
        }
        for host in ["", ":80", "a b", "user@localhost", "[::1", "[x]:1", "[::1]80", "a:b", "a:1:2"]
        {
            assert!(!is_host(host), "{host}");
        }
    }

    #[test]
    fn the_target_says_more_than_the_header() {
        let request = |uri: &str, hosts: &[&str], version| {
            let mut request = Request::builder().uri(uri).version(version);
            for host in hosts {
                request = request.header("host", *host);
            }
            request.body(()).unwrap()
        };
        let v11 = Version::HTTP_11;
        for (uri, hosts, wanted) in [
            ("/", &["localhost"][..], Some("localhost")),
            ("http://localhost:1/", &["evil.example"], Some("localhost:1")),
            ("http://evil.example/", &["localhost"], Some("evil.example")),
            ("/", &["localhost", "localhost"], None),
            ("/", &[""], None),
            ("/", &[], None),
            ("http://me@localhost/", &["localhost"], None),
        ] {
            let request = request(uri, hosts, v11);
            let said = check(&request).ok().and_then(|()| named(&request));
            assert_eq!(said, wanted, "{uri} {hosts:?}");
        }
        assert!(check(&request("/", &[], Version::HTTP_10)).is_ok());
        assert!(check(&request("/", &["a", "b"], Version::HTTP_10)).is_err());
    }
}
