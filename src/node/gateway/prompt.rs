//! `POST /models/ID/prompt`: a conversation as the prompt that the model's chat template makes of it,
//! for a model that runs in a tab, where there are no templates.
//!
//! Refuses what `program` refuses, and models without a template. Computes within the template's own
//! bounds, in a thread that may wait.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::program::usable;
use crate::engine::EngineError;
use crate::failures;
use crate::http::Refused;
use crate::service::Service;
use doppler_infer::template::{self, Conversation};
use doppler_store::{Manifest, ModelId};

/// The prompt, which has all special tokens in it.
#[derive(Debug, Serialize, Deserialize)]
struct Prompt {
    prompt: String,
}

pub async fn prompt(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
    Json(conversation): Json<Conversation>,
) -> Response {
    let made = async {
        let model = id.parse::<ModelId>().map_err(|error| Refused::bad_id(&error))?;
        let manifest = usable(&service, model)?;
        let made = tokio::task::spawn_blocking(move || render(&manifest, &conversation)).await;
        made.unwrap_or_else(|_| {
            let error = "the template ended with a panic".to_owned();
            Err(Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "template", error))
        })
    };
    match made.await {
        Ok(prompt) => Json(Prompt { prompt }).into_response(),
        Err(refused) => refused.into_response(),
    }
}

fn render(manifest: &Manifest, conversation: &Conversation) -> Result<String, Refused> {
    let made = template::render(manifest.chat.as_ref(), conversation, SystemTime::now());
    made.map_err(|error| {
        let error = EngineError::Template(error);
        let failure = failures::of_label(error.label());
        // The table's numbers are all statuses.
        let status = StatusCode::from_u16(failure.status);
        let status = status.unwrap_or(StatusCode::UNPROCESSABLE_ENTITY);
        Refused::new(status, failure.label, error.to_string())
    })
}
