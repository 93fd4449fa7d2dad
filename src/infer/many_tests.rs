//! Rows of several sequences in one step: each sequence writes what it writes alone, whoever shares
//! its steps; on any device.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::engine::{Engine, Next};
use super::error::SessionError;
use super::sampler::SamplerOptions;
use super::sequence::Sequence;
use super::sequence_tests::{Bench, CONTEXT, DRAWN, GREEDY, ON_THE_CPU, VOCAB};

/// A text to be written.
struct Text {
    options: SamplerOptions,
    prompt: Vec<u32>,
    count: usize,
}

/// A text in progress.
struct Writer<'a> {
    text: &'a Text,
    sequence: Sequence,
    tokens: Vec<u32>,
}

impl<'a> Writer<'a> {
    fn new(engine: &mut Engine, text: &'a Text) -> Self {
        let mut sequence = Sequence::new(text.options, CONTEXT).unwrap();
        let logits = engine.prefill(&mut sequence, &text.prompt).unwrap();
        let tokens = vec![sequence.choose(&logits)];
        Self { text, sequence, tokens }
    }

    fn next(&mut self) -> Next<'_> {
        let token = self.tokens[self.tokens.len() - 1];
        Next { sequence: &mut self.sequence, token, more: self.text.count - self.tokens.len() }
    }

    fn is_done(&self) -> bool {
        self.tokens.len() == self.text.count
    }
}

/// One token of each.
fn step(engine: &mut Engine, writers: &mut [Writer<'_>]) {
    let mut rows: Vec<Next<'_>> = writers.iter_mut().map(Writer::next).collect();
    let chosen = engine.next_of_each(&mut rows);
    for (writer, token) in writers.iter_mut().zip(chosen) {
        writer.tokens.push(token.unwrap());
    }
}

/// Up to 16 texts of mixed lengths, which begin and end at different steps, on an engine that at
/// first has room for none.
pub fn together(bench: &Bench<'_>, seed: u64) {
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let model = (bench.model)(seed);
    let text = |rng: &mut StdRng| {
        let len = rng.random_range(1..140);
        let prompt = (0..len).map(|_| rng.random_range(0..VOCAB)).collect();
        let options =
            SamplerOptions { seed: rng.random(), ..[GREEDY, DRAWN][rng.random_range(0..2)] };
        Text { options, prompt, count: rng.random_range(1..30) }
    };
    let texts: Vec<Text> = (0..rng.random_range(2..17)).map(|_| text(&mut rng)).collect();
    let mut engine = bench.engine(&model, CONTEXT);
    let alone: Vec<Vec<u32>> = texts
        .iter()
        .map(|text| {
            let mut writers = [Writer::new(&mut engine, text)];
            while !writers[0].is_done() {
                step(&mut engine, &mut writers);
            }
            writers[0].tokens.clone()
        })
        .collect();
    let mut engine = bench.engine(&model, 8);
    let mut waiting = texts.iter().zip(&alone);
    let mut writers: Vec<(Writer<'_>, &Vec<u32>)> = Vec::new();
    loop {
        for (text, alone) in waiting.by_ref().take(rng.random_range(0..4)) {
            writers.push((Writer::new(&mut engine, text), alone));
        }
        let (done, going): (Vec<_>, Vec<_>) =
            writers.into_iter().partition(|(writer, _)| writer.is_done());
        for (writer, alone) in done {
            assert_eq!(&writer.tokens, alone, "of {} texts", texts.len());
        }
        let (mut going, wants): (Vec<_>, Vec<_>) = going.into_iter().unzip();
        if !going.is_empty() {
            step(&mut engine, &mut going);
        } else if waiting.len() == 0 {
            break;
        }
        writers = going.into_iter().zip(wants).collect();
    }
}

#[test]
fn rows_of_a_step_write_what_each_writes_alone() {
    ON_THE_CPU.iter().for_each(|bench| together(bench, rand::random()));
}

/// A row that cannot go on fails alone.
#[test]
fn a_row_that_fails_is_where_it_was_and_the_others_go_on() {
    let bench = &ON_THE_CPU[0];
    let model = (bench.model)(1);
    let mut engine = bench.engine(&model, CONTEXT);
    assert!(engine.batch() >= 3, "they share a step");
    let texts = [5, 9, 13].map(|len| {
        let prompt = (0..len).collect();
        Text { options: GREEDY, prompt, count: 20 }
    });
    let alone = texts.each_ref().map(|text| {
        let mut writers = [Writer::new(&mut engine, text)];
        (1..20).for_each(|_| step(&mut engine, &mut writers));
        writers[0].tokens.clone()
    });
    let mut writers = texts.each_ref().map(|text| Writer::new(&mut engine, text));
    for i in 1..20 {
        // The second's limit is reached, or its token is none, in every other step.
        let limit = writers[1].sequence.limit();
        let odd = i % 2 == 1;
        if odd && i % 4 == 1 {
            let len = writers[1].sequence.len();
            writers[1].sequence.set_limit(len);
        }
        let mut rows: Vec<Next<'_>> = writers.iter_mut().map(Writer::next).collect();
        if odd && i % 4 == 3 {
            rows[1].token = VOCAB;
        }
        let chosen = engine.next_of_each(&mut rows);
        writers[1].sequence.set_limit(limit);
        for (at, chosen) in chosen.into_iter().enumerate() {
            match chosen {
                Ok(token) => writers[at].tokens.push(token),
                Err(SessionError::Full { .. } | SessionError::Token { .. }) => {
                    assert!(odd && at == 1, "row {at} of step {i}");
                }
                Err(error) => panic!("row {at}: {error}"),
            }
        }
    }
    assert_eq!(writers[0].tokens, alone[0]);
    assert_eq!(writers[1].tokens, alone[1][..10]);
    assert_eq!(writers[2].tokens, alone[2]);
}

/// What rows choose together is asked for once.
#[test]
fn experts_of_a_step_are_the_union_of_what_its_rows_chose() {
    let bench = &ON_THE_CPU[0];
    let model = (bench.model)(2);
    let mut engine = bench.engine(&model, CONTEXT);
    let text = Text { options: GREEDY, prompt: (0..20).collect(), count: 2 };
    // The same text, so that all rows choose the same experts.
    let mut writers: Vec<_> = (0..8).map(|_| Writer::new(&mut engine, &text)).collect();
    let before = engine.stats().pager.demands;
    step(&mut engine, &mut writers);
    // Three layers, top 3.
    assert_eq!(engine.stats().pager.demands - before, 9);
    assert!(writers.iter().all(|writer| writer.tokens == writers[0].tokens));
}
