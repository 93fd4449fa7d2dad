//! Which model a request to the node means, and how long to wait for an unknown one.
//!
//! A peer announces what it knows soon after it connects. So an unknown name is refused at once,
//! unless the node has just started or just met a peer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use tokio::time::timeout;

use super::api::{ModelInfo, ResolveRequest};
use super::resolve::{Candidate, Standing, Unresolved, resolve};
use super::service::Service;
use super::size::count;
use super::trust::{self, How, TrustPolicy};
use doppler_mesh::PeerId;
use doppler_store::ModelId;
use doppler_store::manifest::Manifest;
use doppler_store::signature::PublicKey;

/// How long a peer that was just met may take to announce models. mDNS takes no longer to find one.
/// Ten times the period over which nodes collect announcements.
const SETTLE: Duration = Duration::from_secs(5);

impl Service {
    /// Every known model under every name with which it was signed.
    pub(super) fn candidates(&self) -> anyhow::Result<Vec<Candidate>> {
        let trust = self.trust.read()?;
        let known = self.catalog.list().into_iter();
        Ok(known
            .flat_map(|(id, known)| known.signed.into_iter().map(move |signed| (id, signed)))
            .map(|(id, signed)| Candidate {
                id,
                standing: self.standing(signed.publisher, &trust),
                publisher: signed.publisher.to_string(),
                name: signed.name,
            })
            .collect())
    }

    pub(super) fn standing(&self, publisher: PublicKey, trust: &trust::Known) -> Standing {
        if publisher == self.publisher() {
            Standing::Own
        } else if trust.trusts(publisher) {
            Standing::Trusted
        } else if trust.refused.contains(&publisher) {
            Standing::Refused
        } else {
            Standing::Stranger
        }
    }

    /// Whether the model that `text` means may be used: one of its signers is trusted, or the
    /// policy allows it. Under the first-use policy, the signer that becomes trusted is one that
    /// calls the model `text`, if there is one, rather than the first signer.
    ///
    /// # Errors
    /// [`trust::Untrusted`] if it may not.
    fn admit(&self, model: ModelId, text: &str, can_ask: bool) -> anyhow::Result<()> {
        let Some((name, signers)) = self.strangers(model, text) else { return Ok(()) };
        let policy = self.config().trust_policy;
        self.trust.admit(policy, &model.to_string(), &name, &signers, can_ask)
    }

    /// Whether a model may be used without the owner's approval. No publisher becomes trusted by
    /// this.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub(super) fn permit(&self, model: ModelId) -> anyhow::Result<()> {
        let Some((name, signers)) = self.strangers(model, "") else { return Ok(()) };
        // A request here does not come from this node's owner, so the first-use policy allows
        // nothing.
        let policy = match self.config().trust_policy {
            TrustPolicy::FirstUse => TrustPolicy::Listed,
            other => other,
        };
        self.trust.check(policy, &model.to_string(), &name, &signers, false)?;
        Ok(())
    }

    /// A model's name and signers; `None` if it needs no approval, being unknown or this node's
    /// own. Signers that call it `text` come first, and among these the ones that hold it
    /// themselves: anybody can sign what another published.
    fn strangers(&self, model: ModelId, text: &str) -> Option<(String, Vec<PublicKey>)> {
        let mut signed = self.catalog.get(model)?.signed;
        if signed.iter().any(|signed| signed.publisher == self.publisher()) {
            return None;
        }
        let holders = self.mesh.holders(model.manifest());
        signed.sort_by_key(|signed| {
            let peer = PeerId::from_public_key(signed.publisher.0);
            (signed.name.to_lowercase() != text.to_lowercase(), !holders.contains(&peer))
        });
        let name = signed.first().map_or_else(String::new, |signed| signed.name.clone());
        Some((name, signed.iter().map(|signed| signed.publisher).collect()))
    }

    /// The model that `text` means, with its manifest, which may have to be fetched first. The
    /// model may be used, and is kept from here on.
    ///
    /// # Errors
    /// If no known model is meant, or more than one; as [`Self::admit`]; if nobody sends the
    /// manifest.
    pub async fn wanted(
        &self,
        text: &str,
        trust: &[PublicKey],
        can_ask: bool,
    ) -> anyhow::Result<(ModelId, Arc<Manifest>)> {
        let (asked, patience) = (Instant::now(), self.config().find_timeout);
        let mut changed = self.catalog.changes();
        loop {
            changed.mark_unchanged();
            let (text, near) = match resolve(text, &self.candidates()?) {
                Ok(model) => {
                    let manifest = self.wanted_by_id(model, text, trust, can_ask).await?;
                    self.keep(model);
                    return Ok((model, manifest));
                }
                Err(Unresolved::Unknown { text, near, .. }) => (text, near),
                Err(ambiguous) => return Err(ambiguous.into()),
            };
            let until = self.settled_at().min(asked + patience);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let peers = count(self.mesh.peers().len(), "connected peer");
                let swarm = &self.config().swarm;
                let hint = format!(" (doppler-node ls lists the models of swarm {swarm}; {peers})");
                return Err(Unresolved::Unknown { text, near, hint }.into());
            }
            if let Ok(Err(_)) = timeout(left, changed.changed()).await {
                bail!("the node is stopping");
            }
        }
    }

    /// The manifest of a model that may be used. If it was not fetched unasked, it is fetched now:
    /// after the policy has allowed its publisher, and before the publisher is trusted.
    ///
    /// # Errors
    /// As [`Self::admit`], or if nobody sends it.
    pub(super) async fn wanted_by_id(
        &self,
        model: ModelId,
        text: &str,
        trust: &[PublicKey],
        can_ask: bool,
    ) -> anyhow::Result<Arc<Manifest>> {
        if !trust.is_empty() {
            self.trust.add(trust, How::Added, "")?;
        }
        if let Some((name, signers)) = self.strangers(model, text) {
            let policy = self.config().trust_policy;
            self.trust.check(policy, &model.to_string(), &name, &signers, can_ask)?;
        }
        let manifest = match self.catalog.get(model).and_then(|known| known.manifest) {
            Some(manifest) => manifest,
            None => self.learn_now(model).await?,
        };
        self.admit(model, text, can_ask)?;
        self.rely_on(&manifest);
        Ok(manifest)
    }

    /// Finds a model for a command that reads it from the store by itself.
    ///
    /// # Errors
    /// As [`wanted`](Self::wanted).
    pub async fn resolve(&self, request: &ResolveRequest) -> anyhow::Result<ModelInfo> {
        let (id, _) = self.wanted(&request.model, &request.trust, request.can_ask).await?;
        self.info_of(id)
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
        // If no peer was met, the following error says so.
        let _ = timeout(self.config().find_timeout, met).await;
    }

    /// When everything should have been heard.
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
