//! Rows converted from one form to the other, and what a halted token leaves: decode_pack,
//! decode_unpack, decode_seek, decode_aside.

use super::{EPS, compare_packed, words};
use crate::cpu::decode_aside::decode_aside;
use crate::cpu::decode_pack::decode_pack;
use crate::cpu::decode_seek::decode_seek;
use crate::cpu::decode_unpack::decode_unpack;
use crate::cpu::pack::{packed_words, pieces};
use crate::gpu::Reduction;
use crate::gpu::decode::params;
use crate::gpu::tests::alone::Alone;
use crate::gpu::tests::{Random, device};

const ODD: [usize; 9] = [1, 7, 63, 64, 100, 1000, 1024, 1025, 4099];

#[test]
fn a_row_is_packed_as_its_twin_packs_it_and_unpacked_as_it_was() {
    let mut random = Random::new("decode_pack, decode_unpack");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    for cols in ODD {
        let mut x = random.floats(cols.next_multiple_of(4));
        x[..cols].iter_mut().skip(32).take(16).for_each(|x| *x = 0.0);
        let mut want = vec![0; packed_words(cols)];
        decode_pack(&x[..cols], &mut want);
        let p = params::Pack { cols: cols as u32, pieces: pieces(cols) as u32 };
        let grid = (pieces(cols).div_ceil(32) as u32, 1);
        let buffers = [words(&x), vec![0x7fc0_0000; want.len()]];
        let got = alone.run("decode_pack", 0, &p, &buffers, grid);
        let slack: Vec<f64> = x[..cols].iter().map(|x| EPS * f64::from(x.abs())).collect();
        compare_packed(&got[1], &want, &slack, &format!("{cols} columns")).unwrap();

        let mut plain = vec![0.0; cols];
        decode_unpack(&want, &mut plain);
        let mut expected = words(&plain);
        expected.resize(cols.next_multiple_of(4), 0);
        // What follows the row is unchanged.
        expected.extend([9; 8]);
        let buffers = [want, vec![9; expected.len()]];
        let got = alone.run("decode_unpack", 0, &p, &buffers, grid);
        assert_eq!(got[1], expected, "{cols} columns");
        assert_eq!(plain, x[..cols]);
    }
}

#[test]
fn only_the_token_that_has_just_halted_sets_anything_aside() {
    let mut random = Random::new("decode_aside");
    let Some(device) = device(Reduction::Group) else { return };
    let alone = Alone::new(&device);
    let position = 17;
    for (quads, at) in [(1, 0), (8, 3), (700, 40)] {
        let source: Vec<u32> = (0..4 * quads).map(|_| random.next() as u32).collect();
        // Halted here by this token; at another layer; by another token; not at all.
        for state in [[5, 0, 18, 0], [4, 0, 18, 0], [5, 0, 17, 0], [0, 0, 18, 0]] {
            let before = vec![9; 4 * (at + quads + 2)];
            let mut want = before.clone();
            decode_aside(&source, &state, (5, position), &mut want, 4 * at);
            assert_eq!(want != before, state == [5, 0, 18, 0]);
            let p = params::Aside { quads: quads as u32, at: at as u32, halt: 5 };
            let buffers = [source.clone(), state.to_vec(), before];
            let grid = (quads.div_ceil(256) as u32, 1);
            let got = alone.run("decode_aside", position as usize, &p, &buffers, grid);
            assert_eq!(got[2], want, "{quads} quads, {state:?}");
        }
    }
}

#[test]
fn a_token_halts_where_one_of_its_experts_has_no_slot_and_only_there() {
    const EXPERTS: usize = 9;
    let mut random = Random::new("decode_seek");
    let Some(device) = device(Reduction::Lane) else { return };
    let alone = Alone::new(&device);
    let (position, halt, table_at, ids_at) = (17, 3, 5, 6);
    for (top_k, halted) in [(1, 0), (4, 0), (9, 0), (4, 2)] {
        let mut ids: Vec<u32> = (0..EXPERTS as u32).collect();
        for i in (1..EXPERTS).rev() {
            ids.swap(i, random.below(i + 1));
        }
        // Every expert has a slot; one that was not chosen has none; the first and the last chosen
        // one have none.
        let lacking = [None, ids.get(top_k).copied(), Some(ids[0]), Some(ids[top_k - 1])];
        for lacks in lacking {
            let mut table = vec![u32::MAX; table_at];
            table.extend(
                (0..EXPERTS as u32).map(|id| if Some(id) == lacks { u32::MAX } else { 7 * id }),
            );
            let mut before = vec![9; ids_at + top_k + 2];
            before[0] = halted;
            let mut want = before.clone();
            decode_seek(&ids[..top_k], &table[table_at..], (halt, position), ids_at, &mut want);
            let chosen_lacks = lacks.is_some_and(|lacks| ids[..top_k].contains(&lacks));
            let expected = if halted == 0 && chosen_lacks { halt } else { halted };
            assert_eq!(want[0], expected);
            let p = params::Seek {
                top_k: top_k as u32,
                table_at: table_at as u32,
                ids_at: ids_at as u32,
                halt,
            };
            let buffers = [ids[..top_k].to_vec(), table, before];
            let got = alone.run("decode_seek", position as usize, &p, &buffers, (1, 1));
            assert_eq!(got[2], want, "{top_k} of {ids:?}, without {lacks:?}");
        }
    }
}
