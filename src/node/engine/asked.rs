//! What is asked of a model: a request turned into tokens and checked, before anything is loaded or
//! touched.
//!
//! A plain prompt stays as it is. A conversation becomes a prompt by the model's chat template, which
//! writes the special tokens itself; the token that ends a turn ends the answer.

use std::time::SystemTime;

use doppler_infer::generate::GenerateOptions;
use doppler_infer::model::Model;
use doppler_infer::request::Request;
use doppler_infer::sampler::Sampler;
use doppler_infer::stops::Stops;
use doppler_infer::template;
use doppler_infer::tokenizer::Tokenizer;

use super::error::EngineError;
use crate::api::GenerateRequest;

/// The special token that ends a turn, by its name in a template.
const END_OF_TURN: &str = "eos_token";

/// A request that fits its model.
#[derive(Debug, Clone)]
pub struct Asked {
    pub request: Request,
    pub stops: Stops,
}

/// Refuses what is wrong with a request for any model.
///
/// # Errors
/// If an option is out of range, or the conversation is not one.
pub fn check_request(request: &GenerateRequest) -> Result<(), EngineError> {
    if request.tokens == 0 {
        return Err(EngineError::NoTokens);
    }
    Sampler::with(request.sampler(), request.extras())?;
    Stops::new(&request.stop)?;
    if let Some(conversation) = &request.chat {
        conversation.check()?;
        if !request.prompt.is_empty() || !request.prompt_ids.is_empty() {
            return Err(EngineError::TwoPrompts);
        }
    } else if !request.prompt.is_empty() && !request.prompt_ids.is_empty() {
        return Err(EngineError::TwoPrompts);
    }
    Ok(())
}

impl Asked {
    /// The prompt's tokens, however many they are.
    ///
    /// # Errors
    /// If the text cannot be tokenized, or the template refuses the conversation.
    pub fn prompt(
        model: &Model,
        tokenizer: &Tokenizer,
        request: &GenerateRequest,
    ) -> Result<Vec<u32>, EngineError> {
        let Some(conversation) = &request.chat else {
            return match request.prompt_ids.is_empty() {
                true => Ok(tokenizer.encode(&request.prompt)?),
                false => Ok(request.prompt_ids.clone()),
            };
        };
        let chat = model.manifest.chat.as_ref();
        let mut text = template::render(chat, conversation, SystemTime::now())?;
        text.push_str(&request.begin);
        Ok(tokenizer.encode_bare(&text)?)
    }

    /// # Errors
    /// If the model cannot do what is asked.
    pub fn check(
        model: &Model,
        tokenizer: &Tokenizer,
        request: &GenerateRequest,
    ) -> Result<Self, EngineError> {
        check_request(request)?;
        let prompt = Self::prompt(model, tokenizer, request)?;
        let mut stop = model.manifest.eos_token_ids.clone();
        if request.chat.is_some() {
            let chat = model.manifest.chat.as_ref();
            let end = chat.and_then(|chat| chat.tokens.get(END_OF_TURN));
            stop.extend(end.and_then(|end| tokenizer.id_of(end)));
        }
        let mut extras = request.extras();
        if let Some(constraint) = &request.constraint {
            extras.grammar = Some(tokenizer.grammar(constraint, &stop)?);
        }
        let options = GenerateOptions {
            max_tokens: request.tokens,
            stop,
            sampler: request.sampler(),
            extras,
        };
        let stops = Stops::new(&request.stop)?;
        let request = Request::check(&model.graph, prompt, options, request.context)?;
        Ok(Self { request, stops })
    }
}
