//! Compares a token's routing and the experts that it fetches by itself with the CPU twins, with
//! random tables and odd numbers of experts.

use super::alone::Alone;
use super::{Random, assert_close, device};
use crate::cpu::decode_fetch::decode_fetch;
use crate::cpu::decode_route::{Places, decode_route};
use crate::gpu::Reduction;
use crate::gpu::decode::params::{Fetch, Route};
use crate::gpu::experts::EMPTY;
use crate::gpu::lower::ScoringWords;
use crate::graph::Scoring;

// Long: it builds a layer's tables and judges each of the kernel's seven buffers.
/// The result of decode_route for one layer, in every way that it can end.
#[test]
fn a_token_takes_free_slots_in_the_order_of_choice_or_halts() {
    const STATE: usize = 40;
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    let mut random = Random::new("a token's slots");
    let mut ends = [0; 3];
    for round in 0..60 {
        let experts = 2 + random.below(140);
        let top_k = 1 + random.below(experts.min(9));
        // Experts are absent rarely enough that every outcome occurs.
        let gone = [2, 5, 40][round % 3];
        let mut some = |odds: usize, most: usize| {
            (0..experts)
                .map(|_| (random.below(odds) != 0).then(|| random.below(most) as u32))
                .collect::<Vec<_>>()
        };
        let (slots, spill) = (some(3, 900), some(gone, 300));
        let free: Vec<u32> = (0..random.below(12)).map(|i| 1000 + i as u32).collect();
        let taken = random.below(free.len() + 1);
        let position = random.below(500) as u32;
        // No token has taken slots, this one has, or another one has.
        let taker = [0, position + 1, position + 2][random.below(3)];
        let renormalise = random.below(2) == 1;
        let mut logits = random.floats(experts);
        let biased = random.below(2) == 1;
        let groups = 2 + random.below(6);
        let grouped = biased && experts.is_multiple_of(groups) && experts / groups > 1;
        // Sums of two of them would tie but for rounding.
        if biased && !grouped {
            // Far enough apart that rounding does not change the order.
            logits.iter_mut().for_each(|logit| *logit = (*logit * 16.0).round() / 16.0);
        }
        let biases: Vec<f32> = (0..experts).map(|_| random.below(3) as f32).collect();
        let odd = round % 6 == 5;
        if odd {
            logits[random.below(experts)] = f32::NAN;
        }
        let takes = taker != position + 2;
        let places = Places { slots: &slots, spill: &spill, free: &free, taken, takes };
        let kept = 1 + random.below(groups);
        let scoring = match random.below(3) {
            _ if grouped => {
                let (groups, kept) = (groups as u32, kept as u32);
                Scoring::Grouped { renormalise, scale: 2.5, groups, kept }
            }
            0 if biased && renormalise => Scoring::Scaled,
            0 => Scoring::Softmax { renormalise },
            1 if !biased => Scoring::Mixer { jitter: 0.1 },
            _ => Scoring::Sigmoid { renormalise, scale: 2.5 },
        };
        let added = biased.then_some(&biases[..]);
        let want = decode_route(&logits, added, top_k, scoring, &places);

        let words = |of: &[Option<u32>]| of.iter().map(|w| w.unwrap_or(EMPTY)).collect::<Vec<_>>();
        let mut table = [words(&slots), words(&spill), vec![free.len() as u32]].concat();
        table.extend(&free);
        let x: Vec<u32> = (0..24).map(|_| random.next() as u32).collect();
        let mut state = vec![0; STATE];
        (state[30], state[31]) = (taker, taken as u32);
        let (halt, quads) = (7, 6);
        let [table_at, spill_at, free_at] = [0, experts, 2 * experts].map(|at| at as u32);
        let params = Route {
            experts: experts as u32,
            top_k: top_k as u32,
            renormalise: ScoringWords::of(scoring).renormalise,
            table_at,
            ids_at: 4,
            halt,
            quads,
            spill_at,
            free_at,
            taker_at: 30,
            taken_at: 31,
            sigmoid: ScoringWords::of(scoring).sigmoid,
            biased: if scoring == Scoring::Scaled { 2 } else { u32::from(biased) },
            scale: ScoringWords::of(scoring).scale,
            groups: if grouped { groups as u32 } else { 1 },
            kept: kept as u32,
            state_stride: 0,
        };
        let buffers = [
            logits.iter().map(|l| l.to_bits()).collect(),
            table,
            x.clone(),
            state,
            vec![9; 2 * top_k],
            vec![9; 24],
            vec![9; 2 * top_k],
            biases.iter().map(|bias| bias.to_bits()).collect(),
        ];
        let got = alone.run("decode_route", position as usize, &params, &buffers, (1, 1));
        let [_, _, _, state, routed, aside, fetches, _] = got.try_into().unwrap();
        assert_eq!(state[4..4 + top_k], want.ids);
        let weights: Vec<f32> = routed.chunks(2).map(|pair| f32::from_bits(pair[1])).collect();
        if odd {
            assert!(want.weights.iter().chain(&weights[..top_k]).all(|weight| weight.is_nan()));
        } else {
            assert_close(&weights[..top_k], &want.weights, 1e-6, "the routing weights");
        }
        let got: Vec<u32> = routed.chunks(2).take(top_k).map(|pair| pair[0]).collect();
        assert_eq!(got, want.slots.clone().unwrap_or_else(|| vec![EMPTY; top_k]));
        let fetched = fetches.chunks(2).take(top_k);
        let fetched: Vec<_> = fetched.map(|f| (f[0] != EMPTY).then_some((f[0], f[1]))).collect();
        assert_eq!(fetched, want.fetches);
        let count = want.fetches.iter().flatten().count();
        assert_eq!(state[0], if want.slots.is_none() { halt } else { 0 });
        assert_eq!(state[2], if want.slots.is_none() { position + 1 } else { 0 });
        let owner = if count > 0 { position + 1 } else { taker };
        assert_eq!((state[30], state[31]), (owner, (taken + count) as u32));
        let kept = if want.slots.is_none() { &x } else { &vec![9; 24] };
        assert_eq!(&aside, kept, "the residual is set aside only for a halt");
        ends[if want.slots.is_none() { 0 } else { 1 + usize::from(count > 0) }] += 1;
    }
    assert!(ends.iter().all(|end| *end > 0), "halted, found, fetched: {ends:?}");
}

#[test]
fn fetched_experts_are_copied_whole_and_nothing_else_is_touched() {
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    let mut random = Random::new("fetched experts");
    for (quads, parts, top_k) in [(1, 1, 1), (259, 3, 4), (5000, 2, 3), (1031, 64, 8)] {
        let stride = quads * 4;
        let spill: Vec<u32> = (0..5 * stride).map(|_| random.next() as u32).collect();
        let slots: Vec<u32> = (0..9 * stride).map(|_| random.next() as u32).collect();
        let fetches: Vec<_> = (0..top_k)
            .map(|k| (k == 0 || random.below(3) != 0).then(|| (random.below(5), k)))
            .collect();
        let mut want = slots.clone();
        decode_fetch(&spill, &mut want, &fetches, stride);
        let pairs = fetches.iter().flat_map(|fetch| match fetch {
            Some((place, slot)) => [*place as u32, *slot as u32],
            None => [EMPTY, 0],
        });
        let buffers = [spill, pairs.collect(), slots];
        let params = Fetch { quads: quads as u32, parts };
        let workgroups = parts * top_k as u32;
        let got = alone.run("decode_fetch", 0, &params, &buffers, (workgroups, 1));
        assert!(got[2] == want, "{quads} quads by {parts}");
    }
}
