//! `ps`: the loaded models of the running node.

use super::print_json;
use crate::api::Ps;
use crate::args::ControlArgs;
use crate::client::Client;
use crate::config::data_dir;
use crate::output::outln;
use crate::progress;
use crate::size::{ByteSize, count};

pub fn ps(args: &ControlArgs) -> anyhow::Result<()> {
    let ps: Ps = Client::open(&data_dir(&args.data)?)?.get("/control/v1/ps")?;
    if args.json {
        return print_json(&ps);
    }
    if ps.loaded.is_empty() {
        outln!("no model is loaded (the first request loads one)");
    }
    for model in &ps.loaded {
        let state = match (model.idle_s, model.unload_s) {
            (None, _) => match ps.running {
                0 | 1 => "answers".to_owned(),
                running => format!("answers {running} requests"),
            },
            (Some(_), Some(left)) => format!("idle, unloaded in {}", progress::time(left)),
            (Some(idle), None) => format!("idle for {}", progress::time(idle)),
        };
        let id = model.id.get(..10).unwrap_or(&model.id);
        let bytes = ByteSize(model.bytes);
        outln!("{}  {id}  {bytes} on {}  {state}", model.name, model.backend);
    }
    if ps.waiting > 0 {
        outln!("{} waiting", count(ps.waiting, "request"));
    }
    Ok(())
}
