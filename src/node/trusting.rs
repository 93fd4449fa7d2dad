//! Whose models may be used, for the page: the list, and one change at a time. `trust` keeps it.

use serde::{Deserialize, Serialize};

use super::service::Service;
use super::trust::{How, Known, Trusted};
use doppler_store::signature::PublicKey;

/// `GET /control/v1/trust`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrustList {
    pub trusted: Vec<Trusted>,
    /// Removed, and refused under every policy.
    pub refused: Vec<PublicKey>,
}

/// `POST /control/v1/trust`; answered by the list as it is then.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrustRequest {
    pub publisher: PublicKey,
    /// True to trust, false to refuse.
    pub trust: bool,
    /// The user's note.
    #[serde(default)]
    pub note: String,
}

impl Service {
    /// # Errors
    /// If the list is damaged.
    pub fn trust_list(&self) -> anyhow::Result<TrustList> {
        let Known { trusted, refused } = self.trust.read()?;
        Ok(TrustList { trusted, refused })
    }

    /// # Errors
    /// If the list is damaged or full, or the note is too long.
    pub fn change_trust(&self, request: &TrustRequest) -> anyhow::Result<TrustList> {
        let TrustRequest { publisher, trust, note } = request;
        match trust {
            true => self.trust.add(&[*publisher], How::Added, note)?,
            false => self.trust.remove(*publisher)?,
        };
        self.trust_list()
    }
}
