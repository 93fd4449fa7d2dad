//! `serve` and the APIs under `/v1`: over raw HTTP, and by the official clients.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use crate::common::{Node, PATIENCE, command, model, root, run, scripted};
use crate::embed_cli;

/// A `serve` process; killed by its pid when dropped.
struct Server {
    address: String,
    model: String,
    child: Child,
}

impl Server {
    fn start(model: &str, data: &Path, more: &[&str]) -> Self {
        let mut serve = command();
        serve.args(["serve", model, "--http", "127.0.0.1:0", "--backend", "cpu", "--json"]);
        serve.args(more).arg("--data").arg(data);
        let mut child = serve.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said = lines.by_ref().find_map(|line| {
            let line = line.unwrap();
            let said: Value =
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
            // A model of a path is read first.
            (said["event"] != "reading").then_some(said)
        });
        let said = said.expect("it ended before it served");
        assert_eq!(said["event"], "serving", "{said}");
        let text = |key: &str| said[key].as_str().unwrap().to_owned();
        Self { address: text("address"), model: text("model"), child }
    }

    /// The scripted model, on a data directory of its own.
    fn scripted(dir: &Path, more: &[&str]) -> Self {
        let model = dir.join("scripted");
        scripted::write(&model);
        Self::start(model.to_str().unwrap(), &dir.join("data"), more)
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        ask(&self.address, "POST", path, "", &body.to_string())
    }

    /// A chat's answer with these fields.
    fn chat(&self, more: Value) -> Reply {
        self.post("/v1/chat/completions", &self.chat_body(more))
    }

    fn chat_body(&self, more: Value) -> Value {
        let mut body = json!({ "model": self.model, "messages": [user("Hi")] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    }

    /// A sample of `/metrics`.
    fn metric(&self, sample: &str) -> f64 {
        let text = ask(&self.address, "GET", "/metrics", "", "").body;
        let line = text.lines().find_map(|line| line.strip_prefix(sample));
        line.unwrap_or_else(|| panic!("{sample}: {text}")).trim().parse().unwrap()
    }

    /// Waits until a sample of `/metrics` is at least this.
    fn until(&self, sample: &str, least: f64) {
        let began = Instant::now();
        while self.metric(sample) < least {
            assert!(began.elapsed() < PATIENCE, "{sample} never came to {least}");
            std::thread::yield_now();
        }
    }
}

impl Server {
    /// Asks it to end, and waits until it has.
    fn stop(mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn user(text: &str) -> Value {
    json!({ "role": "user", "content": text })
}

fn tools() -> Value {
    json!([{ "type": "function", "function": { "name": "add", "parameters": { "type": "object" } } }])
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The data of each event of a stream.
    fn events(&self) -> Vec<String> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert!(self.header("content-type").unwrap().starts_with("text/event-stream"));
        let lines = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        lines.map(str::to_owned).collect()
    }
}

fn send(address: &str, method: &str, path: &str, lines: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let host = if lines.contains("Host:") { "" } else { "Host: localhost\r\n" };
    let request = format!(
        "{method} {path} HTTP/1.1\r\n{host}Connection: close\r\n{lines}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

fn ask(address: &str, method: &str, path: &str, lines: &str, body: &str) -> Reply {
    read(send(address, method, path, lines, body))
}

fn read(mut stream: TcpStream) -> Reply {
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    let said = String::from_utf8(said).unwrap();
    let (head, body) = said.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut reply = Reply { status, head: head.to_owned(), body: body.to_owned() };
    if reply.header("transfer-encoding") == Some("chunked") {
        reply.body = whole(body);
    }
    reply
}

/// The content of a chunked body.
fn whole(mut body: &str) -> String {
    let mut content = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            break;
        }
        content += &rest[..size];
        body = &rest[size + 2..];
    }
    content
}

#[test]
fn a_completion_is_the_text_that_run_makes_whole_and_streamed() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let path = model.to_str().unwrap();
    let server = Server::start(path, dir.path(), &[]);
    let words = ["run", path, "-p", "Once upon a time", "-n", "12", "--json", "--backend", "cpu"];
    let told = run(words).ok().json();
    let body = |more: Value| {
        let mut body = json!({ "model": server.model, "prompt": "Once upon a time",
                               "max_tokens": 12, "temperature": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let said = server.post("/v1/completions", &body(json!({ "logprobs": 2 }))).ok();
    let choice = &said["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&told["text"], &"length".into()));
    assert_eq!(said["usage"]["prompt_tokens"], told["prompt_tokens"]);
    assert_eq!(said["usage"]["completion_tokens"], 12);
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(choice["logprobs"]["top_logprobs"][0].as_object().unwrap().len(), 2);

    let usage = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let events = server.post("/v1/completions", &body(usage)).events();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    let chunks: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, told["text"]);
    let used = &chunks.last().unwrap()["usage"];
    assert_eq!(used["completion_tokens"], 12);
    let prompt = used["prompt_tokens"].as_u64().unwrap();
    let cached = used["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(cached, Some(prompt - 1), "the prompt was computed before");

    let twice = body(json!({ "n": 2, "temperature": 1, "seed": 7 }));
    let said =
        [server.post("/v1/completions", &twice).ok(), server.post("/v1/completions", &twice).ok()];
    assert_eq!(said[0]["choices"], said[1]["choices"], "a seed repeats");
    assert_ne!(said[0]["choices"][0]["text"], said[0]["choices"][1]["text"]);
    assert_eq!(said[0]["usage"]["completion_tokens"], 24);

    let stop = told["text"].as_str().unwrap().get(6..12).unwrap();
    let said = server.post("/v1/completions", &body(json!({ "stop": [stop] }))).ok();
    let text = told["text"].as_str().unwrap();
    assert_eq!(said["choices"][0]["text"].as_str(), text.get(..text.find(stop).unwrap()));
    assert_eq!(said["choices"][0]["finish_reason"], "stop");
    assert_eq!(server.chat(json!({})).json()["error"]["code"], "no_template");
}

#[test]
fn a_prompt_that_an_earlier_process_computed_is_not_computed_again() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let (path, data) = (model.to_str().unwrap(), dir.path());
    let prompt = "Once upon a time there was a node. ".repeat(12);
    let ask_for = |server: &Server| {
        let body = json!({ "model": server.model, "prompt": prompt, "max_tokens": 8,
                           "temperature": 0 });
        let said = server.post("/v1/completions", &body).ok();
        let cached = said["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
        (said["choices"][0]["text"].clone(), cached.unwrap())
    };
    let first = Server::start(path, data, &[]);
    let (text, cached) = ask_for(&first);
    assert_eq!(cached, 0);
    first.stop();
    let second = Server::start(path, data, &[]);
    let (again, cached) = ask_for(&second);
    assert_eq!(again, text);
    assert!(cached >= 64, "{cached} tokens");
    let held = second.metric("doppler_prefix_bytes");
    assert!(held > 0.0);
    second.stop();
    let none = Server::start(path, data, &["--prefix-budget", "off"]);
    assert_eq!(ask_for(&none), (text, 0));
}

#[test]
fn a_gguf_file_is_served_under_its_own_name_and_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = root().join("tests/data/gguf/qwen3/model.gguf");
    let path = file.to_str().unwrap();
    let words = ["run", path, "-p", "Hello", "-n", "5", "--json", "--backend", "cpu"];
    let told = run(words).ok().json();
    let server = Server::start(path, dir.path(), &[]);
    for name in [&server.model, "model", "model.gguf"] {
        let body = json!({ "model": name, "prompt": "Hello", "max_tokens": 5, "temperature": 0 });
        let said = server.post("/v1/completions", &body).ok();
        assert_eq!(
            (&said["choices"][0]["text"], &said["model"]),
            (&told["text"], &json!(server.model))
        );
    }
}

#[test]
fn a_chat_calls_its_tool_and_goes_on_from_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::scripted(dir.path(), &[]);
    let said = server.chat(json!({})).ok();
    assert_eq!(said["choices"][0]["message"]["content"], "Hello, wörld!");
    assert_eq!(said["choices"][0]["finish_reason"], "stop");
    assert_eq!(said["usage"]["completion_tokens"], 4);

    let said = server.chat(json!({ "tools": tools() })).ok();
    let choice = &said["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "Let me add.");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({ "name": "add", "arguments": "{\"a\":2,\"b\":3}" }));
    let result = json!({ "role": "tool", "tool_call_id": call["id"], "content": "5" });
    let messages = json!([user("2 + 3?"), choice["message"], result]);
    let said = server.chat(json!({ "tools": tools(), "messages": messages })).ok();
    assert_eq!(said["choices"][0]["message"]["content"], "The sum is 5.");

    let events = server.chat(json!({ "tools": tools(), "stream": true })).events();
    let mut made = json!({ "text": "", "arguments": "", "reason": null });
    for event in events.iter().filter(|event| *event != "[DONE]") {
        let chunk: Value = serde_json::from_str(event).unwrap();
        let choice = &chunk["choices"][0];
        let add = |to: &str, piece: &Value| {
            let old = made[to].as_str().unwrap().to_owned();
            Value::from(old + piece.as_str().unwrap_or_default())
        };
        let text = add("text", &choice["delta"]["content"]);
        let call = &choice["delta"]["tool_calls"][0]["function"];
        let arguments = add("arguments", &call["arguments"]);
        made["text"] = text;
        made["arguments"] = arguments;
        if call["name"].is_string() {
            made["name"] = call["name"].clone();
        }
        made["reason"] = choice["finish_reason"].clone();
    }
    let want = json!({ "text": "Let me add.", "arguments": "{\"a\":2,\"b\":3}", "name": "add",
                       "reason": "tool_calls" });
    assert_eq!(made, want);

    let this = json!({ "type": "function", "function": { "name": "add" } });
    let said = server.chat(json!({ "tools": tools(), "tool_choice": this })).ok();
    let message = &said["choices"][0]["message"];
    assert_eq!(message["content"], Value::Null);
    assert_eq!(message["tool_calls"][0]["function"]["arguments"], "{\"a\":2,\"b\":3}");
    let said = server.chat(json!({ "tools": tools(), "tool_choice": "none" })).ok();
    assert_eq!(said["choices"][0]["message"]["content"], "Hello, wörld!");
    let said = server.chat(json!({ "stop": "wör" })).ok();
    assert_eq!(said["choices"][0]["message"]["content"], "Hello, ");
}

#[test]
fn what_is_wrong_is_refused_with_one_status_in_the_apis_form() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::scripted(dir.path(), &[]);
    for (more, status, code) in [
        (json!({ "model": "gpt-4" }), 404, "model_not_found"),
        (json!({ "temprature": 1 }), 400, "field"),
        (json!({ "response_format": { "type": "xml" } }), 400, "field"),
        (json!({ "response_format": { "type": "regex", "regex": "(" } }), 400, "grammar"),
        (json!({ "temperature": -1 }), 400, "sampling"),
        (json!({ "messages": [] }), 400, "conversation"),
        (json!({ "messages": [user(&"long ".repeat(4_000_000))] }), 400, "context_length_exceeded"),
    ] {
        let said = server.chat(more.clone());
        let error = &said.json()["error"];
        assert_eq!((said.status, error["code"].as_str()), (status, Some(code)), "{error}");
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        assert!(said.header("x-request-id").is_some());
    }
    let at = |method: &str, path: &str, lines: &str, body: &str| {
        let said = ask(&server.address, method, path, lines, body);
        (said.status, said.json()["error"]["code"].as_str().unwrap_or_default().to_owned())
    };
    let chat = "/v1/chat/completions";
    assert_eq!(at("POST", chat, "", "{"), (400, "field".into()));
    assert_eq!(at("POST", chat, "", "[]"), (400, "field".into()));
    assert_eq!(at("GET", chat, "", ""), (405, "method".into()));
    assert_eq!(at("POST", "/v1/audio/speech", "", "{}"), (404, "no_route".into()));
    assert_eq!(at("POST", chat, "Host: evil.example\r\n", "{}"), (403, "forbidden".into()));
    let origin = "Origin: https://evil.example\r\n";
    assert_eq!(at("POST", chat, origin, "{}"), (403, "forbidden".into()));
    let listed = ask(&server.address, "GET", "/v1/models", "", "").ok();
    assert_eq!(listed["data"][0]["id"], server.model.as_str());
    let one = ask(&server.address, "GET", &format!("/v1/models/{}", server.model), "", "").ok();
    assert_eq!(one, listed["data"][0]);
    assert_eq!(at("GET", "/v1/models/none", "", ""), (404, "model_not_found".into()));
    assert_eq!(ask(&server.address, "GET", "/health", "", "").ok(), json!({ "status": "ok" }));
}

#[test]
fn a_key_and_named_origins_decide_who_asks() {
    let dir = tempfile::tempdir().unwrap();
    let more = ["--api-key", "sesame", "--cors", "https://app.example"];
    let server = Server::scripted(dir.path(), &more);
    let with = |lines: &str| ask(&server.address, "GET", "/v1/models", lines, "");
    let refused = with("");
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (401, &"invalid_api_key".into())
    );
    assert_eq!(with("Authorization: Bearer sesam\r\n").status, 401);
    with("Authorization: Bearer sesame\r\n").ok();
    with("x-api-key: sesame\r\nHost: node.example\r\n").ok();
    let page = "Origin: https://app.example\r\nx-api-key: sesame\r\n";
    let allowed = with(page);
    assert_eq!(allowed.header("access-control-allow-origin"), Some("https://app.example"));
    let preflight = "Origin: https://app.example\r\nAccess-Control-Request-Method: POST\r\n\
                     Access-Control-Request-Headers: authorization, x-stainless-os\r\n";
    let preflight = ask(&server.address, "OPTIONS", "/v1/chat/completions", preflight, "");
    assert_eq!(preflight.status, 204);
    let headers = preflight.header("access-control-allow-headers");
    assert_eq!(headers, Some("authorization, x-stainless-os"));
    let words = ["serve", "--http", "0.0.0.0:0", "--data", dir.path().to_str().unwrap()];
    run(words).fails(&["--api-key", "0.0.0.0"]);
}

#[test]
fn whoever_goes_stops_the_generation_and_a_full_queue_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::scripted(dir.path(), &["--keep-alive", "0s"]);
    // Whoever got the whole answer may go at once.
    let short = json!({ "model": server.model, "prompt": "x", "max_tokens": 2 }).to_string();
    for _ in 0..8 {
        ask(&server.address, "POST", "/v1/completions", "", &short).ok();
    }
    server.until("doppler_generations_total{end=\"done\"}", 8.0);
    // It says "la " until the context is full.
    let endless =
        json!({ "model": server.model, "prompt": "x", "max_tokens": 16_000, "stream": true });
    let mut stream = send(&server.address, "POST", "/v1/completions", "", &endless.to_string());
    let mut seen = [0; 4096];
    assert!(stream.read(&mut seen).unwrap() > 0);
    drop(stream);
    let cancelled = "doppler_generations_total{end=\"cancelled\"}";
    server.until(cancelled, 1.0);
    // Without a stream, too.
    let mut quiet = endless.clone();
    quiet["stream"] = false.into();
    let stream = send(&server.address, "POST", "/v1/completions", "", &quiet.to_string());
    server.until("doppler_generating", 1.0);
    drop(stream);
    server.until(cancelled, 2.0);

    // Nobody reads this one, so it soon pauses.
    let slow = send(&server.address, "POST", "/v1/completions", "", &endless.to_string());
    server.until("doppler_generating", 1.0);
    let mut many = endless.clone();
    many["n"] = 16.into();
    let ask =
        |body: &Value| send(&server.address, "POST", "/v1/completions", "", &body.to_string());
    let mut waiting = vec![ask(&many)];
    // As many as may run; of the first request one choice waits.
    server.until("doppler_generating", server.metric("doppler_generating_max"));
    waiting.extend((0..3).map(|_| ask(&many)));
    server.until("doppler_queue_length", 49.0);
    many["n"] = 15.into();
    waiting.push(ask(&many));
    server.until("doppler_queue_length", 64.0);
    let refused = server.chat(json!({}));
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    drop((waiting, slow));
    let said = server.chat(json!({})).ok();
    assert_eq!(said["choices"][0]["message"]["content"], "Hello, wörld!");
    server.until("doppler_model_loads_total", 2.0);
}

#[test]
fn many_at_once_of_every_kind_are_all_answered_or_refused() {
    many_at_once(16, 12);
}

/// A thousand, 32 at once; the node's memory stays what it was after the first quarter.
#[test]
#[ignore = "a minute; nightly.sh runs it"]
fn a_thousand_requests_with_random_disconnects_leave_nothing_behind() {
    many_at_once(32, 32);
}

/// So many threads ask so many times each.
fn many_at_once(threads: usize, times: usize) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::scripted(dir.path(), &[]);
    let one = |number: usize| {
        let chat = |more: Value| server.chat(more);
        let long =
            json!({ "model": server.model, "prompt": "x", "max_tokens": 500, "stream": true });
        let is_busy = |status: u16| status == 429;
        match number % 6 {
            0 => {
                let said = chat(json!({}));
                assert!(is_busy(said.status) || said.ok()["choices"][0]["finish_reason"] == "stop");
            }
            1 => {
                let said = chat(json!({ "stream": true }));
                assert!(is_busy(said.status) || said.events().last().unwrap() == "[DONE]");
            }
            2 => {
                let said = chat(json!({ "n": 3, "max_tokens": 2 }));
                let choices = || said.ok()["choices"].as_array().unwrap().len();
                assert!(is_busy(said.status) || choices() == 3);
            }
            3 => assert_eq!(chat(json!({ "n": 99 })).status, 400),
            4 => drop(send(&server.address, "POST", "/v1/completions", "", &long.to_string())),
            _ => {
                let mut stream =
                    send(&server.address, "POST", "/v1/completions", "", &long.to_string());
                let mut begin = [0; 64];
                stream.read_exact(&mut begin).unwrap();
            }
        }
    };
    let all = |times: usize| {
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let one = &one;
                scope.spawn(move || (0..times).for_each(|at| one(thread + at)));
            }
        });
    };
    let memory = || {
        let status = format!("/proc/{}/status", server.child.id());
        let status = std::fs::read_to_string(status).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.unwrap_or_default() / 1024.0
    };
    all(times / 4);
    let early = memory();
    all(times - times / 4);
    let late = memory();
    // 5 %, and what allocators keep of a small process.
    assert!(late <= early * 1.05 + 16.0, "{early} MiB, then {late} MiB");
    let said = server.chat(json!({})).ok();
    assert_eq!(said["choices"][0]["message"]["content"], "Hello, wörld!");
    assert_eq!(server.metric("doppler_queue_length"), 0.0);
    // Whoever left is noticed before the next step.
    let began = Instant::now();
    while server.metric("doppler_generating") > 0.0 {
        assert!(began.elapsed() < PATIENCE, "something still runs");
        std::thread::yield_now();
    }
}

#[test]
fn a_node_of_a_swarm_serves_what_it_knows_and_ps_shows_it() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, converted) = (dir.path().join("scripted"), dir.path().join("rdrr"));
    scripted::write(&checkpoint);
    let words = ["convert", checkpoint.to_str().unwrap(), "--quantize", "bf16", "--out"];
    run(words.into_iter().chain([converted.to_str().unwrap()])).ok();
    let node = Node::start(&dir.path().join("data"), "api", &[], &[]);
    let none = node.ask(&["ps"]).ok();
    assert!(none.out.contains("no model is loaded"), "{}", none.out);
    node.ask(&["publish", converted.to_str().unwrap()]).ok();
    let page = node.ask(&["status", "--json"]).ok().json()["page"].as_str().unwrap().to_owned();
    let address = page.strip_prefix("http://").unwrap();
    let listed = ask(address, "GET", "/v1/models", "", "").ok();
    let model = listed["data"][0]["id"].as_str().unwrap();
    let body = json!({ "model": model, "messages": [user("Hi")] });
    let said = ask(address, "POST", "/v1/chat/completions", "", &body.to_string()).ok();
    assert_eq!(said["choices"][0]["message"]["content"], "Hello, wörld!");
    let ps = node.ask(&["ps", "--json"]).ok().json();
    assert_eq!((ps["loaded"][0]["name"].as_str(), &ps["waiting"]), (Some(model), &0.into()));

    // Its store is served by its name, but not by two at a time.
    let data = node.data.clone();
    let second = ["serve", "--http", "127.0.0.1:0", "--data", data.to_str().unwrap()];
    run(second).fails(&["answers at", address]);
    drop(node);
    let server = Server::start(model, &data, &[]);
    let said = server.chat(json!({})).ok();
    assert_eq!(said["choices"][0]["message"]["content"], "Hello, wörld!");
    drop(server);
    run(second.iter().chain(&["none-of-it"])).fails(&["none-of-it", "name a model"]);
}

#[test]
fn texts_are_embedded_as_the_command_does_and_each_kind_of_model_does_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bert");
    std::fs::create_dir(&path).unwrap();
    embed_cli::model(&path, "mean_tokens");
    let path = path.to_str().unwrap();
    let texts = ["W9 w10 w11", "w12"];
    let words =
        ["embed", path, "--json", "--backend", "cpu", "--text", texts[0], "--text", texts[1]];
    let told = run(words).ok().json();
    let server = Server::start(path, &dir.path().join("data"), &["--api-key", "sesame"]);
    let ask = |body: Value| {
        let key = "x-api-key: sesame\r\n";
        ask(&server.address, "POST", "/v1/embeddings", key, &body.to_string())
    };
    // The second text is longer than what the model was loaded for.
    for input in [json!(texts[1]), json!(texts)] {
        let said = ask(json!({ "model": server.model, "input": input })).ok();
        let last = said["data"].as_array().unwrap().last().unwrap();
        assert_eq!(last["embedding"], told["embeddings"][1]);
    }
    let said = ask(json!({ "model": server.model, "input": texts })).ok();
    assert_eq!(said["data"][0]["embedding"], told["embeddings"][0]);
    assert_eq!(said["usage"]["prompt_tokens"], 8);
    let long = ask(json!({ "model": server.model, "input": "w3 ".repeat(15) })).json();
    assert_eq!(long["error"]["code"], "context_length_exceeded");
    let text = json!({ "model": server.model, "prompt": "w1" }).to_string();
    let key = "x-api-key: sesame\r\n";
    let said = self::ask(&server.address, "POST", "/v1/completions", key, &text);
    assert_eq!((said.status, &said.json()["error"]["code"]), (400, &"not_text".into()));
    let python = root().join("tests/clients/.venv/bin/python");
    if have(&python) {
        client(python.to_str().unwrap(), "embeddings.py", &server);
    }
}

/// Runs a script of `tests/clients` against a server of the scripted model.
fn client(program: &str, script: &str, server: &Server) {
    let scripts = root().join("tests/clients");
    let said = Command::new(program)
        .arg(scripts.join(script))
        .args([&server.address, &server.model])
        .env_remove("OPENAI_API_KEY")
        .env_remove("ANTHROPIC_API_KEY")
        .output();
    let said = said.unwrap_or_else(|error| panic!("{program}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success(), "{script}\n{out}\n{err}");
    assert_eq!(out.lines().last(), Some("all passed"), "{script}\n{out}\n{err}");
}

/// Whether the clients are installed (`test.sh` does it); says so if not.
fn have(what: &Path) -> bool {
    let have = what.exists();
    if !have {
        let missing = format!("{} is missing: ./test.sh installs it", what.display());
        assert!(std::env::var_os("DOPPLER_REQUIRE_CLIENTS").is_none(), "{missing}");
        eprintln!("skipped: {missing}");
    }
    have
}

#[test]
fn the_official_python_clients_pass() {
    let python = root().join("tests/clients/.venv/bin/python");
    if have(&python) {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::scripted(dir.path(), &["--api-key", "sesame"]);
        client(python.to_str().unwrap(), "clients.py", &server);
    }
}

#[test]
fn the_official_javascript_clients_pass() {
    if have(&root().join("tests/clients/node_modules")) {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::scripted(dir.path(), &["--api-key", "sesame"]);
        client("node", "clients.mjs", &server);
    }
}
