//! A node's HTTP port when others crowd it: commands and the page work as before.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::common::{Node, PATIENCE, model};
use serde_json::Value;

/// More than the port has room for.
const CROWD: usize = 300;
/// All that is asked here, on a loaded machine. A silent connection may stay for 20 s.
const SOON: Duration = Duration::from_secs(15);

fn control(node: &Node) -> String {
    let text = std::fs::read(node.data.join("control.json")).unwrap();
    let control: Value = serde_json::from_slice(&text).unwrap();
    control["address"].as_str().unwrap().to_owned()
}

/// The status line of a page's request.
fn page(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    said.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn silent_connections_keep_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&dir.path().join("a"), "crowd", &[], &[]);
    let model = model();
    node.ask(&["publish", model.to_str().unwrap()]).ok();
    let address = control(&node);
    let crowd = |said: &str| -> Vec<TcpStream> {
        let connect = |_| {
            let mut stream = TcpStream::connect(&address).unwrap();
            // The first of them have been closed by now.
            let _ = stream.write_all(said.as_bytes());
            stream
        };
        (0..CROWD).map(connect).collect()
    };
    // Nothing at all, headers without an end, a body that never comes.
    let body = "POST /control/v1/publish HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n";
    let name = "tiny-mixtral-q4_k_m";
    for said in ["", "GET / HTTP/1.1\r\nHost: localhost\r\nX: ", body] {
        let silent = crowd(said);
        let began = Instant::now();
        node.ask(&["status"]).ok();
        node.ask(&["ls"]).ok();
        node.ask(&["pin", name]).ok();
        node.ask(&["run", name, "-p", "Call me", "-n", "2"]).ok();
        assert_eq!(page(&address), "HTTP/1.1 200 OK");
        assert!(began.elapsed() < SOON, "{:?} beside {said:?}", began.elapsed());
        drop(silent);
    }
}
