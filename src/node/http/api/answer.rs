//! From the engine's events to the parts of an answer, the same for every API. Pure.

use super::failed::Failed;
use super::tools::{Call, Found, Parser};
use crate::api::{GenerateEvent, TokenOdds};
use doppler_infer::generate::StopReason;
use doppler_infer::grammar::Constraint;

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Text, and the probabilities of the tokens that came with it, if they were asked for.
    Text {
        text: String,
        odds: Vec<TokenOdds>,
    },
    Call(Call),
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// This stop text would have come next.
    StopText(String),
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    /// The model waits for the results of its calls.
    Calls,
}

/// Tokens of one answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: usize,
    /// Those of the prompt whose keys and values were there already.
    pub cached: usize,
    pub generated: usize,
}

/// What an event means.
#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    /// The prompt has this many tokens.
    Start(usize),
    Parts(Vec<Part>),
    End {
        parts: Vec<Part>,
        finish: Finish,
        usage: Usage,
    },
    Failed(Failed),
}

/// How an answer is read.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// Finds calls, if tools were offered.
    pub parser: Option<Parser>,
    /// How the answer begins, before the first event.
    pub begin: String,
    /// Special tokens that the parser must see.
    pub markers: Vec<(u32, &'static str)>,
    /// Nothing counts after the first call.
    pub one_call: bool,
    /// What the model's text must look like, after `begin`.
    pub constraint: Option<Constraint>,
}

/// Listens to one answer's events.
pub struct Teller {
    reading: Reading,
    called: bool,
    prompt: usize,
}

impl Teller {
    pub fn new(mut reading: Reading) -> Self {
        if let Some(parser) = &mut reading.parser {
            // It begins a call, so nothing of it is given out.
            let begin = std::mem::take(&mut reading.begin);
            parser.push(&begin);
        }
        Self { reading, called: false, prompt: 0 }
    }

    pub fn hear(&mut self, event: GenerateEvent) -> Told {
        match event {
            GenerateEvent::Loading(_) => Told::Parts(Vec::new()),
            GenerateEvent::Start { prompt_tokens, .. } => {
                self.prompt = prompt_tokens;
                Told::Start(prompt_tokens)
            }
            GenerateEvent::Token { id, mut text, logprobs, .. } => {
                if self.reading.parser.is_some()
                    && let Some((_, mark)) = self.reading.markers.iter().find(|mark| mark.0 == id)
                {
                    text.push_str(mark);
                }
                Told::Parts(self.parts(&text, logprobs))
            }
            GenerateEvent::End { tokens, rest, stop, stop_text, reused, .. } => {
                let mut parts = self.parts(&rest, None);
                if let Some(parser) = self.reading.parser.take() {
                    let found = parser.finish();
                    parts.extend(self.counted(found));
                }
                let finish = match stop {
                    StopReason::MaxTokens => Finish::Length,
                    StopReason::ContextFull => Finish::Context,
                    StopReason::Cancelled => {
                        let message = "the node is stopping: the answer is not complete";
                        return Told::Failed(Failed::new("stopping", message));
                    }
                    _ if self.called => Finish::Calls,
                    StopReason::StopString => Finish::StopText(stop_text.unwrap_or_default()),
                    StopReason::StopToken | StopReason::Complete => Finish::Stop,
                };
                let usage = Usage { prompt: self.prompt, cached: reused, generated: tokens };
                Told::End { parts, finish, usage }
            }
            GenerateEvent::Error { label, message } => Told::Failed(Failed::told(label, message)),
        }
    }

    fn parts(&mut self, text: &str, logprobs: Option<TokenOdds>) -> Vec<Part> {
        let odds: Vec<_> = logprobs.into_iter().collect();
        let found = match &mut self.reading.parser {
            None if text.is_empty() => Vec::new(),
            None => vec![Found::Text(text.to_owned())],
            Some(parser) => parser.push(text),
        };
        let mut parts = self.counted(found);
        match parts.first_mut() {
            _ if odds.is_empty() => {}
            Some(Part::Text { odds: have, .. }) => *have = odds,
            _ => parts.insert(0, Part::Text { text: String::new(), odds }),
        }
        parts
    }

    /// What counts of it.
    fn counted(&mut self, found: Vec<Found>) -> Vec<Part> {
        let mut parts = Vec::new();
        for found in found {
            if self.called && self.reading.one_call {
                break;
            }
            parts.push(match found {
                Found::Text(text) => Part::Text { text, odds: Vec::new() },
                Found::Call(call) => {
                    self.called = true;
                    Part::Call(call)
                }
            });
        }
        parts
    }
}

/// An answer without a stream: all of its parts.
#[derive(Debug, Clone, Default)]
pub struct Whole {
    pub text: String,
    pub odds: Vec<TokenOdds>,
    pub calls: Vec<Call>,
}

impl Whole {
    pub fn add(&mut self, parts: Vec<Part>) {
        for part in parts {
            match part {
                Part::Text { text, odds } => {
                    self.text.push_str(&text);
                    self.odds.extend(odds);
                }
                Part::Call(call) => self.calls.push(call),
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::tools::Syntax;
    use super::*;
    use crate::api::Traffic;

    pub fn token(id: u32, text: &str) -> GenerateEvent {
        let (text, traffic) = (text.to_owned(), Traffic::default());
        GenerateEvent::Token { id, text, logprobs: None, traffic }
    }

    pub fn end(tokens: usize, rest: &str, stop: StopReason) -> GenerateEvent {
        GenerateEvent::End {
            tokens,
            text: String::new(),
            rest: rest.to_owned(),
            stop,
            stop_text: (stop == StopReason::StopString).then(|| "END".to_owned()),
            reused: 2,
            seconds: 0.1,
            tok_s: 1.0,
            clamped: 0,
            traffic: Traffic::default(),
        }
    }

    pub fn start(prompt_tokens: usize) -> GenerateEvent {
        GenerateEvent::Start { prompt_tokens, backend: "cpu".into() }
    }

    fn heard(reading: Reading, events: Vec<GenerateEvent>) -> (Whole, Option<(Finish, Usage)>) {
        let mut teller = Teller::new(reading);
        let (mut whole, mut ended) = (Whole::default(), None);
        for event in events {
            match teller.hear(event) {
                Told::Start(_) => {}
                Told::Parts(parts) => whole.add(parts),
                Told::End { parts, finish, usage } => {
                    whole.add(parts);
                    ended = Some((finish, usage));
                }
                Told::Failed(failed) => panic!("{failed:?}"),
            }
        }
        (whole, ended)
    }

    #[test]
    fn an_answer_ends_for_its_reason_and_tells_its_tokens() {
        for (stop, finish) in [
            (StopReason::StopToken, Finish::Stop),
            (StopReason::Complete, Finish::Stop),
            (StopReason::StopString, Finish::StopText("END".into())),
            (StopReason::MaxTokens, Finish::Length),
            (StopReason::ContextFull, Finish::Context),
        ] {
            let events = vec![start(5), token(1, "a"), token(2, ""), end(2, "b", stop)];
            let (whole, ended) = heard(Reading::default(), events);
            assert_eq!(whole.text, "ab");
            let usage = Usage { prompt: 5, cached: 2, generated: 2 };
            assert_eq!(ended, Some((finish, usage)));
        }
        let mut teller = Teller::new(Reading::default());
        let Told::Failed(failed) = teller.hear(end(1, "", StopReason::Cancelled)) else { panic!() };
        assert_eq!(failed.label, "stopping");
    }

    fn reading(syntax: Syntax, one_call: bool) -> Reading {
        let parser = Some(Parser::new(syntax, vec!["f".into()]));
        Reading { parser, one_call, ..Reading::default() }
    }

    #[test]
    fn calls_end_an_answer_unless_it_was_cut_off() {
        let text = "<tool_call>{\"name\": \"f\"}</tool_call>";
        let events = |stop| vec![start(1), token(1, text), token(2, text), end(2, "", stop)];
        let (whole, ended) = heard(reading(Syntax::Hermes, false), events(StopReason::StopToken));
        assert_eq!((whole.calls.len(), ended.unwrap().0), (2, Finish::Calls));
        let (whole, ended) = heard(reading(Syntax::Hermes, true), events(StopReason::StopToken));
        assert_eq!((whole.calls.len(), ended.unwrap().0), (1, Finish::Calls));
        let (_, ended) = heard(reading(Syntax::Hermes, false), events(StopReason::MaxTokens));
        assert_eq!(ended.unwrap().0, Finish::Length);
    }

    #[test]
    fn special_tokens_and_the_given_beginning_reach_the_parser() {
        let mut marked = reading(Syntax::MistralNamed, false);
        marked.markers = vec![(7, "[TOOL_CALLS]"), (8, "[ARGS]")];
        let events =
            vec![token(7, ""), token(1, "f"), token(8, ""), end(3, "{}", StopReason::StopToken)];
        assert_eq!(heard(marked, events).0.calls.len(), 1);
        let mut forced = reading(Syntax::Hermes, false);
        forced.begin = Syntax::Hermes.begin(Some("f"));
        let events = vec![token(1, " {\"a\": 1}}"), end(1, "", StopReason::StopToken)];
        let (whole, ended) = heard(forced, events);
        assert_eq!(whole.calls[0].arguments, r#"{"a":1}"#);
        assert_eq!(ended.unwrap().0, Finish::Calls);
    }
}
