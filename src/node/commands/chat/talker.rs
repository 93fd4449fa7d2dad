//! Who answers: a model loaded in this process, or one of the node that runs on the data directory.
//!
//! Both go on from the keys and values of the turn before, as far as the prompts begin alike.

use anyhow::{Context, bail};

use crate::api::{GenerateEvent, GenerateRequest};
use crate::args::ChatArgs;
use crate::client::{Answered, Client};
use crate::commands::{asking, can_ask};
use crate::config::data_dir;
use crate::engine::{Asked, EngineError};
use crate::source::{self, ModelArgument, Opened};
use crate::store_access::StoreAccess;
use crate::{adapters, generation, held, progress};
use doppler_infer::generate::StopReason;
use doppler_infer::session::Session;
use doppler_infer::template::{self, TemplateError};

pub enum Talker {
    Here(Box<Here>),
    Node(Client),
}

/// A model loaded in this process.
pub struct Here {
    // Declared before what it reads from, so that it is dropped first.
    session: Session,
    opened: Opened,
}

/// An answer.
pub struct Turn {
    pub text: String,
    pub tokens: usize,
    pub stop: StopReason,
    pub stop_text: Option<String>,
}

impl Talker {
    /// Finds the model, and loads it if no node does.
    ///
    /// # Errors
    /// If it is not found, cannot run, or has no chat template.
    pub fn open(args: &ChatArgs) -> anyhow::Result<Self> {
        let model = &args.model;
        match source::place(model, false)? {
            ModelArgument::Directory => {
                Self::here(args, source::open_path(&model.model, model.quantize)?)
            }
            ModelArgument::Named => {
                let data = data_dir(&model.data)?;
                let text = &*model.name();
                let missing = || source::not_a_directory(text);
                match StoreAccess::open(&data).with_context(missing)? {
                    StoreAccess::Node(client) => Ok(Self::Node(client)),
                    here => {
                        let held = held::open_in(here, &data, text).with_context(|| {
                            format!("no node runs on {}; {}", data.display(), missing())
                        })?;
                        Self::here(args, source::open_held(held)?)
                    }
                }
            }
        }
    }

    fn here(args: &ChatArgs, opened: Opened) -> anyhow::Result<Self> {
        opened.tokenizer()?;
        let adapters = adapters::open(&args.adapters.adapters, &args.model.data)?;
        // Before anything is loaded.
        let chat = opened.model.manifest.chat.as_ref();
        let chat = chat.ok_or(EngineError::Template(TemplateError::Missing))?;
        template::check(chat).map_err(EngineError::Template)?;
        let context = args.model.context;
        let mut session = opened.session(&args.model, args.model.slots(), context)?;
        session.adapt(&adapters)?;
        // The caches grow with the conversation.
        let most = context.unwrap_or(opened.model.graph.context_max);
        session.parts().1.set_limit(most);
        Ok(Self::Here(Box::new(Here { session, opened })))
    }

    /// The answer to a request. `each` gets its text as it comes, and returns false to stop it.
    pub fn answer(
        &mut self,
        request: &GenerateRequest,
        each: &mut dyn FnMut(&str) -> bool,
    ) -> anyhow::Result<Turn> {
        match self {
            Self::Here(here) => here.answer(request, each),
            Self::Node(client) => asking(|trust| {
                let trust = request.trust.iter().copied().chain(trust).collect();
                let (can_ask, progress) = (can_ask(), true);
                let request = GenerateRequest { trust, can_ask, progress, ..request.clone() };
                on_node(client, &request, each)
            }),
        }
    }
}

impl Here {
    fn answer(
        &mut self,
        request: &GenerateRequest,
        each: &mut dyn FnMut(&str) -> bool,
    ) -> anyhow::Result<Turn> {
        let tokenizer = self.opened.tokenizer()?;
        let asked = Asked::check(&self.opened.model, tokenizer, request)?;
        let (engine, sequence) = self.session.parts();
        let done = generation::generate(engine, sequence, tokenizer, &asked, |_, piece| {
            each(&piece.text)
        })?;
        each(&done.rest);
        tracing::debug!(reused = done.reused, prompt = asked.request.prompt.len(), "a turn");
        let (tokens, stop) = (done.tokens.len(), done.reason);
        Ok(Turn { text: done.text, tokens, stop, stop_text: done.stop_text })
    }
}

fn on_node(
    client: &Client,
    request: &GenerateRequest,
    each: &mut dyn FnMut(&str) -> bool,
) -> anyhow::Result<Turn> {
    let waiting = progress::spinner("the node is finding and loading the model");
    let (mut text, mut tokens) = (String::new(), 0);
    let mut end = None;
    let heard = client.generate(request, |event| {
        if let GenerateEvent::Loading(progress) = &event {
            waiting.set_message(progress::describe("fetching the model", progress));
            return each("");
        }
        waiting.finish_and_clear();
        match event {
            GenerateEvent::Token { text: piece, .. } => {
                text += &piece;
                tokens += 1;
                each(&piece)
            }
            GenerateEvent::End { .. } | GenerateEvent::Error { .. } => {
                end = Some(event);
                false
            }
            GenerateEvent::Loading(_) | GenerateEvent::Start { .. } => each(""),
        }
    });
    waiting.finish_and_clear();
    heard?;
    match end {
        Some(GenerateEvent::End { text, rest, stop, stop_text, .. }) => {
            each(&rest);
            Ok(Turn { text, tokens, stop, stop_text })
        }
        Some(GenerateEvent::Error { label, message }) => Err(Answered { label, message }.into()),
        // Ctrl-C ended the listening; the node notices at its next token.
        _ if !each("") => Ok(Turn { text, tokens, stop: StopReason::Cancelled, stop_text: None }),
        _ => bail!("the node stopped before the answer was complete"),
    }
}
