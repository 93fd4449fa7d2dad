//! A step that runs op by op: the graph is cut at its `Experts` ops, and also before a layer's
//! choice of experts if the next layer's choice can be guessed there.
//!
//! A backend that runs steps in this way keeps a [`Walk`], which says when the host must load
//! experts.

use std::ops::Range;

use super::backend::{BackendError, Ops, Progress, Report, Result};
use super::graph::{Buf, Graph, MoeId, Op};

/// A stretch of the graph between two decisions of the host.
#[derive(Debug, Clone)]
enum Part {
    Run(Range<usize>),
    /// `ops` choose the next layer's experts from the current state. The result is only a guess.
    Guess {
        ops: Range<usize>,
        op: usize,
        moe: MoeId,
    },
    Experts {
        op: usize,
        moe: MoeId,
    },
}

/// Where a step is.
#[derive(Debug, Clone, Default)]
pub struct Walk {
    parts: Vec<Part>,
    /// The next part.
    at: usize,
    /// The `Experts` op whose waves are running.
    waits: Option<usize>,
}

impl Walk {
    pub fn new(graph: &Graph) -> Self {
        Self { parts: parts(graph), at: 0, waits: None }
    }

    /// Call when a step begins.
    pub const fn start(&mut self) {
        self.at = 0;
        self.waits = None;
    }

    /// The `Experts` op at which the step waits.
    ///
    /// # Errors
    /// If it does not wait.
    pub fn waits(&self) -> Result<usize> {
        self.waits.ok_or_else(|| {
            BackendError::Unsupported("running experts of a step that does not wait for any".into())
        })
    }

    /// Runs until the host is needed, or to the end.
    pub fn advance(&mut self, ops: &mut impl Ops, guess: bool) -> Result<Progress> {
        if let Some(op) = self.waits.take() {
            ops.finish_experts(op)?;
        }
        while let Some(part) = self.parts.get(self.at) {
            self.at += 1;
            match part {
                Part::Run(stretch) => ops.run(stretch.clone())?,
                Part::Guess { ops: stretch, op, moe } => {
                    if guess && ops.guesses() {
                        ops.run(stretch.clone())?;
                        return Ok(Progress::Guess { moe: *moe, likely: ops.routing(*op)? });
                    }
                }
                Part::Experts { op, moe } => {
                    let chosen = ops.routing(*op)?;
                    self.waits = Some(*op);
                    return Ok(Progress::Experts { moe: *moe, chosen });
                }
            }
        }
        Ok(Progress::Report(Report::default()))
    }
}

/// Cuts the graph at its `Experts` ops, and before a layer's choice of experts if the next layer's
/// can be guessed there.
fn parts(graph: &Graph) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut start = 0;
    let layers = graph.ops.iter().enumerate().filter_map(|(op, kind)| match kind {
        Op::Experts { moe, .. } => Some((op, *moe)),
        _ => None,
    });
    let mut layers = layers.peekable();
    while let Some((op, moe)) = layers.next() {
        let next =
            layers.peek().and_then(|(op, moe)| Some((*op, *moe, Choice::before(graph, *op)?)));
        if let (Some(choice), Some((op, moe, guess))) = (Choice::before(graph, op), next)
            && guess.buffers == choice.buffers
        {
            parts.push(Part::Run(start..choice.ops.start));
            parts.push(Part::Guess { ops: guess.ops, op, moe });
            start = choice.ops.start;
        }
        parts.push(Part::Run(start..op));
        parts.push(Part::Experts { op, moe });
        start = op + 1;
    }
    parts.push(Part::Run(start..graph.ops.len()));
    parts
}

/// The ops that choose a layer's experts from the state: a norm, the router, the choice. If two
/// layers' ops use the same buffers, running one set just before the other changes nothing that the
/// other reads.
struct Choice {
    ops: Range<usize>,
    /// The state, the normalised state, the router's logits.
    buffers: [Buf; 3],
}

impl Choice {
    /// The three ops before the `Experts` op at `op`, if they are these.
    fn before(graph: &Graph, op: usize) -> Option<Self> {
        let ops = op.checked_sub(3)?..op;
        let [
            Op::RmsNorm { x, out: normed, .. },
            Op::Linear { x: input, out, .. },
            Op::Route { logits, .. },
        ] = &graph.ops[ops.clone()]
        else {
            return None;
        };
        let alone = x != normed && x != out && normed != out;
        (alone && input == normed && out == logits)
            .then_some(Self { ops, buffers: [*x, *normed, *out] })
    }
}
