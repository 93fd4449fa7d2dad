//! What templates expect of Python: dictionaries in order, `json.dumps`, and how values print.
//!
//! Whatever walks a value is bounded in depth and in the text that it makes, because a template can
//! nest a value in itself over and over.

use std::fmt::Write;
use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ObjectExt, ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};
use serde_json::Value as Json;

/// The deepest value that is printed. JSON that is read here is at most 128 deep.
const DEPTH_MAX: usize = 160;
/// The most bytes that one value becomes.
const TEXT_BYTES_MAX: usize = 16 << 20;

/// A JSON object whose keys stay in order.
#[derive(Debug)]
struct Ordered(Vec<(Value, Value)>);

impl Object for Ordered {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_key_value_enumerator(|this| Box::new(this.0.iter().cloned()))
    }
}

/// A JSON value as the engine's.
pub fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Array(list) => Value::from(list.iter().map(value).collect::<Vec<_>>()),
        Json::Object(map) => {
            let pairs = map.iter().map(|(key, json)| (Value::from(key.as_str()), value(json)));
            Value::from_object(Ordered(pairs.collect()))
        }
        Json::Bool(yes) => Value::from(*yes),
        Json::String(text) => Value::from(text.as_str()),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
    }
}

/// Prints a value as Python's `str` does.
pub fn print(out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(()),
        ValueKind::Bool | ValueKind::None | ValueKind::Seq | ValueKind::Map => {
            let mut text = Text::default();
            text.python(value, 0)?;
            Ok(out.write_str(&text.0)?)
        }
        _ => Ok(write!(out, "{value}")?),
    }
}

/// `json.dumps` with Transformers' defaults: not escaped to ASCII, `", "` and `": "` between.
pub fn tojson(state: &mut State<'_, '_>, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let between = match (&separators, indent) {
        (Some(pair), _) if pair.len() == 2 => (pair[0].clone(), pair[1].clone()),
        (Some(_), _) => return Err(refused("separators must be two texts")),
        (None, Some(_)) => (",".to_owned(), ": ".to_owned()),
        (None, None) => (", ".to_owned(), ": ".to_owned()),
    };
    let form = Form {
        indent: indent.map(|indent| indent.min(16)),
        between,
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut text = Text::default();
    text.json(value, &form, 0)?;
    state.consume_fuel(text.0.len() as u64 / 64)?;
    // Not escaped again.
    Ok(Value::from_safe_string(text.0))
}

/// How JSON is laid out.
struct Form {
    indent: Option<usize>,
    /// Between items, and between a key and its value.
    between: (String, String),
    ascii: bool,
    sorted: bool,
}

fn refused(problem: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}

/// Text that is being made.
#[derive(Default)]
struct Text(String);

impl Text {
    fn push(&mut self, text: &str) -> Result<(), Error> {
        if self.0.len() + text.len() > TEXT_BYTES_MAX {
            return Err(Error::new(ErrorKind::OutOfFuel, "a value becomes too much text"));
        }
        self.0.push_str(text);
        Ok(())
    }

    fn json(&mut self, value: &Value, form: &Form, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(refused("a value is nested too deep"));
        }
        match value.kind() {
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.push(&value.to_string()),
            ValueKind::String => self.json_string(value.as_str().unwrap_or_default(), form.ascii),
            ValueKind::Map => {
                let mut pairs = pairs(value);
                if form.sorted {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.push("{")?;
                for (at, (key, value)) in pairs.iter().enumerate() {
                    self.json_next(at, form, depth + 1)?;
                    self.json_string(&key.to_string(), form.ascii)?;
                    self.push(&form.between.1)?;
                    self.json(value, form, depth + 1)?;
                }
                self.json_end(pairs.len(), form, depth)?;
                self.push("}")
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.push("[")?;
                let mut count = 0;
                for (at, item) in value.try_iter()?.enumerate() {
                    self.json_next(at, form, depth + 1)?;
                    self.json(&item, form, depth + 1)?;
                    count = at + 1;
                }
                self.json_end(count, form, depth)?;
                self.push("]")
            }
            _ => Err(refused("a value that is not defined cannot become JSON")),
        }
    }

    /// What comes before item number `at`.
    fn json_next(&mut self, at: usize, form: &Form, depth: usize) -> Result<(), Error> {
        if at > 0 {
            self.push(&form.between.0)?;
        }
        self.json_line(form, depth)
    }

    /// What comes after the last of `count` items.
    fn json_end(&mut self, count: usize, form: &Form, depth: usize) -> Result<(), Error> {
        if count > 0 { self.json_line(form, depth) } else { Ok(()) }
    }

    fn json_line(&mut self, form: &Form, depth: usize) -> Result<(), Error> {
        let Some(indent) = form.indent else { return Ok(()) };
        self.push("\n")?;
        self.push(&" ".repeat(indent * depth))
    }

    fn json_string(&mut self, text: &str, ascii: bool) -> Result<(), Error> {
        let quoted = Json::from(text).to_string();
        if !ascii || quoted.is_ascii() {
            return self.push(&quoted);
        }
        let mut escaped = String::with_capacity(quoted.len());
        for c in quoted.chars() {
            if c.is_ascii() {
                escaped.push(c);
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(escaped, "\\u{unit:04x}")?;
            }
        }
        self.push(&escaped)
    }

    /// `repr` of a value, but for a string at the top.
    fn python(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(refused("a value is nested too deep"));
        }
        match value.kind() {
            ValueKind::None => self.push("None"),
            ValueKind::Bool => self.push(if value.is_true() { "True" } else { "False" }),
            ValueKind::String => {
                let text = value.as_str().unwrap_or_default();
                let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
                let mut quoted = String::from(quote);
                for c in text.chars() {
                    match c {
                        '\\' => quoted.push_str("\\\\"),
                        '\n' => quoted.push_str("\\n"),
                        '\r' => quoted.push_str("\\r"),
                        '\t' => quoted.push_str("\\t"),
                        c if c == quote => quoted.extend(['\\', c]),
                        c if c.is_ascii_control() => write!(quoted, "\\x{:02x}", u32::from(c))?,
                        c => quoted.push(c),
                    }
                }
                quoted.push(quote);
                self.push(&quoted)
            }
            ValueKind::Map => {
                self.push("{")?;
                for (at, (key, value)) in pairs(value).iter().enumerate() {
                    self.push(if at > 0 { ", " } else { "" })?;
                    self.python(key, depth + 1)?;
                    self.push(": ")?;
                    self.python(value, depth + 1)?;
                }
                self.push("}")
            }
            ValueKind::Seq => {
                let (open, close) = if value.is_tuple() { ("(", ")") } else { ("[", "]") };
                self.push(open)?;
                for (at, item) in value.try_iter()?.enumerate() {
                    self.push(if at > 0 { ", " } else { "" })?;
                    self.python(&item, depth + 1)?;
                }
                self.push(close)
            }
            _ => self.push(&value.to_string()),
        }
    }
}

/// A dictionary's items in its order.
fn pairs(map: &Value) -> Vec<(Value, Value)> {
    let Some(object) = map.as_object() else { return Vec::new() };
    object.try_iter_pairs().into_iter().flatten().collect()
}
