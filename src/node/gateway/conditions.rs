//! Conditional requests: RFC 9110, section 13, for representations that have a strong entity tag
//! or none, and never a date of modification. Pure, and the middleware that applies it.
//!
//! `If-Modified-Since` and `If-Unmodified-Since` are ignored, as they must be where there is no
//! date (13.1.3, 13.1.4). Preconditions are for `GET` and `HEAD` answers of 2xx only (13.2.1).

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{self, HeaderName};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::http::Refused;

/// What follows from a request's preconditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Proceed,
    /// 304: the client has it already.
    NotModified,
    /// 412: the client wants another version.
    Failed,
}

/// An entity tag in a list: its opaque part with the quotes, and whether it is weak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag<'a> {
    weak: bool,
    opaque: &'a [u8],
}

/// A field of entity tags.
enum Tags<'a> {
    Absent,
    /// `*`
    Any,
    /// Members that are not entity tags match nothing.
    List(Vec<Tag<'a>>),
}

/// Evaluates `If-Match`, then `If-None-Match` (13.2.2). `tag` is the representation's.
pub fn judge(headers: &HeaderMap, tag: Option<&[u8]>) -> Verdict {
    let has = |tags: &[Tag<'_>], may_be_weak: bool| {
        tags.iter().any(|have| (may_be_weak || !have.weak) && Some(have.opaque) == tag)
    };
    match tags(headers, &header::IF_MATCH) {
        Tags::List(tags) if !has(&tags, false) => return Verdict::Failed,
        Tags::Absent | Tags::Any | Tags::List(_) => {}
    }
    match tags(headers, &header::IF_NONE_MATCH) {
        Tags::Any => Verdict::NotModified,
        Tags::List(tags) if has(&tags, true) => Verdict::NotModified,
        Tags::Absent | Tags::List(_) => Verdict::Proceed,
    }
}

/// Whether a `Range` applies (13.1.5): there is no `If-Range`, or it is this strong tag.
pub fn range_applies(headers: &HeaderMap, tag: &[u8]) -> bool {
    let mut values = headers.get_all(header::IF_RANGE).iter();
    match (values.next(), values.next()) {
        (None, _) => true,
        (Some(value), None) => value.as_bytes() == tag,
        (Some(_), Some(_)) => false,
    }
}

/// The field's members over all its lines (5.6.1); a quoted tag may contain commas.
fn tags<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Tags<'a> {
    let lines: Vec<&[u8]> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
    match lines[..] {
        [] => Tags::Absent,
        [line] if line.trim_ascii() == b"*" => Tags::Any,
        _ => Tags::List(lines.iter().copied().flat_map(members).collect()),
    }
}

fn members(mut rest: &[u8]) -> Vec<Tag<'_>> {
    let mut tags = Vec::new();
    loop {
        rest = rest.trim_ascii_start();
        if let Some(next) = rest.strip_prefix(b",") {
            rest = next;
            continue;
        }
        if rest.is_empty() {
            return tags;
        }
        let weak = rest.strip_prefix(b"W/");
        let quoted = weak.unwrap_or(rest);
        let close = quoted.strip_prefix(b"\"").and_then(|inside| {
            let end = inside.iter().position(|byte| *byte == b'"')?;
            inside[..end].iter().all(|byte| *byte > b' ' && *byte != 0x7f).then_some(end + 2)
        });
        match close {
            Some(close) => {
                tags.push(Tag { weak: weak.is_some(), opaque: &quoted[..close] });
                rest = &quoted[close..];
            }
            // Not an entity tag; continue with the next member.
            None => {
                let end = rest.iter().position(|byte| *byte == b',').unwrap_or(rest.len());
                rest = &rest[end..];
            }
        }
    }
}

/// 304, with the headers of the answer that it replaces (15.4.5).
pub fn not_modified(mut answer: Response) -> Response {
    *answer.status_mut() = StatusCode::NOT_MODIFIED;
    *answer.body_mut() = Body::empty();
    for name in
        [header::CONTENT_TYPE, header::CONTENT_LENGTH, header::CONTENT_RANGE, header::ACCEPT_RANGES]
    {
        answer.headers_mut().remove(name);
    }
    answer
}

/// 412.
pub fn failed() -> Refused {
    let error = "If-Match names none of what is here".to_owned();
    Refused::new(StatusCode::PRECONDITION_FAILED, "precondition", error)
}

/// Applies the preconditions to answers that have an `ETag`.
pub async fn conditional(request: Request, next: Next) -> Response {
    let names = [header::IF_MATCH, header::IF_NONE_MATCH];
    let asks = matches!(*request.method(), Method::GET | Method::HEAD)
        && names.iter().any(|name| request.headers().contains_key(name));
    if !asks {
        return next.run(request).await;
    }
    let headers = request.headers().clone();
    let answer = next.run(request).await;
    if !answer.status().is_success() {
        return answer;
    }
    match judge(&headers, answer.headers().get(header::ETAG).map(HeaderValue::as_bytes)) {
        Verdict::Proceed => answer,
        Verdict::NotModified => not_modified(answer),
        Verdict::Failed => failed().into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Verdict::{Failed, NotModified, Proceed};

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    const MATCH: &str = "if-match";
    const NONE: &str = "if-none-match";

    #[test]
    fn each_section_on_preconditions_is_followed() {
        for (section, fields, wanted) in [
            ("13.1.1 the current tag", &[(MATCH, "\"a\"")][..], Proceed),
            ("13.1.1 another tag", &[(MATCH, "\"b\"")], Failed),
            ("13.1.1 any", &[(MATCH, "*")], Proceed),
            ("13.1.1 one of a list", &[(MATCH, "\"b\" , \"a\"")], Proceed),
            ("13.1.1 one of several lines", &[(MATCH, "\"b\""), (MATCH, "\"a\"")], Proceed),
            ("13.1.1 weak tags do not match", &[(MATCH, "W/\"a\"")], Failed),
            ("13.1.1 no tag at all", &[(MATCH, "a")], Failed),
            ("13.1.1 an empty list", &[(MATCH, "")], Failed),
            ("13.1.2 the current tag", &[(NONE, "\"a\"")], NotModified),
            ("13.1.2 another tag", &[(NONE, "\"b\"")], Proceed),
            ("13.1.2 any", &[(NONE, " * ")], NotModified),
            ("13.1.2 weak tags match", &[(NONE, "W/\"a\"")], NotModified),
            ("13.1.2 one of several lines", &[(NONE, "\"b\""), (NONE, "\"a\"")], NotModified),
            ("13.1.2 no tag at all", &[(NONE, "a")], Proceed),
            ("13.2.2 If-Match goes first", &[(MATCH, "\"b\""), (NONE, "\"a\"")], Failed),
            ("13.2.2 and then If-None-Match", &[(MATCH, "*"), (NONE, "\"a\"")], NotModified),
            ("5.6.1 empty members", &[(NONE, ",, \"b\",, \"a\",")], NotModified),
            ("8.8.3 a comma within a tag", &[(NONE, "\"x,y\", \"a\"")], NotModified),
            ("8.8.3 what only looks like the tag", &[(NONE, "\"x,\"a\"")], Proceed),
            ("8.8.3.2 tags differ in case", &[(NONE, "\"A\", w/\"a\"")], Proceed),
            ("a bad member among good ones", &[(NONE, "b, \"a\"")], NotModified),
        ] {
            assert_eq!(judge(&headers(fields), Some(b"\"a\"")), wanted, "{section}");
        }
        for (section, fields, wanted) in [
            ("without a tag nothing matches", &[(MATCH, "\"a\"")][..], Failed),
            ("but it is there", &[(MATCH, "*")], Proceed),
            ("and so it is here", &[(NONE, "*")], NotModified),
            ("nor here", &[(NONE, "\"a\"")], Proceed),
        ] {
            assert_eq!(judge(&headers(fields), None), wanted, "{section}");
        }
    }

    #[test]
    fn only_the_strong_tag_lets_a_range_apply() {
        let date = "Sat, 29 Oct 1994 19:43:31 GMT";
        for (section, values, wanted) in [
            ("13.1.5 none", &[][..], true),
            ("13.1.5 the current tag", &["\"a\""], true),
            ("13.1.5 another tag", &["\"b\""], false),
            ("13.1.5 a weak tag", &["W/\"a\""], false),
            ("13.1.5 a date, where there is none", &[date], false),
            ("13.1.5 it is no list", &["\"a\", \"b\""], false),
            ("13.1.5 it has one line", &["\"a\"", "\"a\""], false),
        ] {
            let fields: Vec<_> = values.iter().map(|value| ("if-range", *value)).collect();
            assert_eq!(range_applies(&headers(&fields), b"\"a\""), wanted, "{section}");
        }
    }
}
