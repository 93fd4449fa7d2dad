//! Chat templates: from a conversation to the prompt that the model's makers meant.
//!
//! Templates are Jinja, rendered as Transformers does: blocks are trimmed, special tokens and
//! `raise_exception`, `strftime_now`, `tojson` and Python's methods are there. They come with models
//! from elsewhere, so they are not trusted: nothing can be included or read, fuel bounds time and
//! memory ([`FUEL`]), a stack of its own bounds depth, and a failure is one line.
//!
//! Known difference: a dictionary that the template itself writes down is sorted by key. Messages and
//! tools keep their order.
//!
//! Reference: `apply_chat_template` of Transformers, `utils/chat_template_utils.py`.

mod python;
mod strftime;

use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::tokenizer::PROMPT_BYTES_MAX;
use doppler_store::chat::{ChatTemplates, DEFAULT};

/// What a rendering may cost: an instruction each, and 64 bytes of text each. So it takes at most
/// about a second and 128 MB.
const FUEL: u64 = 2_000_000;
/// The stack of a rendering. Lists nested as deep as the fuel allows are dropped within it.
const STACK_BYTES: usize = 512 << 20;
/// The most messages of a conversation.
pub const MESSAGES_MAX: usize = 4096;
/// The most tools that a conversation offers.
pub const TOOLS_MAX: usize = 512;
/// The template for conversations with tools, if there is one of this name.
const WITH_TOOLS: &str = "tool_use";
/// The longest message of a template's error, in characters.
const PROBLEM_CHARS_MAX: usize = 400;

/// Why a conversation could not be made a prompt. Each message is one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error(
        "this model has no chat template, so it cannot chat: give it a plain prompt (run without \
         --chat), or convert it again from a checkpoint with chat_template.jinja or \
         tokenizer_config.json"
    )]
    Missing,
    #[error("the conversation is not usable: {0}")]
    Conversation(String),
    #[error("the model's chat template is not usable: {0}")]
    Syntax(String),
    /// The template itself says so.
    #[error("the model's chat template refuses this conversation: {0}")]
    Refused(String),
    #[error("the model's chat template failed: {0}")]
    Failed(String),
    #[error("the model's chat template does not end, or makes too much text: it was stopped")]
    Costly,
    #[error("the prompt would be {0} bytes long, more than {PROMPT_BYTES_MAX}")]
    TooLong(usize),
}

/// What was said so far, and what the model may use.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Conversation {
    /// Objects with a `role` and usually a `content`, the oldest first.
    pub messages: Vec<Json>,
    /// Descriptions of functions, as OpenAI's API has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Json>,
    /// Whether the model should think first. `None` leaves it to the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thinking: Option<bool>,
}

impl Conversation {
    /// A message of plain text.
    pub fn message(role: &str, content: &str) -> Json {
        serde_json::json!({ "role": role, "content": content })
    }

    /// # Errors
    /// If there is no message or too many, or one of them has no role.
    pub fn check(&self) -> Result<(), TemplateError> {
        let (messages, tools) = (self.messages.len(), self.tools.len());
        let problem = match () {
            () if messages == 0 => "it has no messages".to_owned(),
            () if messages > MESSAGES_MAX => {
                format!("{messages} messages, more than {MESSAGES_MAX}")
            }
            () if tools > TOOLS_MAX => format!("{tools} tools, more than {TOOLS_MAX}"),
            () => match self.messages.iter().position(|message| !message["role"].is_string()) {
                None => return Ok(()),
                Some(at) => format!("message {} has no role", at + 1),
            },
        };
        Err(TemplateError::Conversation(problem))
    }
}

/// The failure that `raise_exception` makes.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// Checks that every template can be parsed.
///
/// # Errors
/// With the name and line of the first that cannot.
pub fn check(chat: &ChatTemplates) -> Result<(), TemplateError> {
    for (name, source) in &chat.templates {
        let source = without_generation_tags(source);
        let environment = environment(SystemTime::UNIX_EPOCH)?;
        environment.template_from_named_str(name, &source).map_err(|error| failure(&error))?;
    }
    Ok(())
}

/// The prompt of a conversation, up to where the model's answer begins. `now` is what
/// `strftime_now` tells, in UTC.
///
/// # Errors
/// If there is no template, or it does not accept the conversation, fails, or costs too much.
pub fn render(
    chat: Option<&ChatTemplates>,
    conversation: &Conversation,
    now: SystemTime,
) -> Result<String, TemplateError> {
    let chat = chat.ok_or(TemplateError::Missing)?;
    conversation.check()?;
    let (name, source) = choose(chat, !conversation.tools.is_empty())?;
    // A thread of its own, because a template can nest values deeper than an ordinary stack allows
    // them to be dropped.
    let work = || render_here(chat, name, source, conversation, now);
    let rendered = std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("template".to_owned());
        let thread = builder.stack_size(STACK_BYTES).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| TemplateError::Failed(error.to_string()))?;
        thread.join().unwrap_or_else(|_| Err(TemplateError::Failed("it panicked".to_owned())))
    })?;
    match rendered.len() {
        bytes if bytes > PROMPT_BYTES_MAX => Err(TemplateError::TooLong(bytes)),
        _ => Ok(rendered),
    }
}

/// The source of the template for conversations with tools, or without. `None` if there is none.
pub fn source(chat: &ChatTemplates, with_tools: bool) -> Option<&str> {
    choose(chat, with_tools).ok().map(|(_, source)| source)
}

/// The template that a conversation wants: the one for tools, the default, or the only one.
fn choose(chat: &ChatTemplates, with_tools: bool) -> Result<(&str, &str), TemplateError> {
    let named = |name: &str| chat.templates.get_key_value(name);
    let tools = named(WITH_TOOLS).filter(|_| with_tools);
    let only = || chat.templates.iter().next().filter(|_| chat.templates.len() == 1);
    let found = tools.or_else(|| named(DEFAULT)).or_else(only);
    found.map(|(name, source)| (name.as_str(), source.as_str())).ok_or_else(|| {
        let names: Vec<&str> = chat.templates.keys().map(String::as_str).collect();
        TemplateError::Syntax(format!("none of {} is named {DEFAULT}", names.join(", ")))
    })
}

fn render_here(
    chat: &ChatTemplates,
    name: &str,
    source: &str,
    conversation: &Conversation,
    now: SystemTime,
) -> Result<String, TemplateError> {
    let source = without_generation_tags(source);
    let environment = environment(now)?;
    let template = environment.template_from_named_str(name, &source);
    let template = template.map_err(|error| failure(&error))?;
    let Conversation { messages, tools, thinking } = conversation;
    let list = |list: &[Json]| Value::from(list.iter().map(python::value).collect::<Vec<_>>());
    let mut context: Vec<(String, Value)> = vec![
        ("messages".into(), list(messages)),
        ("tools".into(), if tools.is_empty() { Value::from(()) } else { list(tools) }),
        ("documents".into(), Value::from(())),
        ("add_generation_prompt".into(), true.into()),
    ];
    if let Some(thinking) = *thinking {
        // Qwen's and SmolLM's name, and Granite's and DeepSeek's.
        context.push(("enable_thinking".into(), thinking.into()));
        context.push(("thinking".into(), thinking.into()));
    }
    let tokens = chat.tokens.iter().map(|(name, text)| (name.clone(), Value::from(text.as_str())));
    context.extend(tokens);
    let context = Value::from_pairs(context);
    template.render(context).map_err(|error| failure(&error))
}

/// What a template finds around it.
fn environment<'a>(now: SystemTime) -> Result<Environment<'a>, TemplateError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| failure(&error))?);
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(python::print);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python::tojson);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
    });
    environment.add_function("strftime_now", move |state: &mut State, format: String| {
        let told = strftime::utc(now, &format);
        state.consume_fuel(told.len() as u64 / 64)?;
        Ok::<_, Error>(told)
    });
    Ok(environment)
}

/// Replaces the tags with which Transformers marks an assistant's text for training. They have no
/// other effect, and the engine does not know them.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // `{%}` opens a tag and does not close it.
        let Some(length) = rest[start + 2..].find("%}") else { break };
        let (tag, after) = rest[start..].split_at(2 + length + 2);
        out.push_str(&rest[..start]);
        let inner = &tag[2..tag.len() - 2];
        let word = inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        match word {
            "generation" => out.push_str(&tag.replacen(word, "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen(word, "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// An error of the engine, on one line.
fn failure(error: &Error) -> TemplateError {
    let mut causes = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
    if let Some(raised) = causes.find_map(|cause| cause.downcast_ref::<Raised>()) {
        return TemplateError::Refused(one_line(&raised.0));
    }
    let line = error.line().map_or(String::new(), |line| format!(" (line {line})"));
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let problem = one_line(&format!("{detail}{line}"));
    match error.kind() {
        ErrorKind::OutOfFuel => TemplateError::Costly,
        ErrorKind::SyntaxError => TemplateError::Syntax(problem),
        _ => TemplateError::Failed(problem),
    }
}

fn one_line(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(PROBLEM_CHARS_MAX).map(plain).collect()
}
