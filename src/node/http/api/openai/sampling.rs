//! How the next token is chosen: fields that several routes share.

use serde_json::Value;

use super::super::body::{Object, optional, texts};
use super::super::failed::Failed;
use crate::api::GenerateRequest;
use crate::engine::Lane;

/// The seed's place in a request that has none.
fn any_seed() -> u64 {
    // JSON's numbers are exact up to 53 bits, so a seed that is shown can be given back.
    rand::random::<u64>() >> 11
}

/// A request with everything that these fields say.
///
/// # Errors
/// If one has another type, or a bias is none.
pub fn sampled(body: &Object) -> Result<GenerateRequest, Failed> {
    let seed = optional::<i64>(body, "seed")?.map(i64::cast_unsigned);
    let number = |name: &str, or: f32| Ok(optional::<f32>(body, name)?.unwrap_or(or));
    let top_p = number("top_p", 1.0)?;
    // A share of nothing keeps the likeliest token alone.
    let greedy = top_p == 0.0;
    Ok(GenerateRequest {
        temperature: if greedy { 0.0 } else { number("temperature", 1.0)? },
        top_p: if greedy { 1.0 } else { top_p },
        top_k: optional(body, "top_k")?.unwrap_or(0),
        min_p: number("min_p", 0.0)?,
        repetition_penalty: number("repetition_penalty", 1.0)?,
        presence_penalty: number("presence_penalty", 0.0)?,
        frequency_penalty: number("frequency_penalty", 0.0)?,
        repeat_last_n: optional(body, "repeat_last_n")?,
        seed: seed.unwrap_or_else(any_seed),
        logit_bias: biases(body)?,
        stop: texts(body, "stop")?,
        resume: true,
        ..GenerateRequest::default()
    })
}

/// `{"TOKEN": NUMBER}`
fn biases(body: &Object) -> Result<Vec<(u32, f32)>, Failed> {
    let Some(map) = optional::<Object>(body, "logit_bias")? else { return Ok(Vec::new()) };
    let bias = |(token, by): (String, Value)| {
        let bias = token.parse().ok().zip(by.as_f64().map(|by| by as f32));
        bias.ok_or_else(|| Failed::field("logit_bias", "it maps ids of tokens to numbers"))
    };
    map.into_iter().map(bias).collect()
}

/// Requests of one user take turns with those of others.
pub fn lane(body: &Object, fields: &[&str]) -> Lane {
    let user = fields.iter().find_map(|name| body.get(*name)?.as_str());
    user.filter(|user| !user.is_empty()).map_or_else(Lane::own, Lane::of)
}
