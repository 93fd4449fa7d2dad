//! `swarm-key`: creates the secret key of a private swarm.

use crate::args::SwarmKeyArgs;
use crate::output::outln;
use crate::swarm_key;

pub fn swarm_key(args: &SwarmKeyArgs) -> anyhow::Result<()> {
    swarm_key::create(&args.file)?;
    outln!(
        "{} holds a new swarm key; copy it to each node in a safe way, then: join --swarm-key {}",
        args.file.display(),
        args.file.display()
    );
    Ok(())
}
