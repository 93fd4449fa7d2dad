//! A bad request costs nothing: the next good one is answered without loading again.

use std::path::Path;
use std::sync::Arc;

use doppler_infer::backend::BackendError;
use doppler_infer::error::SessionError;
use doppler_infer::generate::StopReason;
use doppler_infer::reader::WeightReader;
use doppler_infer::template::Conversation;
use doppler_store::chat::ChatTemplates;
use doppler_store::dir::{DirReader, DirShard};
use doppler_store::manifest::ManifestBody;
use doppler_store::{Manifest, ModelId};
use tempfile::TempDir;

use super::*;
use crate::api::{GenerateRequest, TokenOdds};
use crate::embedded;

pub(super) const OPTIONS: EngineOptions = EngineOptions {
    backend: BackendChoice::Cpu,
    vram_budget: 1 << 30,
    host_budget: 0,
    keep_alive: None,
};

/// An engine on the CPU, and the embedded model in a directory.
pub(super) struct Bench {
    pub dir: TempDir,
    pub engine: Engine,
    pub opened: Arc<Opened>,
}

pub(super) fn bench() -> Bench {
    bench_with(None, OPTIONS)
}

/// As [`bench`], with this chat template and these options.
pub(super) fn bench_with(chat: Option<ChatTemplates>, options: EngineOptions) -> Bench {
    bench_on(chat, options, None)
}

/// As [`bench_with`], with what is on disk.
pub(super) fn bench_on(
    chat: Option<ChatTemplates>,
    options: EngineOptions,
    prefixes: Option<Prefixes>,
) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    embedded::extract(dir.path()).unwrap();
    let engine = Engine::start(options, prefixes, Traffic::default).unwrap();
    let opened = open(&engine, dir.path(), ModelId::of(embedded::manifest()), chat);
    Bench { dir, engine, opened }
}

/// Opens the embedded model under this id.
pub(super) fn open(
    engine: &Engine,
    dir: &Path,
    id: ModelId,
    chat: Option<ChatTemplates>,
) -> Arc<Opened> {
    let manifest = Manifest::parse(embedded::manifest()).unwrap();
    let manifest = Manifest::new(ManifestBody { chat, ..ManifestBody::clone(&manifest) }).unwrap();
    let shards = manifest.shards.iter().map(|shard| DirShard {
        shard: shard.id().unwrap(),
        path: dir.join(&shard.filename),
        size: shard.size,
    });
    let reader = Arc::new(DirReader::new(shards));
    let reader = WeightReader::new(reader, tokio::runtime::Handle::current());
    let tokenizer = std::fs::read(dir.join("tokenizer.json")).unwrap();
    engine.models().open(id, manifest, &tokenizer, reader).unwrap()
}

pub(super) fn request(prompt: &str) -> GenerateRequest {
    let text = serde_json::json!({ "model": "embedded", "prompt": prompt, "tokens": 3 });
    serde_json::from_value(text).unwrap()
}

/// The end of an answer.
pub(super) struct End {
    pub(super) text: String,
    pub(super) stop: StopReason,
    stop_text: Option<String>,
    pub(super) reused: usize,
    odds: Vec<TokenOdds>,
}

fn hello() -> Conversation {
    Conversation { messages: vec![Conversation::message("user", "Hello")], ..Default::default() }
}

impl Bench {
    /// The answer's text, or the label of its failure.
    pub(super) async fn ask(&self, request: &GenerateRequest) -> Result<String, &'static str> {
        Ok(self.end(request).await?.text)
    }

    /// How the answer ended.
    pub(super) async fn end(&self, request: &GenerateRequest) -> Result<End, &'static str> {
        self.end_of(&self.opened, request).await
    }

    /// How this model's answer ended.
    pub(super) async fn end_of(
        &self,
        opened: &Arc<Opened>,
        request: &GenerateRequest,
    ) -> Result<End, &'static str> {
        let job = Job::check(opened.clone(), Vec::new(), request).map_err(|error| error.label())?;
        let mut events =
            self.engine.submit(Lane::own(), vec![job]).map_err(|error| error.label())?;
        let mut events = events.remove(0);
        let mut pieces = String::new();
        let mut odds = Vec::new();
        while let Some(event) = events.recv().await {
            match event {
                GenerateEvent::Token { text, logprobs, .. } => {
                    pieces += &text;
                    odds.extend(logprobs);
                }
                GenerateEvent::End { text, rest, stop, stop_text, reused, .. } => {
                    assert_eq!(pieces + &rest, text, "what was given out is the text");
                    return Ok(End { text, stop, stop_text, reused, odds });
                }
                GenerateEvent::Error { label, .. } => {
                    return Err(crate::failures::of_label(&label).label);
                }
                _ => {}
            }
        }
        panic!("no end")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_each_kind_of_bad_request_the_next_good_one_answers_without_loading() {
    let bench = bench();
    let good = request("Once upon a time");
    let context_max = bench.opened.model.graph.context_max;
    let text = bench.ask(&good).await.unwrap();
    assert_eq!(bench.engine.shown().loads, 1);
    let bad = [
        ("no_tokens", GenerateRequest { tokens: 0, ..good.clone() }),
        ("empty_prompt", request("")),
        ("sampling", GenerateRequest { top_p: 0.0, ..good.clone() }),
        ("sampling", GenerateRequest { top_p: f32::NAN, ..good.clone() }),
        ("sampling", GenerateRequest { temperature: -1.0, ..good.clone() }),
        ("sampling", GenerateRequest { repetition_penalty: 0.0, ..good.clone() }),
        ("sampling", GenerateRequest { min_p: 1.5, ..good.clone() }),
        ("sampling", GenerateRequest { logprobs: Some(21), ..good.clone() }),
        ("sampling", GenerateRequest { logit_bias: vec![(1, f32::NAN)], ..good.clone() }),
        ("token", GenerateRequest { logit_bias: vec![(4096, 1.0)], ..good.clone() }),
        ("stop", GenerateRequest { stop: vec![String::new()], ..good.clone() }),
        ("stop", GenerateRequest { stop: vec!["x".into(); 17], ..good.clone() }),
        ("conversation", GenerateRequest { chat: Some(hello()), ..good.clone() }),
        ("conversation", GenerateRequest { chat: Some(Conversation::default()), ..request("") }),
        ("no_template", GenerateRequest { chat: Some(hello()), ..request("") }),
        ("context", GenerateRequest { context: Some(0), ..good.clone() }),
        ("context", GenerateRequest { context: Some(context_max + 1), ..good.clone() }),
        ("prompt_too_long", GenerateRequest { context: Some(2), ..good.clone() }),
        ("prompt_too_long", request(&"many words ".repeat(context_max))),
    ];
    for (label, request) in bad {
        assert_eq!(bench.ask(&request).await, Err(label), "{request:?}");
        assert_eq!(bench.ask(&good).await.as_ref(), Ok(&text), "after {label}");
    }
    assert_eq!(bench.engine.shown().loads, 1);
    bench.engine.stop().await;
    assert_eq!(bench.ask(&good).await, Err("stopping"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_ends_for_each_of_its_reasons_and_says_which() {
    let bench = bench();
    let all = GenerateRequest { tokens: 24, ..request("Once upon a time") };
    let whole = bench.end(&all).await.unwrap();
    assert_eq!((whole.stop, &whole.stop_text), (StopReason::MaxTokens, &None));
    // A text across several tokens, which begins within one.
    let at = whole.text.len() / 2;
    let stop = whole.text[at..at + 9].to_owned();
    let first = whole.text.find(&stop).unwrap();
    let stopping =
        GenerateRequest { stop: vec!["no such text".into(), stop.clone()], ..all.clone() };
    let ended = bench.end(&stopping).await.unwrap();
    assert_eq!((ended.stop, ended.stop_text), (StopReason::StopString, Some(stop)));
    assert_eq!(ended.text, whole.text[..first]);
    // What began like a stop text and was none is given out at the end.
    let begun = format!("{}\u{1f433}", &whole.text[whole.text.len() - 4..]);
    let none = bench.end(&GenerateRequest { stop: vec![begun], ..all.clone() }).await.unwrap();
    assert_eq!((none.stop, none.text), (StopReason::MaxTokens, whole.text.clone()));
    let full = bench.end(&GenerateRequest { context: Some(12), ..all.clone() }).await.unwrap();
    assert_eq!(full.stop, StopReason::ContextFull);
    let told = bench.end(&GenerateRequest { logprobs: Some(2), ..all.clone() }).await.unwrap();
    assert_eq!((told.text, told.odds.len()), (whole.text, 24));
    let likeliest = |odds: &TokenOdds| odds.top.len() == 2 && odds.top[0].id == odds.id;
    assert!(told.odds.iter().all(likeliest), "greedy takes the likeliest");
    // The end of the text made certain.
    let eos = bench.opened.model.manifest.eos_token_ids[0];
    let certain = GenerateRequest { logit_bias: vec![(eos, 1000.0)], ..all };
    let ended = bench.end(&certain).await.unwrap();
    assert_eq!((ended.stop, ended.text.as_str()), (StopReason::StopToken, ""));
    bench.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_goes_on_from_the_keys_and_values_of_the_turn_before() {
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";
    let bench = bench_with(Some(ChatTemplates::one(source)), OPTIONS);
    let say = |chat: Conversation, resume| GenerateRequest {
        model: "embedded".into(),
        tokens: 8,
        chat: Some(chat),
        resume,
        ..GenerateRequest::default()
    };
    let first = bench.end(&say(hello(), true)).await.unwrap();
    let plain = bench.end(&say(hello(), false)).await.unwrap();
    assert_eq!((first.reused, plain.reused), (0, 0));
    assert_eq!(first.text, plain.text);
    // The prompt is the template's.
    let raw = bench.ask(&GenerateRequest { tokens: 8, ..request("user: Hello\nassistant:") }).await;
    assert_eq!(raw.as_ref(), Ok(&first.text));
    let mut longer = hello();
    longer.messages.push(Conversation::message("assistant", &first.text));
    longer.messages.push(Conversation::message("user", "And then?"));
    let fresh = bench.end(&say(longer.clone(), false)).await.unwrap();
    assert_eq!(fresh.reused, 0, "it did not ask for what was kept");
    bench.end(&say(hello(), true)).await.unwrap();
    let again = bench.end(&say(longer.clone(), true)).await.unwrap();
    assert!(again.reused > 3, "{}", again.reused);
    assert_eq!(again.text, fresh.text);
    // Another text begins alike only where it does.
    let other = Conversation { messages: longer.messages[2..].to_vec(), ..Default::default() };
    let other = bench.end(&say(other, true)).await.unwrap();
    assert!(other.reused < again.reused);
    assert_eq!(bench.engine.shown().loads, 1);
    bench.engine.stop().await;
}

/// The token that ends a turn is often not the one that ends a text.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversations_turn_ends_with_the_templates_end_token() {
    let mut chat = ChatTemplates::one("{{ messages[0].content }}");
    let word = |bench: &Bench| bench.opened.tokenizer.encode_bare("a").unwrap();
    chat.tokens.insert("eos_token".into(), "a".into());
    let bench = bench_with(Some(chat), OPTIONS);
    let [end] = word(&bench)[..] else { panic!("not one token") };
    let certain = GenerateRequest { logit_bias: vec![(end, 1000.0)], ..request("Hello") };
    let said = GenerateRequest { prompt: String::new(), chat: Some(hello()), ..certain.clone() };
    assert_eq!(bench.end(&certain).await.unwrap().stop, StopReason::MaxTokens);
    assert_eq!(bench.end(&said).await.unwrap().stop, StopReason::StopToken);
    bench.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_tokens_as_can_be_asked_for_end_with_the_context() {
    let bench = bench();
    let all = GenerateRequest { tokens: usize::MAX, context: Some(12), ..request("Once upon") };
    let job = Job::check(bench.opened.clone(), Vec::new(), &all).unwrap();
    assert_eq!(job.asked.request.context, 12);
    assert!(bench.ask(&all).await.is_ok());
    bench.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_longer_context_than_the_first_requests_needs_no_reload() {
    let bench = bench();
    let short = GenerateRequest { tokens: 2, ..request("Once") };
    let long = GenerateRequest { tokens: 150, ..request("Once upon a time there was") };
    let first = bench.ask(&short).await.unwrap();
    let text = bench.ask(&long).await.unwrap();
    assert_eq!(bench.ask(&short).await, Ok(first));
    assert_eq!(bench.engine.shown().loads, 1);
    bench.engine.stop().await;
    // The text is the same as on an engine that had the room from the start.
    let bench = self::bench();
    assert_eq!(bench.ask(&long).await, Ok(text));
    bench.engine.stop().await;
}

/// Weights that cannot be read fail the request. The next one reads them again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_fails_says_why_and_can_be_tried_again() {
    let bench = bench();
    let good = request("Once upon a time");
    let shard = bench.dir.path().join("shard_00003.bin");
    let aside = bench.dir.path().join("aside");
    std::fs::rename(&shard, &aside).unwrap();
    assert!(bench.ask(&good).await.is_err());
    std::fs::rename(&aside, &shard).unwrap();
    assert!(bench.ask(&good).await.is_ok());
    bench.engine.stop().await;
}

#[test]
fn only_a_lost_device_unloads_a_model() {
    let session = |error| EngineError::Session(SessionError::Backend(error));
    assert!(session(BackendError::Lost(String::new())).is_lost());
    assert!(EngineError::Device(BackendError::Lost(String::new())).is_lost());
    let what = String::new();
    assert!(!session(BackendError::OutOfMemory { what: what.clone(), bytes: 1 }).is_lost());
    assert!(!session(BackendError::Unsupported(what)).is_lost());
    assert!(!EngineError::Session(SessionError::EmptyPrompt).is_lost());
    assert!(!EngineError::Busy { retry_s: 1 }.is_lost());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_opened_once() {
    let bench = bench();
    let again = bench.engine.models().get(bench.opened.id).unwrap();
    assert!(Arc::ptr_eq(&again, &bench.opened));
    assert!(bench.engine.models().get(ModelId::of(b"another")).is_none());
    bench.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_begun_goes_on_as_from_the_same_tokens() {
    let bench = bench_with(Some(ChatTemplates::one("{{ messages[0].content }}")), OPTIONS);
    let messages = vec![Conversation::message("user", "Once upon")];
    let chat = Some(Conversation { messages, ..Conversation::default() });
    let begun = GenerateRequest { chat, begin: " a time".into(), ..request("") };
    let ids = bench.opened.tokenizer.encode_bare("Once upon a time").unwrap();
    let same = GenerateRequest { prompt_ids: ids, ..request("") };
    let text = bench.ask(&begun).await.unwrap();
    assert_eq!(bench.ask(&same).await.as_ref(), Ok(&text));
    assert_ne!(bench.ask(&GenerateRequest { begin: String::new(), ..begun }).await, Ok(text));
    let both = GenerateRequest { prompt: "x".into(), ..same };
    assert_eq!(bench.ask(&both).await, Err("conversation"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn choices_are_queued_together_and_each_is_answered() {
    let bench = bench();
    let job = |seed| {
        let request = GenerateRequest { seed, temperature: 1.0, ..request("Once upon a time") };
        Job::check(bench.opened.clone(), Vec::new(), &request).unwrap()
    };
    let channels = bench.engine.submit(Lane::own(), vec![job(1), job(2), job(1)]).unwrap();
    let mut texts = Vec::new();
    for mut events in channels {
        while let Some(event) = events.recv().await {
            if let GenerateEvent::End { text, .. } = event {
                texts.push(text);
            }
        }
    }
    assert_eq!((texts.len(), &texts[0]), (3, &texts[2]));
    // What is counted after an answer is counted once the thread has ended.
    bench.engine.stop().await;
    let shown = bench.engine.shown();
    assert_eq!((shown.counts.ended, shown.counts.failed, shown.counts.generated_tokens), (3, 0, 9));
    assert!(shown.loaded[0].idle_since.is_some());
}
