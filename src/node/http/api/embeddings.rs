//! `POST /v1/embeddings`: texts in, vectors out. The translation is pure.
//!
//! Reference: OpenAI's API reference, "Embeddings".

use serde_json::{Value, json};

use super::body::{Object, optional, required};
use super::failed::Failed;
use super::fields::Field;
use super::fields::Use::Taken;
use super::openai::lane;
use crate::engine::Lane;
use doppler_infer::embedding::Embedded;

pub const FIELDS: &[Field] = &[
    Field("model", Taken, "an embedding model"),
    Field(
        "input",
        Taken,
        "a text or up to 2,048 of them; not tokens. One that is too long is refused",
    ),
    Field("encoding_format", Taken, "`float` or `base64`"),
    Field("dimensions", Taken, "the model's own number only"),
    Field("prompt_name", Taken, "not OpenAI's: the model's prompt that is put before each text"),
    Field("user", Taken, "requests of one user take turns with those of others"),
];

/// Embeddings that were asked for.
#[derive(Debug)]
pub struct Embed {
    pub model: String,
    pub texts: Vec<String>,
    pub prompt_name: Option<String>,
    pub base64: bool,
    pub dimensions: Option<usize>,
    pub lane: Lane,
}

impl Embed {
    /// # Errors
    /// Names the field that is wrong.
    pub fn read(body: &Object) -> Result<Self, Failed> {
        let base64 = match optional::<String>(body, "encoding_format")?.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => return Err(Failed::field("encoding_format", "it is float or base64")),
        };
        let wrong = || Failed::field("input", "it is a text or a list of texts");
        let texts = match body.get("input") {
            Some(Value::String(text)) => vec![text.clone()],
            Some(Value::Array(list)) => {
                let texts = list.iter().map(|text| text.as_str().map(str::to_owned));
                texts.collect::<Option<Vec<_>>>().ok_or_else(wrong)?
            }
            _ => return Err(wrong()),
        };
        if texts.is_empty() {
            return Err(Failed::field("input", "there is no text to embed"));
        }
        Ok(Self {
            model: required(body, "model")?,
            texts,
            prompt_name: optional(body, "prompt_name")?,
            base64,
            dimensions: optional(body, "dimensions")?,
            lane: lane(body, &["user"]),
        })
    }

    /// The answer.
    ///
    /// # Errors
    /// If a text did not fit, or the vectors do not have the length that was asked for.
    pub fn answer(&self, model: &str, embedded: &[Embedded]) -> Result<Value, Failed> {
        for (number, one) in embedded.iter().enumerate() {
            if one.cut > 0 {
                let (most, more) = (one.tokens, one.cut);
                let why =
                    format!("input[{number}] has {more} tokens more than the {most} that fit");
                return Err(Failed::new("prompt_too_long", why));
            }
            let length = one.vector.len();
            if self.dimensions.is_some_and(|wanted| wanted != length) {
                let why =
                    format!("this model's vectors have {length} numbers, no more and no fewer");
                return Err(Failed::field("dimensions", why));
            }
        }
        let data = embedded.iter().enumerate().map(|(index, one)| {
            json!({ "object": "embedding", "index": index, "embedding": self.vector(&one.vector) })
        });
        let tokens: usize = embedded.iter().map(|one| one.tokens).sum();
        Ok(json!({
            "object": "list",
            "data": data.collect::<Value>(),
            "model": model,
            "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
        }))
    }

    fn vector(&self, vector: &[f32]) -> Value {
        if !self.base64 {
            // With no more digits than a number of 32 bits has.
            let short = |number: &f32| number.to_string().parse().unwrap_or(f64::from(*number));
            return vector.iter().map(|number| Value::from(short(number))).collect();
        }
        let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
        base64(&bytes).into()
    }
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or(0));
        let bits = (byte(0) << 16) | (byte(1) << 8) | byte(2);
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            let has = digit <= three.len();
            text.push(if has { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: Value) -> Result<Embed, Failed> {
        let mut body = json!({ "model": "m", "input": "Hi" });
        let body = body.as_object_mut().unwrap();
        body.extend(more.as_object().unwrap().clone());
        super::super::fields::check(FIELDS, body)?;
        Embed::read(body)
    }

    fn embedded(cut: usize) -> Vec<Embedded> {
        vec![Embedded { vector: vec![1.0, -0.1], tokens: 3, cut }]
    }

    #[test]
    fn vectors_are_numbers_or_their_bytes() {
        let said = read(json!({})).unwrap().answer("m", &embedded(0)).unwrap();
        assert_eq!(said["data"][0]["embedding"], json!([1.0, -0.1]));
        assert_eq!(said["usage"], json!({ "prompt_tokens": 3, "total_tokens": 3 }));
        let base64 = read(json!({ "encoding_format": "base64", "dimensions": 2 })).unwrap();
        let said = base64.answer("m", &embedded(0)).unwrap();
        assert_eq!(said["data"][0]["embedding"], "AACAP83MzL0=");
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(read(json!({ "input": ["a", "b"] })).unwrap().texts, ["a", "b"]);
        for (more, param) in [
            (json!({ "input": null }), "input"),
            (json!({ "input": [] }), "input"),
            (json!({ "input": [1, 2] }), "input"),
            (json!({ "encoding_format": "hex" }), "encoding_format"),
            (json!({ "dimension": 3 }), "dimension"),
        ] {
            assert_eq!(read(more.clone()).unwrap_err().param.as_deref(), Some(param), "{more}");
        }
        let cut = read(json!({})).unwrap().answer("m", &embedded(2)).unwrap_err();
        assert_eq!(cut.label, "prompt_too_long");
        let other = read(json!({ "dimensions": 3 })).unwrap().answer("m", &embedded(0));
        assert_eq!(other.unwrap_err().param.as_deref(), Some("dimensions"));
    }
}
