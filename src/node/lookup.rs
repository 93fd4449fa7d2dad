//! Which model a request to the node means, and how long to wait for one that is not known.
//!
//! A peer says what it knows soon after it is met. So a name that is not known is refused at
//! once, but for a node that has just started or just met somebody.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use tokio::time::timeout;

use super::api::{ModelInfo, ResolveRequest};
use super::resolve::{Candidate, Standing, Unresolved, resolve};
use super::service::Service;
use super::size::count;
use doppler_store::ModelId;
use doppler_store::manifest::Manifest;
use doppler_store::signature::PublicKey;

/// How long a peer that was just met may take to say what models there are; mDNS takes no
/// longer to find one. Ten times the pause with which nodes gather what they say.
const SETTLE: Duration = Duration::from_secs(5);

impl Service {
    /// Every known model under every name that it was signed with.
    pub(super) fn candidates(&self) -> anyhow::Result<Vec<Candidate>> {
        let trusted = self.trusted()?;
        let known = self.catalog.list().into_iter();
        Ok(known
            .flat_map(|(id, known)| known.signed.into_iter().map(move |signed| (id, signed)))
            .map(|(id, signed)| Candidate {
                id,
                standing: self.standing(signed.publisher, &trusted),
                publisher: signed.publisher.to_string(),
                name: signed.name,
            })
            .collect())
    }

    pub(super) fn trusted(&self) -> anyhow::Result<Vec<PublicKey>> {
        Ok(self.trust.list()?.into_iter().map(|one| one.publisher).collect())
    }

    pub(super) fn standing(&self, publisher: PublicKey, trusted: &[PublicKey]) -> Standing {
        if publisher == self.publisher() {
            Standing::Own
        } else if trusted.contains(&publisher) {
            Standing::Trusted
        } else {
            Standing::Stranger
        }
    }

    /// The model that `text` means, with its manifest, which may have to arrive first.
    ///
    /// # Errors
    /// If no known model is meant, or more than one; if no peer sends the manifest within the
    /// find timeout.
    pub async fn wanted(&self, text: &str) -> anyhow::Result<(ModelId, Arc<Manifest>)> {
        let (asked, patience) = (Instant::now(), self.config().find_timeout);
        let mut changed = self.catalog.changes();
        loop {
            changed.mark_unchanged();
            let (until, error) = match resolve(text, &self.candidates()?) {
                Ok(id) => match self.catalog.get(id).and_then(|known| known.manifest) {
                    Some(manifest) => return Ok((id, manifest)),
                    None => (
                        asked + patience,
                        anyhow!(
                            "model {id} was announced, but no peer sent its manifest within {:.0} s",
                            patience.as_secs_f64()
                        ),
                    ),
                },
                Err(unknown @ Unresolved::Unknown { .. }) => {
                    let peers = count(self.mesh.peers().len(), "connected peer");
                    let swarm = &self.config().swarm;
                    (
                        self.settled_at().min(asked + patience),
                        anyhow!(
                            "{unknown} (doppler-node ls lists the models of swarm {swarm}; {peers})"
                        ),
                    )
                }
                Err(ambiguous) => return Err(ambiguous.into()),
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(error);
            }
            if let Ok(Err(_)) = timeout(left, changed.changed()).await {
                bail!("the node is stopping");
            }
        }
    }

    /// Finds a model for a command that reads it from the store by itself.
    ///
    /// # Errors
    /// As [`wanted`](Self::wanted), or if its publisher may not be used.
    pub async fn resolve(&self, request: &ResolveRequest) -> anyhow::Result<ModelInfo> {
        let (id, _) = self.wanted(&request.model).await?;
        self.admit(id, &request.trust, request.can_ask)?;
        let text = id.to_string();
        let info = self.models().into_iter().find(|model| model.id == text);
        info.ok_or_else(|| anyhow!("model {id} was withdrawn meanwhile"))
    }

    /// Waits for a first peer, as long as missing shards are looked for.
    pub async fn meet(&self) {
        let mut changes = self.mesh.watch_changes();
        let met = async {
            loop {
                changes.borrow_and_update();
                if !self.mesh.peers().is_empty() || changes.changed().await.is_err() {
                    return;
                }
            }
        };
        // Nobody was met: what follows says so.
        let _ = timeout(self.config().find_timeout, met).await;
    }

    /// When all that there is to be heard has been heard.
    fn settled_at(&self) -> Instant {
        let now = Instant::now();
        let newest = self.mesh.peers().iter().map(|peer| peer.connected_s).reduce(f64::min);
        let newest = newest.and_then(|seconds| {
            now.checked_sub(Duration::try_from_secs_f64(seconds).unwrap_or_default())
        });
        let known = self.expects_peers.then_some(self.config().find_timeout);
        let unknown = if self.config().mdns { SETTLE } else { Duration::ZERO };
        settled_at(self.started, newest, known.unwrap_or(unknown))
    }
}

/// `newest` is when the last peer was met; `first` how long after the start one may be expected.
fn settled_at(started: Instant, newest: Option<Instant>, first: Duration) -> Instant {
    newest.map_or(started + first, |newest| newest.max(started) + SETTLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_listens_to_whom_it_just_met_and_no_longer() {
        let started = Instant::now();
        let later = |seconds| started + Duration::from_secs(seconds);
        let patience = Duration::from_secs(20);
        assert_eq!(settled_at(started, None, patience), later(20), "on the way to known peers");
        assert_eq!(settled_at(started, None, Duration::ZERO), started, "there is nobody");
        assert_eq!(settled_at(started, Some(later(3)), patience), later(3) + SETTLE);
        assert_eq!(settled_at(started, Some(later(500)), patience), later(500) + SETTLE);
    }
}
