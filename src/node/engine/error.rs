//! Why a generation failed: the engine's error type, with a stable label for each variant.
//!
//! `failures` maps a label to its HTTP status and exit code.

use doppler_infer::backend::BackendError;
use doppler_infer::embedding::EmbedError;
use doppler_infer::error::SessionError;
use doppler_infer::grammar::GrammarError;
use doppler_infer::model::ModelError;
use doppler_infer::sampler::SamplerError;
use doppler_infer::stops::StopError;
use doppler_infer::template::TemplateError;
use doppler_infer::tokenizer::TokenizerError;
use doppler_store::ModelId;

use super::queue::QUEUE_MAX;

/// Why a request was refused or a generation ended early.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("tokens: ask for at least one")]
    NoTokens,
    #[error("a request has one prompt: a text, tokens or a conversation")]
    TwoPrompts,
    #[error(transparent)]
    Stop(#[from] StopError),
    /// The answer cannot be held to the form that is asked for.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    /// The conversation cannot be made a prompt.
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("model {0} comes without a tokenizer")]
    NoTokenizer(ModelId),
    /// The model's tokenizer cannot be used.
    #[error("model {model}: {source}")]
    Tokenizer { model: ModelId, source: TokenizerError },
    /// The prompt cannot be tokenized, or the answer cannot be decoded.
    #[error(transparent)]
    Text(#[from] TokenizerError),
    /// The manifest does not describe a model that runs here.
    #[error("model {model}: {source}")]
    Model { model: ModelId, source: Box<ModelError> },
    /// No device could be opened.
    #[error(transparent)]
    Device(#[from] BackendError),
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The texts cannot be embedded.
    #[error(transparent)]
    Embed(#[from] EmbedError),
    #[error("{QUEUE_MAX} requests are already waiting: try again in about {retry_s} s")]
    Busy {
        /// When there will probably be room.
        retry_s: u64,
    },
    #[error("the node is stopping")]
    Stopping,
    #[error("cannot start the engine's thread: {0}")]
    Thread(std::io::Error),
}

impl From<SamplerError> for EngineError {
    fn from(error: SamplerError) -> Self {
        Self::Session(error.into())
    }
}

impl EngineError {
    /// A stable name for JSON, metrics and the table of failures.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::NoTokens => "no_tokens",
            Self::TwoPrompts
            | Self::Template(TemplateError::Conversation(_) | TemplateError::Refused(_)) => {
                "conversation"
            }
            Self::Template(TemplateError::TooLong(_)) => "prompt_too_long",
            Self::Template(TemplateError::Missing) => "no_template",
            Self::Template(_) => "template",
            Self::Stop(_) => "stop",
            Self::Grammar(_) => "grammar",
            Self::NoTokenizer(_) => "no_tokenizer",
            Self::Tokenizer { .. } => "tokenizer",
            Self::Text(_) => "text",
            Self::Model { .. } => "model",
            Self::Device(error) => error.label(),
            Self::Session(error) => error.label(),
            Self::Embed(EmbedError::NotEmbedding(_)) => "not_embedding",
            Self::Embed(EmbedError::Session(error)) => error.label(),
            Self::Embed(EmbedError::Tokenizer(_)) => "text",
            Self::Embed(_) => "texts",
            Self::Busy { .. } => "busy",
            Self::Stopping => "stopping",
            Self::Thread(_) => "thread",
        }
    }

    /// Whether the device is gone, so that what was loaded on it cannot be used any more.
    pub const fn is_lost(&self) -> bool {
        matches!(
            self,
            Self::Device(BackendError::Lost(_))
                | Self::Session(SessionError::Backend(BackendError::Lost(_)))
        )
    }
}
