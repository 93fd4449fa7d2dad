//! Long work for a command, which reports its progress and then its result, one JSON object per
//! line.
//!
//! Invariant: the result is the last line. Work is cancelled when its listener goes away.

use std::future::Future;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::api::ApiError;
use doppler_mesh::Progress;

/// How often progress is reported.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(250);
/// How many lines a slow listener may lag behind before progress is left out.
const EVENTS_MAX: usize = 16;

/// One line.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum WorkEvent<R> {
    Progress(Progress),
    Done { reply: R },
    Failed(ApiError),
}

/// A callback for progress.
pub type Report = std::sync::Arc<dyn Fn(Progress) + Send + Sync>;

/// A callback that reports to nobody.
pub fn quietly() -> Report {
    std::sync::Arc::new(|_| ())
}

/// Starts work in its own task. Its events arrive on the returned queue.
pub fn begin<R, F>(work: impl FnOnce(Report) -> F) -> mpsc::Receiver<WorkEvent<R>>
where
    R: Send + 'static,
    F: Future<Output = anyhow::Result<R>> + Send + 'static,
{
    let (sender, events) = mpsc::channel(EVENTS_MAX);
    let told = sender.clone();
    // A listener that lags behind misses progress, but never the result.
    let report: Report = std::sync::Arc::new(move |progress| {
        let _ = told.try_send(WorkEvent::Progress(progress));
    });
    let work = work(report);
    tokio::spawn(async move {
        let end = tokio::select! {
            end = work => end,
            () = sender.closed() => return,
        };
        let end = match end {
            Ok(reply) => WorkEvent::Done { reply },
            Err(error) => WorkEvent::Failed(ApiError::of(&error)),
        };
        // An error means that the listener has just gone; the work is done all the same.
        let _ = sender.send(end).await;
    });
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(done: u64) -> Progress {
        Progress { done, total: 100, ..Progress::default() }
    }

    #[tokio::test]
    async fn progress_comes_first_and_the_end_last() {
        let mut events = begin(|report| async move {
            for done in 0..1000 {
                report(progress(done));
            }
            Ok("whole")
        });
        let mut seen = 0;
        let end = loop {
            match events.recv().await.unwrap() {
                WorkEvent::Progress(progress) => seen += progress.total,
                end => break end,
            }
        };
        assert!(seen > 0);
        assert!(matches!(end, WorkEvent::Done { reply: "whole" }), "{end:?}");
        assert!(events.recv().await.is_none());
        let mut failing = begin::<(), _>(|_| async { anyhow::bail!("no room") });
        let Some(WorkEvent::Failed(error)) = failing.recv().await else { panic!("no failure") };
        assert_eq!(error.error, "no room");
    }

    #[tokio::test]
    async fn work_that_nobody_listens_to_is_given_up() {
        struct Dropped(Option<tokio::sync::oneshot::Sender<()>>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                let _ = self.0.take().map(|sender| sender.send(()));
            }
        }
        let (sender, dropped) = tokio::sync::oneshot::channel();
        let guard = Dropped(Some(sender));
        let events = begin::<(), _>(|_| async move {
            let _guard = guard;
            std::future::pending().await
        });
        drop(events);
        tokio::time::timeout(Duration::from_secs(10), dropped).await.unwrap().unwrap();
    }

    #[test]
    fn lines_survive_json() {
        let line = WorkEvent::<u32>::Progress(Progress { rate: Some(2.5), ..progress(3) });
        let json = serde_json::to_string(&line).unwrap();
        assert_eq!(json, r#"{"event":"progress","done":3,"total":100,"rate":2.5,"left_s":null}"#);
        let back: WorkEvent<u32> = serde_json::from_str(&json).unwrap();
        assert!(matches!(back, WorkEvent::Progress(progress) if progress.done == 3));
    }
}
