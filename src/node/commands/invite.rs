//! `invite`: a string by which others join the running node's swarm.

use super::print_json;
use crate::args::ControlArgs;
use crate::client::Client;
use crate::config::data_dir;
use crate::invite::Invite;
use crate::output::{note, outln};

pub fn invite(args: &ControlArgs) -> anyhow::Result<()> {
    let client = Client::open(&data_dir(&args.data)?)?;
    let invite: Invite = client.get("/control/v1/invite")?;
    let text = invite.text();
    if args.json {
        return print_json(&serde_json::json!({ "invite": text }));
    }
    outln!("{text}");
    if invite.key.is_some() {
        note!("this holds the swarm's key: whoever has it can join");
    }
    Ok(())
}
