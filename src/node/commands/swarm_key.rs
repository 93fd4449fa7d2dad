//! `swarm-key`: the secret of a private swarm.

use crate::args::SwarmKeyArgs;
use crate::swarm_key;

pub fn swarm_key(args: &SwarmKeyArgs) -> anyhow::Result<()> {
    swarm_key::create(&args.file)?;
    println!(
        "{} holds a new swarm key; copy it to each node by a safe way, then: join --swarm-key {}",
        args.file.display(),
        args.file.display()
    );
    Ok(())
}
