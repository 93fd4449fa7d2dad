//! `run`: generates with a model on this disk or in the swarm.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use serde::Serialize;

use super::print_json;
use super::trust::{asking, can_ask};
use crate::api::{GenerateEvent, GenerateRequest, Hits, Traffic};
use crate::args::{BudgetArgs, RunArgs};
use crate::client::{Answered, Client};
use crate::config::{Config, data_dir};
use crate::output::{self, note};
use crate::service::Service;
use crate::size::{ByteSize, count};
use crate::source::{ModelArgument, Opened};
use crate::store_access::StoreAccess;
use crate::{engine, generation, held, progress, source};
use doppler_infer::generate::{GenerateOptions, StopReason};
use doppler_infer::request::Request;
use doppler_store::signature::PublicKey;

/// What `--json` prints.
#[derive(Serialize)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    stop: StopReason,
    tok_s: f64,
    seconds: f64,
    backend: String,
    hits: Hits,
    /// Elements of keys and values that did not fit the cache's format and were clamped.
    clamped: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    traffic: Option<Traffic>,
}

pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    engine::check_request(&request(args))?;
    let started = Instant::now();
    let answer = match source::place(&args.model, args.swarm.is_some())? {
        ModelArgument::Directory => {
            run_local(args, started, &source::open_path(&args.model.model, args.model.quantize)?)?
        }
        ModelArgument::Named if args.swarm.is_some() => {
            check_policy(args)?;
            asking(|trust| run_in_swarm(args, trust))?
        }
        ModelArgument::Named => run_named(args, started)?,
    };
    if args.json {
        return print_json(&answer);
    }
    if !output::piece("\n") {
        return Ok(());
    }
    let tokens = count(answer.tokens.len(), "token");
    note!("{tokens} at {:.1} tokens/s on {}", answer.tok_s, answer.backend);
    if answer.stop == StopReason::ContextFull {
        note!(
            "stopped because the context of {} tokens is full (--context makes room for more, \
             up to what the model was made for)",
            (answer.prompt_tokens + answer.tokens.len()).saturating_sub(1)
        );
    }
    let Hits { vram, ram, disk, peer } = answer.hits;
    if vram + ram + disk + peer > 0 {
        note!("experts from vram {vram}, ram {ram}, disk {disk}, peers {peer}");
    }
    if answer.clamped > 0 {
        note!(
            "{} elements of keys and values did not fit the f16 cache and were clamped: run with --kv f32",
            answer.clamped
        );
    }
    if let Some(traffic) = &answer.traffic {
        note!("{} verified from peers", ByteSize(traffic.verified_bytes));
    }
    Ok(())
}

fn check_policy(args: &RunArgs) -> anyhow::Result<()> {
    ensure!(
        args.model.policy.is_none(),
        "--policy is for a run in this process; a node has its own"
    );
    Ok(())
}

/// Asks the node that runs on the data directory. If there is none, takes the model from its store.
fn run_named(args: &RunArgs, started: Instant) -> anyhow::Result<Answer> {
    let data = data_dir(&args.model.data)?;
    let text = &*args.model.name();
    let missing = || source::not_a_directory(text);
    match StoreAccess::open(&data).with_context(missing)? {
        StoreAccess::Node(client) => {
            check_policy(args)?;
            asking(|trust| run_on_node(args, &client, trust))
        }
        here => {
            let held = held::open_in(here, &data, text).with_context(|| {
                let (missing, data) = (missing(), data.display());
                format!("no node runs on {data} (or name a swarm with --swarm); {missing}")
            })?;
            run_local(args, started, &source::open_held(held)?)
        }
    }
}

fn run_on_node(args: &RunArgs, client: &Client, trust: Vec<PublicKey>) -> anyhow::Result<Answer> {
    let mut listener = Listener::new(args);
    let heard = client.generate(&swarm_request(args, trust), |event| listener.hear(event));
    listener.waiting.finish_and_clear();
    heard?;
    listener.answer()
}

fn run_local(args: &RunArgs, started: Instant, opened: &Opened) -> anyhow::Result<Answer> {
    let tokenizer = opened.tokenizer()?;
    let prompt = generation::encode_prompt(tokenizer, &args.prompt)?;
    let options = GenerateOptions {
        max_tokens: args.tokens,
        stop: opened.model.manifest.eos_token_ids.clone(),
        sampler: request(args).sampler(),
    };
    // A wrong request is refused before anything is loaded.
    let request = Request::check(&opened.model.graph, prompt, options, args.model.context)?;
    let mut session = opened.session(&args.model, args.model.slots(), Some(request.context))?;
    echo_prompt(args);
    let (engine, sequence) = session.parts();
    let done = generation::generate(engine, sequence, tokenizer, &request, |_, _, text| {
        args.json || echo(text)
    })?;
    let hits = session.stats().pager.hits;
    Ok(Answer {
        prompt_tokens: request.prompt.len(),
        tokens: done.tokens,
        text: done.text,
        stop: done.reason,
        tok_s: done.tok_s,
        seconds: started.elapsed().as_secs_f64(),
        backend: session.describe(),
        hits: Hits { vram: hits.vram, ram: hits.ram, disk: hits.disk, peer: hits.peer },
        clamped: done.clamped,
        traffic: None,
    })
}

/// Joins the swarm for this run only.
fn run_in_swarm(args: &RunArgs, trust: Vec<PublicKey>) -> anyhow::Result<Answer> {
    let swarm = args.swarm.as_deref().context("--swarm is missing")?;
    let defaults = BudgetArgs::default();
    let budget = BudgetArgs {
        vram_budget: args.model.vram_budget.unwrap_or(defaults.vram_budget),
        ..defaults
    };
    let control = ([127, 0, 0, 1], 0).into();
    let config = Config::resolve(
        swarm,
        &args.network,
        &args.model.data,
        &budget,
        args.model.backend,
        control,
    )?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        let service = Service::start(config, |_| ()).await?;
        let answer = async {
            let mut listener = Listener::new(args);
            service.meet().await;
            let events = service.generate(swarm_request(args, trust)).await;
            if events.is_err() {
                listener.waiting.finish_and_clear();
            }
            let mut events = events?;
            while let Some(event) = events.recv().await {
                if !listener.hear(event) {
                    break;
                }
            }
            listener.answer()
        }
        .await;
        service.stop().await;
        answer
    });
    // Ctrl-C or an error may leave a read waiting for a peer; it is not worth waiting for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    answer
}

fn request(args: &RunArgs) -> GenerateRequest {
    GenerateRequest {
        model: args.model.name().into_owned(),
        prompt: args.prompt.clone(),
        tokens: args.tokens,
        temperature: args.sampling.temperature,
        top_p: args.sampling.top_p,
        top_k: args.sampling.top_k,
        repetition_penalty: args.sampling.repetition_penalty,
        seed: args.sampling.seed,
        context: args.model.context,
        trust: Vec::new(),
        can_ask: false,
        progress: false,
    }
}

/// The request for a model of the swarm.
fn swarm_request(args: &RunArgs, answered: Vec<PublicKey>) -> GenerateRequest {
    let trust = args.network.trust.iter().copied().chain(answered).collect();
    GenerateRequest { trust, can_ask: can_ask(), progress: true, ..request(args) }
}

fn echo_prompt(args: &RunArgs) {
    if !args.json {
        echo(&args.prompt);
    }
}

/// False once standard output is closed.
fn echo(text: &str) -> bool {
    output::piece(text)
}

/// Collects a generation's events, and prints text as it arrives unless quiet.
struct Listener<'a> {
    args: &'a RunArgs,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    backend: String,
    end: Option<GenerateEvent>,
    /// Spins until the node has the model's resident weights.
    waiting: ProgressBar,
}

impl<'a> Listener<'a> {
    fn new(args: &'a RunArgs) -> Self {
        let waiting = progress::spinner("the node is finding and loading the model");
        Self {
            args,
            tokens: Vec::new(),
            prompt_tokens: 0,
            backend: String::new(),
            end: None,
            waiting,
        }
    }

    /// False once no more events are expected.
    fn hear(&mut self, event: GenerateEvent) -> bool {
        if let GenerateEvent::Loading(progress) = &event {
            self.waiting.set_message(progress::describe("fetching the model", progress));
            return true;
        }
        self.waiting.finish_and_clear();
        match event {
            GenerateEvent::Start { prompt_tokens, backend } => {
                self.prompt_tokens = prompt_tokens;
                self.backend = backend;
                echo_prompt(self.args);
                true
            }
            GenerateEvent::Token { id, text, .. } => {
                self.tokens.push(id);
                self.args.json || echo(&text)
            }
            end => {
                self.end = Some(end);
                false
            }
        }
    }

    fn answer(self) -> anyhow::Result<Answer> {
        match self.end {
            Some(GenerateEvent::End { text, stop, seconds, tok_s, clamped, traffic, .. }) => {
                Ok(Answer {
                    text,
                    tokens: self.tokens,
                    prompt_tokens: self.prompt_tokens,
                    stop,
                    tok_s,
                    seconds,
                    backend: self.backend,
                    hits: traffic.hits,
                    clamped,
                    traffic: Some(traffic),
                })
            }
            Some(GenerateEvent::Error { label, message }) => {
                Err(Answered { label, message }.into())
            }
            _ => bail!("the generation stopped without an answer"),
        }
    }
}
