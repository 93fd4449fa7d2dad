//! Carries out a weight's source recipe: from stored tensors to the weight's rows.
//!
//! Resolving checks names, shapes and types before a byte is read. Reading goes by rows and copies
//! elements; the only arithmetic is adding one and multiplying by a constant. The plain case reads stored rows directly into the
//! caller's buffer.

use super::checkpoint::{Checkpoint, Form};
use super::{LoadError, Result, missing};
use crate::graph::Weight;
use crate::quant::dequantize;
use crate::source::{Source, Take};
use doppler_store::DType;

/// About how many bytes of a transposed matrix are read at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// A source whose stored tensors exist and fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    node: Node,
    pub rows: u64,
    pub cols: u64,
    /// The type that is read.
    pub dtype: DType,
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    /// Its name and its stored shape.
    Stored(String, Vec<u64>),
    Rows(Box<Resolved>, Take),
    Cols(Box<Resolved>, Take),
    Concatenate(Vec<Resolved>),
    Transpose(Box<Resolved>),
    /// The source, outer and inner.
    Permute(Box<Resolved>, u64, u64),
    /// Whole rows one after another, in one row.
    Flat(Box<Resolved>),
    Ones,
    AddOne(Box<Resolved>),
    Times(Box<Resolved>, f32),
}

impl Resolved {
    /// Resolves how `weight` is made from the checkpoint's tensors.
    ///
    /// # Errors
    /// If a tensor is missing, its type cannot be read, its shape is not the weight's, or a slice
    /// exceeds its tensor.
    pub fn new(checkpoint: &dyn Checkpoint, weight: &Weight) -> Result<Self> {
        let source = checkpoint.source(weight);
        let resolver = Resolver { checkpoint, weight };
        let resolved = resolver.resolve(&source)?;
        let (rows, cols) = (weight.rows as u64, weight.cols as u64);
        let fits = match &resolved.node {
            Node::Stored(_, shape) => *shape == [rows, cols] || rows == 1 && *shape == [cols],
            _ => (resolved.rows, resolved.cols) == (rows, cols),
        };
        if fits {
            return Ok(resolved);
        }
        let want = if rows == 1 { format!("[{cols}]") } else { format!("[{rows}, {cols}]") };
        Err(resolver.fail(format!("its shape is {:?}, the config wants {want}", resolved.shape())))
    }

    /// The shape that will be stored. A plain tensor keeps its shape.
    pub fn shape(&self) -> Vec<u64> {
        match &self.node {
            Node::Stored(_, shape) => shape.clone(),
            _ if self.rows == 1 => vec![self.cols],
            _ => vec![self.rows, self.cols],
        }
    }

    /// Bytes of one row as read.
    pub const fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.cols as usize)
    }

    /// Calls `each` with the names of the stored tensors that it is made from.
    pub fn names<'a>(&'a self, each: &mut dyn FnMut(&'a str)) {
        match &self.node {
            Node::Stored(name, _) => each(name),
            Node::Ones => {}
            Node::Concatenate(parts) => parts.iter().for_each(|part| part.names(each)),
            Node::Rows(of, _)
            | Node::Cols(of, _)
            | Node::Transpose(of)
            | Node::Permute(of, ..)
            | Node::Flat(of)
            | Node::AddOne(of)
            | Node::Times(of, _) => of.names(each),
        }
    }

    /// Fills `out` with whole rows, from row `first` on.
    pub fn read(&self, checkpoint: &dyn Checkpoint, first: u64, out: &mut [u8]) -> Result<()> {
        let row = self.row_bytes();
        match &self.node {
            Node::Stored(name, _) => checkpoint.read(name, first, out),
            Node::Rows(of, take) => {
                let start = take.start as u64 + first * take.step as u64;
                if take.step == 1 {
                    return of.read(checkpoint, start, out);
                }
                let count = out.len() / row;
                let mut span = vec![0; ((count - 1) * take.step + 1) * row];
                of.read(checkpoint, start, &mut span)?;
                for (out, from) in out.chunks_exact_mut(row).zip(span.chunks(take.step * row)) {
                    out.copy_from_slice(&from[..row]);
                }
                Ok(())
            }
            Node::Cols(of, take) => {
                let wide = of.row_bytes();
                let mut rows = vec![0; out.len() / row * wide];
                of.read(checkpoint, first, &mut rows)?;
                let (len, block) = (self.dtype.block_len(), self.dtype.block_bytes());
                for (out, from) in out.chunks_exact_mut(row).zip(rows.chunks_exact(wide)) {
                    for (i, out) in out.chunks_exact_mut(block).enumerate() {
                        let at = (take.start / len + i * take.step) * block;
                        out.copy_from_slice(&from[at..at + block]);
                    }
                }
                Ok(())
            }
            Node::Concatenate(parts) => {
                let (mut first, mut out) = (first, out);
                for part in parts {
                    let here = part.rows.saturating_sub(first) as usize;
                    let (now, later) = out.split_at_mut((here * row).min(out.len()));
                    if !now.is_empty() {
                        part.read(checkpoint, first, now)?;
                    }
                    (first, out) = (first.saturating_sub(part.rows), later);
                }
                Ok(())
            }
            Node::Transpose(of) => self.transposed(checkpoint, of, first, out),
            Node::Permute(of, outer, inner) => {
                let block = outer * inner;
                for (number, out) in (first..).zip(out.chunks_exact_mut(row)) {
                    let (start, within) = (number / block * block, number % block);
                    of.read(checkpoint, start + within % outer * inner + within / outer, out)?;
                }
                Ok(())
            }
            Node::Ones => {
                out.as_chunks_mut::<4>().0.fill(1_f32.to_le_bytes());
                Ok(())
            }
            // The only row.
            Node::Flat(of) => of.read(checkpoint, 0, out),
            Node::AddOne(of) => self.computed(checkpoint, of, first, out, |value| value + 1.0),
            Node::Times(of, factor) => {
                self.computed(checkpoint, of, first, out, |value| value * factor)
            }
        }
    }

    /// Rows of `of` as F32, each value changed.
    fn computed(
        &self,
        checkpoint: &dyn Checkpoint,
        of: &Self,
        first: u64,
        out: &mut [u8],
        change: impl Fn(f32) -> f32,
    ) -> Result<()> {
        let (cols, row) = (self.cols as usize, self.row_bytes());
        let mut rows = vec![0; out.len() / row * of.row_bytes()];
        of.read(checkpoint, first, &mut rows)?;
        let mut values = vec![0.0; cols];
        for (out, from) in out.chunks_exact_mut(row).zip(rows.chunks_exact(of.row_bytes())) {
            dequantize(of.dtype, from, cols, &mut values);
            for (out, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(&values) {
                *out = change(*value).to_le_bytes();
            }
        }
        Ok(())
    }

    /// Rows `first..` of the transpose of `of`, that is, some of its columns. Reads some of its
    /// rows at a time.
    fn transposed(
        &self,
        checkpoint: &dyn Checkpoint,
        of: &Self,
        first: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let (row, tall) = (self.row_bytes(), of.row_bytes());
        let element = self.dtype.block_bytes();
        let (first, count) = (first as usize, out.len() / row);
        let step = (CHUNK_BYTES / tall).max(1);
        let mut buffer = vec![0; step.min(of.rows as usize) * tall];
        for start in (0..of.rows as usize).step_by(step) {
            let rows = step.min(of.rows as usize - start);
            let read = &mut buffer[..rows * tall];
            of.read(checkpoint, start as u64, read)?;
            for (col, from) in (start..).zip(read.chunks_exact(tall)) {
                let from = from[first * element..].chunks_exact(element).take(count);
                for (out, from) in out.chunks_exact_mut(row).zip(from) {
                    out[col * element..][..element].copy_from_slice(from);
                }
            }
        }
        Ok(())
    }
}

struct Resolver<'a> {
    checkpoint: &'a dyn Checkpoint,
    weight: &'a Weight,
}

impl Resolver<'_> {
    fn fail(&self, problem: String) -> LoadError {
        LoadError::Tensor { tensor: self.weight.tensor.clone(), problem }
    }

    fn resolve(&self, source: &Source) -> Result<Resolved> {
        match source {
            Source::Ones => Ok(self.ones()),
            Source::Itself => self.stored(&self.weight.tensor),
            Source::Stored(name) => self.stored(name),
            Source::Rows { of, take } => {
                let of = self.resolve(of)?;
                self.within(take, of.rows, "rows")?;
                let (rows, cols, dtype) = (take.count as u64, of.cols, of.dtype);
                Ok(Resolved { node: Node::Rows(Box::new(of), *take), rows, cols, dtype })
            }
            Source::Cols { of, take } => {
                let of = self.resolve(of)?;
                self.within(take, of.cols, "columns")?;
                let len = of.dtype.block_len();
                let whole = take.start.is_multiple_of(len) && take.count.is_multiple_of(len);
                if len > 1 && !(whole && take.step == 1) {
                    let dtype = of.dtype;
                    return Err(
                        self.fail(format!("its columns cannot be sliced within {dtype} blocks"))
                    );
                }
                let (rows, cols, dtype) = (of.rows, take.count as u64, of.dtype);
                Ok(Resolved { node: Node::Cols(Box::new(of), *take), rows, cols, dtype })
            }
            Source::Concatenate(parts) => {
                let parts: Vec<_> =
                    parts.iter().map(|part| self.resolve(part)).collect::<Result<_>>()?;
                let Some((cols, dtype)) = parts.first().map(|part| (part.cols, part.dtype)) else {
                    return Err(self.fail("it has no parts".into()));
                };
                if let Some(part) = parts.iter().find(|p| (p.cols, p.dtype) != (cols, dtype)) {
                    return Err(self.fail(format!(
                        "it is made of rows of {cols} {dtype} and of {} {}",
                        part.cols, part.dtype
                    )));
                }
                let rows = parts.iter().map(|part| part.rows).sum();
                Ok(Resolved { node: Node::Concatenate(parts), rows, cols, dtype })
            }
            Source::Transpose(of) => {
                let of = self.resolve(of)?;
                let (rows, cols, dtype) = (of.cols, of.rows, of.dtype);
                if dtype.is_quantised() {
                    return Err(self.fail(format!("blocks of {dtype} cannot be transposed")));
                }
                Ok(Resolved { node: Node::Transpose(Box::new(of)), rows, cols, dtype })
            }
            Source::Permute { of, outer, inner } => {
                let of = self.resolve(of)?;
                let (outer, inner) = (*outer as u64, *inner as u64);
                let (rows, cols, dtype) = (of.rows, of.cols, of.dtype);
                if outer * inner == 0 || !rows.is_multiple_of(outer * inner) {
                    return Err(
                        self.fail(format!("{rows} rows are not a multiple of {outer} x {inner}"))
                    );
                }
                Ok(Resolved { node: Node::Permute(Box::new(of), outer, inner), rows, cols, dtype })
            }
            Source::Flat(of) => self.flat(self.resolve(of)?),
            Source::AddOne(of) => {
                let of = self.resolve(of)?;
                let (rows, cols) = (of.rows, of.cols);
                Ok(Resolved { node: Node::AddOne(Box::new(of)), rows, cols, dtype: DType::F32 })
            }
            Source::Times(of, factor) => {
                let of = self.resolve(of)?;
                let (rows, cols, node) = (of.rows, of.cols, Node::Times(Box::new(of), *factor));
                Ok(Resolved { node, rows, cols, dtype: DType::F32 })
            }
            Source::FirstOf(sources) => {
                let there = sources.iter().find(|source| self.is_there(source));
                match there.or(sources.first()) {
                    Some(source) => self.resolve(source),
                    None => Err(self.fail("it has no source".into())),
                }
            }
        }
    }

    fn ones(&self) -> Resolved {
        let cols = self.weight.cols as u64;
        Resolved { node: Node::Ones, rows: 1, cols, dtype: DType::F32 }
    }

    fn flat(&self, of: Resolved) -> Result<Resolved> {
        let (cols, dtype) = (of.rows * of.cols, of.dtype);
        if !of.cols.is_multiple_of(dtype.block_len() as u64) {
            return Err(self.fail(format!("rows of {dtype} cannot be joined")));
        }
        Ok(Resolved { node: Node::Flat(Box::new(of)), rows: 1, cols, dtype })
    }

    fn stored(&self, name: &str) -> Result<Resolved> {
        let stored = self.checkpoint.find(name).ok_or_else(|| missing(self.checkpoint, name))?;
        let dtype = stored.dtype().ok_or_else(|| LoadError::Tensor {
            tensor: name.to_owned(),
            problem: match &stored.form {
                Form::Unreadable(what) => {
                    format!("type {what} cannot be read (F32, F16 and BF16 can)")
                }
                form => format!("{form:?} cannot be read"),
            },
        })?;
        let (rows, cols) = stored.rows_cols();
        let node = Node::Stored(name.to_owned(), stored.shape.clone());
        Ok(Resolved { node, rows, cols, dtype })
    }

    /// Whether all stored tensors of a source exist.
    fn is_there(&self, source: &Source) -> bool {
        match source {
            Source::Ones => true,
            Source::Itself => self.checkpoint.find(&self.weight.tensor).is_some(),
            Source::Stored(name) => self.checkpoint.find(name).is_some(),
            Source::Concatenate(parts) => parts.iter().all(|part| self.is_there(part)),
            Source::FirstOf(sources) => sources.iter().any(|source| self.is_there(source)),
            Source::Rows { of, .. }
            | Source::Cols { of, .. }
            | Source::Transpose(of)
            | Source::Permute { of, .. }
            | Source::Flat(of)
            | Source::AddOne(of)
            | Source::Times(of, _) => self.is_there(of),
        }
    }

    fn within(&self, take: &Take, have: u64, what: &str) -> Result<()> {
        let last = take.count.checked_sub(1).and_then(|n| n.checked_mul(take.step));
        let last = last.and_then(|n| n.checked_add(take.start));
        match last {
            Some(last) if take.step > 0 && (last as u64) < have => Ok(()),
            _ => Err(self.fail(format!(
                "the config wants {} {what} from number {} on, its source has {have}",
                take.count, take.start
            ))),
        }
    }
}
