//! Calls whose arguments fit their tools' schemas: grammars of what a model may write. Pure.
//!
//! An answer that must call a tool is begun ([`Syntax::begin`]); [`demanded`] is the rest of it, one
//! call. [`free`] is an answer in which the model may call tools, any number of them: what it writes as a
//! call is one of an offered tool, the rest is any text.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Syntax, hermes, llama, mistral};
use doppler_infer::grammar::{Constraint, rule};

/// A tool as a grammar takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    pub name: String,
    /// The schema of its arguments, which are an object in any case.
    pub schema: Value,
}

impl Held {
    /// The tool, with arguments that need only be an object.
    pub fn loose(&self) -> Self {
        Self { name: self.name.clone(), schema: json!({ "type": "object" }) }
    }
}

/// A text as a grammar writes it.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// Rules `args_0`, `args_1`...: the arguments of each tool.
fn arguments(tools: &[Held]) -> String {
    let rules =
        tools.iter().enumerate().map(|(at, tool)| format!("args_{at}: {}\n", rule(&tool.schema)));
    rules.collect()
}

/// What follows the beginning of an answer that must call one of the tools; `named`: the beginning has
/// its name, and there is only one.
pub fn demanded(
    syntax: Syntax,
    tools: &[Held],
    named: bool,
    markers: &[(u32, &str)],
) -> Constraint {
    let mut lark = String::new();
    let key = syntax.key();
    let calls = tools.iter().enumerate().map(|(at, tool)| {
        let name = match syntax {
            _ if named => String::new(),
            Syntax::MistralNamed => {
                format!("{} {} ", literal(&tool.name), mark(mistral::ARGUMENTS, markers))
            }
            // The name's first quote is part of the beginning.
            _ => {
                let quoted = literal(&tool.name);
                literal(&format!("{}, \"{key}\":", &quoted[1..])) + " "
            }
        };
        let end = match syntax {
            Syntax::Hermes => format!(" SPACE? \"}}\" (SPACE? {})?", mark(hermes::CLOSE, markers)),
            Syntax::Llama => " SPACE? \"}\"".to_owned(),
            Syntax::Mistral => " SPACE? \"}\" SPACE? \"]\"".to_owned(),
            Syntax::MistralNamed => String::new(),
        };
        format!("{name}SPACE? args_{at}{end}")
    });
    let calls: Vec<String> = calls.collect();
    let _ = write!(lark, "start: {}\nSPACE: /[ \\n]/\n{}", calls.join(" | "), arguments(tools));
    Constraint::Lark(lark)
}

/// A mark: a token of its own, or text.
fn mark(text: &str, markers: &[(u32, &str)]) -> String {
    match markers.iter().find(|(_, mark)| *mark == text) {
        Some((id, _)) => format!("<[{id}]>"),
        None => literal(text),
    }
}

/// An answer in which tools may be called. With `instead` it has that form if it calls none, and is
/// free text otherwise.
pub fn free(
    syntax: Syntax,
    tools: &[Held],
    markers: &[(u32, &str)],
    instead: Option<&Value>,
) -> Constraint {
    let key = syntax.key();
    let whole = |at: usize, tool: &Held| {
        let begin = literal(&format!("{{\"name\": {}, \"{key}\":", literal(&tool.name)));
        format!("{begin} SPACE? args_{at} SPACE? \"}}\"")
    };
    let calls = tools.iter().enumerate().map(|(at, tool)| match syntax {
        Syntax::MistralNamed => {
            format!(
                "{} {} SPACE? args_{at}",
                literal(&tool.name),
                mark(mistral::ARGUMENTS, markers)
            )
        }
        _ => whole(at, tool),
    });
    let call = format!("call: {}\n", calls.collect::<Vec<_>>().join(" | "));
    let (open, is_token) = match syntax {
        Syntax::Hermes => (hermes::OPEN, markers.iter().any(|(_, mark)| *mark == hermes::OPEN)),
        Syntax::Mistral | Syntax::MistralNamed => {
            (mistral::OPEN, markers.iter().any(|(_, mark)| *mark == mistral::OPEN))
        }
        Syntax::Llama => (llama::TAG, true),
    };
    let opened = mark(open, markers);
    let body = match syntax {
        Syntax::Hermes => format!("SPACE? call SPACE? {} SPACE?", mark(hermes::CLOSE, markers)),
        Syntax::Mistral => "SPACE? \"[\" call (\", \" call)* \"]\"".to_owned(),
        Syntax::MistralNamed | Syntax::Llama => "SPACE? call".to_owned(),
    };
    // Mistral's models write nothing behind calls, and it would not be told from them.
    let after = if syntax == Syntax::Hermes { "TEXT?" } else { "" };
    let (start, rules) = match (syntax, instead) {
        (Syntax::Llama, None) => {
            ("TEXT | call (\"; \" call)*".to_owned(), "TEXT: /[^{](?s:.*)/\n".to_owned())
        }
        (Syntax::Llama, Some(schema)) => {
            ("instead | call".to_owned(), format!("instead: {}\n", rule(schema)))
        }
        (_, Some(schema)) => {
            (format!("instead | ({opened} {body})+"), format!("instead: {}\n", rule(schema)))
        }
        (_, None) if is_token => {
            (format!("TEXT? ({opened} {body} {after})*"), "TEXT: /(?s:.+)/\n".to_owned())
        }
        // The text up to a mark ends with it, and nothing but a call can follow.
        (_, None) => {
            let until = format!("until[suffix={}]: /(?s:.*)/\n", literal(open));
            let start = match syntax {
                Syntax::Hermes => format!("(until {body})* TEXT?"),
                _ => format!("TEXT | until {body} ({opened} {body})*"),
            };
            (start, until + "TEXT: /(?s:.+)/\n")
        }
    };
    Constraint::Lark(format!("start: {start}\nSPACE: /[ \\n]/\n{rules}{call}{}", arguments(tools)))
}
