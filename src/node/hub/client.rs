//! Requests to the Hub, or to a mirror of it.
//!
//! Invariant: the token goes to the endpoint alone. Redirects are followed here, one by one, and a
//! request to any other scheme, host or port carries no token; nor does one over plain HTTP to
//! another machine. A redirect never leads from HTTPS to HTTP.
//!
//! API: <https://huggingface.co/docs/hub/api>.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::{Response, StatusCode, Uri, header};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{ConnectProxyConnector, Connector, TcpConnector};
use ureq::{Agent, Body};

use super::error::HubError;
use super::tls::Tls;
use doppler_store::regular;

const ENDPOINT: &str = "https://huggingface.co";
/// The most redirects of a request.
const REDIRECTS_MAX: usize = 8;
/// The longest answer of the API.
const JSON_BYTES_MAX: u64 = 16 << 20;
/// The longest token, and the longest file with one.
const TOKEN_BYTES_MAX: usize = 512;
/// How long a connection may take to be made, an answer to begin, and more of it to come.
const CONNECT_MAX: Duration = Duration::from_secs(10);
const ANSWER_MAX: Duration = Duration::from_secs(30);
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The longest wait that a server may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);

/// Origins of this machine: no proxy is asked for them.
const LOOPBACK: [&str; 3] = ["http://127.0.0.1:", "http://localhost:", "http://[::1]:"];

/// How often something is tried.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// The wait after the first failure; it doubles each time, up to 32 times this.
    pub first: Duration,
    /// Attempts in a row that may bring nothing.
    pub tries: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self { first: Duration::from_millis(500), tries: 7 }
    }
}

impl Patience {
    /// The wait before attempt `tries` + 1.
    pub fn wait(self, tries: u32, asked: Option<Duration>) -> Duration {
        let own = self.first * 2_u32.pow(tries.saturating_sub(1).min(5));
        asked.map_or(own, |asked| asked.min(RETRY_AFTER_MAX).max(own))
    }
}

/// Why a request failed.
#[derive(Debug)]
pub enum Failed {
    /// It may succeed later.
    Again {
        error: HubError,
        after: Option<Duration>,
    },
    /// The server refuses it with this status.
    Refused {
        status: StatusCode,
        url: String,
        code: String,
    },
    Final(HubError),
}

/// An answer, and who gave it.
pub struct Reply {
    pub url: String,
    pub response: Response<Body>,
}

/// See the module.
pub struct Client {
    agent: Agent,
    endpoint: String,
    origin: String,
    token: Option<String>,
    pub patience: Patience,
}

/// What the environment says.
#[derive(Default)]
pub struct Settings {
    pub endpoint: Option<String>,
    pub token: Option<String>,
    /// PEM file of certificate authorities.
    pub authorities: Option<PathBuf>,
}

impl Settings {
    /// `HF_ENDPOINT`, `HF_TOKEN` or a token's file, `SSL_CERT_FILE`.
    pub fn of_environment() -> Self {
        let text = |name: &str| std::env::var(name).ok().filter(|text| !text.trim().is_empty());
        let file = text("HF_TOKEN_PATH").map(PathBuf::from);
        let file = file.or_else(|| Some(super::cache::home()?.join("token")));
        let kept = || file.and_then(|file| regular::read_text(&file).ok());
        let token = text("HF_TOKEN").or_else(kept).map(|token| token.trim().to_owned());
        Self {
            endpoint: text("HF_ENDPOINT"),
            token: token.filter(|token| !token.is_empty()),
            authorities: text("SSL_CERT_FILE").map(PathBuf::from),
        }
    }
}

impl Client {
    /// # Errors
    /// If the endpoint is no URL, the token cannot be a header, or a certificate authority is none.
    pub fn new(settings: Settings) -> Result<Self, HubError> {
        let endpoint = settings.endpoint.unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let answer = |problem: &str| HubError::Answer {
            host: endpoint.clone(),
            problem: problem.to_owned(),
        };
        let origin = origin(&endpoint)
            .ok_or_else(|| answer("HF_ENDPOINT is no URL like https://huggingface.co"))?;
        let token = settings.token;
        let plain = |token: &String| {
            token.len() <= TOKEN_BYTES_MAX && token.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if token.as_ref().is_some_and(|token| !plain(token)) {
            return Err(HubError::Access("the Hub's token (HF_TOKEN) is no token".to_owned()));
        }
        let authorities = match &settings.authorities {
            None => Vec::new(),
            Some(file) => {
                let pem = regular::read(file).map_err(HubError::io(file))?;
                doppler_mesh::certificates(&pem)
                    .map_err(|problem| answer(&format!("SSL_CERT_FILE: {problem}")))?
            }
        };
        let tls = Tls::new(authorities).map_err(|error| answer(&error.to_string()))?;
        let is_here = LOOPBACK.iter().any(|here| origin.starts_with(here));
        let mut config = Agent::config_builder();
        if is_here {
            config = config.proxy(None);
        }
        let config = config
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("doppler-node/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(CONNECT_MAX))
            .timeout_connect(Some(CONNECT_MAX))
            .timeout_recv_response(Some(ANSWER_MAX))
            .timeout_per_read(Some(SILENCE_MAX))
            .build();
        let connector =
            ().chain(ConnectProxyConnector::default()).chain(TcpConnector::default()).chain(tls);
        let agent = Agent::with_parts(config, connector, DefaultResolver::default());
        Ok(Self { agent, endpoint, origin, token, patience: Patience::default() })
    }

    /// Without a slash at its end.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub const fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Whether the token may go there.
    fn may_know_token(&self, url: &str) -> bool {
        let is_safe = self.origin.starts_with("https://")
            || LOOPBACK.iter().any(|here| self.origin.starts_with(here));
        is_safe && origin(url).as_deref() == Some(&self.origin)
    }

    /// One attempt, redirects included. `range` is in bytes, its end excluded.
    pub fn once(&self, url: &str, range: Option<(u64, u64)>) -> Result<Reply, Failed> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTS_MAX {
            let mut request = self.agent.get(&url);
            if let Some(token) = self.token.as_ref().filter(|_| self.may_know_token(&url)) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            if let Some((start, end)) = range {
                request = request.header(header::RANGE, format!("bytes={start}-{}", end - 1));
            }
            let response = request.call().map_err(|error| broken(&url, &error))?;
            let status = response.status();
            if status.is_success() {
                return Ok(Reply { url, response });
            }
            let field = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
            match status.as_u16() {
                301 | 302 | 303 | 307 | 308 => {
                    let to = field("location").and_then(|to| resolve(&url, to));
                    url = to.ok_or_else(|| Failed::Final(answer(&url, "a redirect to nowhere")))?;
                }
                408 | 429 | 500..=599 => {
                    let after = field("retry-after").and_then(|text| text.trim().parse().ok());
                    let error = answer(&url, &format!("it answers {status}"));
                    return Err(Failed::Again { error, after: after.map(Duration::from_secs) });
                }
                _ => {
                    let code = field("x-error-code").unwrap_or_default().to_owned();
                    return Err(Failed::Refused { status, url, code });
                }
            }
        }
        Err(Failed::Final(answer(&url, "too many redirects")))
    }

    /// Tries until it succeeds, is refused, or patience ends.
    pub fn patiently<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T, Failed>,
    ) -> Result<T, Failed> {
        let mut tries = 0;
        loop {
            match attempt() {
                Err(Failed::Again { error, after }) => {
                    tries += 1;
                    if tries >= self.patience.tries {
                        return Err(Failed::Final(error));
                    }
                    std::thread::sleep(self.patience.wait(tries, after));
                }
                other => return other,
            }
        }
    }

    /// A whole answer of at most `limit` bytes, and the URL of the next page if there is one.
    pub fn whole(&self, url: &str, limit: u64) -> Result<(Vec<u8>, Option<String>), Failed> {
        self.patiently(|| {
            let Reply { url, response } = self.once(url, None)?;
            let next = response.headers().get(header::LINK).and_then(|link| link.to_str().ok());
            let next = next.and_then(next_page).and_then(|next| resolve(&url, next));
            let mut bytes = Vec::new();
            let body = response.into_body().into_with_config().limit(u64::MAX).reader();
            body.take(limit + 1).read_to_end(&mut bytes).map_err(|error| cut_off(&url, &error))?;
            if bytes.len() as u64 > limit {
                let problem = format!("it answers with more than {limit} bytes");
                return Err(Failed::Final(answer(&url, &problem)));
            }
            Ok((bytes, next))
        })
    }

    /// An answer of the API, and the URL of the next page. `path` begins with a slash, or is such a
    /// URL.
    pub fn json<T: DeserializeOwned>(&self, path: &str) -> Result<(T, Option<String>), Failed> {
        let url = match path.starts_with('/') {
            true => format!("{}{path}", self.endpoint),
            false => path.to_owned(),
        };
        let (bytes, next) = self.whole(&url, JSON_BYTES_MAX)?;
        let value = serde_json::from_slice(&bytes).map_err(|error| {
            Failed::Final(answer(&url, &format!("its answer is not the API's: {error}")))
        })?;
        Ok((value, next))
    }
}

/// The scheme, host and port of a URL.
fn origin(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    let (scheme, host) = (uri.scheme_str()?.to_lowercase(), uri.host()?.to_lowercase());
    let port = uri.port_u16().or(match scheme.as_str() {
        "https" => Some(443),
        "http" => Some(80),
        _ => None,
    })?;
    Some(format!("{scheme}://{host}:{port}"))
}

/// Where a redirect from `url` leads. `None` if that is no HTTP, or no longer encrypted.
fn resolve(url: &str, to: &str) -> Option<String> {
    let from: Uri = url.parse().ok()?;
    let (scheme, host) = (from.scheme_str()?, from.authority()?.as_str());
    let to = if to.contains("://") {
        to.to_owned()
    } else if let Some(rest) = to.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if to.starts_with('/') {
        format!("{scheme}://{host}{to}")
    } else {
        let dir = from.path().rsplit_once('/').map_or("", |(dir, _)| dir);
        format!("{scheme}://{host}{dir}/{to}")
    };
    let leads = origin(&to)?;
    let is_downgrade = scheme == "https" && !leads.starts_with("https://");
    (!is_downgrade).then_some(to)
}

/// The target of `rel="next"` in a Link header.
fn next_page(link: &str) -> Option<&str> {
    link.split(',').find_map(|part| {
        let (target, rest) = part.trim().strip_prefix('<')?.split_once('>')?;
        (rest.contains("rel=\"next\"") || rest.contains("rel=next")).then_some(target)
    })
}

/// The host of a URL, for messages. What follows it may contain a signature.
pub fn host(url: &str) -> String {
    let uri: Option<Uri> = url.parse().ok();
    let authority = uri.as_ref().and_then(|uri| uri.authority());
    authority.map_or_else(|| "the Hub".to_owned(), |authority| authority.host().to_owned())
}

pub fn answer(url: &str, problem: &str) -> HubError {
    HubError::Answer { host: host(url), problem: problem.to_owned() }
}

/// A request that got no answer.
fn broken(url: &str, error: &ureq::Error) -> Failed {
    let is_certificate = error.to_string().to_lowercase().contains("certificate");
    let error = HubError::Offline { host: host(url), problem: error.to_string() };
    if is_certificate { Failed::Final(error) } else { Failed::Again { error, after: None } }
}

/// An answer that ended early.
pub fn cut_off(url: &str, error: &std::io::Error) -> Failed {
    let error = HubError::Offline { host: host(url), problem: error.to_string() };
    Failed::Again { error, after: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_resolved_and_never_lose_their_encryption() {
        let from = "https://hub.example/a/b?x=1";
        for (to, want) in [
            ("https://cdn.example/x?sig=1", Some("https://cdn.example/x?sig=1")),
            ("//cdn.example/x", Some("https://cdn.example/x")),
            ("/c", Some("https://hub.example/c")),
            ("c", Some("https://hub.example/a/c")),
            ("http://hub.example/c", None),
            ("ftp://hub.example/c", None),
        ] {
            assert_eq!(resolve(from, to).as_deref(), want, "{to}");
        }
        assert!(resolve("http://127.0.0.1:1/a", "http://127.0.0.1:2/b").is_some());
    }

    #[test]
    fn the_token_goes_to_the_endpoint_only_and_never_in_clear_to_another_machine() {
        let client = |endpoint: &str| {
            let endpoint = Some(endpoint.to_owned());
            Client::new(Settings { endpoint, token: Some("t".into()), authorities: None }).unwrap()
        };
        let hub = client("https://hub.example/");
        for (url, may) in [
            ("https://hub.example/x", true),
            ("https://HUB.example:443/x", true),
            ("https://hub.example:444/x", false),
            ("http://hub.example/x", false),
            ("https://hub.example.evil/x", false),
            ("https://hub.example@evil.example/x", false),
        ] {
            assert_eq!(hub.may_know_token(url), may, "{url}");
        }
        assert!(!client("http://mirror.example").may_know_token("http://mirror.example/x"));
        assert!(client("http://127.0.0.1:80").may_know_token("http://127.0.0.1/x"));
        assert!(!client("http://127.0.0.1.evil:80").may_know_token("http://127.0.0.1.evil/x"));
    }

    #[test]
    fn waits_double_and_a_server_may_ask_for_more_within_bounds() {
        let patience = Patience { first: Duration::from_secs(1), tries: 3 };
        let waits = [1, 2, 3, 40].map(|tries| patience.wait(tries, None).as_secs());
        assert_eq!(waits, [1, 2, 4, 32]);
        assert_eq!(patience.wait(1, Some(Duration::from_secs(9))).as_secs(), 9);
        assert_eq!(patience.wait(1, Some(Duration::from_secs(1 << 40))), RETRY_AFTER_MAX);
    }

    #[test]
    fn the_next_page_is_found_in_the_link_header() {
        let link = "<https://h/a?p=1>; rel=\"prev\", <https://h/a?p=3>; rel=\"next\"";
        assert_eq!(next_page(link), Some("https://h/a?p=3"));
        assert_eq!(next_page("<https://h/a>; rel=\"prev\""), None);
    }
}
