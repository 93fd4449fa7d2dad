//! Compares sampling on the device with the CPU's sampler: the tokens must be the same.

use super::{Random, device};
use crate::cpu::sample_greedy::sample_greedy;
use crate::cpu::sample_keys::sample_keys;
use crate::gpu::readback::Readback;
use crate::gpu::sample::{Links, SamplePlan};
use crate::gpu::{GpuDevice, Reduction};
use crate::odds::{REFUSED, Ruler};
use crate::sampler::{Sampler, SamplerOptions};

const STORAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE
    .union(wgpu::BufferUsages::COPY_DST)
    .union(wgpu::BufferUsages::COPY_SRC);

/// Tokens recorded in one submission.
const AHEAD: usize = 5;

/// The buffers around a plan.
struct Rig {
    device: GpuDevice,
    vocab: usize,
    logits: wgpu::Buffer,
    state: wgpu::Buffer,
    tokens: wgpu::Buffer,
    chosen: wgpu::Buffer,
    /// Receives the tokens of a submission, one after the other.
    log: wgpu::Buffer,
}

impl Rig {
    fn new(device: &GpuDevice, vocab: usize) -> Self {
        let make = |words: usize| device.buffer("test", 4 * words as u64, STORAGE).unwrap();
        Self {
            device: device.clone(),
            vocab,
            logits: make(vocab),
            state: make(1),
            tokens: make(1),
            chosen: make(1),
            log: make(AHEAD),
        }
    }

    fn plan(&self, sampler: &Sampler) -> Result<SamplePlan, crate::backend::BackendError> {
        let Self { logits, state, tokens, chosen, .. } = self;
        SamplePlan::new(
            &self.device,
            self.vocab,
            Links { logits, state, tokens, chosen, row: 0 },
            sampler,
        )
    }

    fn load(&self, logits: &[f32]) {
        self.device.write(&self.logits, 0, bytemuck::cast_slice(logits));
    }

    /// Chooses `AHEAD` tokens without reading any of them in between.
    fn choose(&self, plan: &SamplePlan) -> Vec<u32> {
        let mut encoder = self.device.wgpu().create_command_encoder(&Default::default());
        for i in 0..AHEAD {
            plan.encode(&mut encoder.begin_compute_pass(&Default::default()));
            encoder.copy_buffer_to_buffer(&self.chosen, 0, &self.log, 4 * i as u64, 4);
        }
        self.read(encoder, &self.log)[..AHEAD].to_vec()
    }

    /// The plan's `ranks` after the first kernels.
    fn ranks_after(&self, plan: &SamplePlan, kernels: usize) -> Vec<u32> {
        let mut encoder = self.device.wgpu().create_command_encoder(&Default::default());
        plan.encode_first(kernels, &mut encoder.begin_compute_pass(&Default::default()));
        let mut words = self.read(encoder, &plan.ranks);
        words.truncate(self.vocab);
        words
    }

    fn read(&self, mut encoder: wgpu::CommandEncoder, from: &wgpu::Buffer) -> Vec<u32> {
        let mut readback = Readback::new(&self.device, "the test's words", from.size()).unwrap();
        readback.copy(&self.device, &mut encoder, from, from.size()).unwrap();
        let index = self.device.submit(encoder).unwrap();
        readback.submitted(from.size(), &index);
        let bytes = readback.take(&self.device).unwrap().unwrap();
        bytes.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect()
    }

    fn word(&self, from: &wgpu::Buffer) -> u32 {
        self.read(self.device.wgpu().create_command_encoder(&Default::default()), from)[0]
    }
}

/// Arbitrary bits: subnormals, infinities, NaNs.
fn wild(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| f32::from_bits(random.next() as u32)).collect()
}

fn logits(random: &mut Random, n: usize) -> Vec<f32> {
    let spread = [0.01, 1.0, 4.0, 30.0, 1e5, 1e-39][random.below(6)];
    let mut logits: Vec<f32> = match random.below(8) {
        0 => vec![random.float() * spread; n],
        1 => (0..n).map(|_| random.below(4) as f32 * spread).collect(),
        2 => {
            let finite = |x: f32| if x.is_finite() { x } else { 1.0 };
            wild(random, n).into_iter().map(finite).collect()
        }
        3 => (0..n).map(|_| f32::from_bits((random.next() as u32 % 9) | 0x3f80_0000)).collect(),
        // Like a model's: a few stand out.
        4 => (0..n).map(|i| random.float() * 3.0 + if i % 997 == 5 { 12.0 } else { 0.0 }).collect(),
        _ => (0..n).map(|_| (random.float() + random.float() + random.float()) * spread).collect(),
    };
    for odd in [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -0.0, f32::MIN_POSITIVE / 3.0] {
        if random.below(16) == 0 {
            for _ in 0..=random.below(3) {
                logits[random.below(n)] = odd;
            }
        }
    }
    if random.below(30) == 0 {
        logits.fill([f32::NAN, f32::NEG_INFINITY][random.below(2)]);
    }
    logits
}

fn options(random: &mut Random, vocab: usize) -> SamplerOptions {
    SamplerOptions {
        temperature: [0.0, 0.7, 1.0, 1.9, 50.0, 1e-4, 1e-30, 1e30][random.below(8)],
        top_k: [0, 0, 1, 2, 40, 1000, vocab / 2, vocab][random.below(8)],
        top_p: [1.0, 1.0, 0.95, 0.5, 0.999_999_9, 1e-12][random.below(6)],
        repetition_penalty: [1.0, 1.1, 1.7, 0.3, 1e-42, 3e38][random.below(6)],
        repetition_window: [0, 1, 2, 3, 64, 256][random.below(6)],
        seed: random.next(),
        ..SamplerOptions::default()
    }
}

#[test]
fn the_device_chooses_what_the_cpu_chooses() {
    choices(4);
}

#[test]
#[ignore = "a sweep"]
fn the_device_chooses_what_the_cpu_chooses_over_and_over() {
    choices(1);
}

/// Compares the choices of the device and the CPU, in one of every `few` cases.
fn choices(few: usize) {
    let mut random = Random::new("sample");
    let Some(device) = device(Reduction::Lane) else { return };
    // Vocabularies around a chunk's boundary, those of real models, and the largest.
    let vocabularies: [(usize, usize); 9] = [
        (1, 30),
        (2, 60),
        (7, 100),
        (1000, 100),
        (1024, 30),
        (1025, 60),
        (32_000, 60),
        (151_936, 24),
        (262_144, 4),
    ];
    let mut drawn = std::collections::HashSet::new();
    let mut refused = 0;
    for (vocab, cases) in vocabularies {
        let rig = Rig::new(&device, vocab);
        for case in 0..cases.div_ceil(few) {
            let options = options(&mut random, vocab);
            let mut sampler = Sampler::new(options).unwrap();
            for _ in 0..random.below(300) {
                // Some of them twice, some outside this vocabulary.
                sampler.accept(random.below(vocab.min(20) * 2) as u32);
            }
            let plan = rig.plan(&sampler).unwrap();
            for round in 0..2 {
                let logits = logits(&mut random, vocab);
                rig.load(&logits);
                let got = rig.choose(&plan);
                let mut want = Vec::new();
                let finite = logits.iter().all(|logit| logit.is_finite());
                refused += usize::from(!finite);
                for _ in 0..AHEAD {
                    // A row that is not finite is refused repeatedly, and changes nothing.
                    want.push(if finite { sampler.sample(&logits) } else { REFUSED });
                    if finite {
                        sampler.accept(want[want.len() - 1]);
                    }
                }
                let what = format!("case {case} of {vocab}, round {round}: {options:?}");
                assert_eq!(got, want, "{what}");
                drawn.extend(got);
            }
        }
    }
    assert!(drawn.len() > 500 / few, "only {} different tokens were seen", drawn.len());
    assert!(refused > 20 / few, "only {refused} rows that are not finite were seen");
}

/// A single logit is enough, wherever it is. The next step gets a valid token as input.
#[test]
fn a_row_with_a_logit_that_is_not_finite_is_refused_and_not_remembered() {
    let Some(device) = device(Reduction::Lane) else { return };
    let vocab = 2500;
    let rig = Rig::new(&device, vocab);
    for temperature in [0.0, 1.0] {
        let options = SamplerOptions {
            temperature,
            repetition_penalty: 1.3,
            seed: 3,
            ..SamplerOptions::default()
        };
        let mut sampler = Sampler::new(options).unwrap();
        let plan = rig.plan(&sampler).unwrap();
        let plain: Vec<f32> = (0..vocab).map(|i| (i % 37) as f32 * 0.1).collect();
        for (place, odd) in [
            (0, f32::NAN),
            (1023, f32::INFINITY),
            (1024, -f32::NAN),
            (vocab - 1, f32::NEG_INFINITY),
        ] {
            let mut logits = plain.clone();
            logits[place] = odd;
            rig.load(&logits);
            rig.device.write(&rig.tokens, 0, bytemuck::cast_slice(&[77u32]));
            assert_eq!(rig.choose(&plan), [REFUSED; AHEAD], "{odd} at {place}");
            assert_eq!(rig.word(&rig.tokens), 0);
            rig.load(&plain);
            for token in rig.choose(&plan) {
                assert_eq!(token, sampler.sample(&plain), "after {odd} at {place}");
                sampler.accept(token);
            }
        }
    }
}

#[test]
fn keys_and_ranks_are_the_twins_bit_by_bit() {
    let mut random = Random::new("keys and ranks");
    let Some(device) = device(Reduction::Lane) else { return };
    let vocab = 5000;
    let rig = Rig::new(&device, vocab);
    for case in 0..300 {
        // Products near the smallest normal number and near the largest, and ties in rounding.
        let penalty = match case % 3 {
            0 => [1e-42, 3e38, 1.5, f32::MIN_POSITIVE, 1.0 + f32::EPSILON][random.below(5)],
            _ => f32::from_bits(random.next() as u32 % 0x7f7f_ffff + 1),
        };
        let options = SamplerOptions {
            temperature: f32::from_bits(random.next() as u32 % 0x7f7f_ffff + 1),
            repetition_penalty: penalty,
            repetition_window: 256,
            ..SamplerOptions::default()
        };
        let mut sampler = Sampler::new(options).unwrap();
        (0..256).for_each(|_| sampler.accept(random.below(vocab) as u32));
        let mut logits = wild(&mut random, vocab);
        if case % 2 == 0 {
            // Closer together, so that not all ranks are out of range.
            let near = options.temperature.min(1e30) * 20.0;
            logits.iter_mut().for_each(|logit| *logit = random.float() * near);
        }
        rig.load(&logits);
        let plan = rig.plan(&sampler).unwrap();
        let mut want = vec![0; vocab];
        sample_keys(&logits, sampler.recent(), sampler.recipe(), &mut want);
        assert_eq!(rig.ranks_after(&plan, 1), want, "keys, case {case}: {options:?}");
        let (_, max) = sample_greedy(&want);
        let ruler = Ruler::new(sampler.recipe(), max);
        want.iter_mut().for_each(|key| *key = ruler.rank(*key));
        assert_eq!(rig.ranks_after(&plan, 2), want, "ranks, case {case}: {options:?}");
    }
}

#[test]
fn a_halted_step_leaves_no_trace_and_a_plan_can_be_restored() {
    let mut random = Random::new("halted");
    let Some(device) = device(Reduction::Lane) else { return };
    let vocab = 3000;
    let rig = Rig::new(&device, vocab);
    for temperature in [0.0, 1.0] {
        let options = SamplerOptions {
            temperature,
            top_k: 500,
            top_p: 0.9,
            repetition_penalty: 1.4,
            repetition_window: 5,
            seed: random.next(),
            ..SamplerOptions::default()
        };
        let mut sampler = Sampler::new(options).unwrap();
        let logits = random.floats(vocab);
        rig.load(&logits);
        let plan = rig.plan(&sampler).unwrap();
        assert_eq!(plan.dispatches(), if temperature == 0.0 { 2 } else { 6 });
        rig.device.write(&rig.tokens, 0, bytemuck::cast_slice(&[77u32]));
        rig.device.write(&rig.chosen, 0, bytemuck::cast_slice(&[88u32]));
        rig.device.write(&rig.state, 0, bytemuck::cast_slice(&[1u32]));
        assert_eq!(rig.choose(&plan), [88; AHEAD]);
        assert_eq!(rig.word(&rig.tokens), 77);
        rig.device.write(&rig.state, 0, bytemuck::cast_slice(&[0u32]));
        let first = rig.choose(&plan);
        for token in &first {
            let want = sampler.clone().sample(&logits);
            assert_eq!(*token, want);
            sampler.follow(*token);
        }
        assert_eq!(rig.word(&rig.tokens), first[AHEAD - 1]);
        // The host continues by itself, then hands back to the device.
        let token = sampler.sample(&logits);
        sampler.accept(token);
        plan.restore(&rig.device, &sampler).unwrap();
        for token in rig.choose(&plan) {
            assert_eq!(token, sampler.sample(&logits));
            sampler.accept(token);
        }
        let other = Sampler::new(SamplerOptions { seed: options.seed ^ 1, ..options }).unwrap();
        assert!(plan.restore(&rig.device, &other).is_err(), "other options");
    }
}

#[test]
fn what_the_kernels_do_not_hold_is_refused() {
    let Some(device) = device(Reduction::Lane) else { return };
    let plain = Sampler::new(SamplerOptions::default()).unwrap();
    let rig = Rig::new(&device, 8);
    let Rig { logits, state, tokens, chosen, .. } = &rig;
    let links = Links { logits, state, tokens, chosen, row: 0 };
    for vocab in [0, 9, 262_145] {
        assert!(SamplePlan::new(&device, vocab, links, &plain).is_err(), "{vocab}");
    }
    let options = SamplerOptions {
        repetition_penalty: 1.2,
        repetition_window: 257,
        ..SamplerOptions::default()
    };
    let refused = rig.plan(&Sampler::new(options).unwrap()).err().unwrap().to_string();
    assert!(refused.contains("257"), "{refused}");
    let same = Links { chosen: tokens, ..links };
    assert!(SamplePlan::new(&device, 8, same, &plain).is_err(), "one buffer twice");
    assert!(rig.plan(&plain).is_ok());
}
