//! `embed`: vectors of texts, by an embedding model on this disk or in the store.

use anyhow::ensure;
use serde::Serialize;

use super::print_json;
use crate::args::EmbedArgs;
use crate::output::{note, outln};
use crate::size::count;
use crate::{generation, progress, source};
use doppler_infer::embedding::{self, Asked, Embedded};
use doppler_infer::engine::{Engine, LoadOptions};

/// What `--json` prints.
#[derive(Serialize)]
struct Answer {
    embeddings: Vec<Vec<f32>>,
    /// By text.
    tokens: Vec<usize>,
    /// By text, tokens at the end that did not fit.
    cut: Vec<usize>,
    backend: String,
}

pub fn embed(args: &EmbedArgs) -> anyhow::Result<()> {
    let model = &args.model;
    ensure!(model.context.is_none(), "--context is the model's own for embeddings: leave it out");
    let opened = source::open(model)?;
    let asked = Asked { texts: &args.text, prompt_name: args.prompt_name.as_deref() };
    // A wrong request is refused before anything is loaded.
    let prepared = embedding::prepare(&opened.model, opened.tokenizer()?, &asked)?;
    let device = generation::device_for(model.backend, &opened.model)?;
    let options = LoadOptions {
        slots: model.slots(),
        policy: model.policy(),
        host_bytes: model.host_bytes(),
        ..embedding::load_options(&opened.model, prepared.longest())
    };
    let loading = progress::spinner("loading the model");
    let engine = Engine::load(&opened.model, device.as_ref(), &options);
    loading.finish_and_clear();
    let mut engine = engine?;
    let embedded = embedding::run(&mut engine, &opened.model, &prepared)?;
    for (number, Embedded { tokens, cut, .. }) in embedded.iter().enumerate() {
        if *cut > 0 {
            let (number, cut) = (number + 1, count(*cut, "token"));
            note!(
                "text {number} is too long: its last {cut} did not fit the {tokens} that the model takes"
            );
        }
    }
    if args.json {
        return print_json(&Answer {
            tokens: embedded.iter().map(|one| one.tokens).collect(),
            cut: embedded.iter().map(|one| one.cut).collect(),
            embeddings: embedded.into_iter().map(|one| one.vector).collect(),
            backend: engine.describe(),
        });
    }
    for Embedded { vector, .. } in &embedded {
        let numbers: Vec<String> = vector.iter().map(ToString::to_string).collect();
        outln!("{}", numbers.join(" "));
    }
    Ok(())
}
