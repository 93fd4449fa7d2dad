//! Compares recipes with the same steps on whole matrices, with irregular shapes, read in parts.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::checkpoint::{Checkpoint, Form, Stored};
use super::recipe::Resolved;
use super::{Result, missing};
use crate::graph::{Weight, WeightRole};
use crate::quant::{dequantize, quantize};
use crate::source::{Source, Take};
use doppler_store::DType;

/// Tensors in memory.
#[derive(Default)]
struct Memory {
    tensors: BTreeMap<String, (Stored, Vec<u8>)>,
}

impl Memory {
    /// Adds a tensor whose values give their position: `1000 * row + column`.
    fn with(mut self, name: &str, shape: &[u64], dtype: DType) -> Self {
        let stored = Stored { shape: shape.to_vec(), form: Form::Blocks(dtype) };
        let (rows, cols) = stored.rows_cols();
        let mut bytes = Vec::new();
        for row in 0..rows {
            let values: Vec<f32> = (0..cols).map(|col| (100 * row + col) as f32).collect();
            quantize(dtype, &values, &mut bytes).unwrap();
        }
        self.tensors.insert(name.to_owned(), (stored, bytes));
        self
    }
}

impl Checkpoint for Memory {
    fn place(&self) -> String {
        "memory".into()
    }

    fn name(&self) -> String {
        "memory".into()
    }

    fn config(&self) -> &Value {
        &Value::Null
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>> {
        Ok(Vec::new())
    }

    fn tokenizer(&self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.keys().map(String::as_str))
    }

    fn find(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name).map(|(stored, _)| stored)
    }

    fn read(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()> {
        let (stored, bytes) = self.tensors.get(name).ok_or_else(|| missing(self, name))?;
        let row = stored.dtype().unwrap().row_bytes(stored.rows_cols().1 as usize);
        let start = first as usize * row;
        out.copy_from_slice(&bytes[start..start + out.len()]);
        Ok(())
    }
}

fn weight(rows: usize, cols: usize, source: Source) -> Weight {
    let role = WeightRole::Other;
    Weight { tensor: "w".into(), rows, cols, role, layer: None, source }
}

/// The weight's rows, read in parts of random size.
fn values(memory: &Memory, weight: &Weight, rng: &mut StdRng) -> Vec<Vec<f32>> {
    let resolved = Resolved::new(memory, weight).unwrap();
    let row = resolved.row_bytes();
    let mut out = Vec::new();
    let mut first = 0;
    while first < resolved.rows {
        let count = rng.random_range(1..=resolved.rows - first);
        let mut bytes = vec![0; count as usize * row];
        resolved.read(memory, first, &mut bytes).unwrap();
        for row in bytes.chunks_exact(row) {
            let mut values = vec![0.0; weight.cols];
            dequantize(resolved.dtype, row, weight.cols, &mut values);
            out.push(values);
        }
        first += count;
    }
    out
}

fn at(row: usize, col: usize) -> f32 {
    (100 * row + col) as f32
}

/// Compares a recipe with the expected value at each row and column.
fn gives(source: Source, rows: usize, cols: usize, expected: impl Fn(usize, usize) -> f32) {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for dtype in [DType::F32, DType::F16] {
        let memory = Memory::default().with("w", &[2, 6, 10], dtype).with("v", &[5, 10], dtype);
        let weight = weight(rows, cols, source.clone());
        for (row, values) in values(&memory, &weight, &mut rng).iter().enumerate() {
            let expected: Vec<f32> = (0..cols).map(|col| expected(row, col)).collect();
            assert_eq!(*values, expected, "{source:?} in {dtype}, row {row}");
        }
    }
}

#[test]
fn rows_are_joined_to_one_and_ones_need_no_tensor() {
    let joined = Source::stored("w").rows(2..5).flat();
    gives(joined, 1, 30, |_, col| at(2 + col / 10, col % 10));
    gives(Source::Ones, 1, 7, |_, _| 1.0);
}

#[test]
fn slices_of_a_stack_are_rows_and_columns_of_one_tall_matrix() {
    let w = || Source::stored("w");
    gives(w().rows(6..12), 6, 10, |row, col| at(row + 6, col));
    gives(w().rows(7..8), 1, 10, |_, col| at(7, col));
    gives(w().cols(3..7), 12, 4, |row, col| at(row, col + 3));
    let odd = Take { start: 1, count: 6, step: 2 };
    gives(w().rows(odd), 6, 10, |row, col| at(2 * row + 1, col));
    gives(w().cols(Take { start: 0, count: 4, step: 3 }), 12, 4, |row, col| at(row, 3 * col));
    gives(w().rows(2..8).cols(odd.start..9), 6, 8, |row, col| at(row + 2, col + 1));
}

#[test]
fn parts_are_joined_turned_and_put_in_another_order() {
    let (w, v) = (|| Source::stored("w"), || Source::stored("v"));
    let joined = || Source::Concatenate(vec![w().rows(0..4), v(), w().rows(11..12)]);
    gives(joined(), 10, 10, |row, col| match row {
        0..4 => at(row, col),
        4..9 => at(row - 4, col),
        _ => at(11, col),
    });
    gives(joined().rows(3..10), 7, 10, |row, col| match row {
        0 => at(3, col),
        1..6 => at(row - 1, col),
        _ => at(11, col),
    });
    gives(w().transpose(), 10, 12, |row, col| at(col, row));
    gives(v().transpose().rows(2..5), 3, 5, |row, col| at(col, row + 2));
    // An expert stored as [hidden, 2 ff]: its second half, transposed.
    gives(w().rows(6..12).cols(5..10).transpose(), 5, 6, |row, col| at(col + 6, row + 5));
    // Two heads of 2 x 3 rows: separated pairs become neighbours.
    gives(w().permute(2, 3), 12, 10, |row, col| {
        let (head, within) = (row / 6, row % 6);
        at(6 * head + within % 2 * 3 + within / 2, col)
    });
    gives(w().permute(2, 3).permute(3, 2), 12, 10, at);
}

#[test]
fn one_is_added_and_factors_multiplied_in_f32() {
    let mut rng = StdRng::seed_from_u64(1);
    let memory = Memory::default().with("w", &[7], DType::F16);
    let weight = weight(1, 7, Source::Itself.add_one());
    let resolved = Resolved::new(&memory, &weight).unwrap();
    assert_eq!((resolved.dtype, resolved.shape()), (DType::F32, vec![7]));
    let expected: Vec<f32> = (1..8).map(|n| n as f32).collect();
    assert_eq!(values(&memory, &weight, &mut rng), [expected]);
    let weight = self::weight(1, 7, Source::Itself.times(0.125));
    assert_eq!(Resolved::new(&memory, &weight).unwrap().dtype, DType::F32);
    let expected: Vec<f32> = (0..7).map(|n| n as f32 / 8.0).collect();
    assert_eq!(values(&memory, &weight, &mut rng), [expected]);
}

#[test]
fn blocks_are_cut_between_rows_and_blocks_only() {
    let memory = Memory::default().with("w", &[4, 96], DType::Q8_0);
    let mut rng = StdRng::seed_from_u64(2);
    let cut = weight(2, 64, Source::stored("w").rows(1..3).cols(32..96));
    let whole = values(&memory, &weight(4, 96, Source::Itself), &mut rng);
    let got = values(&memory, &cut, &mut rng);
    assert_eq!(got, [whole[1][32..].to_vec(), whole[2][32..].to_vec()]);
    for (rows, cols, source) in
        [(4, 40, Source::stored("w").cols(0..40)), (96, 4, Source::stored("w").transpose())]
    {
        let error = Resolved::new(&memory, &weight(rows, cols, source)).unwrap_err().to_string();
        assert!(error.contains("tensor w") && error.contains("Q8_0"), "{error}");
    }
}

#[test]
fn the_first_form_that_is_there_is_taken_and_what_is_missing_is_named() {
    let forms =
        |names: &[&str]| Source::FirstOf(names.iter().map(|name| Source::stored(*name)).collect());
    let memory = Memory::default().with("v", &[5, 10], DType::F32);
    let mut names = Vec::new();
    let resolved = Resolved::new(&memory, &weight(5, 10, forms(&["w", "v"]))).unwrap();
    resolved.names(&mut |name| names.push(name));
    assert_eq!(names, ["v"]);
    let refusal =
        |rows, source| Resolved::new(&memory, &weight(rows, 10, source)).unwrap_err().to_string();
    assert!(refusal(5, forms(&["x", "y"])).contains("tensor x"));
    assert!(refusal(4, Source::stored("v")).contains("wants [4, 10]"));
    assert!(refusal(3, Source::stored("v").rows(3..6)).contains("3 rows from number 3 on"));
    assert!(refusal(5, Source::stored("v").permute(2, 2)).contains("not a multiple of 2 x 2"));
    assert!(refusal(0, Source::Concatenate(vec![])).contains("no parts"));
    let take = Take { start: 0, count: usize::MAX, step: usize::MAX };
    assert!(refusal(5, Source::stored("v").rows(take)).contains("its source has 5"));
}
