//! `run`: generates with a model on this disk or in the swarm.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use serde::Serialize;

use super::print_json;
use super::text_args;
use super::trust::{asking, can_ask};
use crate::api::{GenerateEvent, GenerateRequest, Hits, TokenOdds, Traffic};
use crate::args::{BudgetArgs, RunArgs};
use crate::client::{Answered, Client};
use crate::config::{Config, data_dir};
use crate::engine::Asked;
use crate::output::{self, note};
use crate::service::Service;
use crate::size::{ByteSize, count};
use crate::source::{ModelArgument, Opened};
use crate::store_access::StoreAccess;
use crate::{adapters, engine, generation, held, progress, source};
use doppler_infer::generate::StopReason;
use doppler_store::signature::PublicKey;

/// What `--json` prints.
#[derive(Serialize)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    stop: StopReason,
    /// The stop text that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_text: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<TokenOdds>,
    tok_s: f64,
    seconds: f64,
    backend: String,
    hits: Hits,
    /// Elements of keys and values that did not fit the cache's format and were clamped.
    clamped: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    traffic: Option<Traffic>,
}

/// The arguments, and the request that they make.
struct Run<'a> {
    args: &'a RunArgs,
    request: GenerateRequest,
}

pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    let run = Run { args, request: text_args::run_request(args)? };
    engine::check_request(&run.request)?;
    let started = Instant::now();
    let answer = match source::place(&args.model, args.swarm.is_some())? {
        ModelArgument::Directory => {
            run.here(started, &source::open_path(&args.model.model, args.model.quantize)?)?
        }
        ModelArgument::Named if args.swarm.is_some() => {
            check_policy(args)?;
            asking(|trust| run.in_swarm(trust))?
        }
        ModelArgument::Named => run.named(started)?,
    };
    if args.json {
        return print_json(&answer);
    }
    if !output::piece("\n") {
        return Ok(());
    }
    let tokens = count(answer.tokens.len(), "token");
    note!("{tokens} at {:.1} tokens/s on {}", answer.tok_s, answer.backend);
    note!("{}", stopped(&answer));
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

/// Why the text ends where it does, and what makes it longer.
fn stopped(answer: &Answer) -> String {
    let used = (answer.prompt_tokens + answer.tokens.len()).saturating_sub(1);
    match (answer.stop, &answer.stop_text) {
        (StopReason::StopToken, _) => "stopped where the model ended its text".to_owned(),
        (StopReason::Complete, _) => "stopped where its form is complete".to_owned(),
        (StopReason::StopString, text) => {
            format!("stopped before {:?}", text.as_deref().unwrap_or_default())
        }
        (StopReason::MaxTokens, _) => "stopped after as many tokens as -n allows".to_owned(),
        (StopReason::ContextFull, _) => format!(
            "stopped because the context of {used} tokens is full (--context makes room for more, \
             up to what the model was made for)"
        ),
        (StopReason::Cancelled, _) => "stopped because nobody reads on".to_owned(),
    }
}

fn check_policy(args: &RunArgs) -> anyhow::Result<()> {
    ensure!(
        args.model.policy.is_none(),
        "--policy is for a run in this process; a node has its own"
    );
    Ok(())
}

impl Run<'_> {
    /// Asks the node that runs on the data directory. If there is none, takes the model from its
    /// store.
    fn named(&self, started: Instant) -> anyhow::Result<Answer> {
        let model = &self.args.model;
        let data = data_dir(&model.data)?;
        let text = &*model.name();
        let missing = || source::not_a_directory(text);
        match StoreAccess::open(&data).with_context(missing)? {
            StoreAccess::Node(client) => {
                check_policy(self.args)?;
                asking(|trust| self.on_node(&client, trust))
            }
            here => {
                let held = held::open_in(here, &data, text).with_context(|| {
                    let (missing, data) = (missing(), data.display());
                    format!("no node runs on {data} (or name a swarm with --swarm); {missing}")
                })?;
                self.here(started, &source::open_held(held)?)
            }
        }
    }

    fn on_node(&self, client: &Client, trust: Vec<PublicKey>) -> anyhow::Result<Answer> {
        let mut listener = Listener::new(self);
        let heard = client.generate(&self.swarm_request(trust), |event| listener.hear(event));
        listener.waiting.finish_and_clear();
        heard?;
        listener.answer()
    }

    fn here(&self, started: Instant, opened: &Opened) -> anyhow::Result<Answer> {
        let tokenizer = opened.tokenizer()?;
        let adapters = adapters::open(&self.args.adapters.adapters, &self.args.model.data)?;
        // A wrong request is refused before anything is loaded.
        let asked = Asked::check(&opened.model, tokenizer, &self.request)?;
        let (model, context) = (&self.args.model, asked.request.context);
        let mut session = opened.session(model, model.slots(), Some(context))?;
        session.adapt(&adapters)?;
        self.echo_prompt();
        let (engine, sequence) = session.parts();
        let done = generation::generate(engine, sequence, tokenizer, &asked, |_, piece| {
            self.args.json || echo(&piece.text)
        })?;
        self.echo_rest(&done.rest);
        let hits = session.stats().pager.hits;
        Ok(Answer {
            prompt_tokens: asked.request.prompt.len(),
            tokens: done.tokens,
            text: done.text,
            stop: done.reason,
            stop_text: done.stop_text,
            logprobs: done.logprobs,
            tok_s: done.tok_s,
            seconds: started.elapsed().as_secs_f64(),
            backend: session.describe(),
            hits: Hits { vram: hits.vram, ram: hits.ram, disk: hits.disk, peer: hits.peer },
            clamped: done.clamped,
            traffic: None,
        })
    }

    /// Joins the swarm for this run only.
    fn in_swarm(&self, trust: Vec<PublicKey>) -> anyhow::Result<Answer> {
        let args = self.args;
        let swarm = args.swarm.as_deref().context("--swarm is missing")?;
        let defaults = BudgetArgs::default();
        let budget = BudgetArgs {
            vram_budget: args.model.vram_budget.unwrap_or(defaults.vram_budget),
            ..defaults
        };
        let control = ([127, 0, 0, 1], 0).into();
        let config = Config::resolve(
            swarm,
            &args.network.network,
            &args.model.data,
            &budget,
            args.model.backend,
            control,
        )?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let answer = runtime.block_on(async {
            let service = Service::start(config, |_| ()).await?;
            let answer = async {
                let mut listener = Listener::new(self);
                service.meet().await;
                let events = service.generate(self.swarm_request(trust)).await;
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

    /// The request for a model of the swarm.
    fn swarm_request(&self, answered: Vec<PublicKey>) -> GenerateRequest {
        let trust = self.args.network.network.trust.iter().copied().chain(answered).collect();
        GenerateRequest { trust, can_ask: can_ask(), progress: true, ..self.request.clone() }
    }

    /// A plain prompt is the beginning of the text. A message is not.
    fn echo_prompt(&self) {
        if !self.args.json && self.request.chat.is_none() {
            echo(&self.request.prompt);
        }
    }

    fn echo_rest(&self, rest: &str) {
        if !self.args.json {
            echo(rest);
        }
    }
}

/// False once standard output is closed.
fn echo(text: &str) -> bool {
    output::piece(text)
}

/// Collects a generation's events, and prints text as it arrives unless quiet.
struct Listener<'a> {
    run: &'a Run<'a>,
    tokens: Vec<u32>,
    logprobs: Vec<TokenOdds>,
    prompt_tokens: usize,
    backend: String,
    end: Option<GenerateEvent>,
    /// Spins until the node has the model's resident weights.
    waiting: ProgressBar,
}

impl<'a> Listener<'a> {
    fn new(run: &'a Run<'a>) -> Self {
        let waiting = progress::spinner("the node is finding and loading the model");
        Self {
            run,
            tokens: Vec::new(),
            logprobs: Vec::new(),
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
                self.run.echo_prompt();
                true
            }
            GenerateEvent::Token { id, text, logprobs, .. } => {
                self.tokens.push(id);
                self.logprobs.extend(logprobs);
                self.run.args.json || echo(&text)
            }
            end => {
                if let GenerateEvent::End { rest, .. } = &end {
                    self.run.echo_rest(rest);
                }
                self.end = Some(end);
                false
            }
        }
    }

    fn answer(self) -> anyhow::Result<Answer> {
        match self.end {
            Some(GenerateEvent::End {
                text,
                stop,
                stop_text,
                seconds,
                tok_s,
                clamped,
                traffic,
                ..
            }) => Ok(Answer {
                text,
                tokens: self.tokens,
                prompt_tokens: self.prompt_tokens,
                stop,
                stop_text,
                logprobs: self.logprobs,
                tok_s,
                seconds,
                backend: self.backend,
                hits: traffic.hits,
                clamped,
                traffic: Some(traffic),
            }),
            Some(GenerateEvent::Error { label, message }) => {
                Err(Answered { label, message }.into())
            }
            _ => bail!("the generation stopped without an answer"),
        }
    }
}
