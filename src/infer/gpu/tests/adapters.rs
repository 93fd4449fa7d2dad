//! Adapters on a GPU: attached as ops that the token's one submission contains.

use std::sync::Arc;

use super::{BOTH, device};
use crate::adapter::Attached;
use crate::adapter::tests::{attaches, configs, random_adapter};
use crate::backend::KvFormat;
use crate::engine::LoadOptions;
use crate::session::Session;
use crate::testing;
use doppler_store::DType;

#[test]
fn attached_adapters_compute_what_merged_weights_do_and_leave_nothing_behind() {
    for reduction in BOTH {
        let Some(device) = device(reduction) else { return };
        for (seed, config) in (1..).zip(configs()) {
            attaches(&config, &device, 31 * seed);
        }
    }
}

#[test]
fn a_token_with_adapters_is_one_submission() {
    let Some(device) = device(crate::gpu::Reduction::Group) else { return };
    let model = testing::random(&configs()[0], 1, |_| DType::F32);
    let kv = KvFormat::F16;
    let options = LoadOptions { context: Some(64), batch: 8, kv, ..LoadOptions::default() };
    let mut session = Session::new(&model, &device, &options).unwrap();
    let counted = |session: &mut Session| {
        session.reset();
        session.next(3, 1).unwrap();
        let before = session.counters();
        let next = session.next(4, 1).unwrap();
        let after = session.counters();
        (next, after.submissions - before.submissions, after.dispatches - before.dispatches)
    };
    let (_, submissions, plain) = counted(&mut session);
    let adapter = Arc::new(random_adapter(&model, 2, 4, 1.0));
    session.adapt(&[Attached { adapter, weight: 1.0 }]).unwrap();
    let (_, with, dispatches) = counted(&mut session);
    println!("dispatches a token: {plain} without, {dispatches} with adapters");
    assert_eq!((submissions, with), (1, 1));
    // In each of two layers a product and its conversion for four inputs, one for each of seven
    // results, and what fusion would have saved.
    assert!(
        dispatches > plain && dispatches <= plain + 2 * (4 * 2 + 7 + 10),
        "{dispatches}, {plain}"
    );
}
