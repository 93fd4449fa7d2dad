//! A model opened from its manifest: its graph, and where every weight's bytes are.
//!
//! Reads no weights. Refuses a manifest whose tensors do not fit the graph that its config
//! describes: one is missing, has another shape or no content address, or an expert's tensors are
//! not one run of bytes.

use std::sync::Arc;

use super::adapter;
use super::backend::{BackendError, Device};
use super::families::{self, FamilyError, Spec};
use super::graph::{ExpertLayout, Graph, MatrixSpec, Moe, Weight};
use super::quant::{QuantizeError, first_not_finite};
use super::reader::{ShardRange, WeightReader};
use doppler_store::manifest::TensorEntry;
use doppler_store::{Manifest, ManifestError};

/// The most unused bytes between an expert's tensors: padding for alignment.
const EXPERT_GAP_MAX: u64 = 16 * 1024;

/// The largest expert, in bytes. Its run is held in memory while it is read.
const EXPERT_BYTES_MAX: u64 = 1 << 32;

/// Why a model cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Family(#[from] FamilyError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("an adapter, not a model: run its base with --adapter NAME, or ask for BASE+NAME")]
    Adapter,
    #[error("the manifest carries no config.json of the model: convert it again")]
    NoConfig,
    #[error("the manifest has no tensor {name:?}, which the config calls for")]
    Missing { name: String },
    #[error("tensor {name:?} is {found}, the config calls for {wanted}")]
    Shape { name: String, found: String, wanted: String },
    #[error("layer {layer} expert {expert}: {problem}")]
    Expert { layer: usize, expert: usize, problem: String },
}

/// A stored weight that is infinite or NaN. Results computed with it are neither right nor the same
/// on all devices.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "{of}, row {row}: {source}; the model is damaged: convert it again from a sound checkpoint"
)]
pub struct NotFinite {
    /// The tensor, or the expert's matrix.
    pub of: String,
    pub row: usize,
    pub source: QuantizeError,
}

/// A trunk tensor: its shape, and the ranges that hold its bytes, in order.
#[derive(Debug, Clone)]
pub struct TrunkTensor {
    pub spec: MatrixSpec,
    pub pieces: Vec<ShardRange>,
}

/// One mixture-of-experts layer. All its experts have the same layout.
#[derive(Debug, Clone)]
pub struct MoeLayer {
    /// The model's layer number.
    pub layer: usize,
    pub layout: ExpertLayout,
    /// The ranges of each expert: one, unless the expert is larger than a shard.
    pub places: Vec<Vec<ShardRange>>,
}

/// A model that can be loaded into sessions.
#[derive(Clone)]
pub struct Model {
    pub manifest: Arc<Manifest>,
    pub graph: Arc<Graph>,
    /// How its states become embeddings. `None` for a model that makes text.
    pub embedding: Option<Arc<Spec>>,
    /// One per graph weight.
    pub trunk: Vec<TrunkTensor>,
    /// One per graph MoE layer.
    pub moe: Vec<MoeLayer>,
    pub reader: WeightReader,
}

impl MoeLayer {
    /// Refuses an expert's stored bytes if a weight is not finite.
    pub fn check(&self, expert: u32, bytes: &[u8]) -> Result<(), NotFinite> {
        let ExpertLayout { gate, up, down, .. } = &self.layout;
        for (part, spec) in [("gate", gate), ("up", up), ("down", down)] {
            let bytes = &bytes[spec.offset..][..spec.bytes()];
            let of = || format!("layer {} expert {expert}, {part} matrix", self.layer);
            check(spec, bytes, of)?;
        }
        Ok(())
    }
}

fn check(spec: &MatrixSpec, bytes: &[u8], of: impl Fn() -> String) -> Result<(), NotFinite> {
    match first_not_finite(spec.dtype, spec.cols, bytes) {
        None => Ok(()),
        Some((row, source)) => Err(NotFinite { of: of(), row, source }),
    }
}

impl Model {
    /// Refuses the stored bytes of the trunk's tensor `index` if a weight is not finite.
    pub fn check_trunk(&self, index: usize, bytes: &[u8]) -> Result<(), NotFinite> {
        let of = || format!("tensor {}", self.graph.weights[index].tensor);
        check(&self.trunk[index].spec, bytes, of)
    }

    /// Matches the manifest's tensors to the graph of its config.
    pub fn open(manifest: Manifest, reader: WeightReader) -> Result<Self, ModelError> {
        if adapter::is_adapter(&manifest) {
            return Err(ModelError::Adapter);
        }
        if manifest.config.is_null() {
            return Err(ModelError::NoConfig);
        }
        let described = families::read(&manifest.config)?;
        let (graph, embedding) = (described.graph, described.embedding.map(Arc::new));
        let trunk = graph.weights.iter().map(|weight| {
            let tensor = find(&manifest, weight)?;
            let pieces = tensor.spans.iter().map(|span| {
                let range = span.range();
                let range =
                    range.ok_or_else(|| ModelError::Missing { name: weight.tensor.clone() })?;
                Ok(ShardRange { shard: manifest.shard_id(span.shard)?, range })
            });
            let (rows, cols) = (weight.rows, weight.cols);
            let spec = MatrixSpec { dtype: tensor.dtype, rows, cols, offset: 0 };
            Ok(TrunkTensor { spec, pieces: pieces.collect::<Result<_, ModelError>>()? })
        });
        let trunk = trunk.collect::<Result<_, ModelError>>()?;
        let moe = graph.moe.iter().map(|moe| layer(&manifest, moe));
        let moe = moe.collect::<Result<_, ModelError>>()?;
        let (manifest, graph) = (Arc::new(manifest), Arc::new(graph));
        Ok(Self { manifest, graph, embedding, trunk, moe, reader })
    }

    /// Whether this device can run the model. The error is for people. Reads nothing.
    pub fn runs_on(&self, device: &dyn Device) -> Result<(), BackendError> {
        let layouts: Vec<_> = self.moe.iter().map(|layer| layer.layout).collect();
        device.supports(&self.graph, &layouts)
    }

    /// Experts over all layers.
    pub fn experts(&self) -> usize {
        self.moe.iter().map(|layer| layer.places.len()).sum()
    }

    /// Stored bytes of all experts.
    pub fn expert_bytes(&self) -> u64 {
        self.moe.iter().map(|layer| layer.layout.bytes as u64 * layer.places.len() as u64).sum()
    }
}

/// The weight's tensor, if it has the weight's shape (a matrix, or a vector for a single row).
fn find<'a>(manifest: &'a Manifest, weight: &Weight) -> Result<&'a TensorEntry, ModelError> {
    let &Weight { tensor: ref name, rows, cols, .. } = weight;
    let tensor =
        manifest.tensors.get(name).ok_or_else(|| ModelError::Missing { name: name.clone() })?;
    let spec = MatrixSpec { dtype: tensor.dtype, rows, cols, offset: 0 };
    if tensor.rows_cols() != (rows as u64, cols as u64) || tensor.size != spec.bytes() as u64 {
        return Err(ModelError::Shape {
            name: name.clone(),
            found: format!("{:?} of {} bytes", tensor.shape, tensor.size),
            wanted: format!("[{rows}, {cols}] of {} bytes in {}", spec.bytes(), tensor.dtype),
        });
    }
    Ok(tensor)
}

/// All experts of a layer. They must have the same layout.
fn layer(manifest: &Manifest, moe: &Moe) -> Result<MoeLayer, ModelError> {
    let mut places = Vec::with_capacity(moe.experts.len());
    let mut shared: Option<ExpertLayout> = None;
    for number in 0..moe.experts.len() {
        let fail =
            |problem: String| ModelError::Expert { layer: moe.layer, expert: number, problem };
        let (layout, place) = expert(manifest, moe, number, &fail)?;
        if *shared.get_or_insert(layout) != layout {
            return Err(fail("its layout differs from that of the layer's other experts".into()));
        }
        places.push(place);
    }
    let layout = shared.ok_or_else(|| ModelError::Expert {
        layer: moe.layer,
        expert: 0,
        problem: "the layer has no experts".into(),
    })?;
    Ok(MoeLayer { layer: moe.layer, layout, places })
}

/// One expert: the offsets of its three matrices in one run of bytes, and the ranges of that run.
fn expert(
    manifest: &Manifest,
    moe: &Moe,
    number: usize,
    fail: &impl Fn(String) -> ModelError,
) -> Result<(ExpertLayout, Vec<ShardRange>), ModelError> {
    let ids = (u32::try_from(moe.layer), u32::try_from(number));
    let group = match ids {
        (Ok(layer), Ok(expert)) => manifest.expert(layer, expert),
        _ => None,
    };
    let group = group.ok_or_else(|| {
        fail("the manifest has no group of tensors for it; convert the model again".into())
    })?;
    let matrix = |weight: &Weight| -> Result<MatrixSpec, ModelError> {
        let &Weight { tensor: ref name, rows, cols, .. } = weight;
        let tensor = find(manifest, weight)?;
        let part = group.parts.iter().find(|p| p.name == *name && p.size == tensor.size);
        let part = part.ok_or_else(|| fail(format!("tensor {name:?} is not in its group")))?;
        Ok(MatrixSpec { dtype: tensor.dtype, rows, cols, offset: part.offset as usize })
    };
    let [gate, up, down] = moe.weights(number);
    let (gate, up, down) = (matrix(&gate)?, matrix(&up)?, matrix(&down)?);
    let used = [gate, up, down].iter().map(|m| m.bytes() as u64).sum::<u64>();
    let bytes = group.size();
    if bytes > EXPERT_BYTES_MAX || bytes > used + EXPERT_GAP_MAX {
        return Err(fail("its tensors are not adjacent; convert the model again".into()));
    }
    let pieces = group
        .pieces
        .iter()
        .map(|(shard, range)| Ok(ShardRange { shard: manifest.shard_id(*shard)?, range: *range }));
    let pieces = pieces.collect::<Result<_, ModelError>>()?;
    Ok((ExpertLayout { gate, up, down, bytes: bytes as usize }, pieces))
}
