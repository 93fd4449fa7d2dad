//! `page`: the address of the running node's page, with the key that lets it change the node.

use super::print_json;
use crate::api::PageLink;
use crate::args::ControlArgs;
use crate::client::Client;
use crate::config::data_dir;
use crate::output::{note, outln};

pub fn page(args: &ControlArgs) -> anyhow::Result<()> {
    let link: PageLink = Client::open(&data_dir(&args.data)?)?.get("/control/v1/page")?;
    if args.json {
        return print_json(&link);
    }
    outln!("{}", link.url);
    note!("this holds the page's key: whoever opens it on this machine can change the node");
    Ok(())
}
