//! Writes a manifest with one key, shard or tensor per line. The same body always
//! gives the same bytes, because the model's id is their hash.

use serde::Serialize;
use serde_json::{Value, json};

use super::manifest::{HashAlgorithm, ManifestBody, Shard, Span, TensorEntry};

/// The JSON text, ending in a newline.
pub fn to_json_bytes(body: &ManifestBody) -> Vec<u8> {
    let mut out = String::from("{\n");
    let mut field = |name: &str, text: &str| {
        if out.len() > 2 {
            out.push_str(",\n");
        }
        out.push_str(&format!("  {}: {text}", compact(&name)));
    };
    field("version", &body.version.to_string());
    field("modelId", &compact(&body.model_id));
    field("modelType", &compact(&body.model_type));
    field("quantization", &compact(&body.quantization));
    field("architecture", &compact(&body.architecture));
    field("moeConfig", &compact(&body.moe));
    field("inference", &compact(&body.inference));
    field("config", &compact(&body.config));
    // One name for all shards: the rules refuse mixed hash functions.
    let algorithm = body.shards.first().map_or(HashAlgorithm::Blake3, |s| s.hash.algorithm);
    field("hashAlgorithm", &compact(&algorithm.name()));
    field("totalSize", &body.total_size.to_string());
    field("eos_token_id", &compact(&body.eos_token_ids));
    field("tokenizer", &compact(&tokenizer(body)));
    // Only where there are any: the ids of other models stay what they are.
    if let Some(chat) = &body.chat {
        field("chatTemplates", &compact(chat));
    }
    let shards = body.shards.iter().map(shard).collect::<Vec<_>>();
    field("shards", &lines('[', ']', &shards));
    let tensors = body.tensors.iter();
    let tensors = tensors.map(|(name, t)| format!("{}: {}", compact(&name), tensor(t)));
    field("tensors", &lines('{', '}', &tensors.collect::<Vec<_>>()));
    out.push_str("\n}\n");
    out.into_bytes()
}

/// Serialising strings, numbers and maps with string keys cannot fail.
fn compact<T: Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data serialises")
}

fn lines(open: char, close: char, items: &[String]) -> String {
    if items.is_empty() {
        return format!("{open}{close}");
    }
    format!("{open}\n    {}\n  {close}", items.join(",\n    "))
}

fn tokenizer(body: &ManifestBody) -> Value {
    let Some(tokenizer) = &body.tokenizer else {
        return Value::Null;
    };
    let mut out = json!({ "type": "bundled", "file": tokenizer.file });
    if let Some(size) = tokenizer.size {
        out["size"] = json!(size);
    }
    if let Some(id) = tokenizer.id {
        out["blake3"] = json!(id);
    }
    out
}

fn shard(shard: &Shard) -> String {
    compact(&json!({
        "index": shard.index,
        "filename": shard.filename,
        "size": shard.size,
        "hash": shard.hash.to_hex(),
        "offset": shard.offset,
    }))
}

fn tensor(tensor: &TensorEntry) -> String {
    let mut out = match tensor.single_span() {
        Some(span) => json!({ "shard": span.shard, "offset": span.offset }),
        None => {
            let span =
                |s: &Span| json!({ "shardIndex": s.shard, "offset": s.offset, "size": s.size });
            json!({ "spans": tensor.spans.iter().map(span).collect::<Vec<_>>() })
        }
    };
    out["size"] = json!(tensor.size);
    out["shape"] = json!(tensor.shape);
    out["dtype"] = json!(tensor.dtype);
    out["role"] = json!(tensor.role.name());
    out["group"] = json!(tensor.group);
    if let Some(layout) = &tensor.layout {
        out["layout"] = json!(layout);
    }
    compact(&out)
}
