//! Determines which bytes of an object a request asks for, and in which form. Pure.
//!
//! `?bytes=` selects a part, and that part is then the whole representation. A `Range` header is
//! ignored with it, as it is for a bao reply, whose bytes are not the object's.

use axum::http::{HeaderMap, Method, StatusCode, header};

use super::conditions::range_applies;
use super::ranges::{Spec, asked};
use crate::http::Refused;
use doppler_store::ShardId;

/// The media type of a bao-encoded reply.
pub const BAO_TYPE: &str = "application/vnd.doppler.bao";

/// How the reply carries the object's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The bytes alone.
    Raw,
    /// With the hash-tree nodes that prove them.
    Bao,
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    Whole,
    /// By the query.
    Part(Spec),
    /// By a `Range` header that applies.
    Ranges(Vec<Spec>),
}

impl Asked {
    /// Bytes that the object may have, to learn its size from one that is held.
    pub fn probes(&self) -> Vec<u64> {
        let specs = match self {
            Self::Whole => &[],
            Self::Part(spec) => std::slice::from_ref(spec),
            Self::Ranges(specs) => &specs[..],
        };
        let firsts = specs.iter().filter_map(|spec| match spec {
            Spec::From(first, _) => Some(*first),
            Spec::Last(_) => None,
        });
        firsts.chain([0]).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    pub form: Form,
    pub asked: Asked,
}

/// The strong validator of an object in one form, whose bytes never change.
pub fn etag(shard: ShardId, form: Form) -> String {
    match form {
        Form::Raw => format!("\"{shard}\""),
        Form::Bao => format!("\"{shard}.bao\""),
    }
}

/// Reads a request's headers and its `format` and `bytes` query values.
///
/// # Errors
/// If the query is wrong. Headers are applied or ignored.
pub fn select(
    shard: ShardId,
    method: &Method,
    headers: &HeaderMap,
    format: Option<&str>,
    bytes: Option<&str>,
) -> Result<Selection, Refused> {
    let form = match format {
        Some("bao") => Form::Bao,
        Some("raw") => Form::Raw,
        None if accepts_bao(headers) => Form::Bao,
        None => Form::Raw,
        Some(other) => return Err(bad(format!("format={other:?}: it is raw or bao"))),
    };
    if let Some(bytes) = bytes {
        let spec = Spec::parse(bytes.trim());
        let spec = spec.ok_or_else(|| {
            bad(format!("bytes={bytes:?} is no range: give FIRST-LAST, FIRST- or -COUNT"))
        })?;
        return Ok(Selection { form, asked: Asked::Part(spec) });
    }
    // Ranges are defined for GET only (14.2).
    let heeded = form == Form::Raw
        && *method == Method::GET
        && range_applies(headers, etag(shard, form).as_bytes());
    let ranges = if heeded { asked(headers) } else { Vec::new() };
    let asked = if ranges.is_empty() { Asked::Whole } else { Asked::Ranges(ranges) };
    Ok(Selection { form, asked })
}

/// Whether `Accept` names the encoding with a weight other than 0 (12.4.2).
fn accepts_bao(headers: &HeaderMap) -> bool {
    let accept = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accept.flat_map(|value| value.split(',')).any(|kind| {
        let mut parts = kind.split(';').map(str::trim);
        let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(BAO_TYPE));
        let refused = parts.any(|part| {
            let weight = part.strip_prefix(['q', 'Q']).and_then(|rest| rest.strip_prefix('='));
            weight.is_some_and(|weight| weight.parse::<f32>() == Ok(0.0))
        });
        named && !refused
    })
}

fn bad(error: String) -> Refused {
    Refused::new(StatusCode::BAD_REQUEST, "bad_request", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_form_comes_from_the_query_or_the_accept_header() {
        let shard = ShardId::of(b"x");
        let form = |accept: &str, format| {
            let accept = headers(&[(header::ACCEPT, accept)]);
            select(shard, &Method::GET, &accept, format, None).map(|selection| selection.form)
        };
        let bao = "text/html, application/vnd.doppler.bao;q=0.9";
        assert_eq!(form("*/*", None).unwrap(), Form::Raw);
        assert_eq!(form(bao, None).unwrap(), Form::Bao);
        assert_eq!(form(bao, Some("raw")).unwrap(), Form::Raw);
        assert_eq!(form("*/*", Some("bao")).unwrap(), Form::Bao);
        assert_eq!(form("Application/VND.doppler.bao", None).unwrap(), Form::Bao);
        assert_eq!(form("application/vnd.doppler.bao; q=0.0", None).unwrap(), Form::Raw);
        assert!(form("*/*", Some("zip")).is_err());
    }

    #[test]
    fn a_range_is_heeded_where_it_is_defined() {
        let shard = ShardId::of(b"x");
        let range = headers(&[(header::RANGE, "bytes=0-5")]);
        let asked = |method: &Method, headers: &HeaderMap, format, bytes| {
            select(shard, method, headers, format, bytes).map(|selection| selection.asked)
        };
        let (get, ranges) = (&Method::GET, Asked::Ranges(vec![Spec::From(0, Some(5))]));
        assert_eq!(asked(get, &range, None, None).unwrap(), ranges);
        assert_eq!(asked(&Method::HEAD, &range, None, None).unwrap(), Asked::Whole);
        assert_eq!(asked(get, &range, Some("bao"), None).unwrap(), Asked::Whole);
        let part = Asked::Part(Spec::Last(9));
        assert_eq!(asked(get, &range, None, Some("-9")).unwrap(), part);
        for wrong in ["", "5", "5-4", "1-2,4-5", "x"] {
            assert!(asked(get, &range, None, Some(wrong)).is_err(), "{wrong:?}");
        }
        let tagged = |tag: &str| {
            let fields = [(header::RANGE, "bytes=0-5"), (header::IF_RANGE, tag)];
            asked(get, &headers(&fields), None, None).unwrap()
        };
        assert_eq!(tagged(&etag(shard, Form::Raw)), ranges);
        assert_eq!(tagged(&etag(shard, Form::Bao)), Asked::Whole);
    }
}
