//! RFC 9110, section by section: HEAD (9.3.2), methods (9.1), preconditions (13) and ranges (14),
//! as they arrive over a socket.

use std::io::{Read, Write};
use std::net::TcpStream;

use bytes::Bytes;

use super::objects::tests::gateway;
use doppler_infer::gpu::KERNELS;
use doppler_store::ShardId;

/// The object that is requested.
const OBJECT: &[u8] = b"0123456789abcdefghij";

/// A reply as received.
struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    /// A header's value; `None` if it is not there.
    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Sends a request with these header lines, and reads until the connection is closed.
fn ask(address: &str, request: &str, lines: &str) -> Reply {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    let head = format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    stream.write_all(format!("{head}{lines}\r\n").as_bytes()).unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    let said = String::from_utf8(said).unwrap();
    let (head, body) = said.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head: head.to_owned(), body: body.to_owned() }
}

/// A row: the section, the method, header lines, and what comes: status, body, `Content-Range`.
type Row<'a> = (&'a str, &'a str, &'a str, u16, &'a str, Option<&'a str>);

const ALL: &str = "0123456789abcdefghij";

/// `TAG` stands for the object's entity tag. What is ignored is answered with all of the object.
const ROWS: &[Row<'static>] = &[
    ("9.3.2 HEAD", "HEAD", "", 200, "", None),
    ("9.3.2, 14.2 HEAD has no ranges", "HEAD", "Range: bytes=0-0\r\n", 200, "", None),
    ("9.3.2, 14.2 nor bad ones", "HEAD", "Range: bytes=99-\r\n", 200, "", None),
    ("13.1.1 If-Match", "GET", "If-Match: TAG\r\n", 200, ALL, None),
    ("13.1.1 If-Match, another", "GET", "If-Match: \"x\"\r\n", 412, "", None),
    ("13.1.1 If-Match, weak", "GET", "If-Match: W/TAG\r\n", 412, "", None),
    ("13.1.1 If-Match, any", "GET", "If-Match: *\r\n", 200, ALL, None),
    ("13.1.1 If-Match, HEAD", "HEAD", "If-Match: \"x\"\r\n", 412, "", None),
    ("13.1.2 If-None-Match", "GET", "If-None-Match: TAG\r\n", 304, "", None),
    ("13.1.2 If-None-Match, weak", "GET", "If-None-Match: W/TAG\r\n", 304, "", None),
    ("13.1.2 If-None-Match, any", "GET", "If-None-Match: *\r\n", 304, "", None),
    ("13.1.2 If-None-Match, a list", "GET", "If-None-Match: \"x\",, TAG\r\n", 304, "", None),
    ("13.1.2 If-None-Match, another", "GET", "If-None-Match: \"x\"\r\n", 200, ALL, None),
    ("13.1.2 If-None-Match, HEAD", "HEAD", "If-None-Match: TAG\r\n", 304, "", None),
    (
        "13.1.3 no date",
        "GET",
        "If-Modified-Since: Sat, 01 Jan 2050 00:00:00 GMT\r\n",
        200,
        ALL,
        None,
    ),
    (
        "13.1.4 no date",
        "GET",
        "If-Unmodified-Since: Sat, 01 Jan 2000 00:00:00 GMT\r\n",
        200,
        ALL,
        None,
    ),
    ("13.1.5 If-Range", "GET", "Range: bytes=1-2\r\nIf-Range: TAG\r\n", 206, "12", Some("1-2/20")),
    ("13.1.5 If-Range, another", "GET", "Range: bytes=1-2\r\nIf-Range: \"x\"\r\n", 200, ALL, None),
    ("13.1.5 If-Range, weak", "GET", "Range: bytes=1-2\r\nIf-Range: W/TAG\r\n", 200, ALL, None),
    (
        "13.1.5 If-Range, a date",
        "GET",
        "Range: bytes=1-2\r\nIf-Range: Sat, 01 Jan 2050 00:00:00 GMT\r\n",
        200,
        ALL,
        None,
    ),
    (
        "13.1.5 If-Range, another and a bad range",
        "GET",
        "Range: bytes=99-\r\nIf-Range: \"x\"\r\n",
        200,
        ALL,
        None,
    ),
    ("13.1.5 If-Range without a range", "GET", "If-Range: \"x\"\r\n", 200, ALL, None),
    (
        "13.2.2 If-Match before If-None-Match",
        "GET",
        "If-None-Match: TAG\r\nIf-Match: \"x\"\r\n",
        412,
        "",
        None,
    ),
    (
        "13.2.2 If-None-Match before ranges",
        "GET",
        "If-None-Match: TAG\r\nRange: bytes=1-2\r\n",
        304,
        "",
        None,
    ),
    (
        "13.2.2 If-None-Match before bad ranges",
        "GET",
        "If-None-Match: TAG\r\nRange: bytes=99-\r\n",
        304,
        "",
        None,
    ),
    (
        "13.2.2 If-Match before bad ranges",
        "GET",
        "If-Match: \"x\"\r\nRange: bytes=99-\r\n",
        412,
        "",
        None,
    ),
    (
        "13.2.2 all that hold",
        "GET",
        "If-Match: TAG\r\nIf-None-Match: \"x\"\r\nIf-Range: TAG\r\nRange: bytes=1-2\r\n",
        206,
        "12",
        Some("1-2/20"),
    ),
    ("14.1 the unit in any case", "GET", "Range: BYTES=1-2\r\n", 206, "12", Some("1-2/20")),
    ("14.1 another unit", "GET", "Range: lines=1-2\r\n", 200, ALL, None),
    ("14.1.1 malformed", "GET", "Range: bytes=2-1\r\n", 200, ALL, None),
    ("14.1.1 malformed", "GET", "Range: bytes 1-2\r\n", 200, ALL, None),
    ("14.1.2 to the end", "GET", "Range: bytes=18-\r\n", 206, "ij", Some("18-19/20")),
    ("14.1.2 past the end", "GET", "Range: bytes=18-99\r\n", 206, "ij", Some("18-19/20")),
    ("14.1.2 all", "GET", "Range: bytes=0-\r\n", 206, ALL, Some("0-19/20")),
    ("14.1.2 a suffix", "GET", "Range: bytes=-2\r\n", 206, "ij", Some("18-19/20")),
    ("14.1.2 a long suffix", "GET", "Range: bytes=-99\r\n", 206, ALL, Some("0-19/20")),
    ("14.2 an empty suffix", "GET", "Range: bytes=-0\r\n", 416, "", Some("*/20")),
    ("14.2 behind the end", "GET", "Range: bytes=20-\r\n", 416, "", Some("*/20")),
    (
        "14.2 far behind the end",
        "GET",
        "Range: bytes=99999999999999999999-\r\n",
        416,
        "",
        Some("*/20"),
    ),
    ("14.2 several behind the end", "GET", "Range: bytes=20-, 30-40\r\n", 416, "", Some("*/20")),
    ("14.2 one of them is not", "GET", "Range: bytes=20-, 1-2\r\n", 206, "12", Some("1-2/20")),
    ("14.2 two lines", "GET", "Range: bytes=1-2\r\nRange: bytes=4-5\r\n", 200, ALL, None),
    ("15.3.7.2 overlapping", "GET", "Range: bytes=1-4,3-6\r\n", 206, "123456", Some("1-6/20")),
    ("5.6.1 empty members", "GET", "Range: bytes=,1-2,\r\n", 206, "12", Some("1-2/20")),
];

#[tokio::test(flavor = "multi_thread")]
async fn objects_follow_each_section() {
    let shard = ShardId::of(OBJECT);
    let address = gateway(vec![Bytes::from_static(OBJECT)]).await.replace("http://", "");
    tokio::task::spawn_blocking(move || {
        let tag = format!("\"{shard}\"");
        for (section, method, lines, status, body, range) in ROWS {
            let request = format!("{method} /shards/{shard}");
            let reply = ask(&address, &request, &lines.replace("TAG", &tag));
            assert_eq!(reply.status, *status, "{section}: {}", reply.head);
            let range = range.map(|range| format!("bytes {range}"));
            assert_eq!(reply.header("content-range"), range.as_deref(), "{section}");
            match status {
                200 | 206 => assert_eq!(reply.body, *body, "{section}"),
                304 => assert_eq!(reply.body, "", "{section}"),
                _ if *method == "HEAD" => assert_eq!(reply.body, "", "{section}"),
                _ => assert!(reply.body.contains("\"code\":"), "{section}: {}", reply.body),
            }
            match status {
                200 => assert_eq!(reply.header("content-length"), Some("20"), "{section}"),
                // 8.6: it could only be what a 200 would say.
                304 => assert_eq!(reply.header("content-length"), None, "{section}"),
                _ => {}
            }
            if [200, 206, 304].contains(status) {
                // 15.3.7 and 15.4.5
                for name in ["date", "etag", "cache-control", "vary"] {
                    assert!(reply.header(name).is_some(), "{section}: no {name}");
                }
                assert_eq!(reply.header("etag"), Some(tag.as_str()), "{section}");
            }
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn several_ranges_come_as_parts() {
    let shard = ShardId::of(OBJECT);
    let address = gateway(vec![Bytes::from_static(OBJECT)]).await.replace("http://", "");
    tokio::task::spawn_blocking(move || {
        let request = format!("GET /shards/{shard}");
        let reply = ask(&address, &request, "Range: bytes=18-, 0-1, 50-60, 5-5\r\n");
        assert_eq!((reply.status, reply.header("content-range")), (206, None), "{}", reply.head);
        assert_eq!(reply.header("content-length"), Some(reply.body.len().to_string().as_str()));
        let kind = reply.header("content-type").unwrap();
        let boundary = kind.strip_prefix("multipart/byteranges; boundary=").unwrap();
        let part = |range: &str, bytes: &str| {
            let head = "Content-Type: application/octet-stream\r\nContent-Range: bytes ";
            format!("--{boundary}\r\n{head}{range}/20\r\n\r\n{bytes}\r\n")
        };
        let parts = [part("18-19", "ij"), part("0-1", "01"), part("5-5", "5")].concat();
        assert_eq!(reply.body, format!("{parts}--{boundary}--\r\n"));
        // Too many ranges are ignored, however small they are.
        let many: Vec<_> = (0..17).map(|at| format!("{at}-{at}")).collect();
        let reply = ask(&address, &request, &format!("Range: bytes={}\r\n", many.join(",")));
        assert_eq!((reply.status, reply.body.as_str()), (200, ALL));
    })
    .await
    .unwrap();
}

/// Kernels and the page, which are not stored objects: they have entity tags, but no ranges.
#[tokio::test(flavor = "multi_thread")]
async fn other_routes_follow_them_too() {
    let kernel = KERNELS.iter().find(|kernel| kernel.in_browsers()).unwrap();
    let path = format!("/kernels/{}", kernel.hash().to_hex());
    let address = gateway(Vec::new()).await.replace("http://", "");
    tokio::task::spawn_blocking(move || {
        for path in [path.as_str(), "/", "/app.js"] {
            let whole = ask(&address, &format!("GET {path}"), "");
            let tag = whole.header("etag").unwrap();
            let length = whole.header("content-length");
            assert_eq!(length, Some(whole.body.len().to_string().as_str()), "{path}");
            for (section, method, lines, status) in [
                ("9.3.2 HEAD", "HEAD", String::new(), 200),
                ("13.1.1 If-Match", "GET", "If-Match: \"x\"\r\n".to_owned(), 412),
                ("13.1.2 If-None-Match", "GET", format!("If-None-Match: {tag}\r\n"), 304),
                ("13.1.2 If-None-Match, HEAD", "HEAD", format!("If-None-Match: {tag}\r\n"), 304),
                ("14.2 no ranges here", "GET", "Range: bytes=0-0\r\n".to_owned(), 200),
                ("13.2.1 not for this", "DELETE", format!("If-None-Match: {tag}\r\n"), 405),
            ] {
                let reply = ask(&address, &format!("{method} {path}"), &lines);
                assert_eq!(reply.status, status, "{path} {section}");
                match status {
                    200 => assert_eq!(reply.header("content-length"), length, "{path} {section}"),
                    304 => {
                        assert_eq!(reply.header("etag"), Some(tag), "{path} {section}");
                        assert_eq!(reply.header("content-length"), None, "{path} {section}");
                    }
                    405 => {
                        let allow = reply.header("allow").unwrap().replace(' ', "");
                        assert_eq!(allow, "GET,HEAD", "{path}: 15.5.6");
                        assert!(reply.body.contains("bad_request"), "{}", reply.body);
                    }
                    _ => {}
                }
            }
        }
        // 13.2.1: preconditions do not change a 404.
        let absent = format!("GET /shards/{}", ShardId::of(b"x"));
        for lines in ["If-Match: \"x\"\r\n", "If-None-Match: *\r\n", "Range: bytes=0-\r\n"] {
            assert_eq!(ask(&address, &absent, lines).status, 404, "{lines}");
            assert_eq!(ask(&address, "GET /nothing", lines).status, 404, "{lines}");
        }
    })
    .await
    .unwrap();
}
