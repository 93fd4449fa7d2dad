//! What a tab needs to run a model: `GET /models/ID/program`, the model's step as plain data, and
//! `GET /kernels/HASH`, the same WGSL text that this node runs.
//!
//! Refuses unknown models, models whose publisher may not be used (`node::trust`), families and
//! shapes that the kernels do not support (by name), and options out of bounds. Serves no weights:
//! those are objects, verified like all others.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::embedded;
use crate::http::Refused;
use crate::service::Service;
use doppler_infer::backend::{BackendError, KvFormat};
use doppler_infer::error::SessionError;
use doppler_infer::gpu::{KERNELS, Kernel, Program, ProgramError, ProgramOptions, Reduction};
use doppler_infer::model::{Model, ModelError};
use doppler_infer::reader::WeightReader;
use doppler_store::{Manifest, MemReader, ModelId};

/// The options of [`ProgramOptions`] as a page writes them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    reduce: Option<String>,
    team: Option<String>,
    kv: Option<String>,
    binding: Option<u64>,
    context: Option<usize>,
    slots: Option<usize>,
}

impl Asked {
    fn options(&self) -> Result<ProgramOptions, Refused> {
        let mut options = ProgramOptions::default();
        match self.reduce.as_deref() {
            Some("lane") => options.reduction = Reduction::Lane,
            Some("group") | None => options.reduction = Reduction::Group,
            Some(other) => return Err(bad(format!("reduce={other:?}: it is lane or group"))),
        }
        match self.team.as_deref() {
            Some("subgroup") => options.subgroups = true,
            Some("group") | None => options.subgroups = false,
            Some(other) => return Err(bad(format!("team={other:?}: it is group or subgroup"))),
        }
        match self.kv.as_deref() {
            Some("f32") => options.kv = KvFormat::F32,
            Some("f16") | None => options.kv = KvFormat::F16,
            Some(other) => return Err(bad(format!("kv={other:?}: it is f16 or f32"))),
        }
        if let Some(binding) = self.binding {
            options.binding_bytes_max = binding;
        }
        options.context = self.context;
        options.slots = self.slots;
        Ok(options)
    }
}

/// `GET /models/embedded`
pub async fn embedded_model() -> Response {
    match embedded::info() {
        Some(info) => Json(info).into_response(),
        None => not_found("this binary has no model in it".into()).into_response(),
    }
}

/// `GET /models/{id}/program?reduce=lane|group&team=group|subgroup&kv=f16|f32&binding=BYTES&context=N&slots=N`
pub async fn program(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Response {
    let lowered = async {
        let model = id.parse::<ModelId>().map_err(|error| Refused::bad_id(&error))?;
        let Query(asked) = asked.map_err(|error| bad(error.body_text()))?;
        let options = asked.options()?;
        lower(usable(&service, model)?, &options)
    };
    match lowered.await {
        Ok(program) => {
            let again = [(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"))];
            (again, Json(program)).into_response()
        }
        Err(refused) => refused.into_response(),
    }
}

/// The manifest of a model that a page may run.
///
/// # Errors
/// If it is not known, or nobody who is trusted signed it.
pub fn usable(service: &Service, model: ModelId) -> Result<Manifest, Refused> {
    if let Some((_, manifest)) = embedded::model().filter(|(embedded, _)| *embedded == model) {
        return Ok(manifest);
    }
    match service.usable(model) {
        Ok(Some(manifest)) => Ok(Manifest::clone(&manifest)),
        Ok(None) => Err(not_found(format!("model {model} is not known here"))),
        Err(error) => {
            let error = format!("{error:#}");
            Err(Refused::new(StatusCode::FORBIDDEN, "untrusted", error))
        }
    }
}

/// A manifest's program. Reads no weights.
fn lower(manifest: Manifest, options: &ProgramOptions) -> Result<Program, Refused> {
    let nothing = WeightReader::new(Arc::new(MemReader::new()), tokio::runtime::Handle::current());
    let model = Model::open(manifest, nothing).map_err(|error: ModelError| unfit(&error))?;
    Program::new(&model, options).map_err(|error| match error {
        ProgramError::Option { .. }
        | ProgramError::Session(SessionError::BudgetTooSmall { .. }) => bad(error.to_string()),
        ProgramError::Session(SessionError::Backend(BackendError::Unsupported(what))) => {
            Refused::new(StatusCode::UNPROCESSABLE_ENTITY, "unsupported", what)
        }
        ProgramError::Binding { .. } | ProgramError::Session(_) => unfit(&error),
    })
}

/// A kernel in the list.
#[derive(Serialize)]
struct Listed {
    name: &'static str,
    hash: String,
    subgroups: bool,
}

/// The kernels that browsers can run, by the hash of their text.
fn texts() -> &'static HashMap<String, &'static Kernel> {
    static TEXTS: OnceLock<HashMap<String, &'static Kernel>> = OnceLock::new();
    TEXTS.get_or_init(|| {
        let kernels = KERNELS.iter().filter(|kernel| kernel.in_browsers());
        kernels.map(|kernel| (kernel.hash().to_hex().to_string(), kernel)).collect()
    })
}

/// `GET /kernels`: the kernels that browsers can run, and which of them need subgroups.
pub async fn kernels() -> Response {
    let listed = texts().iter().map(|(hash, Kernel { name, subgroups, .. })| Listed {
        name,
        hash: hash.clone(),
        subgroups: *subgroups,
    });
    let mut listed: Vec<Listed> = listed.collect();
    listed.sort_by_key(|kernel| kernel.name);
    Json(listed).into_response()
}

/// `GET /kernels/{hash}`: a kernel's text, which never changes.
pub async fn kernel(Path(hash): Path<String>) -> Response {
    let Some(Kernel { source: text, .. }) = texts().get(&hash) else {
        return not_found(format!("no kernel here has the hash {hash}")).into_response();
    };
    let headers = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
        (header::CACHE_CONTROL, "public, max-age=31536000, immutable"),
        (header::ETAG, &format!("\"{hash}\"")),
    ];
    (headers, *text).into_response()
}

fn bad(error: String) -> Refused {
    Refused::new(StatusCode::BAD_REQUEST, "bad_request", error)
}

fn not_found(error: String) -> Refused {
    Refused::new(StatusCode::NOT_FOUND, "not_found", error)
}

/// The refusal of a model that no tab can run.
fn unfit(error: &dyn std::error::Error) -> Refused {
    Refused::new(StatusCode::UNPROCESSABLE_ENTITY, "unsupported", error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: &str) -> Result<ProgramOptions, Refused> {
        let uri: axum::http::Uri = format!("/x?{query}").parse().unwrap();
        let Query(asked) = Query::<Asked>::try_from_uri(&uri).map_err(|e| bad(e.to_string()))?;
        asked.options()
    }

    #[tokio::test]
    async fn the_embedded_model_has_a_program_whose_kernels_are_given_by_hash() {
        let (_, manifest) = embedded::model().unwrap();
        let options = asked("reduce=lane&kv=f32&context=100&slots=12").unwrap();
        let program = lower(manifest, &options).unwrap();
        assert_eq!((program.context, program.moe.len()), (100, 4));
        assert_eq!(program.classes.iter().map(|class| class.count).sum::<u32>(), 12);
        for kernel in &program.kernels {
            let Kernel { name, source: text, .. } = *texts()[&kernel.hash];
            assert_eq!(name, kernel.name);
            assert_eq!(blake3::hash(text.as_bytes()).to_hex().as_str(), kernel.hash);
            assert!(!text.contains("enable "), "{name} asks for an extension");
        }
    }

    #[tokio::test]
    async fn what_no_tab_can_run_is_refused_by_name() {
        for query in ["reduce=warp", "kv=f8", "slots=-1", "colour=red"] {
            assert!(asked(query).is_err(), "{query}");
        }
        let of = |family: &str, query: &str| {
            let text = crate::embedded::manifest();
            let mut value: serde_json::Value = serde_json::from_slice(text).unwrap();
            value["config"]["architectures"][0] = family.into();
            let manifest = Manifest::parse(value.to_string().as_bytes()).unwrap();
            let refused = lower(manifest, &asked(query).unwrap()).unwrap_err();
            (refused.status.as_u16(), refused.code, refused.error)
        };
        let (status, code, error) = of("UnheardOfForCausalLM", "");
        assert_eq!((status, code), (422, "unsupported"));
        assert!(error.contains("UnheardOfForCausalLM"), "{error}");
        let (status, _, error) = of("MixtralForCausalLM", "slots=7");
        assert_eq!(status, 400);
        assert!(error.contains("8 slots"), "{error}");
        let (status, _, error) = of("MixtralForCausalLM", "context=2049");
        assert_eq!(status, 400);
        assert!(error.contains("1 to 2048"), "{error}");
        assert_eq!(of("MixtralForCausalLM", "binding=1000").0, 400);
    }
}
