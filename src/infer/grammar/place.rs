//! Where a schema is at fault: the smallest part of it that is refused for the same reason.

use std::time::{Duration, Instant};

use serde_json::Value;

/// How long to look for it.
const LOOK_MAX: Duration = Duration::from_millis(300);

/// Members whose value is a schema, a list of schemas, or a map of them.
const SINGLE: [&str; 10] = [
    "items",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "additionalItems",
    "unevaluatedProperties",
];
const LISTS: [&str; 4] = ["allOf", "anyOf", "oneOf", "prefixItems"];
const MAPS: [&str; 5] =
    ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"];

/// The JSON pointer to the smallest part that `refuse` refuses with the same words as the whole; empty
/// for the whole.
pub(super) fn find(schema: &Value, why: &str, refuse: impl Fn(&Value) -> Option<String>) -> String {
    let began = Instant::now();
    let (mut place, mut here) = (String::new(), schema);
    'deeper: loop {
        for (step, part) in parts(here) {
            if began.elapsed() > LOOK_MAX {
                break 'deeper;
            }
            if refuse(&alone(part, schema)).as_deref() == Some(why) {
                place += &step;
                here = part;
                continue 'deeper;
            }
        }
        break;
    }
    place
}

/// A part with the definitions that it may refer to.
fn alone(part: &Value, root: &Value) -> Value {
    let mut part = part.clone();
    if let Some(object) = part.as_object_mut() {
        for name in ["$schema", "$defs", "definitions"] {
            if let Some(value) = root.get(name) {
                object.entry(name).or_insert_with(|| value.clone());
            }
        }
    }
    part
}

/// The schemas that a schema consists of, with the steps to them.
fn parts(schema: &Value) -> Vec<(String, &Value)> {
    let Some(schema) = schema.as_object() else { return Vec::new() };
    let get = |names: &'static [&'static str]| -> Vec<(&str, &Value)> {
        names.iter().filter_map(|name| Some((*name, schema.get(*name)?))).collect()
    };
    let mut parts = Vec::new();
    for (name, map) in get(&MAPS) {
        let map = map.as_object().into_iter().flatten();
        parts.extend(map.map(|(key, part)| (format!("/{name}/{}", escaped(key)), part)));
    }
    for (name, list) in get(&LISTS) {
        let list = list.as_array().map_or(&[][..], Vec::as_slice);
        parts.extend(list.iter().enumerate().map(|(at, part)| (format!("/{name}/{at}"), part)));
    }
    parts.extend(get(&SINGLE).into_iter().map(|(name, part)| (format!("/{name}"), part)));
    parts
}

/// A key as JSON pointers write it (RFC 6901).
fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
