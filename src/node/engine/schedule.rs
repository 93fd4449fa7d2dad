//! Whose turn it is among the generations that run: events in, decisions out, without a clock.
//!
//! In each turn every generation whose prompt has run gets one token, and one of the prompts that
//! have not gets a chunk, in rotation. So a token waits for at most one chunk of another's prompt,
//! and a short prompt never waits for all of a long one. Chunks are sized by the measured speed of
//! prompts: while tokens wait, for a short pause; otherwise so that newcomers and cancellations are
//! noticed soon.
//!
//! A generation whose reader lags behind is paused, and one for which the caches have no room is
//! starved until another ends. Neither delays the others.

use std::collections::VecDeque;

/// The most generations that run at once: the most rows of a step of several sequences.
pub const RUNNING_MAX: usize = 16;
/// Tokens of a prompt's first chunk while others wait, before its speed is known, and the fewest.
const CHUNK_MIN: usize = 64;
/// How long a chunk may take while tokens of others wait, and when nobody waits, in seconds.
const PAUSE_S: f64 = 0.05;
const ALONE_S: f64 = 0.5;
/// How fast estimates of speed follow measurements.
const GAIN: f64 = 0.3;

/// An estimate after another measurement.
pub fn follow(before: Option<f64>, measured: f64) -> f64 {
    before.map_or(measured, |before| before + GAIN * (measured - before))
}

/// A running generation.
pub type Id = u64;

/// What to do next.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Generations that get their next token.
    pub tokens: Vec<Id>,
    /// A generation whose prompt goes on, and by how many tokens at most.
    pub prompt: Option<(Id, usize)>,
}

impl Turn {
    /// Whether there is nothing to do until something happens outside.
    pub const fn is_empty(&self) -> bool {
        self.tokens.is_empty() && self.prompt.is_none()
    }
}

#[derive(Debug)]
struct Writer {
    id: Id,
    paused: bool,
    starved: bool,
}

/// The generations that run.
#[derive(Debug, Default)]
pub struct Schedule {
    /// Those whose prompts have not run, in the order of their turns.
    prompts: VecDeque<Id>,
    /// Those that write, the oldest first.
    writers: Vec<Writer>,
    /// Tokens of prompts a second.
    speed: Option<f64>,
    last: Id,
}

impl Schedule {
    /// Tokens of prompts a second, if any have run.
    pub const fn speed(&self) -> Option<f64> {
        self.speed
    }

    /// Whether another generation may begin.
    pub fn has_room(&self) -> bool {
        self.len() < RUNNING_MAX
    }

    /// How many run.
    fn len(&self) -> usize {
        self.prompts.len() + self.writers.len()
    }

    /// A generation begins.
    pub fn begin(&mut self) -> Id {
        self.last += 1;
        self.prompts.push_back(self.last);
        self.last
    }

    /// What to do next.
    pub fn turn(&self) -> Turn {
        let goes_on = |writer: &&Writer| !writer.paused && !writer.starved;
        let tokens: Vec<Id> = self.writers.iter().filter(goes_on).map(|writer| writer.id).collect();
        let chunk = self.chunk(!tokens.is_empty() || self.prompts.len() > 1);
        Turn { tokens, prompt: self.prompts.front().map(|id| (*id, chunk)) }
    }

    /// Tokens of the next chunk of a prompt: a power of two.
    fn chunk(&self, others_wait: bool) -> usize {
        let pause = if others_wait { PAUSE_S } else { ALONE_S };
        match self.speed {
            Some(speed) => {
                let tokens = (speed * pause) as usize;
                1 << tokens.clamp(CHUNK_MIN, 1 << 20).ilog2()
            }
            None => CHUNK_MIN,
        }
    }

    /// So many tokens of a prompt ran in so many seconds. `left` says whether there are more.
    pub fn fed(&mut self, id: Id, tokens: usize, seconds: f64, left: bool) {
        self.speed = Some(follow(self.speed, tokens as f64 / seconds.max(1e-9)));
        self.prompts.retain(|one| *one != id);
        if left {
            self.prompts.push_back(id);
        } else {
            self.writers.push(Writer { id, paused: false, starved: false });
        }
    }

    /// Whether a generation's reader lags so far behind that it must wait.
    pub fn pause(&mut self, id: Id, paused: bool) {
        if let Some(writer) = self.writers.iter_mut().find(|writer| writer.id == id) {
            writer.paused = paused;
        }
    }

    /// There was no room for a generation's next token. Returns the one that must end, if all that
    /// write wait for room and nothing else will make some: the youngest.
    pub fn starve(&mut self, id: Id) -> Option<Id> {
        if let Some(writer) = self.writers.iter_mut().find(|writer| writer.id == id) {
            writer.starved = true;
        }
        let stuck = self.prompts.is_empty() && self.writers.iter().all(|writer| writer.starved);
        self.writers.last().filter(|_| stuck).map(|writer| writer.id)
    }

    /// A generation has ended, however.
    pub fn end(&mut self, id: Id) {
        self.prompts.retain(|one| *one != id);
        self.writers.retain(|writer| writer.id != id);
        self.writers.iter_mut().for_each(|writer| writer.starved = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A schedule with so many that write.
    fn writing(count: usize) -> (Schedule, Vec<Id>) {
        let mut schedule = Schedule::default();
        let ids: Vec<Id> = (0..count).map(|_| schedule.begin()).collect();
        ids.iter().for_each(|id| schedule.fed(*id, 64, 0.1, false));
        (schedule, ids)
    }

    #[test]
    fn prompts_take_turns_and_each_turn_gives_every_writer_a_token() {
        let (mut schedule, ids) = writing(2);
        let (long, short) = (schedule.begin(), schedule.begin());
        let turn = schedule.turn();
        assert_eq!((turn.tokens, turn.prompt.unwrap().0), (ids.clone(), long));
        schedule.fed(long, 64, 0.1, true);
        assert_eq!(
            schedule.turn().prompt.unwrap().0,
            short,
            "it does not wait for all of the other"
        );
        schedule.fed(short, 10, 0.1, false);
        assert_eq!(schedule.turn().tokens, [ids[0], ids[1], short]);
        assert_eq!(schedule.turn().prompt.unwrap().0, long);
        schedule.end(long);
        assert_eq!(schedule.turn().prompt, None);
    }

    #[test]
    fn chunks_are_as_long_as_the_pause_that_others_bear() {
        let (mut schedule, ids) = writing(1);
        let prompt = schedule.begin();
        for (tokens, seconds, waits, alone) in
            [(64, 1e-3, 2048, 16384), (64, 10.0, 64, 64), (1 << 30, 1e-3, 1 << 19, 1 << 19)]
        {
            (0..40).for_each(|_| schedule.fed(prompt, tokens, seconds, true));
            let chunk = schedule.turn().prompt.unwrap().1;
            assert!(chunk >= waits && chunk <= 2 * waits, "{chunk} at {tokens} in {seconds} s");
            schedule.pause(ids[0], true);
            let chunk = schedule.turn().prompt.unwrap().1;
            assert!(chunk >= alone && chunk <= 2 * alone, "{chunk} at {tokens} in {seconds} s");
            schedule.pause(ids[0], false);
        }
        // Before anything is known it is short.
        let mut schedule = Schedule::default();
        schedule.begin();
        assert_eq!(schedule.turn().prompt.unwrap().1, CHUNK_MIN);
    }

    #[test]
    fn who_is_paused_or_starved_delays_nobody_and_goes_on_later() {
        let (mut schedule, ids) = writing(3);
        schedule.pause(ids[0], true);
        assert_eq!(schedule.starve(ids[2]), None, "the second will end and make room");
        assert_eq!(schedule.turn().tokens, [ids[1]]);
        schedule.end(ids[1]);
        assert_eq!(schedule.turn().tokens, [ids[2]], "there is room again");
        schedule.pause(ids[0], false);
        assert_eq!(schedule.turn().tokens, [ids[0], ids[2]]);
        // If all wait for room, the youngest gives its own up.
        assert_eq!(schedule.starve(ids[0]), None);
        assert_eq!(schedule.starve(ids[2]), Some(ids[2]));
        schedule.end(ids[2]);
        assert_eq!(schedule.turn().tokens, [ids[0]]);
    }

    #[test]
    fn so_many_run_and_no_more() {
        let (mut schedule, ids) = writing(RUNNING_MAX - 1);
        assert!(schedule.has_room());
        schedule.begin();
        assert!(!schedule.has_room());
        schedule.end(ids[4]);
        assert!(schedule.has_room());
        (0..100).for_each(|id| schedule.end(id));
        assert!(schedule.len() == 0 && schedule.turn().is_empty());
    }
}
