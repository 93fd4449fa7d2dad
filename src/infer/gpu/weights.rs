//! The trunk's weights on the device.
//!
//! A matrix is repacked into planes. If it is larger than a binding may be, it is split into row
//! ranges, each with its own buffer and dispatch. Vectors (norm weights, biases) become f32,
//! exactly, and must not be quantised.

use wgpu::BufferUsages;

use super::device::GpuDevice;
use super::lower::Place;
use super::repack::Packed;
use crate::backend::{BackendError, Result};
use crate::graph::{Graph, MatrixSpec, Op, WeightId};
use crate::quant::dequantize;
use doppler_store::DType;

pub(super) const WEIGHT: BufferUsages =
    BufferUsages::STORAGE.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);
/// Bytes passed to the driver in one write.
const WRITE_BYTES_MAX: usize = 16 << 20;
/// Bytes of writes that may wait in staging memory.
const STAGED_BYTES_MAX: usize = 64 << 20;

/// Rows `row_start ..` of a matrix.
pub(super) struct RowRange {
    pub buffer: wgpu::Buffer,
    /// The weight that owns the buffer, if several share it.
    pub home: Option<WeightId>,
    /// Where it begins in the buffer, in bytes. A multiple of 16.
    pub at: usize,
    pub row_start: usize,
    pub packed: Packed,
}

pub(super) enum DeviceWeight {
    /// f32 elements.
    Vector(wgpu::Buffer),
    /// In order of rows.
    Matrix(Vec<RowRange>),
}

/// A range of a matrix's rows, without its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RowRangeShape {
    /// As in [`RowRange`].
    pub at: usize,
    pub row_start: usize,
    pub packed: Packed,
    pub home: Option<WeightId>,
}

impl RowRangeShape {
    /// The buffer of range `index` of a weight.
    pub fn place(&self, id: WeightId, index: usize) -> Place {
        self.home.map_or(Place::RowRange(id, index), |home| Place::RowRange(home, 0))
    }
}

/// What recipes need to know about a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WeightShape {
    Missing,
    Vector,
    /// In order of rows.
    Matrix(Vec<RowRangeShape>),
}

/// The shapes of weights on a device.
pub(super) fn shapes(weights: &[Option<DeviceWeight>]) -> Vec<WeightShape> {
    let shape = |weight: &Option<DeviceWeight>| match weight {
        None => WeightShape::Missing,
        Some(DeviceWeight::Vector(_)) => WeightShape::Vector,
        Some(DeviceWeight::Matrix(ranges)) => {
            let shape = |range: &RowRange| {
                let RowRange { at, row_start, packed, home, .. } = *range;
                RowRangeShape { at, row_start, packed, home }
            };
            WeightShape::Matrix(ranges.iter().map(shape).collect())
        }
    };
    weights.iter().map(shape).collect()
}

/// Divides a matrix into row ranges of at most `binding_bytes_max`, each for its own buffer.
pub(super) fn cut(
    name: &str,
    spec: &MatrixSpec,
    binding_bytes_max: u64,
) -> Result<Vec<RowRangeShape>> {
    let row_bytes = Packed::of(spec).row_bytes();
    let rows_max = usize::try_from(binding_bytes_max).unwrap_or(usize::MAX) / row_bytes.max(1);
    if rows_max == 0 {
        let what = format!("one row of {name} (a binding holds {binding_bytes_max})");
        return Err(BackendError::OutOfMemory { what, bytes: row_bytes as u64 });
    }
    let range = |row_start| {
        let rows = rows_max.min(spec.rows - row_start);
        RowRangeShape { at: 0, row_start, packed: Packed { rows, ..Packed::of(spec) }, home: None }
    };
    Ok((0..spec.rows).step_by(rows_max).map(range).collect())
}

/// Writes through the queue's staging memory, of which only [`STAGED_BYTES_MAX`] are in use at a
/// time.
#[derive(Default)]
pub(super) struct Uploads {
    staged: usize,
}

impl Uploads {
    /// `offset` and the length are multiples of 4.
    pub fn write(
        &mut self,
        device: &GpuDevice,
        buffer: &wgpu::Buffer,
        offset: u64,
        bytes: &[u8],
    ) -> Result<()> {
        let mut at = offset;
        for part in bytes.chunks(WRITE_BYTES_MAX) {
            device.write(buffer, at, part);
            at += part.len() as u64;
            self.staged += part.len();
            if self.staged > STAGED_BYTES_MAX {
                self.staged = 0;
                device.flush()?;
            }
        }
        Ok(())
    }
}

/// Which of the graph's weights are read as vectors.
pub(super) fn vectors(graph: &Graph) -> Vec<bool> {
    let mut vector = vec![false; graph.weights.len()];
    for op in &graph.ops {
        match op {
            Op::Scale { weight, .. } | Op::AttendSinks { sinks: weight, .. } => {
                vector[weight.0 as usize] = true
            }
            Op::Conv { filter, .. } => vector[filter.0 as usize] = true,
            Op::Delta { decays, shifts, .. } => {
                for id in [decays, shifts] {
                    vector[id.0 as usize] = true;
                }
            }
            Op::RmsNorm { weight, .. } => vector[weight.0 as usize] = true,
            Op::LayerNorm { weight, bias, .. } => {
                vector[weight.0 as usize] = true;
                bias.iter().for_each(|bias| vector[bias.0 as usize] = true);
            }
            Op::Linear { bias: Some(bias), .. }
            | Op::Logits { bias: Some(bias), .. }
            | Op::Route { bias: Some(bias), .. } => vector[bias.0 as usize] = true,
            _ => {}
        }
    }
    for biases in graph.moe.iter().filter_map(|moe| moe.biases) {
        vector[biases.gate_up.0 as usize] = true;
        vector[biases.down.0 as usize] = true;
    }
    vector
}

/// Device bytes of a weight of this shape, rounded up as if it were split.
pub(super) fn device_bytes(spec: &MatrixSpec) -> u64 {
    let packed = Packed::of(spec).bytes() as u64;
    // A vector may be kept as f32.
    if spec.rows == 1 { packed.max((spec.cols as u64 * 4).next_multiple_of(16)) } else { packed }
}

/// Loads a vector's stored bytes onto the device, as f32.
pub(super) fn load_vector(
    device: &GpuDevice,
    uploads: &mut Uploads,
    name: &str,
    spec: &MatrixSpec,
    bytes: &[u8],
) -> Result<DeviceWeight> {
    check_size(name, spec, bytes)?;
    let values = to_f32(name, spec.dtype, bytes)?;
    let buffer = device.buffer(name, values.len() as u64 * 4, WEIGHT)?;
    uploads.write(device, &buffer, 0, bytemuck::cast_slice(&values))?;
    Ok(DeviceWeight::Vector(buffer))
}

/// Loads a matrix's stored rows onto the device as planes, split into row ranges of at most
/// `binding_bytes_max`.
pub(super) fn load_matrix(
    device: &GpuDevice,
    uploads: &mut Uploads,
    name: &str,
    spec: &MatrixSpec,
    bytes: &[u8],
    binding_bytes_max: u64,
) -> Result<DeviceWeight> {
    check_size(name, spec, bytes)?;
    let stored_row = spec.dtype.row_bytes(spec.cols);
    let mut ranges = Vec::new();
    let mut planes = Vec::new();
    for RowRangeShape { at, row_start, packed, home } in cut(name, spec, binding_bytes_max)? {
        let buffer = device.buffer(name, packed.bytes() as u64, WEIGHT)?;
        planes.resize(packed.bytes(), 0);
        packed.pack(&bytes[row_start * stored_row..][..packed.rows * stored_row], &mut planes);
        uploads.write(device, &buffer, 0, &planes)?;
        ranges.push(RowRange { buffer, home, at, row_start, packed });
    }
    Ok(DeviceWeight::Matrix(ranges))
}

/// Assigns matrices places one after another in one buffer, so that one dispatch can read them all.
/// Returns their total bytes. `None`, with nothing changed, if one of them is split or already
/// shares a buffer, or a binding cannot hold them together.
pub(super) fn join_shapes(
    weights: &mut [WeightShape],
    ids: &[WeightId],
    binding_bytes_max: u64,
) -> Option<usize> {
    let mut total = 0;
    for id in ids {
        match &weights[id.0 as usize] {
            WeightShape::Matrix(ranges) if ranges.len() == 1 && ranges[0].home.is_none() => {
                total += ranges[0].packed.bytes();
            }
            _ => return None,
        }
    }
    let apart = ids.iter().enumerate().all(|(i, id)| !ids[..i].contains(id));
    if !apart || total as u64 > binding_bytes_max {
        return None;
    }
    let mut at = 0;
    for id in ids {
        let WeightShape::Matrix(ranges) = &mut weights[id.0 as usize] else { continue };
        (ranges[0].home, ranges[0].at) = (Some(ids[0]), at);
        at += ranges[0].packed.bytes();
    }
    Some(total)
}

/// As [`join_shapes`], on the device: moves matrices into one buffer.
pub(super) fn gather(
    device: &GpuDevice,
    weights: &mut [Option<DeviceWeight>],
    ids: &[WeightId],
    binding_bytes_max: u64,
) -> Result<()> {
    let mut shapes = shapes(weights);
    let Some(total) = join_shapes(&mut shapes, ids, binding_bytes_max) else { return Ok(()) };
    let buffer = device.buffer("weights read together", total as u64, WEIGHT)?;
    let label = Some("weights read together");
    let mut encoder =
        device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
    for id in ids {
        let index = id.0 as usize;
        let Some(DeviceWeight::Matrix(ranges)) = &mut weights[index] else { continue };
        let WeightShape::Matrix(shapes) = &shapes[index] else { continue };
        let ([range], [shape]) = (ranges.as_mut_slice(), shapes.as_slice()) else { continue };
        encoder.copy_buffer_to_buffer(
            &range.buffer,
            range.at as u64,
            &buffer,
            shape.at as u64,
            Some(range.packed.bytes() as u64),
        );
        (range.buffer, range.at, range.home) = (buffer.clone(), shape.at, shape.home);
    }
    device.submit(encoder)?;
    Ok(())
}

/// Joins vectors one after the other in a new buffer, each with as many elements as it has columns.
pub(super) fn join(
    device: &GpuDevice,
    graph: &Graph,
    weights: &[Option<DeviceWeight>],
    ids: &[WeightId],
) -> Result<wgpu::Buffer> {
    let elements: usize = ids.iter().map(|id| graph.weight_spec(*id).cols).sum();
    let buffer = device.buffer("vectors read together", elements as u64 * 4, WEIGHT)?;
    let label = Some("vectors read together");
    let mut encoder =
        device.wgpu().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
    let mut at = 0;
    for id in ids {
        let bytes = graph.weight_spec(*id).cols as u64 * 4;
        let vector = vector(graph, weights, *id)?;
        encoder.copy_buffer_to_buffer(vector, 0, &buffer, at, Some(bytes));
        at += bytes;
    }
    device.submit(encoder)?;
    Ok(buffer)
}

/// Checks the size once; every later size is computed from the spec.
fn check_size(name: &str, spec: &MatrixSpec, bytes: &[u8]) -> Result<()> {
    if bytes.len() == spec.bytes() {
        return Ok(());
    }
    let MatrixSpec { dtype, rows, cols, .. } = spec;
    let given = bytes.len();
    Err(BackendError::Unsupported(format!("{name}: {given} bytes for {rows} x {cols} {dtype}")))
}

/// Widening is exact.
fn to_f32(name: &str, dtype: DType, bytes: &[u8]) -> Result<Vec<f32>> {
    if dtype.is_quantised() {
        return Err(BackendError::Unsupported(format!(
            "{name} is a vector stored as {dtype}; norms and biases must be F32, F16 or BF16"
        )));
    }
    let mut values = vec![0.0; bytes.len() / dtype.block_bytes()];
    dequantize(dtype, bytes, values.len(), &mut values);
    Ok(values)
}

/// The row ranges of a weight that an op reads as a matrix.
pub(super) fn matrix<'a>(
    graph: &Graph,
    weights: &'a [Option<DeviceWeight>],
    id: WeightId,
) -> Result<&'a [RowRange]> {
    match &weights[id.0 as usize] {
        Some(DeviceWeight::Matrix(ranges)) => Ok(ranges),
        Some(DeviceWeight::Vector(_)) => Err(BackendError::Unsupported(format!(
            "{} is used both as a matrix and as a vector",
            graph.weight_spec(id).tensor
        ))),
        None => Err(missing(graph, id)),
    }
}

/// The f32 elements of a weight that an op reads as a vector.
pub(super) fn vector<'a>(
    graph: &Graph,
    weights: &'a [Option<DeviceWeight>],
    id: WeightId,
) -> Result<&'a wgpu::Buffer> {
    match &weights[id.0 as usize] {
        Some(DeviceWeight::Vector(buffer)) => Ok(buffer),
        // `vectors` marks every weight that is read as a vector.
        Some(DeviceWeight::Matrix(_)) | None => Err(missing(graph, id)),
    }
}

fn missing(graph: &Graph, id: WeightId) -> BackendError {
    BackendError::Unsupported(format!("{} was never loaded", graph.weight_spec(id).tensor))
}
