//! The client of the control API, for commands that ask the node running on a data directory.

use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::api::{ApiError, ControlFile, GenerateEvent, GenerateRequest};
use super::work::WorkEvent;
use doppler_mesh::Progress;
use doppler_store::regular;

/// The longest line that a node may answer with. A generation's last event contains its whole text.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// How long a request that needs no work may take. A stopped node (SIGSTOP) accepts connections,
/// too.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// A failure that a node reported. `failures` knows its label.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Answered {
    pub label: String,
    pub message: String,
}

/// A connection to one running node.
pub struct Client {
    agent: ureq::Agent,
    base: String,
    token: String,
    answer_max: Duration,
}

/// The file in which a node running on `data` says how to reach it.
pub fn control_file(data: &Path) -> PathBuf {
    data.join("control.json")
}

impl Client {
    /// As [`find`](Self::find), but an error if no node runs there.
    pub fn open(data: &Path) -> anyhow::Result<Self> {
        Self::find(data)?.with_context(|| {
            format!(
                "no node is running on {0} (start one: doppler-node join --swarm NAME --data {0})",
                data.display()
            )
        })
    }

    /// Reads `control.json` of the data directory. `None` if no node runs there.
    ///
    /// # Errors
    /// If the file exists but cannot be read: another user's node, or damage.
    pub fn find(data: &Path) -> anyhow::Result<Option<Self>> {
        let path = control_file(data);
        let text = match regular::read(&path) {
            Ok(text) => text,
            Err(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => return Ok(None),
                ErrorKind::PermissionDenied => bail!(
                    "cannot read {}: permission denied; the node there belongs to another user",
                    path.display()
                ),
                _ => return Err(error).with_context(|| format!("cannot read {}", path.display())),
            },
        };
        let control: ControlFile = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged; restart the node", path.display()))?;
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(5)))
            .build()
            .new_agent();
        let base = format!("http://{}", control.address);
        Ok(Some(Self { agent, base, token: control.token, answer_max: ANSWER_MAX }))
    }

    /// `http://HOST:PORT` of the node.
    pub fn address(&self) -> &str {
        &self.base
    }

    pub fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let response = self
            .agent
            .get(format!("{}{path}", self.base))
            .config()
            .timeout_global(Some(self.answer_max))
            .build()
            .header("authorization", format!("Bearer {}", self.token))
            .call()
            .map_err(|error| self.unreachable(&error))?;
        read_json(response)
    }

    pub fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        let response = self.send(path, body)?;
        read_json(response)
    }

    /// Generates. `each` receives every event as it arrives, and may return false to stop
    /// listening.
    pub fn generate(
        &self,
        request: &GenerateRequest,
        each: impl FnMut(GenerateEvent) -> bool,
    ) -> anyhow::Result<()> {
        self.stream("/control/v1/generate", request, each)
    }

    /// Posts work that reports its progress, which `each` receives.
    pub fn work<R: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        mut each: impl FnMut(&Progress),
    ) -> anyhow::Result<R> {
        let mut end = None;
        self.stream(path, body, |event: WorkEvent<R>| match event {
            WorkEvent::Progress(progress) => {
                each(&progress);
                true
            }
            WorkEvent::Done { reply } => {
                end = Some(Ok(reply));
                false
            }
            WorkEvent::Failed(error) => {
                end = Some(Err(told(error)));
                false
            }
        })?;
        end.unwrap_or_else(|| Err(anyhow!("the node stopped before it was done")))
    }

    /// Posts, and passes each line of the answer to `each` as it arrives. `each` may return false
    /// to stop listening.
    pub fn stream<E: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        mut each: impl FnMut(E) -> bool,
    ) -> anyhow::Result<()> {
        let response = self.send(path, body)?;
        if response.status() != 200 {
            read_json::<serde_json::Value>(response)?;
            bail!("the node answered without a stream");
        }
        let body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut lines = BufReader::new(body);
        loop {
            let mut line = Vec::new();
            let taken = std::io::Read::take(&mut lines, LINE_BYTES_MAX)
                .read_until(b'\n', &mut line)
                .context("the node went away")?;
            if taken == 0 {
                return Ok(());
            }
            let event = serde_json::from_slice(&line).context("the node sent a damaged event")?;
            if !each(event) {
                return Ok(());
            }
        }
    }

    fn send(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<ureq::http::Response<ureq::Body>> {
        self.agent
            .post(format!("{}{path}", self.base))
            .header("authorization", format!("Bearer {}", self.token))
            .send_json(body)
            .map_err(|error| self.unreachable(&error))
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        anyhow!("the node at {} does not answer ({error}); is it still running?", self.base)
    }
}

/// The node's failure as this command's.
pub fn told(error: ApiError) -> anyhow::Error {
    match error.untrusted {
        Some(untrusted) => untrusted.into(),
        None => Answered { label: error.label, message: error.error }.into(),
    }
}

fn read_json<T: DeserializeOwned>(
    mut response: ureq::http::Response<ureq::Body>,
) -> anyhow::Result<T> {
    if response.status() != 200 {
        let status = response.status();
        let error: ApiError = response
            .body_mut()
            .read_json()
            .with_context(|| format!("the node answered {status} without saying why"))?;
        return Err(told(error));
    }
    response.body_mut().read_json().context("the node's answer could not be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_does_not_answer_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        // The system accepts the connection, and nothing else happens.
        let stopped = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = stopped.local_addr().unwrap().to_string();
        let control = ControlFile { address, token: "t".into(), pid: 1 };
        std::fs::write(control_file(dir.path()), serde_json::to_vec(&control).unwrap()).unwrap();
        let mut client = Client::open(dir.path()).unwrap();
        client.answer_max = Duration::from_millis(50);
        let error = client.get::<serde_json::Value>("/control/v1/status").unwrap_err().to_string();
        assert!(error.contains("does not answer"), "{error}");
    }

    #[test]
    fn a_node_that_cannot_be_asked_is_not_taken_for_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Client::find(dir.path()).unwrap().is_none());
        assert!(Client::find(&dir.path().join("nothing/here")).unwrap().is_none());
        let error = Client::open(dir.path()).err().unwrap().to_string();
        assert!(error.contains("no node is running"), "{error}");
        // A directory in its place cannot be read by anybody, not even root.
        std::fs::create_dir(control_file(dir.path())).unwrap();
        let error = Client::find(dir.path()).err().unwrap().to_string();
        assert!(error.contains("cannot read") && error.contains("control.json"), "{error}");
    }
}
