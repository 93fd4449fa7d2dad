//! Pulls from the Hub that this node runs itself, for its page: each in a thread of its own, with how
//! far it is. They go on when the page is closed, and end with the node; what had come is taken up
//! again by the next pull of the same model.
//!
//! Bounds: [`PULLING_MAX`] at once, and the last [`PULLED_MAX`] that ended are remembered.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::client::Answered;
use super::hub::{self, Asked, Order, Pulled};
use super::one_line;
use super::service::Service;
use super::work::Report;
use doppler_mesh::Progress;
use doppler_store::Replicas;

/// Pulls at once.
pub const PULLING_MAX: usize = 2;
/// Ended ones that are remembered.
pub const PULLED_MAX: usize = 8;

/// `POST /control/v1/pull`; answered by its [`PullState`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PullRequest {
    /// `hf:ORG/MODEL[:FILE|:QUANT]`.
    pub model: String,
}

/// `POST /control/v1/pull/stop`; answered by its [`PullState`]. It ends soon after.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StopRequest {
    pub number: u64,
}

/// How far a pull is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PullState {
    /// Counts this node's pulls.
    pub number: u64,
    /// What was asked for.
    pub model: String,
    pub state: PullStage,
    /// Bytes of the Hub's files; absent until they are known.
    pub progress: Option<Progress>,
    /// The model's name and id, once it is here.
    pub name: Option<String>,
    pub id: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PullStage {
    Running,
    Done,
    Failed,
    /// Somebody stopped it.
    Stopped,
}

/// A node's pulls.
#[derive(Default)]
pub struct Pulls {
    all: Arc<Mutex<All>>,
}

#[derive(Default)]
struct All {
    last: u64,
    /// The oldest first.
    list: VecDeque<PullState>,
    /// Of those that run, by number.
    stops: BTreeMap<u64, CancellationToken>,
}

fn lock(all: &Mutex<All>) -> MutexGuard<'_, All> {
    // Nothing in here can be left half-changed by a panic.
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

impl All {
    fn change(&mut self, number: u64, change: impl FnOnce(&mut PullState)) {
        if let Some(pull) = self.list.iter_mut().find(|pull| pull.number == number) {
            change(pull);
        }
        let ended = self.list.iter().filter(|pull| pull.state != PullStage::Running).count();
        for _ in PULLED_MAX..ended {
            let first = self.list.iter().position(|pull| pull.state != PullStage::Running);
            first.map(|at| self.list.remove(at));
        }
    }
}

impl Pulls {
    pub fn list(&self) -> Vec<PullState> {
        lock(&self.all).list.iter().cloned().collect()
    }

    /// Begins to pull. If the same model is being pulled, that pull is meant.
    ///
    /// # Errors
    /// `busy` if enough is being pulled. If the system gives no thread.
    fn begin(
        &self,
        model: String,
        work: impl FnOnce(Report, CancellationToken) -> anyhow::Result<Pulled> + Send + 'static,
    ) -> anyhow::Result<PullState> {
        let mut all = lock(&self.all);
        let running = || all.list.iter().filter(|pull| pull.state == PullStage::Running);
        if let Some(same) = running().find(|pull| pull.model == model) {
            return Ok(same.clone());
        }
        if running().count() >= PULLING_MAX {
            let message =
                format!("{PULLING_MAX} models are being pulled already: wait until one is here");
            return Err(Answered { label: "busy".to_owned(), message }.into());
        }
        all.last += 1;
        let number = all.last;
        let pull = PullState {
            number,
            model,
            state: PullStage::Running,
            progress: None,
            name: None,
            id: None,
            error: None,
        };
        let told = Arc::clone(&self.all);
        let report: Report = Arc::new(move |progress| {
            lock(&told).change(number, |pull| pull.progress = Some(progress));
        });
        let ended = Arc::clone(&self.all);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let run = move || {
            let end = work(report, stopped.clone());
            let mut all = lock(&ended);
            all.stops.remove(&number);
            all.change(number, |pull| match end {
                Ok(pulled) => {
                    pull.state = PullStage::Done;
                    (pull.name, pull.id) = (Some(pulled.name), Some(pulled.model));
                }
                Err(_) if stopped.is_cancelled() => pull.state = PullStage::Stopped,
                Err(error) => {
                    pull.state = PullStage::Failed;
                    pull.error = Some(one_line(&error));
                }
            });
        };
        // Not a task: it waits for the network and computes, and must not hold up the node's end.
        let thread = std::thread::Builder::new().name("pull".to_owned());
        thread.spawn(run).context("the system gives no thread for the pull")?;
        all.list.push_back(pull.clone());
        all.stops.insert(number, stop);
        Ok(pull)
    }

    /// Stops a pull that runs. One that has ended stays as it is.
    ///
    /// # Errors
    /// If there is no pull of this number.
    fn stop(&self, number: u64) -> anyhow::Result<PullState> {
        let all = lock(&self.all);
        if let Some(stop) = all.stops.get(&number) {
            stop.cancel();
        }
        let pull = all.list.iter().find(|pull| pull.number == number);
        pull.cloned().with_context(|| format!("there is no pull {number}"))
    }
}

impl Service {
    /// Begins to pull a model of the Hub into this node's store.
    ///
    /// # Errors
    /// If the text names no model of the Hub, or enough is being pulled.
    pub fn pull_from_hub(&self, request: &PullRequest) -> anyhow::Result<PullState> {
        let asked = Asked::parse(request.model.trim())?;
        let data = self.config().data.clone();
        self.pulls.begin(asked.to_string(), move |report, stop| {
            let (quantize, replicas) = (None, Replicas::DEFAULT);
            let order = Order { asked: &asked, data: &data, quantize, replicas };
            hub::pull_telling(&order, report, stop)
        })
    }

    /// Stops a pull. What had come stays, and the next pull of the same model goes on from there.
    ///
    /// # Errors
    /// If there is no such pull.
    pub fn stop_pull(&self, request: &StopRequest) -> anyhow::Result<PullState> {
        self.pulls.stop(request.number)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;

    fn pulled() -> Pulled {
        Pulled {
            model: "id".into(),
            name: "small".into(),
            origin: "hf:lab/small".into(),
            commit: String::new(),
            bytes: 1,
            source_bytes: 1,
            cached_bytes: 0,
            seconds: 0.0,
            present: false,
        }
    }

    fn wait(pulls: &Pulls, is: impl Fn(&[PullState]) -> bool) -> Vec<PullState> {
        let started = Instant::now();
        loop {
            let list = pulls.list();
            if is(&list) {
                return list;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{list:?}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_pull_is_seen_from_its_begin_to_its_end_and_twice_the_same_is_one() {
        let pulls = Pulls::default();
        let (go, may_go) = mpsc::channel::<()>();
        let work = move |report: Report, _| {
            report(Progress { done: 3, total: 9, ..Progress::default() });
            may_go.recv().unwrap();
            Ok(pulled())
        };
        let first = pulls.begin("hf:a/b".into(), work).unwrap();
        let again = pulls.begin("hf:a/b".into(), |_, _| panic!("it runs already")).unwrap();
        assert_eq!((first.number, again.number), (1, 1));
        let list = wait(&pulls, |list| list[0].progress.is_some());
        assert_eq!(list[0].progress.as_ref().map(|progress| progress.done), Some(3));
        go.send(()).unwrap();
        let list = wait(&pulls, |list| list[0].state == PullStage::Done);
        assert_eq!((list[0].name.as_deref(), list[0].id.as_deref()), (Some("small"), Some("id")));
        // It can be asked for again, and what fails says why.
        pulls.begin("hf:a/b".into(), |_, _| anyhow::bail!("no room")).unwrap();
        let list = wait(&pulls, |list| list.len() == 2 && list[1].state == PullStage::Failed);
        assert_eq!(list[1].error.as_deref(), Some("no room"));
    }

    #[test]
    fn one_that_is_stopped_is_told_apart_from_one_that_failed() {
        let pulls = Pulls::default();
        let work = |_: Report, stop: CancellationToken| {
            while !stop.is_cancelled() {
                std::thread::yield_now();
            }
            anyhow::bail!("it was stopped")
        };
        let number = pulls.begin("hf:a/b".into(), work).unwrap().number;
        assert!(pulls.stop(number + 1).is_err());
        assert_eq!(pulls.stop(number).unwrap().number, number);
        let list = wait(&pulls, |list| list[0].state != PullStage::Running);
        assert_eq!((list[0].state, list[0].error.as_deref()), (PullStage::Stopped, None));
        assert_eq!(pulls.stop(number).unwrap().state, PullStage::Stopped, "it has ended");
    }

    #[test]
    fn few_run_at_once_and_few_that_ended_are_remembered() {
        let pulls = Pulls::default();
        let mut ends = Vec::new();
        for at in 0..PULLING_MAX {
            let (go, may_go) = mpsc::channel::<()>();
            ends.push(go);
            let work = move |_: Report, _| {
                may_go.recv().unwrap();
                Ok(pulled())
            };
            pulls.begin(format!("hf:a/{at}"), work).unwrap();
        }
        let refused = pulls.begin("hf:a/more".into(), |_, _| Ok(pulled())).unwrap_err();
        assert_eq!(crate::failures::of(&refused).label, "busy");
        ends.remove(0).send(()).unwrap();
        let first = wait(&pulls, |list| list[0].state != PullStage::Running);
        assert_eq!(first.len(), PULLING_MAX);
        for at in 0..2 * PULLED_MAX {
            pulls.begin(format!("hf:b/{at}"), |_, _| Ok(pulled())).unwrap();
            wait(&pulls, |list| list.last().unwrap().state == PullStage::Done);
        }
        let list = pulls.list();
        assert_eq!(list.len(), PULLED_MAX + 1, "and the one that still runs");
        assert_eq!(list[0].state, PullStage::Running);
        ends.remove(0).send(()).unwrap();
        wait(&pulls, |list| list.iter().all(|pull| pull.state == PullStage::Done));
    }
}
