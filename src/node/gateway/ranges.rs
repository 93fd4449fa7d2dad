//! Byte ranges: RFC 9110, section 14. Pure.
//!
//! A `Range` that is not understood is ignored, as section 14.2 allows: another unit, malformed
//! text, more than [`RANGES_MAX`] ranges. Ranges that overlap or touch are merged, so an answer is
//! never longer than the object plus the headers of its parts.

use axum::http::{HeaderMap, HeaderValue, header};

use doppler_store::ByteRange;

/// Ranges of one request, at most.
pub const RANGES_MAX: usize = 16;

/// A range as requested (14.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spec {
    /// From a byte on, to the last byte named or to the object's end.
    From(u64, Option<u64>),
    /// This many bytes before the end.
    Last(u64),
}

impl Spec {
    /// `FIRST-LAST`, `FIRST-` or `-COUNT`. A number beyond `u64` counts as `u64::MAX`.
    pub fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| text.parse::<u64>().unwrap_or(u64::MAX))
        };
        match text.split_once('-')? {
            ("", count) => Some(Self::Last(number(count)?)),
            (first, "") => Some(Self::From(number(first)?, None)),
            (first, last) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(Self::From(first, Some(last)))
            }
        }
    }

    /// The part within an object of `size` bytes; `None` if there is none.
    pub fn within(self, size: u64) -> Option<ByteRange> {
        match self {
            Self::From(first, last) => {
                let end = last.map_or(size, |last| last.saturating_add(1).min(size));
                ByteRange::new(first, end)
            }
            Self::Last(bytes) => ByteRange::new(size.saturating_sub(bytes), size),
        }
    }
}

/// The ranges of a `Range` header; empty if there is none or it is ignored.
pub fn asked(headers: &HeaderMap) -> Vec<Spec> {
    let mut values = headers.get_all(header::RANGE).iter();
    match (values.next().map(HeaderValue::to_str), values.next()) {
        (Some(Ok(value)), None) => parse(value).unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// `bytes=` and a list of ranges (14.1.1, 14.1.2); the unit in any case (14.1).
fn parse(value: &str) -> Option<Vec<Spec>> {
    let (unit, list) = value.split_once('=')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let mut specs = Vec::new();
    for member in list.split(',').map(|member| member.trim_matches([' ', '\t'])) {
        // Lists may have empty members (5.6.1).
        if member.is_empty() {
            continue;
        }
        if specs.len() == RANGES_MAX {
            return None;
        }
        specs.push(Spec::parse(member)?);
    }
    Some(specs)
}

/// The parts of these ranges within an object of `size` bytes, in the order of the request. Ranges
/// that overlap or touch are merged, at the place of the first (15.3.7.2).
pub fn within(specs: &[Spec], size: u64) -> Vec<ByteRange> {
    let mut parts: Vec<ByteRange> = Vec::new();
    for range in specs.iter().filter_map(|spec| spec.within(size)) {
        let touches = |part: &ByteRange| part.start() <= range.end() && range.start() <= part.end();
        let (joined, mut apart): (Vec<_>, Vec<_>) =
            parts.iter().copied().enumerate().partition(|(_, part)| touches(part));
        let at = joined.first().map_or(parts.len(), |(at, _)| *at);
        let all = || joined.iter().map(|(_, part)| part).chain([&range]);
        let start = all().map(ByteRange::start).min().unwrap_or_default();
        let end = all().map(ByteRange::end).max().unwrap_or_default();
        apart.extend(ByteRange::new(start, end).map(|range| (at, range)));
        apart.sort_by_key(|(at, _)| *at);
        parts = apart.into_iter().map(|(_, part)| part).collect();
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str, size: u64) -> Option<Vec<(u64, u64)>> {
        let specs = parse(value).filter(|specs| !specs.is_empty())?;
        Some(within(&specs, size).iter().map(|range| (range.start(), range.end())).collect())
    }

    #[test]
    fn each_section_on_ranges_is_followed() {
        // Ignored: `None`. Not satisfiable: an empty list. The object has ten bytes.
        for (section, value, wanted) in [
            ("14.1.2 first and last", "bytes=0-0", Some(&[(0, 1)][..])),
            ("14.1.2 to the end", "bytes=3-", Some(&[(3, 10)])),
            ("14.1.2 all of it", "bytes=0-", Some(&[(0, 10)])),
            ("14.1.2 past the end", "bytes=3-99", Some(&[(3, 10)])),
            ("14.1.2 far past the end", "bytes=3-99999999999999999999", Some(&[(3, 10)])),
            ("14.1.2 a suffix", "bytes=-4", Some(&[(6, 10)])),
            ("14.1.2 a suffix longer than it", "bytes=-40", Some(&[(0, 10)])),
            ("14.1.2 a suffix of u64 and more", "bytes=-99999999999999999999", Some(&[(0, 10)])),
            ("14.1.2 an empty suffix", "bytes=-0", Some(&[])),
            ("14.1.2 begins at the end", "bytes=10-", Some(&[])),
            ("14.1.2 begins behind it", "bytes=10-12", Some(&[])),
            ("14.1.2 begins past u64", "bytes=99999999999999999999-", Some(&[])),
            ("14.1 the unit in any case", "Bytes=0-0", Some(&[(0, 1)])),
            ("14.1 another unit", "lines=0-0", None),
            ("14.1 no unit", "0-0", None),
            ("14.1.1 no space around the sign", "bytes =0-0", None),
            ("14.1.1 no range", "bytes=", None),
            ("14.1.1 only empty members", "bytes= , ,", None),
            ("14.1.1 last before first", "bytes=9-2", None),
            ("14.1.1 one bad member", "bytes=0-0,9-2", None),
            ("14.1.1 no number", "bytes=a-b", None),
            ("14.1.1 a sign", "bytes=+1-2", None),
            ("14.1.1 two hyphens", "bytes=1--2", None),
            ("14.1.1 a hyphen", "bytes=-", None),
            ("14.1.1 no hyphen", "bytes=5", None),
            ("14.1.1 a space within", "bytes=1 - 2", None),
            ("5.6.1 empty members", "bytes=,0-0 ,\t,", Some(&[(0, 1)])),
            ("14.2 two ranges", "bytes=0-1, 4-5", Some(&[(0, 2), (4, 6)])),
            ("14.2 in the order asked for", "bytes=8-,0-1", Some(&[(8, 10), (0, 2)])),
            ("14.2 one of two satisfiable", "bytes=20-,0-1", Some(&[(0, 2)])),
            ("14.2 none of two satisfiable", "bytes=20-,-0", Some(&[])),
            ("15.3.7.2 overlapping", "bytes=4-8,0-5", Some(&[(0, 9)])),
            ("15.3.7.2 touching", "bytes=0-4,5-8", Some(&[(0, 9)])),
            ("15.3.7.2 one joins two", "bytes=0-1,8-9,4-5,1-4", Some(&[(0, 6), (8, 10)])),
            ("15.3.7.2 the same many times", "bytes=0-,0-,0-,-10,0-9", Some(&[(0, 10)])),
        ] {
            assert_eq!(read(value, 10).as_deref(), wanted, "{section}");
        }
        assert_eq!(read("bytes=-5", 0).as_deref(), Some(&[][..]), "nothing of nothing");
    }

    #[test]
    fn many_ranges_are_ignored() {
        let list = |count: usize| {
            let ranges: Vec<_> = (0..count).map(|at| format!("{0}-{0}", 2 * at)).collect();
            format!("bytes={}", ranges.join(","))
        };
        assert_eq!(read(&list(RANGES_MAX), 1000).unwrap().len(), RANGES_MAX);
        assert_eq!(read(&list(RANGES_MAX + 1), 1000), None);
        let empty = format!("bytes={}0-0", ",".repeat(10_000));
        assert_eq!(read(&empty, 10).unwrap(), [(0, 1)]);
    }

    #[test]
    fn two_lines_are_no_range() {
        let mut headers = HeaderMap::new();
        headers.append(header::RANGE, HeaderValue::from_static("bytes=0-0"));
        assert_eq!(asked(&headers), [Spec::From(0, Some(0))]);
        headers.append(header::RANGE, HeaderValue::from_static("bytes=2-2"));
        assert_eq!(asked(&headers), []);
    }
}
