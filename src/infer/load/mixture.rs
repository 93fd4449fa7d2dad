//! The type in which each tensor is stored.
//!
//! `Q4KM` is llama.cpp's Q4_K_M mixture (`llama-quant.cpp`): most matrices are Q4_K, the most
//! sensitive ones Q6_K, with its rules for models of eight experts. Vectors (norms, biases) and
//! routers are never quantized. `Mxfp4Moe` is llama.cpp's MXFP4_MOE, which is gpt-oss with its
//! other matrices in Q8_0. BF16 is never narrowed to F16, and a row is never padded to a
//! block: rows that are not a whole number of blocks fall back to a type whose blocks fit.

use std::fmt;
use std::str::FromStr;

use crate::quant::layout;
use doppler_store::DType;

/// How a conversion stores matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// As in the checkpoint, bit for bit.
    Keep,
    /// BF16: F32 is rounded; BF16 and F16 are kept (F16 has bits that BF16 lacks).
    Bf16,
    /// Every matrix in one block format.
    Blocks(DType),
    /// Four and a half to six and a half bits: the Q4_K_M mixture.
    Q4KM,
    /// Experts in MXFP4, other matrices in Q8_0.
    Mxfp4Moe,
}

/// A name that is not a quantization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownQuantization(pub String);

impl fmt::Display for UnknownQuantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known: Vec<&str> = Quantization::all().map(Quantization::name).collect();
        write!(f, "unknown quantization {:?} (known: {})", self.0, known.join(", "))
    }
}

impl std::error::Error for UnknownQuantization {}

impl Quantization {
    /// All of them: the mixtures first, then the block formats of the table.
    pub fn all() -> impl Iterator<Item = Self> {
        let blocks = DType::ALL.into_iter().filter(|dtype| dtype.is_quantised());
        let plain = [Self::Bf16, Self::Keep];
        [Self::Q4KM, Self::Mxfp4Moe].into_iter().chain(blocks.map(Self::Blocks)).chain(plain)
    }

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Bf16 => "bf16",
            Self::Blocks(dtype) => dtype.file_name(),
            Self::Q4KM => "q4_k_m",
            Self::Mxfp4Moe => "mxfp4_moe",
        }
    }

    /// The manifest's `quantization`.
    pub const fn rdrr_name(self) -> &'static str {
        match self {
            Self::Keep => "NONE",
            Self::Bf16 => "BF16",
            Self::Blocks(dtype) => dtype.name(),
            Self::Q4KM => "Q4_K_M",
            Self::Mxfp4Moe => "MXFP4_MOE",
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Quantization {
    type Err = UnknownQuantization;
    fn from_str(text: &str) -> Result<Self, UnknownQuantization> {
        Self::all()
            .find(|q| q.name() == text.to_ascii_lowercase())
            .ok_or_else(|| UnknownQuantization(text.to_owned()))
    }
}

/// A tensor's part in the network, as far as its type depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The token embedding, when it is not also the output.
    Embedding,
    /// The output matrix, or the embedding that is tied to it.
    Output,
    AttentionKey,
    AttentionValue,
    AttentionOutput,
    FeedForwardDown,
    ExpertDown,
    /// The gate or the up of an expert.
    Expert,
    /// A norm, a bias or a router, which is kept unchanged.
    Kept,
    /// Every other matrix.
    Matrix,
}

/// What the choice of type depends on besides the tensor.
#[derive(Debug, Clone, Copy)]
pub struct Mixture {
    pub quantization: Quantization,
    pub layers: usize,
    /// Experts in a sparse layer, 0 for a dense model.
    pub experts: usize,
}

impl Mixture {
    /// The stored type of a matrix with rows of `cols` weights, in `layer` if it is in one.
    pub fn dtype(&self, kind: Kind, layer: Option<usize>, source: DType, cols: u64) -> DType {
        let wanted = match (self.quantization, kind) {
            (Quantization::Keep, _) | (_, Kind::Kept) => return source,
            (Quantization::Bf16, _) if source == DType::F32 => DType::Bf16,
            (Quantization::Bf16, _) => return source,
            (Quantization::Blocks(dtype), _) => dtype,
            (Quantization::Q4KM, kind) => self.q4_k_m(kind, layer),
            (Quantization::Mxfp4Moe, Kind::Expert | Kind::ExpertDown) => DType::Mxfp4,
            (Quantization::Mxfp4Moe, _) => DType::Q8_0,
        };
        fitting(wanted, source, cols)
    }

    fn q4_k_m(&self, kind: Kind, layer: Option<usize>) -> DType {
        let more = layer.is_some_and(|layer| use_more_bits(layer, self.layers));
        let eight = self.experts == 8;
        match kind {
            Kind::Output => DType::Q6K,
            Kind::AttentionKey | Kind::AttentionValue if eight => DType::Q8_0,
            Kind::AttentionOutput if eight => DType::Q5K,
            Kind::AttentionValue | Kind::FeedForwardDown | Kind::ExpertDown if more => DType::Q6K,
            _ => DType::Q4K,
        }
    }
}

/// True for the first and last eighth of the layers, and every third layer in between.
const fn use_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// The wanted type, or the next one whose blocks divide a row.
fn fitting(wanted: DType, source: DType, cols: u64) -> DType {
    let divides = |dtype: DType| cols.is_multiple_of(dtype.block_len() as u64);
    let second = layout(wanted).narrow.unwrap_or(wanted);
    [wanted, second].into_iter().find(|&dtype| divides(dtype)).unwrap_or(source)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixture(layers: usize, experts: usize) -> Mixture {
        Mixture { quantization: Quantization::Q4KM, layers, experts }
    }

    #[test]
    fn q4_k_m_gives_more_bits_to_what_hurts_most() {
        let dense = mixture(32, 0);
        let at = |kind, layer| dense.dtype(kind, Some(layer), DType::Bf16, 4096);
        // The first 4, the last 4, and of those in between every third from the third on.
        let more: Vec<usize> =
            (0..32).filter(|&l| at(Kind::FeedForwardDown, l) == DType::Q6K).collect();
        assert_eq!(more, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]);
        assert!((0..32).all(|l| {
            at(Kind::AttentionValue, l) == at(Kind::FeedForwardDown, l)
                && at(Kind::AttentionKey, l) == DType::Q4K
                && at(Kind::Matrix, l) == DType::Q4K
                && at(Kind::Kept, l) == DType::Bf16
        }));
        assert_eq!(dense.dtype(Kind::Output, None, DType::Bf16, 4096), DType::Q6K);
        assert_eq!(dense.dtype(Kind::Embedding, None, DType::Bf16, 4096), DType::Q4K);
    }

    #[test]
    fn models_of_eight_experts_keep_small_attention_finer() {
        for (experts, key, value, output) in
            [(8, DType::Q8_0, DType::Q8_0, DType::Q5K), (16, DType::Q4K, DType::Q6K, DType::Q4K)]
        {
            let at = |kind| mixture(4, experts).dtype(kind, Some(3), DType::F32, 256);
            assert_eq!(at(Kind::AttentionKey), key);
            assert_eq!(at(Kind::AttentionValue), value);
            assert_eq!(at(Kind::AttentionOutput), output);
            assert_eq!(at(Kind::FeedForwardDown), DType::Q6K);
        }
    }

    #[test]
    fn rows_that_are_no_whole_blocks_fall_back() {
        let at = |kind, cols| mixture(1, 8).dtype(kind, Some(0), DType::Bf16, cols);
        assert_eq!(at(Kind::Matrix, 64), DType::Q5_0);
        assert_eq!(at(Kind::AttentionOutput, 96), DType::Q5_0);
        assert_eq!(at(Kind::Output, 64), DType::Q8_0);
        assert_eq!(at(Kind::Output, 48), DType::Bf16);
        assert_eq!(at(Kind::Matrix, 33), DType::Bf16);
    }

    #[test]
    fn experts_alone_become_mxfp4_in_its_mixture() {
        let mixture = Mixture { quantization: Quantization::Mxfp4Moe, layers: 24, experts: 32 };
        let at = |kind| mixture.dtype(kind, Some(3), DType::Bf16, 2880);
        assert_eq!([Kind::Expert, Kind::ExpertDown].map(at), [DType::Mxfp4; 2]);
        let others = [Kind::Matrix, Kind::Output, Kind::AttentionKey, Kind::FeedForwardDown];
        assert_eq!(others.map(at), [DType::Q8_0; 4]);
        assert_eq!(at(Kind::Kept), DType::Bf16);
        assert_eq!("MXFP4_MOE".parse(), Ok(Quantization::Mxfp4Moe));
    }

    #[test]
    fn plain_quantizations_touch_matrices_only() {
        let of = |quantization, kind, source| {
            Mixture { quantization, layers: 2, experts: 0 }.dtype(kind, Some(0), source, 64)
        };
        assert_eq!(of(Quantization::Bf16, Kind::Matrix, DType::F32), DType::Bf16);
        assert_eq!(of(Quantization::Bf16, Kind::Matrix, DType::F16), DType::F16);
        assert_eq!(of(Quantization::Bf16, Kind::Kept, DType::F32), DType::F32);
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantised()) {
            let blocks = Quantization::Blocks(dtype);
            let narrow = layout(dtype).narrow.unwrap_or(dtype);
            let wanted = if dtype.block_len() <= 64 { dtype } else { narrow };
            assert_eq!(of(blocks, Kind::Embedding, DType::F32), wanted);
            assert_eq!(of(blocks, Kind::Kept, DType::F32), DType::F32);
            assert_eq!(dtype.file_name().parse(), Ok(blocks));
        }
        assert_eq!(of(Quantization::Keep, Kind::Matrix, DType::F32), DType::F32);
        assert_eq!("Q4_K_M".parse(), Ok(Quantization::Q4KM));
        assert!("q3_k".parse::<Quantization>().unwrap_err().to_string().contains("q4_k_m"));
    }
}
