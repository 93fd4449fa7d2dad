//! Values out of a request's JSON, with an error that names the field. Pure.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::failed::Failed;

/// A JSON object.
pub type Object = Map<String, Value>;

/// The field's value. `None` if it is absent or null.
///
/// # Errors
/// If it has another type.
pub fn optional<T: DeserializeOwned>(body: &Object, name: &str) -> Result<Option<T>, Failed> {
    match body.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match T::deserialize(value) {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(Failed::field(name, error.to_string())),
        },
    }
}

/// # Errors
/// If the field is absent or has another type.
pub fn required<T: DeserializeOwned>(body: &Object, name: &str) -> Result<T, Failed> {
    optional(body, name)?.ok_or_else(|| Failed::field(name, "this is required"))
}

/// A number of tokens.
///
/// # Errors
/// If it is not a whole number of at least one.
pub fn tokens(body: &Object, name: &str) -> Result<Option<usize>, Failed> {
    let tokens = optional::<u64>(body, name)?;
    if tokens == Some(0) {
        return Err(Failed::field(name, "ask for at least one token"));
    }
    Ok(tokens.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX)))
}

/// One text, or a list of them.
///
/// # Errors
/// If it is neither.
pub fn texts(body: &Object, name: &str) -> Result<Vec<String>, Failed> {
    match body.get(name) {
        Some(Value::String(text)) => Ok(vec![text.clone()]),
        _ => Ok(optional(body, name)?.unwrap_or_default()),
    }
}

/// # Errors
/// If the value is no object.
pub fn object<'a>(value: &'a Value, name: &str) -> Result<&'a Object, Failed> {
    value.as_object().ok_or_else(|| Failed::field(name, "this must be an object"))
}

/// A member of type text of a part of the request that `name` names.
///
/// # Errors
/// If it is absent or no text.
pub fn text<'a>(value: &'a Value, key: &str, name: &str) -> Result<&'a str, Failed> {
    let text = value.get(key).and_then(Value::as_str);
    text.ok_or_else(|| Failed::field(format!("{name}.{key}"), "this must be a text"))
}
