//! The APIs that other programs speak, under `/v1`: OpenAI's and Anthropic's.
//!
//! A route reads a body, translates it into the engine's requests (`openai`, `responses`,
//! `anthropic`: pure), has them answered (`submit`), and translates the events (`answer`, and again
//! the first three). `access` says who
//! may ask, `fields` what happens to each field, `tools` finds calls in a model's text, `failed`
//! gives failures each API's form. Nothing here knows how the engine runs its requests.

mod access;
mod answer;
mod anthropic;
mod body;
mod embeddings;
mod failed;
mod fields;
mod form;
mod metrics;
mod models;
mod offer;
mod openai;
mod responses;
mod sse;
mod submit;
mod tools;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router, middleware};
use serde_json::Value;

use self::access::Access;
use self::answer::{Finish, Reading, Usage, Whole};
use self::anthropic::{Message, MessageStream};
use self::body::Object;
use self::embeddings::Embed;
use self::failed::{Failed, Form};
use self::fields::Field;
use self::offer::Offer;
use self::openai::{Chat, ChatStream, Completion, CompletionStream, Header};
use self::responses::{Respond, ResponseStream};
use self::submit::{Answers, Asking, ask};
use super::IsOwner;
use crate::api::GenerateRequest;
use crate::engine::{Asked, Lane, check_request};
use crate::generating::Ready;
use crate::pace::{RETRY_MAX_S, RETRY_MIN_S};
use crate::service::Service;
use doppler_infer::grammar::Constraint;

/// The longest body of a request: a prompt, however its characters are escaped, within reason.
const BODY_BYTES_MAX: usize = 32 << 20;

/// What every route knows.
#[derive(Clone)]
struct Api {
    service: Arc<Service>,
}

/// The routes under `/v1`.
pub fn routes(service: Arc<Service>, is_owner: IsOwner) -> Router {
    let options = service.config().api.clone();
    let access =
        Access { key: options.key, token: service.gateway_token(), cors: options.cors, is_owner };
    let watched = service.clone();
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/embeddings", post(embed))
        .route("/v1/responses", post(respond))
        .route("/v1/messages", post(message))
        .route("/v1/messages/count_tokens", post(count_tokens))
        .route("/v1/{*path}", any(no_route))
        .route("/metrics", get(count))
        .method_not_allowed_fallback(no_method)
        .with_state(Api { service })
        .layer(middleware::from_fn_with_state(Arc::new(access), access::guard))
        // For whoever watches the process: it tells nothing else, so it needs no key.
        .route("/health", get(move || health(watched)))
}

/// Whether the node is ready, or how far it is. No names: this needs no key.
async fn health(service: Arc<Service>) -> Response {
    let Some(opening) = service.opening() else {
        return Json(serde_json::json!({ "status": "ok" })).into_response();
    };
    let progress = opening.progress();
    let state = serde_json::json!({
        "status": "loading", "bytes_done": progress.done, "bytes": progress.total,
        "seconds_left": progress.left_s,
    });
    let left_s = progress.left_s.map_or(RETRY_MIN_S, |left_s| left_s.ceil() as u64);
    let retry = [(header::RETRY_AFTER, left_s.clamp(RETRY_MIN_S, RETRY_MAX_S).to_string())];
    (StatusCode::SERVICE_UNAVAILABLE, retry, Json(state)).into_response()
}

async fn count(State(Api { service }): State<Api>) -> Response {
    let status = service.status().await;
    let (engine, waiting) = (service.engine.shown(), service.engine.waiting());
    let text = metrics::text(&status, &engine, waiting);
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

async fn no_route(uri: Uri) -> Response {
    let message = format!("{} does not exist here (docs/api.md lists what does)", uri.path());
    Failed::new("no_route", message).response(Form::of(uri.path()))
}

async fn no_method(method: Method, uri: Uri) -> Response {
    let message = format!("{}: {method} is not for this", uri.path());
    Failed::new("method", message).response(Form::of(uri.path()))
}

/// The body's object, of fields that are all known.
async fn read(request: Request, fields: &[Field]) -> Result<Object, Failed> {
    let bytes = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX).await;
    let bytes = bytes.map_err(|_| {
        Failed::new(
            "too_large",
            format!("the body is longer than {BODY_BYTES_MAX} bytes, or broke off"),
        )
    })?;
    let body: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Failed::new("field", format!("the body is not JSON: {error}")))?;
    let Value::Object(body) = body else {
        return Err(Failed::new("field", "the body must be a JSON object"));
    };
    fields::check(fields, &body)?;
    Ok(body)
}

impl Api {
    /// The model that a request names. Its publisher is trusted on first use at most as the node's
    /// policy says.
    async fn ready(&self, model: &str) -> Result<Ready, Failed> {
        self.service.ready(model, &[], false).await.map_err(|error| Failed::of(&error))
    }
}

/// What an answer's parts have in common.
fn head(prefix: &str, ready: &Ready) -> Header {
    Header {
        id: submit::id(prefix),
        created: submit::now_s(),
        model: ready.opened.model.manifest.model_id.clone(),
    }
}

fn checked(request: &GenerateRequest) -> Result<(), Failed> {
    check_request(request).map_err(|error| Failed::of(&error.into()))
}

async fn chat(State(api): State<Api>, request: Request) -> Response {
    let answer = async {
        let asked = Chat::read(&read(request, openai::CHAT).await?)?;
        checked(&asked.request)?;
        let ready = api.ready(&asked.request.model).await?;
        let reading = reading(&asked.offer, &ready, asked.request.constraint.clone()).await?;
        let requests = asked.requests(&reading);
        let header = head("chatcmpl-", &ready);
        let answers = ask(&api.service, &ready, Asking { requests, reading, lane: asked.lane });
        let answers = answers.await?;
        if asked.stream {
            let (usage, choices) = (asked.include_usage, asked.choices);
            return Ok(answers.streamed(ChatStream::new(header, usage, choices)));
        }
        let whole = answers.whole().await?;
        let with_odds = asked.request.logprobs.is_some();
        Ok(Json(openai::chat_whole(&header, with_odds, &whole)).into_response())
    };
    answer.await.unwrap_or_else(|failed: Failed| failed.response(Form::OpenAi))
}

async fn completions(State(api): State<Api>, request: Request) -> Response {
    let answer = async {
        let asked = Completion::read(&read(request, openai::COMPLETIONS).await?)?;
        for request in &asked.requests {
            checked(request)?;
        }
        let ready = api.ready(&asked.model).await?;
        let header = head("cmpl-", &ready);
        let (requests, lane) = (asked.requests.clone(), asked.lane);
        let asking = Asking { requests, reading: Reading::default(), lane };
        let answers = ask(&api.service, &ready, asking).await?;
        if asked.stream {
            return Ok(answers.streamed(CompletionStream::new(header, &asked)));
        }
        let with_odds = asked.requests.iter().any(|request| request.logprobs.is_some());
        let whole = answers.whole().await?;
        let whole = openai::completion_whole(&header, with_odds, asked.choices, &whole);
        Ok(Json(whole).into_response())
    };
    answer.await.unwrap_or_else(|failed: Failed| failed.response(Form::OpenAi))
}

/// How an answer is read. Grammars take a while to compile.
async fn reading(
    offer: &Offer,
    ready: &Ready,
    form: Option<Constraint>,
) -> Result<Reading, Failed> {
    let (offer, opened) = (offer.clone(), ready.opened.clone());
    let reading = tokio::task::spawn_blocking(move || offer.reading(&opened, form.as_ref()));
    reading.await.map_err(|error| Failed::of(&error.into()))?
}

/// Has a request of one choice answered; `offer` is what its tools are.
async fn one(
    api: &Api,
    ready: &Ready,
    mut request: GenerateRequest,
    offer: &Offer,
    lane: Lane,
) -> Result<Answers, Failed> {
    let reading = reading(offer, ready, request.constraint.take()).await?;
    request.constraint.clone_from(&reading.constraint);
    if !reading.begin.is_empty() {
        request.begin.clone_from(&reading.begin);
    }
    ask(&api.service, ready, Asking { requests: vec![request], reading, lane }).await
}

/// All of an answer of one choice.
async fn only(answers: Answers) -> Result<(Whole, Finish, Usage), Failed> {
    let whole = answers.whole().await?.into_iter().next();
    whole.ok_or_else(|| Failed::new("stopping", "the engine gave no answer"))
}

async fn respond(State(api): State<Api>, request: Request) -> Response {
    let answer = async {
        let asked = Respond::read(&read(request, responses::FIELDS).await?)?;
        checked(&asked.request)?;
        let ready = api.ready(&asked.request.model).await?;
        let (header, echo) = (head("resp_", &ready), asked.echo);
        let answers = one(&api, &ready, asked.request, &asked.offer, asked.lane).await?;
        if asked.stream {
            return Ok(answers.streamed(ResponseStream::new(header, echo)));
        }
        let (whole, finish, usage) = only(answers).await?;
        let whole = responses::response_whole(&header, &echo, &whole, &finish, usage);
        Ok(Json(whole).into_response())
    };
    answer.await.unwrap_or_else(|failed: Failed| failed.response(Form::OpenAi))
}

async fn message(State(api): State<Api>, request: Request) -> Response {
    let answer = async {
        let asked = Message::read(&read(request, anthropic::MESSAGES).await?, false)?;
        checked(&asked.request)?;
        let ready = api.ready(&asked.request.model).await?;
        let header = head("msg_", &ready);
        let answers = one(&api, &ready, asked.request, &asked.offer, asked.lane).await?;
        if asked.stream {
            return Ok(answers.streamed(MessageStream::new(header)));
        }
        let (whole, finish, usage) = only(answers).await?;
        let whole = anthropic::message_whole(&header, &whole, &finish, usage);
        Ok(Json(whole).into_response())
    };
    answer.await.unwrap_or_else(|failed: Failed| failed.response(Form::Anthropic))
}

async fn count_tokens(State(api): State<Api>, request: Request) -> Response {
    let answer = async {
        let asked = Message::read(&read(request, anthropic::COUNT).await?, true)?;
        checked(&asked.request)?;
        let ready = api.ready(&asked.request.model).await?;
        let begin = reading(&asked.offer, &ready, None).await?.begin;
        let mut request = asked.request;
        request.begin.push_str(&begin);
        // Long prompts take a while to tokenize.
        let prompt = tokio::task::spawn_blocking(move || {
            Asked::prompt(&ready.opened.model, &ready.opened.tokenizer, &request)
        });
        let prompt = prompt.await.map_err(|error| Failed::of(&error.into()))?;
        let prompt = prompt.map_err(|error| Failed::of(&error.into()))?;
        Ok(Json(serde_json::json!({ "input_tokens": prompt.len() })).into_response())
    };
    answer.await.unwrap_or_else(|failed: Failed| failed.response(Form::Anthropic))
}

async fn embed(State(api): State<Api>, request: Request) -> Response {
    let answer = async {
        let mut asked = Embed::read(&read(request, embeddings::FIELDS).await?)?;
        let ready = api.ready(&asked.model).await?;
        let (texts, prompt_name) = (std::mem::take(&mut asked.texts), asked.prompt_name.take());
        let vectors = api.service.embed(&ready, asked.lane, texts, prompt_name).await;
        let vectors = vectors.map_err(|error| Failed::of(&error))?;
        let model = &ready.opened.model.manifest.model_id;
        Ok(Json(asked.answer(model, &vectors)?).into_response())
    };
    answer.await.unwrap_or_else(|failed: Failed| failed.response(Form::OpenAi))
}
