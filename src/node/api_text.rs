//! The types of the control API for generating text: what is asked, and what arrives as it is made.

use serde::{Deserialize, Serialize};

use super::adapters::AskedAdapter;
use super::api::Traffic;
use super::engine::EngineError;
use doppler_infer::extras::Extras;
use doppler_infer::generate::StopReason;
use doppler_infer::grammar::Constraint;
use doppler_infer::sampler::SamplerOptions;
use doppler_infer::template::Conversation;
use doppler_mesh::Progress;
use doppler_store::signature::PublicKey;

/// `POST /control/v1/generate`; answered by [`GenerateEvent`]s, one JSON object a line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// Id, unambiguous start of an id, or name.
    pub model: String,
    /// LoRA adapters to attach.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AskedAdapter>,
    pub prompt: String,
    /// A prompt that is tokens already, in place of a text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prompt_ids: Vec<u32>,
    pub tokens: usize,
    #[serde(default)]
    pub temperature: f32,
    #[serde(default = "one")]
    pub top_p: f32,
    #[serde(default)]
    pub top_k: usize,
    #[serde(default)]
    pub min_p: f32,
    #[serde(default = "one")]
    pub repetition_penalty: f32,
    #[serde(default)]
    pub presence_penalty: f32,
    #[serde(default)]
    pub frequency_penalty: f32,
    /// How many recent tokens the penalties count. 64 if absent.
    #[serde(default)]
    pub repeat_last_n: Option<usize>,
    #[serde(default)]
    pub seed: u64,
    /// Token ids and what is added to their logits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Report the probability of each token and of this many of the likeliest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<usize>,
    /// Texts that end the answer. They are not part of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// A conversation, in place of a prompt. The model's chat template makes the prompt of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<Conversation>,
    /// With `chat`: how the answer begins. The model goes on from there, and the answer's events do
    /// not repeat it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub begin: String,
    /// What the answer must look like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub constraint: Option<Constraint>,
    /// Keep the keys and values of this request for the next, and use those of the one before as
    /// far as the prompts begin alike.
    #[serde(default)]
    pub resume: bool,
    /// Tokens of context to make room for. Prompt plus `tokens` if absent.
    #[serde(default)]
    pub context: Option<usize>,
    /// Publishers to trust from now on.
    #[serde(default)]
    pub trust: Vec<PublicKey>,
    /// Whether a person can be asked. Then an unknown publisher is refused instead of trusted on
    /// first use.
    #[serde(default)]
    pub can_ask: bool,
    /// Whether to report the progress of loading ([`GenerateEvent::Loading`]).
    #[serde(default)]
    pub progress: bool,
}

impl Default for GenerateRequest {
    /// Greedy, and without a model, a prompt and tokens, which every request must have.
    fn default() -> Self {
        Self {
            model: String::new(),
            adapters: Vec::new(),
            prompt: String::new(),
            prompt_ids: Vec::new(),
            tokens: 0,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repeat_last_n: None,
            seed: 0,
            logit_bias: Vec::new(),
            logprobs: None,
            stop: Vec::new(),
            chat: None,
            begin: String::new(),
            constraint: None,
            resume: false,
            context: None,
            trust: Vec::new(),
            can_ask: false,
            progress: false,
        }
    }
}

impl GenerateRequest {
    pub fn sampler(&self) -> SamplerOptions {
        SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repetition_window: self
                .repeat_last_n
                .unwrap_or(SamplerOptions::default().repetition_window),
            seed: self.seed,
        }
    }

    /// Without the form of the answer, which is compiled for a model.
    pub fn extras(&self) -> Extras {
        let bias = self.logit_bias.as_slice().into();
        Extras { bias, logprobs: self.logprobs, grammar: None }
    }
}

/// A token, its text, and the natural logarithm of its probability.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenOdds {
    pub id: u32,
    /// Bytes that are no whole character are U+FFFD.
    pub text: String,
    pub logprob: f32,
    /// The likeliest tokens, if this is a chosen one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TokenOdds>,
}

fn one() -> f32 {
    1.0
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum GenerateEvent {
    /// How much of what the model needs before its first token has arrived.
    Loading(Progress),
    /// The model is ready, and the prompt is being processed.
    Start { prompt_tokens: usize, backend: String },
    Token {
        id: u32,
        text: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        logprobs: Option<TokenOdds>,
        traffic: Traffic,
    },
    End {
        tokens: usize,
        text: String,
        /// The end of the text, which no token's event contains: it could have become a stop text.
        #[serde(default)]
        rest: String,
        stop: StopReason,
        /// The stop text that ended it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stop_text: Option<String>,
        /// Tokens of the prompt whose keys and values were there already.
        #[serde(default)]
        reused: usize,
        seconds: f64,
        tok_s: f64,
        /// Elements of keys and values that did not fit the cache's format and were clamped.
        #[serde(default)]
        clamped: u64,
        traffic: Traffic,
    },
    Error {
        /// As in [`ApiError`].
        #[serde(default)]
        label: String,
        message: String,
    },
}

impl GenerateEvent {
    pub fn of_error(error: &EngineError) -> Self {
        let message = error.to_string().lines().collect::<Vec<_>>().join("; ");
        Self::Error { label: error.label().to_owned(), message }
    }
}
