//! Models that say what they are told to: each token decides the next one, so tests can ask for
//! tool calls and answers that are known in advance.
//!
//! Each is a Llama whose only layer adds nothing: the embedding of a token is a unit vector, and the
//! head maps it to the token that follows in a [`Script`].

use std::path::Path;

use serde_json::{Map, Value, json};

/// Embedding and vocabulary have the same size.
const SIZE: usize = 64;
const UNKNOWN: usize = 0;
const END: usize = 2;

/// The begin of a call that must be made, as the API writes it.
const BEGIN: &str = "\n{\"name\": \"add\", \"arguments\":";
const ARGUMENTS: &str = " {\"a\": 2, \"b\": 3}}\n";
const CALL: &str = "\n{\"name\": \"add\", \"arguments\": {\"a\": 2, \"b\": 3}}\n";

/// What a model says.
#[derive(Clone, Copy)]
struct Script {
    /// Each text and the ones that follow it, up to the end. What is not listed is followed by "la ",
    /// without end.
    lines: &'static [&'static [&'static str]],
    /// Texts that it knows and does not say by itself.
    others: &'static [&'static str],
    template: &'static str,
}

/// For the APIs.
const CALLS: Script = Script { lines: &SCRIPT, others: &JSON, template: TEMPLATE };

/// For the page.
const PAGE: Script = Script { lines: &PAGE_LINES, others: &[], template: PAGE_TEMPLATE };

const PAGE_LINES: [&[&str]; 5] = [
    &[
        "<say>",
        "## Sorting in Rust\n\n",
        "Use **`sort_unstable`** when ",
        "equal items may change places:\n\n",
        "```rust\nlet mut list = vec![3, 1, 2];\n",
        "list.sort_unstable();\n",
        "assert_eq!(list, [1, 2, 3]);\n```\n\n",
        "| way | order of equal items | memory |\n|---|---|---:|\n",
        "| `sort` | kept | half of the list |\n",
        "| `sort_unstable` | free | none |\n\n",
        "1. It sorts *in place*.\n2. It takes n log n steps.\n\n",
        "More in [the documentation](https://doc.rust-lang.org/std/).",
    ],
    &["<sum>", "<think>", "Two and three. ", "That makes five.", "</think>\n\n", "It is **5**."],
    &[
        "<trap>",
        "<img src=x onerror=alert(1)> ",
        "[click](javascript:alert(1)) ",
        "<script>alert(1)</script>",
    ],
    &["<sys>", "Your wish is my command."],
    &["<sing>", "la "],
];

const PAGE_TEMPLATE: &str =
    "{%- for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor -%}
{%- if messages[0].role == 'system' -%}<sys>{%- elif 'sum' in messages[-1].content -%}<sum>
{%- elif 'trap' in messages[-1].content -%}<trap>
{%- elif 'sing' in messages[-1].content -%}<sing>{%- else -%}<say>{%- endif -%}";

const SCRIPT: [&[&str]; 4] = [
    &["<say>", "Hello", ", ", "wörld", "!"],
    &["<ask>", "Let me add.\n", "<tool_call>", CALL, "</tool_call>"],
    &["<sum>", "The sum is ", "5", "."],
    &[BEGIN, ARGUMENTS, "</tool_call>"],
];

/// What answers that are held to a form are made of. The model itself never says it.
const JSON: [&str; 33] = [
    "{", "}", "[", "]", "\"", ":", ",", "-", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "a",
    "b", "d", "e", "g", "m", "n", "r", "s", "t", "u", "true", "false", "null", " ",
];

const TEMPLATE: &str =
    "{%- for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor -%}
{%- if messages[-1].role == 'tool' -%}<sum>{%- elif tools -%}<ask>{%- else -%}<say>{%- endif -%}
{#- calls are written between <tool_call> and </tool_call> -#}";

fn texts(script: Script) -> Vec<&'static str> {
    let mut texts = vec!["<unk>", "<s>", "</s>", "la "];
    for text in script.lines.iter().copied().flatten().chain(script.others) {
        if !texts.contains(text) {
            texts.push(text);
        }
    }
    texts
}

/// The token after each.
fn next(script: Script) -> Vec<usize> {
    let texts = texts(script);
    assert!(texts.len() <= SIZE, "{} texts", texts.len());
    let id = |text: &str| texts.iter().position(|have| *have == text).unwrap();
    let mut next = vec![id("la "); SIZE];
    for line in script.lines {
        for pair in line.windows(2) {
            next[id(pair[0])] = id(pair[1]);
        }
        // A song has no end.
        if line[line.len() - 1] != "la " {
            next[id(line[line.len() - 1])] = END;
        }
    }
    next
}

fn tokenizer(script: Script) -> Value {
    let texts = texts(script);
    let vocab: Map<String, Value> =
        texts.iter().enumerate().map(|(id, text)| ((*text).to_owned(), id.into())).collect();
    let added: Vec<Value> = texts
        .iter()
        .enumerate()
        .map(|(id, text)| {
            json!({ "id": id, "content": text, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": id <= END })
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Fuse" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": texts[UNKNOWN] },
    })
}

/// A matrix in bf16, row by row.
fn matrix(rows: usize, columns: usize, value: impl Fn(usize, usize) -> f32) -> Vec<u8> {
    let at = |index: usize| value(index / columns, index % columns).to_bits() >> 16;
    (0..rows * columns).flat_map(|index| (at(index) as u16).to_le_bytes()).collect()
}

fn weights(script: Script) -> Vec<u8> {
    let next = next(script);
    let mut tensors = vec![
        (
            "model.embed_tokens.weight",
            vec![SIZE, SIZE],
            matrix(SIZE, SIZE, |r, c| f32::from(r == c)),
        ),
        (
            "lm_head.weight",
            vec![SIZE, SIZE],
            matrix(SIZE, SIZE, |r, c| 4.0 * f32::from(next[c] == r)),
        ),
        ("model.norm.weight", vec![SIZE], matrix(1, SIZE, |_, _| 1.0)),
        ("model.layers.0.input_layernorm.weight", vec![SIZE], matrix(1, SIZE, |_, _| 1.0)),
        ("model.layers.0.post_attention_layernorm.weight", vec![SIZE], matrix(1, SIZE, |_, _| 1.0)),
    ];
    for name in [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ] {
        tensors.push((name, vec![SIZE, SIZE], matrix(SIZE, SIZE, |_, _| 0.0)));
    }
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(
            name.to_owned(),
            json!({ "dtype": "BF16", "shape": shape, "data_offsets": offsets }),
        );
        data.extend(bytes);
    }
    let header = Value::Object(header).to_string().into_bytes();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

/// Writes the model that makes calls as a checkpoint.
pub fn write(dir: &Path) {
    write_script(dir, CALLS);
}

/// Writes the model that the page's tests talk to.
pub fn write_for_page(dir: &Path) {
    write_script(dir, PAGE);
}

fn write_script(dir: &Path, script: Script) {
    std::fs::create_dir_all(dir).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 16384, "vocab_size": SIZE,
        "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": END,
        "torch_dtype": "bfloat16",
    });
    let named = json!({ "chat_template": script.template, "eos_token": "</s>" });
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).unwrap();
    write("config.json", config.to_string().as_bytes());
    write("tokenizer.json", tokenizer(script).to_string().as_bytes());
    write("tokenizer_config.json", named.to_string().as_bytes());
    write("model.safetensors", &weights(script));
}
