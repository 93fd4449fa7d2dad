//! One token's experts in slots: decode_expert_gate_up, decode_expert_down.

use super::{
    Check, EPS, compare, compare_packed, floats, gated_slack, packed_vector, slacks, words,
};
use crate::cpu::decode_expert_down::decode_expert_down;
use crate::cpu::decode_expert_down_biased::decode_expert_down_biased;
use crate::cpu::decode_expert_gate_up::decode_expert_gate_up;
use crate::cpu::decode_expert_gate_up_biased::decode_expert_gate_up_biased;
use crate::cpu::matrix::Matrix;
use crate::cpu::pack::{Packed, packed_words, pieces, products};
use crate::gpu::Reduction;
use crate::gpu::decode::params;
use crate::gpu::experts::{EMPTY, SlotShape};
use crate::gpu::lower::activation_code;
use crate::gpu::tests::alone::Alone;
use crate::gpu::tests::{Random, device};
use crate::graph::{Activation, ExpertLayout};
use doppler_store::DType;

/// Experts in slots, as stored and as on the device.
struct Slots {
    layout: ExpertLayout,
    shape: SlotShape,
    stored: Vec<Vec<u8>>,
    words: Vec<u32>,
}

impl Slots {
    fn new(random: &mut Random, count: usize, case: &Experts) -> Self {
        let Experts { inner, outer, hidden, ff, .. } = *case;
        let mut layout = None;
        let mut planes = Vec::new();
        let mut stored = Vec::new();
        for _ in 0..count {
            let mut bytes = random.bytes(12);
            let [gate, up, down] = [(inner, ff, hidden), (inner, ff, hidden), (outer, hidden, ff)]
                .map(|(dtype, rows, cols)| {
                    let (mut spec, part) = random.matrix(dtype, rows, cols);
                    spec.offset = bytes.len();
                    bytes.extend(part);
                    bytes.extend(random.bytes(5));
                    spec
                });
            let of = ExpertLayout { gate, up, down, bytes: bytes.len() };
            let shape = SlotShape::of(&of);
            for (spec, (packed, _)) in [(gate, shape.gate), (up, shape.up), (down, shape.down)] {
                let begin = planes.len();
                planes.resize(begin + packed.bytes(), 9);
                packed.pack(&bytes[spec.offset..][..spec.bytes()], &mut planes[begin..]);
            }
            stored.push(bytes);
            layout = Some((of, shape));
        }
        let (layout, shape) = layout.unwrap();
        assert_eq!(planes.len(), count * shape.stride);
        Self { layout, shape, stored, words: bytemuck::pod_collect_to_vec(&planes) }
    }

    fn stored(&self) -> Vec<&[u8]> {
        self.stored.iter().map(Vec::as_slice).collect()
    }
}

/// A layer of experts and a token's choice among them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Experts {
    pub inner: DType,
    pub outer: DType,
    pub hidden: usize,
    pub ff: usize,
    pub top_k: usize,
}

/// Different slots in any order, with weights that come to about one.
fn choices(random: &mut Random, slots: usize, top_k: usize) -> Vec<Option<(usize, f32)>> {
    let mut order: Vec<usize> = (0..slots).collect();
    (0..top_k).for_each(|i| order.swap(i, i + random.below(slots - i)));
    let weight = |slot: &usize| Some((*slot, random.float().abs() * 2.0 / top_k as f32));
    order[..top_k].iter().map(weight).collect()
}

fn routed(of: &[Option<(usize, f32)>]) -> Vec<u32> {
    of.iter()
        .flat_map(|route| {
            route.map_or([EMPTY, 0], |(slot, weight)| [slot as u32, weight.to_bits()])
        })
        .collect()
}

/// Experts of the layer, some of which are chosen, and where the state lists those.
const IDS: usize = 9;
const IDS_AT: usize = 5;

fn state(ids: &[u32]) -> Vec<u32> {
    [&[u32::MAX; IDS_AT], ids].concat()
}

pub(super) fn gate_up(
    alone: &Alone<'_>,
    team: &str,
    random: &mut Random,
    case: &Experts,
    (activation, biased): (Activation, bool),
) -> Check {
    let Experts { inner, hidden, ff, top_k, .. } = *case;
    let slots = Slots::new(random, top_k + 2, case);
    let mut choices = choices(random, top_k + 2, top_k);
    // A choice without a slot is left unchanged.
    let absent = random.below(2 * top_k);
    choices.iter_mut().skip(absent).take(1).for_each(|choice| *choice = None);
    let x = packed_vector(random, hidden, 10.0);
    let vector = packed_words(ff);
    let before: Vec<u32> = (0..top_k * vector).map(|_| random.next() as u32).collect();
    let mut want = before.clone();
    let (stored, layout) = (slots.stored(), &slots.layout);
    let ids: Vec<u32> = (0..top_k).map(|_| random.below(IDS) as u32).collect();
    let biases: Vec<f32> = (0..IDS * 2 * ff).map(|_| 9.0 * random.float()).collect();
    if biased {
        let of = (&ids[..], &biases[..]);
        decode_expert_gate_up_biased(&x, &stored, layout, &choices, of, activation, &mut want);
    } else {
        decode_expert_gate_up(&x, &stored, layout, &choices, activation, &mut want);
    }
    let SlotShape { gate, up, stride, .. } = slots.shape;
    let p = params::ExpertGateUp {
        gate: params::Pieces::of(&gate.0, gate.1),
        up: params::Pieces::of(&up.0, up.1),
        rows: ff as u32,
        pieces: pieces(ff) as u32,
        activation: activation_code(activation),
        slot_stride: (stride / 16) as u32,
        ids_at: IDS_AT as u32,
        ..params::ExpertGateUp::default()
    };
    let kernel = if biased { "decode_expert_gate_up_biased" } else { "decode_expert_gate_up" };
    let name = format!("{kernel}_{}_{team}", inner.file_name());
    let mut buffers = vec![x, slots.words, routed(&choices), before];
    buffers.extend(biased.then(|| state(&ids)));
    buffers.extend(biased.then(|| words(&biases)));
    let grid = (pieces(ff) as u32, 2 * top_k as u32);
    let got = alone.run(&name, 0, &p, &buffers, grid);
    for (i, choice) in choices.iter().enumerate() {
        let [got, want] = [&got[3], &want].map(|of| &of[i * vector..][..vector]);
        let what = format!("{name} {case:?} {activation:?}, choice {i}");
        let Some((slot, _)) = *choice else {
            if got != want {
                return Err(format!("{what}: it has no slot, but was written"));
            }
            continue;
        };
        let (x, stored) = (&buffers[0], &slots.stored[slot]);
        let specs = [slots.layout.gate, slots.layout.up];
        let of = specs.map(|spec| products(Packed::new(x), Matrix::new(&spec, stored)));
        let off = specs.map(|spec| slacks(x, &spec, stored, 32, 0));
        let slack = |row: usize| {
            let [mut gate, mut up] = [0, 1].map(|part| (of[part][row], off[part][row]));
            if biased {
                for (part, (sum, off)) in [&mut gate, &mut up].into_iter().enumerate() {
                    *sum += f64::from(biases[2 * (ids[i] as usize * ff + row) + part]);
                    *off += EPS * sum.abs();
                }
            }
            if activation == Activation::Clamped {
                up = (up.0 + 1.0, up.1 + EPS * (up.0 + 1.0).abs());
            }
            gated_slack(gate, up, activation)
        };
        compare_packed(got, want, &(0..ff).map(slack).collect::<Vec<_>>(), &what)?;
    }
    Ok(())
}

pub(super) fn down(
    alone: &Alone<'_>,
    team: &str,
    random: &mut Random,
    case: &Experts,
    (halted, adds): (bool, bool),
    biased: bool,
) -> Check {
    let Experts { outer, hidden, ff, top_k, .. } = *case;
    let slots = Slots::new(random, top_k + 2, case);
    let choices = if halted { vec![None; top_k] } else { choices(random, top_k + 2, top_k) };
    let x: Vec<Vec<u32>> = (0..top_k).map(|_| packed_vector(random, ff, 2.0)).collect();
    let before = random.floats(hidden + 3);
    let mut want = before.clone();
    let layout = &slots.layout;
    let stored = slots.stored();
    let ids: Vec<u32> = (0..top_k).map(|_| random.below(IDS) as u32).collect();
    let biases: Vec<f32> = (0..IDS * hidden).map(|_| 3.0 * random.float()).collect();
    let result = &mut want[..hidden];
    if biased {
        let of = (&ids[..], &biases[..]);
        decode_expert_down_biased(&x.concat(), &stored, layout, &choices, of, adds, result);
    } else {
        decode_expert_down(&x.concat(), &stored, layout, &choices, adds, result);
    }
    let split = (8 / top_k).max(1);
    let mut slack = vec![0.0; hidden + 3];
    for (x, (slot, weight)) in x.iter().zip(choices.iter().flatten()) {
        // The weight, the choices that a team adds up, and what was there.
        let more = 2 + top_k.div_ceil(8 / split);
        let product = slacks(x, &layout.down, &slots.stored[*slot], 32 * split, more);
        slack.iter_mut().zip(product).for_each(|(sum, off)| *sum += f64::from(weight.abs()) * off);
    }
    slack[..hidden].iter_mut().zip(&before).for_each(|(off, x)| *off += EPS * f64::from(x.abs()));
    if biased && !halted {
        // Each is multiplied and added, then the choices' sums are added to them.
        let roundings = (2 + top_k + super::TEAMS) as f64;
        for (id, (_, weight)) in ids.iter().zip(choices.iter().flatten()) {
            let biases = &biases[*id as usize * hidden..][..hidden];
            slack.iter_mut().zip(biases).for_each(|(off, bias)| {
                *off += roundings * EPS * f64::from((weight * bias).abs());
            });
        }
    }
    let SlotShape { down, stride, .. } = slots.shape;
    let p = params::ExpertDown {
        down: params::Pieces::of(&down.0, down.1),
        rows: hidden as u32,
        top_k: top_k as u32,
        slot_stride: (stride / 16) as u32,
        split: split as u32,
        adds: u32::from(adds),
        ids_at: IDS_AT as u32,
        ..params::ExpertDown::default()
    };
    let kernel = if biased { "decode_expert_down_biased" } else { "decode_expert_down" };
    let name = format!("{kernel}_{}_{team}", outer.file_name());
    let mut buffers = vec![x.concat(), slots.words, routed(&choices), words(&before)];
    buffers.extend(biased.then(|| state(&ids)));
    buffers.extend(biased.then(|| words(&biases)));
    let got = alone.run(&name, 0, &p, &buffers, super::folded(hidden.div_ceil(2)));
    let what = format!("{name} {case:?}, halted: {halted}");
    compare(&floats(&got[3]), &want, &slack, &what)
}

/// Layers of every format, with numbers of rows that do not fill a workgroup and choices that do
/// not fill a team.
fn layers() -> impl Iterator<Item = Experts> {
    DType::ALL.into_iter().enumerate().flat_map(|(i, inner)| {
        let outer = DType::ALL[(i + 3) % DType::ALL.len()];
        [(1, 0), (2, 1), (3, 2), (8, 1)].map(move |(top_k, which)| {
            let (hidden, ff) = match inner.block_len().max(outer.block_len()) {
                256 => [(300, 70), (256, 256), (129, 1100)],
                32 => [(80, 70), (96, 160), (65, 1104)],
                _ => [(33, 17), (64, 32), (65, 1000)],
            }[which];
            Experts { inner, outer, hidden, ff, top_k }
        })
    })
}

#[test]
fn the_first_half_of_experts_matches_its_twin_in_every_format() {
    let mut random = Random::new("decode_expert_gate_up");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for (i, case) in layers().enumerate() {
            let activation = [Activation::Silu, Activation::GeluTanh][i / 4 % 2];
            gate_up(&alone, team, &mut random, &case, (activation, false)).unwrap();
            let activation = [Activation::Clamped, Activation::Silu][i / 4 % 2];
            gate_up(&alone, team, &mut random, &case, (activation, true)).unwrap();
        }
    }
}

#[test]
fn the_second_half_of_experts_matches_its_twin_in_every_format_and_a_halted_step_changes_nothing() {
    let mut random = Random::new("decode_expert_down");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for team in alone.teams() {
        for case in layers() {
            for halted in [false, true] {
                for adds in [false, true] {
                    down(&alone, team, &mut random, &case, (halted, adds), false).unwrap();
                    down(&alone, team, &mut random, &case, (halted, adds), true).unwrap();
                }
            }
        }
    }
}
