//! The gateway over HTTP, from objects in memory: ranges, proofs, refusals, limits.

use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::super::{guard, shards};
use super::*;
use doppler_store::ladder::{Ladder, LadderOptions};
use doppler_store::verified::decode;

/// A gateway over `objects` in memory, on a port of its own.
async fn gateway(contents: Vec<Bytes>) -> String {
    let ladder = Ladder::new(LadderOptions { ram_budget: 1 << 30 }, None, None, Vec::new());
    for bytes in contents {
        ladder.put(bytes, false).await.unwrap();
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let pressure = Pressure::default();
    let objects = Objects::new(Arc::new(ladder), pressure.clone());
    let routes = shards(objects).layer(axum::middleware::from_fn(guard::guard));
    let connections = super::super::Connections::new(listener, pressure);
    tokio::spawn(axum::serve(connections, routes).into_future());
    base
}

fn random(len: usize) -> Bytes {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random::<u8>()).collect::<Vec<_>>().into()
}

struct Got {
    status: u16,
    headers: ureq::http::HeaderMap,
    body: Vec<u8>,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

async fn ask(method: &'static str, url: String, headers: &[(&'static str, &str)]) -> Got {
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.to_string())).collect();
    tokio::task::spawn_blocking(move || {
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = config.timeout_global(Some(Duration::from_secs(60))).build().new_agent();
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let mut response = agent.run(request.body(()).unwrap()).unwrap();
        let body = response.body_mut().with_config().limit(1 << 30).read_to_vec().unwrap();
        Got { status: response.status().as_u16(), headers: response.headers().clone(), body }
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_is_given_whole_or_in_part() {
    let bytes = random(3 * PIECE_BYTES as usize + 12_345);
    let shard = ShardId::of(&bytes);
    let base = gateway(vec![bytes.clone()]).await;
    let url = format!("{base}/shards/{shard}");

    let whole = ask("GET", url.clone(), &[("accept-encoding", "gzip")]).await;
    assert_eq!((whole.status, &whole.body[..]), (200, &bytes[..]));
    assert_eq!(whole.header("etag"), format!("\"{shard}\""));
    assert_eq!(whole.header("accept-ranges"), "bytes");
    assert_eq!(whole.header("content-encoding"), "");
    assert!(whole.header("cache-control").contains("immutable"));

    let head = ask("HEAD", url.clone(), &[]).await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.header("content-length"), bytes.len().to_string());

    let last = bytes.len() - 1;
    for (range, from, to) in [
        ("bytes=0-0".to_owned(), 0, 1),
        ("bytes=1000000-2100000".to_owned(), 1_000_000, 2_100_001),
        (format!("bytes={}-", last), last, last + 1),
        ("bytes=-20000".to_owned(), bytes.len() - 20_000, bytes.len()),
    ] {
        let part = ask("GET", url.clone(), &[("range", &range)]).await;
        assert_eq!((part.status, &part.body[..]), (206, &bytes[from..to]), "{range}");
        let said = format!("bytes {from}-{}/{}", to - 1, bytes.len());
        assert_eq!(part.header("content-range"), said);
    }
    let same = ask("GET", url.clone(), &[("if-none-match", &format!("\"{shard}\""))]).await;
    assert_eq!((same.status, same.body.len()), (304, 0));
    let beyond = ask("GET", url.clone(), &[("range", &format!("bytes={}-", bytes.len()))]).await;
    assert_eq!(beyond.status, 416);
    assert_eq!(beyond.header("content-range"), format!("bytes */{}", bytes.len()));
    assert!(String::from_utf8(beyond.body).unwrap().contains("out_of_range"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bao_reply_proves_itself_piece_by_piece() {
    let bytes = random(2 * PIECE_BYTES as usize + 40_001);
    let (shard, size) = (ShardId::of(&bytes), bytes.len() as u64);
    let base = gateway(vec![bytes.clone()]).await;
    let accept = [("accept", BAO_TYPE)];
    for (query, range) in [
        ("", ByteRange::new(0, size).unwrap()),
        ("?bytes=1030000-2200000", ByteRange::new(1_030_000, size.min(2_200_001)).unwrap()),
    ] {
        let got = ask("GET", format!("{base}/shards/{shard}{query}"), &accept).await;
        assert_eq!(got.status, 200);
        assert_eq!(got.header("content-type"), BAO_TYPE);
        assert_eq!(got.header("x-doppler-size"), size.to_string());
        let mut rest = &got.body[..];
        for piece in cut(range) {
            let proved = decode(shard, size, piece, &mut rest).await.unwrap();
            let slice = proved.slice(piece).unwrap();
            assert_eq!(slice, bytes[piece.start() as usize..piece.end() as usize]);
        }
        assert!(rest.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_given_is_refused_in_words() {
    let bytes = random(70_000);
    let shard = ShardId::of(&bytes);
    let base = gateway(vec![bytes]).await;
    let at = |path: String| format!("{base}/shards/{path}");
    let absent = ShardId::of(b"elsewhere");
    for (path, headers, status, code) in [
        (absent.to_string(), vec![], 404, "not_found"),
        ("xyz".into(), vec![], 400, "bad_request"),
        (shard.to_string(), vec![("range", "bytes=0-1,4-5")], 400, "bad_request"),
        (shard.to_string(), vec![("range", "bytes=9-2")], 400, "bad_request"),
        (shard.to_string(), vec![("host", "evil.example")], 403, "forbidden"),
        (shard.to_string(), vec![("origin", "https://evil.example")], 403, "forbidden"),
        (format!("{shard}?format=zip"), vec![], 400, "bad_request"),
        (format!("{shard}?bytes=70000-"), vec![], 416, "out_of_range"),
    ] {
        let got = ask("GET", at(path.clone()), &headers).await;
        let body: serde_json::Value = serde_json::from_slice(&got.body).unwrap();
        assert_eq!((got.status, body["code"].as_str().unwrap()), (status, code), "{path}");
        assert!(!body["error"].as_str().unwrap().is_empty());
    }
    let page = ask("GET", at(shard.to_string()), &[("origin", "http://localhost:5173")]).await;
    assert_eq!(page.status, 200);
    assert_eq!(page.header("access-control-allow-origin"), "http://localhost:5173");
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_beyond_the_limit_are_told_to_come_again() {
    let ladder = Ladder::new(LadderOptions { ram_budget: 1 << 20 }, None, None, Vec::new());
    let objects = Objects::new(Arc::new(ladder), Pressure::default());
    let held = Arc::clone(&objects.slots).acquire_many_owned(REPLIES_MAX as u32).await.unwrap();
    let (headers, wanted) = (HeaderMap::new(), Wanted::default());
    let absent = ShardId::of(b"x");
    let refused = objects.reply(absent, "text/plain", &headers, &wanted).await.unwrap_err();
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    drop(held);
    let refused = objects.reply(absent, "text/plain", &headers, &wanted).await.unwrap_err();
    assert_eq!(refused.status, StatusCode::NOT_FOUND);
}

/// As many readers as there are places take nothing: the next one waits a few seconds, not twenty.
#[tokio::test(flavor = "multi_thread")]
async fn readers_that_read_nothing_make_way_for_one_that_does() {
    use std::io::{Read, Write};
    let contents = Bytes::from(vec![7; 48 << 20]);
    let shard = ShardId::of(&contents);
    let base = gateway(vec![contents]).await;
    let address = base.strip_prefix("http://").unwrap().to_owned();
    tokio::task::spawn_blocking(move || {
        let ask = |rest: &str| {
            let mut stream = std::net::TcpStream::connect(&address).unwrap();
            write!(stream, "GET /shards/{shard} HTTP/1.1\r\nHost: localhost\r\n{rest}\r\n")
                .unwrap();
            let mut line = [0; 12];
            stream.read_exact(&mut line).unwrap();
            (stream, String::from_utf8_lossy(&line).into_owned())
        };
        let silent: Vec<_> = (0..REPLIES_MAX).map(|_| ask("").0).collect();
        let asked = Instant::now();
        let (_, line) = ask("Range: bytes=0-9\r\n");
        assert_eq!(line, "HTTP/1.1 206");
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
        drop(silent);
    })
    .await
    .unwrap();
}
