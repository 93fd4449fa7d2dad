//! Checked reading of an architecture's metadata.
//!
//! Reading a key consumes it. A key of the architecture that is left over is refused by name,
//! because it could change what the model says. Keys of other namespaces (`general`, `quantize` and
//! so on) describe the file.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use super::header::Value;

/// Keys that change nothing here, after the architecture's name.
const HARMLESS: &[&str] = &[
    // The embedding table says the same.
    "vocab_size",
    // Whether the scaling was trained or is applied afterwards.
    "rope.scaling.finetuned",
    // Which converter wrote a Llama.
    "tensor_data_layout",
];

/// The metadata of one architecture.
pub struct Keys<'a> {
    metadata: &'a BTreeMap<String, Value>,
    architecture: &'a str,
    read: RefCell<BTreeSet<String>>,
}

type Result<T> = std::result::Result<T, String>;

impl<'a> Keys<'a> {
    pub fn new(metadata: &'a BTreeMap<String, Value>, architecture: &'a str) -> Self {
        Self { metadata, architecture, read: RefCell::default() }
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        let full = format!("{}.{key}", self.architecture);
        let value = self.metadata.get(&full);
        self.read.borrow_mut().insert(full);
        value
    }

    fn bad(&self, key: &str, value: &Value, want: &str) -> String {
        format!("{}.{key} is {}, expected {want}", self.architecture, value.kind())
    }

    /// A whole number above 0. A list with a number for each layer is one number if all are equal.
    pub fn number(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = match value {
            Value::Integer(value) => u64::try_from(*value).ok(),
            Value::Integers(list) => match list.split_first() {
                Some((first, rest)) if rest.iter().all(|other| other == first) => {
                    u64::try_from(*first).ok()
                }
                _ => return Err(self.bad(key, value, "the same number for all layers")),
            },
            _ => None,
        };
        number
            .filter(|number| *number > 0)
            .map(Some)
            .ok_or_else(|| self.bad(key, value, "a whole number above 0"))
    }

    /// A whole number, 0 if it is absent.
    pub fn count(&self, key: &str) -> Result<u64> {
        match self.get(key) {
            None => Ok(0),
            Some(Value::Integer(value)) if (0..=1 << 20).contains(value) => Ok(*value as u64),
            Some(value) => Err(self.bad(key, value, "a whole number")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(value) => Err(self.bad(key, value, "true or false")),
        }
    }

    pub fn needed(&self, key: &str) -> Result<u64> {
        self.number(key)?.ok_or_else(|| format!("{}.{key} is missing", self.architecture))
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) if value.is_finite() => Ok(Some(*value)),
            Some(value) => Err(self.bad(key, value, "a finite number")),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.bad(key, value, "a string")),
        }
    }

    /// Refuses a key unless it is absent or has the only value that is understood.
    pub fn only(&self, key: &str, value: &Value) -> Result<()> {
        match self.get(key).filter(|found| *found != value) {
            None => Ok(()),
            Some(found) => Err(format!(
                "{}.{key} is {}, which is not supported ({} is)",
                self.architecture,
                found.kind(),
                value.kind()
            )),
        }
    }

    /// Refuses the metadata if a key of the architecture was not read.
    pub fn all_read(&self) -> Result<()> {
        let prefix = format!("{}.", self.architecture);
        let read = self.read.borrow();
        let left = self.metadata.iter().find(|(key, _)| {
            let own = key.strip_prefix(&prefix);
            own.is_some_and(|own| !HARMLESS.contains(&own) && !read.contains(*key))
        });
        match left {
            None => Ok(()),
            Some((key, value)) => Err(format!(
                "{key:?} is {}, which is not understood and could change what the model says",
                value.kind()
            )),
        }
    }
}
