//! Which bytes of an object a request asks for, and in which form. Pure.
//!
//! Refuses: more than one range, ranges in other units, a `Range` header on a bao
//! reply (its bytes are not the object's: `?bytes=` selects there).

use axum::http::{HeaderMap, StatusCode, header};

use super::Refused;
use doppler_store::{ByteRange, ShardId};

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

/// A range as it was asked for: RFC 9110, section 14.1.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Whole,
    /// From a byte on, to the last one named (or the object's).
    From(u64, Option<u64>),
    /// So many bytes before the end.
    Last(u64),
}

impl Asked {
    /// A byte that the object must have for the range to make sense.
    pub const fn first(&self) -> u64 {
        match self {
            Self::From(first, _) => *first,
            Self::Whole | Self::Last(_) => 0,
        }
    }

    /// The range within an object of `size` bytes; `None` if there is nothing of it.
    pub fn within(&self, size: u64) -> Option<ByteRange> {
        match *self {
            Self::Whole => ByteRange::new(0, size),
            Self::From(first, last) => {
                let end = last.map_or(size, |last| last.saturating_add(1).min(size));
                ByteRange::new(first, end)
            }
            Self::Last(bytes) => ByteRange::new(size.saturating_sub(bytes), size),
        }
    }
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    pub form: Form,
    pub asked: Asked,
    /// The asker has it already.
    pub unchanged: bool,
}

/// The strong validator of an object in one form; its bytes never change.
pub fn etag(shard: ShardId, form: Form) -> String {
    match form {
        Form::Raw => format!("\"{shard}\""),
        Form::Bao => format!("\"{shard}.bao\""),
    }
}

/// Reads a request's headers and its `format` and `bytes` query values.
pub fn select(
    shard: ShardId,
    headers: &HeaderMap,
    format: Option<&str>,
    bytes: Option<&str>,
) -> Result<Selection, Refused> {
    let accepts_bao = || {
        let accept = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        accept
            .flat_map(|value| value.split(','))
            .any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim() == BAO_TYPE))
    };
    let form = match format {
        Some("bao") => Form::Bao,
        Some("raw") => Form::Raw,
        None if accepts_bao() => Form::Bao,
        None => Form::Raw,
        Some(other) => return Err(bad(format!("format={other:?}: it is raw or bao"))),
    };
    let tag = etag(shard, form);
    let range = headers.get(header::RANGE).map(|value| value.to_str().unwrap_or_default());
    let asked = match (bytes, range, form) {
        (Some(_), Some(_), _) => {
            return Err(bad("give a Range header or ?bytes=, not both".into()));
        }
        (None, Some(_), Form::Bao) => {
            return Err(bad(
                "a Range header would cut the encoding: select with ?bytes=FIRST-LAST".into(),
            ));
        }
        (Some(text), None, _) => parse(text)?,
        (None, Some(text), Form::Raw) => {
            let spec = text.trim().strip_prefix("bytes=");
            let asked = parse(spec.ok_or_else(|| bad(format!("Range {text:?}: give bytes=")))?)?;
            // A range of a version that is no longer: then the whole is wanted.
            let same = headers
                .get(header::IF_RANGE)
                .is_none_or(|value| value.as_bytes() == tag.as_bytes());
            if same { asked } else { Asked::Whole }
        }
        (None, None, _) => Asked::Whole,
    };
    let unchanged = headers.get_all(header::IF_NONE_MATCH).iter().any(|value| {
        let tags = value.to_str().unwrap_or_default().split(',').map(str::trim);
        tags.map(|have| have.strip_prefix("W/").unwrap_or(have))
            .any(|have| have == tag || have == "*")
    });
    Ok(Selection { form, asked, unchanged })
}

/// `FIRST-LAST`, `FIRST-` or `-COUNT`.
fn parse(spec: &str) -> Result<Asked, Refused> {
    if spec.contains(',') {
        return Err(bad(format!("{spec:?}: one range at a time")));
    }
    let wrong = || bad(format!("{spec:?} is no range: give FIRST-LAST, FIRST- or -COUNT"));
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u64>().ok()).flatten().ok_or_else(wrong)
    };
    let (first, last) = spec.trim().split_once('-').ok_or_else(wrong)?;
    match (first, last) {
        ("", count) => Ok(Asked::Last(number(count)?)),
        (first, "") => Ok(Asked::From(number(first)?, None)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            if last < first { Err(wrong()) } else { Ok(Asked::From(first, Some(last))) }
        }
    }
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
    fn ranges_are_read_as_the_rfc_says() {
        for (spec, size, wanted) in [
            ("0-0", 10, Some((0, 1))),
            ("3-", 10, Some((3, 10))),
            ("3-99", 10, Some((3, 10))),
            ("-4", 10, Some((6, 10))),
            ("-40", 10, Some((0, 10))),
            ("-0", 10, None),
            ("10-", 10, None),
            ("10-12", 10, None),
            ("0-18446744073709551615", 10, Some((0, 10))),
        ] {
            let range = parse(spec).unwrap().within(size);
            assert_eq!(range.map(|range| (range.start(), range.end())), wanted, "{spec}");
        }
        for spec in ["", "-", "5", "a-b", "5-4", "1-2,4-5", "+1-2", "1--2", "99999999999999999999-"]
        {
            assert!(parse(spec).is_err(), "{spec:?}");
        }
    }

    #[test]
    fn the_form_comes_from_the_query_or_the_accept_header() {
        let shard = ShardId::of(b"x");
        let bao = headers(&[(header::ACCEPT, "text/html, application/vnd.doppler.bao;q=0.9")]);
        let form =
            |headers: &HeaderMap, format| select(shard, headers, format, None).map(|s| s.form);
        assert_eq!(form(&HeaderMap::new(), None).unwrap(), Form::Raw);
        assert_eq!(form(&bao, None).unwrap(), Form::Bao);
        assert_eq!(form(&bao, Some("raw")).unwrap(), Form::Raw);
        assert_eq!(form(&HeaderMap::new(), Some("bao")).unwrap(), Form::Bao);
        assert!(form(&HeaderMap::new(), Some("zip")).is_err());
        let ranged = headers(&[(header::RANGE, "bytes=0-5")]);
        assert!(form(&ranged, Some("bao")).is_err());
        let asked = select(shard, &ranged, None, None).unwrap().asked;
        assert_eq!(asked, Asked::From(0, Some(5)));
        assert!(select(shard, &ranged, None, Some("0-5")).is_err());
        assert!(select(shard, &headers(&[(header::RANGE, "lines=1-2")]), None, None).is_err());
    }

    #[test]
    fn validators_name_the_object_and_its_form() {
        let shard = ShardId::of(b"x");
        let raw = etag(shard, Form::Raw);
        let known = headers(&[(header::IF_NONE_MATCH, &format!("\"other\", W/{raw}"))]);
        assert!(select(shard, &known, None, None).unwrap().unchanged);
        assert!(!select(shard, &known, Some("bao"), None).unwrap().unchanged);
        let range = |tag: &str| headers(&[(header::RANGE, "bytes=1-"), (header::IF_RANGE, tag)]);
        assert_eq!(select(shard, &range(&raw), None, None).unwrap().asked, Asked::From(1, None));
        assert_eq!(select(shard, &range("\"old\""), None, None).unwrap().asked, Asked::Whole);
    }
}
