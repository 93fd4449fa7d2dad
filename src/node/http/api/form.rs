//! The form that a request asks its answer to have. Pure.
//!
//! OpenAI's `response_format` nests a schema once more than its `text.format`, Anthropic's
//! `output_config.format` has only schemas. All may also be given an expression or a grammar, which is
//! ours.

use serde_json::Value;

use super::body::{Object, optional};
use super::failed::Failed;
use doppler_infer::grammar::Constraint;

/// The form that a field of this name, of this value, asks for. `None` asks for none.
///
/// # Errors
/// If the type is unknown, or what belongs to it is missing.
pub fn read(format: Option<&Value>, name: &str) -> Result<Option<Constraint>, Failed> {
    let Some(format) = format.filter(|format| !format.is_null()) else { return Ok(None) };
    let text = |key: &str| {
        let text = format.get(key).and_then(Value::as_str).map(str::to_owned);
        text.ok_or_else(|| Failed::field(format!("{name}.{key}"), "this must be a text"))
    };
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Constraint::json_object())),
        Some("json_schema") => {
            // Chat completions have it within an object of the type's name.
            let (within, name) = match format.get("json_schema") {
                Some(within) => (within, format!("{name}.json_schema")),
                None => (format, name.to_owned()),
            };
            let schema = within.get("schema").filter(|schema| schema.is_object());
            let missing = || Failed::field(format!("{name}.schema"), "this must be a JSON schema");
            Ok(Some(Constraint::JsonSchema(schema.ok_or_else(missing)?.clone())))
        }
        Some("regex") => Ok(Some(Constraint::Regex(text("regex")?))),
        Some("grammar") => Ok(Some(Constraint::Lark(text("grammar")?))),
        _ => Err(Failed::field(
            format!("{name}.type"),
            "it is text, json_object, json_schema, regex or grammar",
        )),
    }
}

/// The form in a member `key` of the object that a field of this name is, if it is there.
///
/// # Errors
/// As [`read`], or if the field is no object.
pub fn within(body: &Object, name: &str, key: &str) -> Result<Option<Constraint>, Failed> {
    let given = optional::<Object>(body, name)?.unwrap_or_default();
    read(given.get(key), &format!("{name}.{key}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_apis_form_is_read_and_what_is_wrong_is_named() {
        let schema = json!({ "type": "object" });
        let read = |format: Value| read(Some(&format), "f");
        let want = Ok(Some(Constraint::JsonSchema(schema.clone())));
        let nested = json!({ "name": "n", "strict": true, "schema": schema });
        assert_eq!(read(json!({ "type": "json_schema", "json_schema": nested })), want);
        assert_eq!(read(json!({ "type": "json_schema", "name": "n", "schema": schema })), want);
        assert_eq!(read(json!({ "type": "json_object" })), want);
        assert_eq!(read(json!({ "type": "text" })), Ok(None));
        assert_eq!(read(Value::Null), Ok(None));
        let regex = Ok(Some(Constraint::Regex("a+".into())));
        assert_eq!(read(json!({ "type": "regex", "regex": "a+" })), regex);
        let lark = Ok(Some(Constraint::Lark("start: \"a\"".into())));
        assert_eq!(read(json!({ "type": "grammar", "grammar": "start: \"a\"" })), lark);
        for (format, param) in [
            (json!({ "type": "json_schema" }), "f.schema"),
            (
                json!({ "type": "json_schema", "json_schema": { "schema": 7 } }),
                "f.json_schema.schema",
            ),
            (json!({ "type": "xml" }), "f.type"),
            (json!("json"), "f.type"),
            (json!({ "type": "regex" }), "f.regex"),
        ] {
            assert_eq!(read(format.clone()).unwrap_err().param.as_deref(), Some(param), "{format}");
        }
    }
}
