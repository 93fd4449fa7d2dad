//! What a line of a chat means: something to say, or a command that begins with a slash.

use crate::api::GenerateRequest;
use doppler_infer::template::Conversation;

pub const HELP: &str = "\
/clear            forget the conversation, but not what the model is told first
/system [TEXT]    show what the model is told first, or tell it TEXT and begin anew
/set [NAME VALUE] show the options, or change one
/bye              end the chat, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one.
A message that begins with a slash is written with two: //etc is a directory.";

/// What a line means.
#[derive(Debug, PartialEq)]
pub enum Line {
    Say(String),
    Help,
    Clear,
    System(Option<String>),
    Set(Option<Setting>),
    Bye,
}

/// An option and its new value.
#[derive(Debug, Clone, PartialEq)]
pub enum Setting {
    Temperature(f32),
    TopK(usize),
    TopP(f32),
    MinP(f32),
    RepetitionPenalty(f32),
    PresencePenalty(f32),
    FrequencyPenalty(f32),
    Seed(u64),
    /// `None`: until the context is full.
    Tokens(Option<usize>),
    /// `None`: as the template has it.
    Thinking(Option<bool>),
}

/// The options' names, as on the command line.
const NAMES: &str = "temperature, top-k, top-p, min-p, repetition-penalty, presence-penalty, \
                     frequency-penalty, seed, tokens, thinking";

/// # Errors
/// If it is no command, or a command without what it needs: what to type instead.
pub fn read(text: &str) -> Result<Line, String> {
    let Some(command) = text.trim_start().strip_prefix('/') else {
        return Ok(Line::Say(text.to_owned()));
    };
    if command.starts_with('/') {
        return Ok(Line::Say(command.to_owned()));
    }
    let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let rest = Some(rest.trim()).filter(|rest| !rest.is_empty());
    match name {
        "help" | "?" => Ok(Line::Help),
        "clear" => Ok(Line::Clear),
        "system" => Ok(Line::System(rest.map(str::to_owned))),
        "set" => Ok(Line::Set(rest.map(setting).transpose()?)),
        "bye" | "exit" | "quit" => Ok(Line::Bye),
        _ => Err(format!("there is no /{name}: /help shows what there is")),
    }
}

fn setting(text: &str) -> Result<Setting, String> {
    let (name, value) = text.split_once([' ', '=']).unwrap_or((text, ""));
    let (name, value) = (name.trim().replace('_', "-"), value.trim());
    fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, String> {
        value.parse().map_err(|_| format!("{name} needs a number, not {value:?}"))
    }
    let n = name.as_str();
    Ok(match n {
        "temperature" | "temp" => Setting::Temperature(number(n, value)?),
        "top-k" => Setting::TopK(number(n, value)?),
        "top-p" => Setting::TopP(number(n, value)?),
        "min-p" => Setting::MinP(number(n, value)?),
        "repetition-penalty" | "repeat-penalty" => Setting::RepetitionPenalty(number(n, value)?),
        "presence-penalty" => Setting::PresencePenalty(number(n, value)?),
        "frequency-penalty" => Setting::FrequencyPenalty(number(n, value)?),
        "seed" => Setting::Seed(number(n, value)?),
        "tokens" if value == "all" => Setting::Tokens(None),
        "tokens" => Setting::Tokens(Some(number(n, value)?)),
        "thinking" => Setting::Thinking(match value {
            "on" => Some(true),
            "off" => Some(false),
            "default" => None,
            _ => return Err("thinking is on, off or default".to_owned()),
        }),
        _ => return Err(format!("there is no option {name}: {NAMES}")),
    })
}

impl Setting {
    pub fn apply(&self, request: &mut GenerateRequest, conversation: &mut Conversation) {
        match *self {
            Self::Temperature(value) => request.temperature = value,
            Self::TopK(value) => request.top_k = value,
            Self::TopP(value) => request.top_p = value,
            Self::MinP(value) => request.min_p = value,
            Self::RepetitionPenalty(value) => request.repetition_penalty = value,
            Self::PresencePenalty(value) => request.presence_penalty = value,
            Self::FrequencyPenalty(value) => request.frequency_penalty = value,
            Self::Seed(value) => request.seed = value,
            Self::Tokens(value) => request.tokens = value.unwrap_or(usize::MAX),
            Self::Thinking(value) => conversation.thinking = value,
        }
    }
}

/// The options and their values.
pub fn settings(request: &GenerateRequest, conversation: &Conversation) -> String {
    let tokens = match request.tokens {
        usize::MAX => "all".to_owned(),
        tokens => tokens.to_string(),
    };
    let thinking = match conversation.thinking {
        None => "default",
        Some(true) => "on",
        Some(false) => "off",
    };
    format!(
        "temperature {}, top-k {}, top-p {}, min-p {}, repetition-penalty {}, \
         presence-penalty {}, frequency-penalty {}, seed {}, tokens {tokens}, thinking {thinking}",
        request.temperature,
        request.top_k,
        request.top_p,
        request.min_p,
        request.repetition_penalty,
        request.presence_penalty,
        request.frequency_penalty,
        request.seed,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        let say = |text: &str| Ok(Line::Say(text.to_owned()));
        assert_eq!(read("Hello /there"), say("Hello /there"));
        assert_eq!(read("//etc is a directory"), say("/etc is a directory"));
        assert_eq!(read("/help"), Ok(Line::Help));
        assert_eq!(read(" /clear "), Ok(Line::Clear));
        assert_eq!(read("/system"), Ok(Line::System(None)));
        assert_eq!(read("/system  Be brief. "), Ok(Line::System(Some("Be brief.".into()))));
        assert_eq!(read("/set"), Ok(Line::Set(None)));
        assert_eq!(read("/bye"), Ok(Line::Bye));
        for (text, word) in [
            ("/helpme", "/help"),
            ("/set nothing 3", "temperature"),
            ("/set temperature warm", "\"warm\""),
            ("/set top-k", "number"),
            ("/set thinking maybe", "off"),
        ] {
            let problem = read(text).unwrap_err();
            assert!(problem.contains(word), "{text}: {problem}");
        }
    }

    #[test]
    fn every_named_option_can_be_set_and_is_shown() {
        let (mut request, mut chat) = (GenerateRequest::default(), Conversation::default());
        for name in NAMES.split(", ") {
            let value = if name == "thinking" { "off" } else { "2" };
            for text in [format!("/set {name} {value}"), format!("/set {name}={value}")] {
                let Ok(Line::Set(Some(setting))) = read(&text) else { panic!("{text}") };
                setting.apply(&mut request, &mut chat);
            }
        }
        let shown = settings(&request, &chat);
        for name in NAMES.split(", ") {
            let value = if name == "thinking" { "off" } else { "2" };
            assert!(shown.contains(&format!("{name} {value}")), "{name}: {shown}");
        }
        let Ok(Line::Set(Some(all))) = read("/set tokens all") else { panic!() };
        all.apply(&mut request, &mut chat);
        assert!(request.tokens == usize::MAX && settings(&request, &chat).contains("tokens all"));
    }
}
