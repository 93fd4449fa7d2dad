//! The port over real sockets: silent and slow connections, too many requests, stopping.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream as Stream;

use axum::routing::get;
use tokio::sync::mpsc;

use super::super::seats::{CONNECTIONS_MAX, GUESTS_MAX, OWNERS_MAX};
use super::*;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

struct Port {
    address: SocketAddr,
    stopping: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    /// Told when a request of `/held` has come, and how to let them all go.
    come: mpsc::UnboundedReceiver<()>,
    go: Arc<Notify>,
}

/// A port that answers `/` with "here", and `/held` when it is told to.
async fn port() -> Port {
    let (sender, come) = mpsc::unbounded_channel();
    let go = Arc::new(Notify::new());
    let wait = Arc::clone(&go);
    let held = move || {
        let (sender, wait) = (sender.clone(), Arc::clone(&wait));
        async move {
            let told = wait.notified();
            let _ = sender.send(());
            told.await;
            "held"
        }
    };
    let routes = Router::new().route("/", get(|| async { "here" })).route("/held", get(held));
    let is_owner: IsOwner = Arc::new(|headers| headers.contains_key("authorization"));
    let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let stopping = CancellationToken::new();
    let server = Server::new(routes, is_owner, Pressure::default());
    let task = tokio::spawn(server.run(listener, stopping.clone()));
    Port { address, stopping, task, come, go }
}

impl Port {
    fn connect(&self) -> Stream {
        let stream = Stream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request's headers.
    fn ask(&self, path: &str, owner: bool) -> Stream {
        let mut stream = self.connect();
        let owner = if owner { "Authorization: me\r\n" } else { "" };
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n{owner}\r\n").unwrap();
        stream
    }
}

/// What comes up to the end of `wanted`.
fn read_to(stream: &mut Stream, wanted: &str) -> String {
    let (mut said, mut byte) = (String::new(), [0]);
    while !said.ends_with(wanted) {
        stream.read_exact(&mut byte).unwrap_or_else(|error| panic!("{error} after {said:?}"));
        said.push(byte[0].into());
    }
    said
}

/// Whether the other end has closed this connection.
fn is_closed(stream: &mut Stream) -> bool {
    match stream.read(&mut [0]) {
        Ok(0) => true,
        Ok(_) => panic!("it said something"),
        Err(error) => match error.kind() {
            ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted => true,
            _ => panic!("{error}"),
        },
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_give_way_to_whoever_asks() {
    let port = port().await;
    let port = blocking(move || {
        let mut silent: Vec<_> = (0..CONNECTIONS_MAX).map(|_| port.connect()).collect();
        // Headers that never end are silence, too.
        for stream in &mut silent {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: lo").unwrap();
        }
        let asked = Instant::now();
        for owner in [false, true] {
            read_to(&mut port.ask("/", owner), "here");
        }
        assert!(asked.elapsed() < HEAD_TIME / 4, "{:?}", asked.elapsed());
        assert!(is_closed(&mut silent[0]), "the first of them made room");
        port
    })
    .await;
    port.stopping.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_do_not_come_in_time_end_the_connection() {
    let port = port().await;
    let mut streams = blocking(move || {
        let silent = port.connect();
        let mut answered = port.ask("/", false);
        read_to(&mut answered, "here");
        let mut dripping = port.connect();
        let asked = Instant::now();
        // A byte now and then does not prolong it.
        while dripping.write_all(b"G").is_ok() {
            assert!(asked.elapsed() < HEAD_TIME + PATIENCE, "still open");
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!(asked.elapsed() >= HEAD_TIME - Duration::from_secs(1), "{:?}", asked.elapsed());
        [silent, answered]
    })
    .await;
    assert!(blocking(move || streams.iter_mut().all(is_closed)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_that_are_too_many_are_told_so_and_the_owner_is_served() {
    let mut port = port().await;
    let held = |port: &Port, count: usize, owner: bool| {
        (0..count).map(|_| port.ask("/held", owner)).collect::<Vec<_>>()
    };
    let mut waiting = held(&port, GUESTS_MAX, false);
    for _ in 0..GUESTS_MAX {
        port.come.recv().await.unwrap();
    }
    let busy = |stream: &mut Stream| {
        let said = read_to(stream, "}");
        assert!(said.starts_with("HTTP/1.1 503") && said.contains("\"overloaded\""), "{said}");
        assert!(said.contains("connection: close") && said.contains("retry-after"), "{said}");
    };
    busy(&mut port.ask("/", false));
    read_to(&mut port.ask("/", true), "here");
    waiting.extend(held(&port, OWNERS_MAX, true));
    for _ in 0..OWNERS_MAX {
        port.come.recv().await.unwrap();
    }
    busy(&mut port.ask("/", true));
    // Whoever still waits when a seat is free is served.
    let mut patient = port.ask("/", false);
    port.go.notify_waiters();
    read_to(&mut patient, "here");
    for stream in &mut waiting {
        read_to(stream, "held");
    }
    read_to(&mut port.ask("/", false), "here");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_closes_what_is_silent_and_answers_what_was_asked() {
    let mut port = port().await;
    let mut silent = port.connect();
    let mut asked = port.ask("/held", false);
    port.come.recv().await.unwrap();
    port.stopping.cancel();
    port.task.await.unwrap();
    assert!(blocking(move || is_closed(&mut silent)).await);
    assert!(Stream::connect(port.address).is_err(), "nobody listens any more");
    port.go.notify_waiters();
    blocking(move || {
        read_to(&mut asked, "held");
        assert!(is_closed(&mut asked));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_says_once_and_validly_whom_it_is_for() {
    let port = port().await;
    for (section, request, status) in [
        ("7.2 one", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "200"),
        ("9112 3.2 none", "GET / HTTP/1.1\r\n\r\n", "400"),
        ("9112 3.2 two", "GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", "400"),
        ("9112 3.2 invalid", "GET / HTTP/1.1\r\nHost: local host\r\n\r\n", "400"),
        ("9112 3.2 empty", "GET / HTTP/1.1\r\nHost:\r\n\r\n", "400"),
        ("9112 3.2.2 absolute", "GET http://localhost/ HTTP/1.1\r\nHost: x\r\n\r\n", "200"),
        ("9110 4.2.4 userinfo", "GET http://a@localhost/ HTTP/1.1\r\nHost: x\r\n\r\n", "400"),
        ("9112 3.2 HTTP/1.0", "GET / HTTP/1.0\r\n\r\n", "200"),
    ] {
        let mut stream = port.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let said = blocking(move || read_to(&mut stream, "\r\n")).await;
        assert_eq!(said.split(' ').nth(1), Some(status), "{section}");
    }
}

/// An answer that nobody reads does not keep its connection for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_reads_nothing_is_cut_off_sooner_while_others_wait() {
    let endless = || async {
        Body::from_stream(futures::stream::repeat_with(|| Ok::<_, io::Error>(vec![7; 65_536])))
    };
    let pressure = Pressure::default();
    let routes = Router::new().route("/", get(endless));
    let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::new(routes, Arc::new(|_| false), pressure.clone());
    let seats = Arc::clone(&server.seats);
    tokio::spawn(server.run(listener, CancellationToken::new()));
    let mut stream = Stream::connect(address).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let began = Instant::now();
    let until = async |served: bool| {
        while seats.lock().unwrap().is_serving() != served {
            assert!(began.elapsed() < PATIENCE);
            tokio::task::yield_now().await;
        }
    };
    until(true).await;
    let _waiting = pressure.wait();
    until(false).await;
    assert!(began.elapsed() < HEAD_TIME / 2, "{:?}", began.elapsed());
    drop(stream);
}
