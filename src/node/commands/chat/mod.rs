//! `chat`: a conversation with a model, turn by turn, in the terminal or from a script's lines.
//!
//! `input` reads what is said, `line` understands it, `talker` lets a model answer: one loaded here or
//! one of the running node. Invariant: Ctrl-C ends an answer or drops a line, never the program, and
//! what was said up to then stays in the conversation. A turn that fails leaves the conversation as it
//! was.

mod input;
mod line;
mod talker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use doppler_infer::generate::StopReason;
use doppler_infer::template::Conversation;

use super::text_args;
use crate::adapters;
use crate::api::GenerateRequest;
use crate::args::ChatArgs;
use crate::engine;
use crate::output::{self, note};
use crate::signals;
use input::{Heard, Input};
use line::{HELP, Line, Setting};
use talker::{Talker, Turn};

/// The state of the conversation.
struct Chat {
    request: GenerateRequest,
    conversation: Conversation,
    talker: Talker,
    /// Set by Ctrl-C while the model answers.
    interrupted: Arc<AtomicBool>,
}

pub fn chat(args: &ChatArgs) -> anyhow::Result<()> {
    let request = GenerateRequest {
        tokens: args.tokens.unwrap_or(usize::MAX),
        trust: args.trust.clone(),
        resume: true,
        adapters: adapters::asked(&args.adapters.adapters)?,
        ..text_args::request(&args.model, &args.sampling)
    };
    engine::check_request(&request)?;
    let mut input = Input::open()?;
    let interrupted = match input.is_person() {
        true => signals::interrupts()?,
        // A script that is stopped stops all of it.
        false => Arc::default(),
    };
    let conversation = Conversation {
        messages: args.system.iter().map(|text| Conversation::message("system", text)).collect(),
        thinking: args.thinking.map(text_args::thinks),
        ..Conversation::default()
    };
    let talker = Talker::open(args)?;
    let mut chat = Chat { request, conversation, talker, interrupted };
    if input.is_person() {
        note!("{}: /help shows what else can be typed here", args.model.name());
    }
    loop {
        match input.read()? {
            Heard::End => return Ok(()),
            Heard::Nothing => {}
            Heard::Text(text) => match line::read(&text) {
                Ok(Line::Bye) => return Ok(()),
                Ok(line) => chat.act(line, input.is_person())?,
                Err(problem) => note!("{problem}"),
            },
        }
    }
}

impl Chat {
    /// # Errors
    /// If a script's turn fails. A person is told, and can go on.
    fn act(&mut self, line: Line, person: bool) -> anyhow::Result<()> {
        match line {
            Line::Bye => {}
            Line::Help => note!("{HELP}"),
            Line::Clear => {
                self.conversation.messages.retain(|message| message["role"] == "system");
                note!("the conversation begins anew");
            }
            Line::System(text) => self.system(text),
            Line::Set(None) => note!("{}", line::settings(&self.request, &self.conversation)),
            Line::Set(Some(setting)) => self.set(&setting),
            Line::Say(text) => {
                if let Err(error) = self.say(text) {
                    if !person {
                        return Err(error);
                    }
                    note!("error: {}", crate::one_line(&error));
                }
            }
        }
        Ok(())
    }

    /// Shows or replaces what the model is told first. A new text begins a new conversation, because
    /// the old one was held under the old text.
    fn system(&mut self, text: Option<String>) {
        let messages = &mut self.conversation.messages;
        match text {
            None => {
                let system = messages.iter().find(|message| message["role"] == "system");
                match system.and_then(|message| message["content"].as_str()) {
                    Some(text) => note!("{text}"),
                    None => note!("the model is told nothing first"),
                }
            }
            Some(text) => {
                *messages = vec![Conversation::message("system", &text)];
                note!("the conversation begins anew");
            }
        }
    }

    /// Changes an option if the result is a possible request.
    fn set(&mut self, setting: &Setting) {
        let (mut request, mut conversation) = (self.request.clone(), self.conversation.clone());
        setting.apply(&mut request, &mut conversation);
        match engine::check_request(&request) {
            Ok(()) => (self.request, self.conversation) = (request, conversation),
            Err(error) => note!("{error}"),
        }
    }

    /// One turn: what the user says, and the answer as it comes.
    fn say(&mut self, text: String) -> anyhow::Result<()> {
        self.conversation.messages.push(Conversation::message("user", &text));
        let request =
            GenerateRequest { chat: Some(self.conversation.clone()), ..self.request.clone() };
        self.interrupted.store(false, Ordering::SeqCst);
        let interrupted = self.interrupted.clone();
        let answered = self.talker.answer(&request, &mut |piece| {
            output::piece(piece) && !interrupted.load(Ordering::SeqCst)
        });
        // From here on, Ctrl-C has nothing to stop.
        self.interrupted.store(false, Ordering::SeqCst);
        match answered {
            Ok(turn) => {
                self.conversation.messages.push(Conversation::message("assistant", &turn.text));
                output::piece("\n");
                if let Some(why) = why(&turn) {
                    note!("({why})");
                }
                Ok(())
            }
            Err(error) => {
                self.conversation.messages.pop();
                Err(error)
            }
        }
    }
}

/// Why an answer ended, unless its turn was over.
fn why(turn: &Turn) -> Option<String> {
    match turn.stop {
        StopReason::StopToken | StopReason::Complete => None,
        StopReason::StopString => {
            Some(format!("stopped before {:?}", turn.stop_text.as_deref().unwrap_or_default()))
        }
        StopReason::MaxTokens => Some(format!(
            "stopped after {}; /set tokens NUMBER allows more",
            crate::size::count(turn.tokens, "token")
        )),
        StopReason::ContextFull => {
            Some("stopped because the context is full; /clear begins anew".to_owned())
        }
        StopReason::Cancelled => Some("stopped".to_owned()),
    }
}
