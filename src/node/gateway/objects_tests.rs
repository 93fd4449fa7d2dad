//! The gateway over HTTP, from objects in memory: ranges, proofs, refusals, limits.

use std::time::Instant;

use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::super::{assembled, guard};
use super::*;
use crate::http::Server;
use doppler_store::ladder::{Ladder, LadderOptions};
use doppler_store::verified::decode;

/// A gateway over `objects` in memory, on a port of its own.
pub async fn gateway(contents: Vec<Bytes>) -> String {
    let ladder = Ladder::new(LadderOptions { ram_budget: 1 << 30 }, None, None, Vec::new());
    for bytes in contents {
        ladder.put(bytes, false).await.unwrap();
    }
    let listener = crate::http::listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let pressure = Pressure::default();
    let objects = Objects::new(Arc::new(ladder), pressure.clone());
    let kernels = axum::Router::new()
        .route("/kernels/{hash}", axum::routing::get(super::super::program::kernel));
    let routes = assembled(objects, kernels).layer(axum::middleware::from_fn(guard::guard));
    let server = Server::new(routes, Arc::new(|_| false), pressure);
    tokio::spawn(server.run(listener, Default::default()));
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

    let part = ask("GET", url.clone(), &[("range", "bytes=1000000-2100000")]).await;
    assert_eq!((part.status, &part.body[..]), (206, &bytes[1_000_000..2_100_001]));
    assert_eq!(part.header("content-range"), format!("bytes 1000000-2100000/{}", bytes.len()));
    let by_query = ask("GET", format!("{url}?bytes=-20000"), &[]).await;
    assert_eq!((by_query.status, &by_query.body[..]), (200, &bytes[bytes.len() - 20_000..]));
    assert_eq!(by_query.header("content-range"), "");
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
        (format!("{shard}?bytes=9-2"), vec![], 400, "bad_request"),
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
    let held = Arc::clone(&objects.places).acquire_many_owned(PIECES_MAX as u32).await.unwrap();
    let (headers, wanted) = (HeaderMap::new(), Wanted::default());
    let ask = || objects.reply(ShardId::of(b"x"), "text/plain", &Method::GET, &headers, &wanted);
    assert_eq!(ask().await.unwrap_err().status, StatusCode::SERVICE_UNAVAILABLE);
    drop(held);
    assert_eq!(ask().await.unwrap_err().status, StatusCode::NOT_FOUND);
}

/// How a reader of a whole object behaves while others wait.
#[derive(Clone, Copy)]
enum Reader {
    Idle,
    /// It takes this many bytes every 100 ms.
    Dripping(usize),
}

/// Twice as many slow readers as there are places: another reader waits a few seconds at most.
async fn makes_way(reader: Reader) {
    use std::io::{Read, Write};
    let contents = Bytes::from(vec![7; 48 << 20]);
    let shard = ShardId::of(&contents);
    let base = gateway(vec![contents]).await;
    let address = base.strip_prefix("http://").unwrap().to_owned();
    tokio::task::spawn_blocking(move || {
        let ask = |rest: &str| {
            let mut stream = std::net::TcpStream::connect(&address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            write!(stream, "GET /shards/{shard} HTTP/1.1\r\nHost: localhost\r\n{rest}\r\n")
                .unwrap();
            stream
        };
        let mut slow: Vec<_> = (0..2 * PIECES_MAX).map(|_| ask("")).collect();
        slow.iter().for_each(|stream| stream.set_nonblocking(true).unwrap());
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let dripping = std::thread::spawn(move || {
            let mut taken = vec![0; 1 << 16];
            while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) =
                stopped.recv_timeout(Duration::from_millis(100))
            {
                if let Reader::Dripping(bytes) = reader {
                    slow.retain_mut(|stream| match stream.read(&mut taken[..bytes]) {
                        Ok(taken) => taken > 0,
                        // It waits for its turn; others were cut off.
                        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
                    });
                }
            }
            slow.len()
        });
        // Again and again: readers that were slow before do not get the places back.
        for _ in 0..3 {
            let asked = Instant::now();
            let mut stream = ask("Range: bytes=0-9\r\nConnection: close\r\n");
            let mut said = String::new();
            stream.read_to_string(&mut said).unwrap();
            assert!(said.starts_with("HTTP/1.1 206"), "{said}");
            assert!(asked.elapsed() < Duration::from_secs(8), "{:?}", asked.elapsed());
        }
        drop(stop);
        dripping.join().unwrap();
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_read_nothing_make_way_for_one_that_does() {
    makes_way(Reader::Idle).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_drip_make_way_for_one_that_does_not() {
    makes_way(Reader::Dripping(1000)).await;
}
