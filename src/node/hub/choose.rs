//! Which files of a repository make the model that is asked for. Pure, but for the index, which the
//! caller reads.
//!
//! Without a selector these are the safetensors and what belongs to them, or the only GGUF model. A
//! selector is a GGUF file's path, or the name of a quantisation, which must fit one GGUF model.

use std::collections::BTreeMap;

use super::error::HubError;
use super::listing::{Listing, RepoFile};

/// Files beside the weights that conversion reads, if they are there.
const BESIDE: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
];
/// What a tokenizer is made of where there is no `tokenizer.json`.
const SENTENCE_PIECES: [&str; 2] = ["tokenizer.model", "added_tokens.json"];
pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
/// Models or files that an error lists.
const LISTED_MAX: usize = 24;

/// The files of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Read whole, before anything else.
    pub small: Vec<RepoFile>,
    /// Read as they arrive.
    pub weights: Vec<RepoFile>,
    /// The GGUF file to open. `None` for a directory of safetensors.
    pub gguf: Option<String>,
}

impl Chosen {
    /// Chooses. `index` reads the index of safetensors in several files: the names of the files.
    ///
    /// # Errors
    /// If nothing fits, or more than one model does; the error lists them.
    pub fn of(
        listing: &Listing,
        selector: Option<&str>,
        index: &mut dyn FnMut(&RepoFile) -> Result<Vec<String>, HubError>,
    ) -> Result<Self, HubError> {
        if let Some(selector) = selector {
            return gguf(listing, Some(selector));
        }
        match (listing.find("config.json"), listing.find(SINGLE), listing.find(INDEX)) {
            (Some(_), Some(single), _) => {
                safetensors(listing, std::slice::from_ref(&single.path), None)
            }
            (Some(_), None, Some(file)) => safetensors(listing, &index(file)?, Some(file)),
            _ => gguf(listing, None),
        }
    }
}

fn safetensors(
    listing: &Listing,
    names: &[String],
    index: Option<&RepoFile>,
) -> Result<Chosen, HubError> {
    let mut weights = Vec::new();
    for name in names {
        let file = listing.find(name).ok_or_else(|| {
            HubError::Missing(format!("{}: {INDEX} names {name}, which is not there", listing.repo))
        })?;
        weights.push(file.clone());
    }
    let mut small: Vec<_> = index.cloned().into_iter().collect();
    small.extend(BESIDE.iter().filter_map(|name| listing.find(name)).cloned());
    if listing.find("tokenizer.json").is_none() {
        small.extend(SENTENCE_PIECES.iter().filter_map(|name| listing.find(name)).cloned());
    }
    if listing.find("modules.json").is_some() {
        // The modules of sentence-transformers: `1_Pooling/config.json`, `2_Dense/model.safetensors`.
        for file in &listing.files {
            let Some((dir, name)) = file.path.split_once('/') else { continue };
            if !dir.starts_with(|c: char| c.is_ascii_digit()) {
                continue;
            }
            match name {
                "config.json" => small.push(file.clone()),
                SINGLE => weights.push(file.clone()),
                _ => {}
            }
        }
    }
    Ok(Chosen { small, weights, gguf: None })
}

/// The GGUF models of a repository by their names: each is one file or all of its parts, in order.
fn models(listing: &Listing) -> BTreeMap<String, Vec<&RepoFile>> {
    let mut models: BTreeMap<String, Vec<&RepoFile>> = BTreeMap::new();
    for file in &listing.files {
        let lower = file.path.to_ascii_lowercase();
        let Some(stem) = lower.strip_suffix(".gguf") else { continue };
        let name = lower.rsplit('/').next().unwrap_or_default();
        // Encoders of images, and calibration data.
        if name.starts_with("mmproj") || name.contains("imatrix") {
            continue;
        }
        let stem = &file.path[..part_of(stem).map_or(stem.len(), |(whole, ..)| whole.len())];
        models.entry(stem.to_owned()).or_default().push(file);
    }
    models.values_mut().for_each(|files| files.sort_by(|a, b| a.path.cmp(&b.path)));
    models
}

/// `NAME-00002-of-00003` as the name, the part's number and their count.
fn part_of(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| {
        let is_number = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse().ok()).flatten()
    };
    Some((name, digits(number)?, digits(count)?))
}

fn gguf(listing: &Listing, selector: Option<&str>) -> Result<Chosen, HubError> {
    let models = models(listing);
    let repo = &listing.repo;
    let list = |of: &mut dyn Iterator<Item = String>| {
        let mut names: Vec<String> = of.take(LISTED_MAX + 1).collect();
        if names.len() > LISTED_MAX {
            names.truncate(LISTED_MAX);
            names.push("more".to_owned());
        }
        names.join(", ")
    };
    let every = || list(&mut models.keys().map(|name| format!("{name}.gguf")));
    if models.is_empty() {
        let files = list(&mut listing.files.iter().map(|file| file.path.clone()));
        let wanted = match selector {
            Some(selector) => format!("no GGUF file, so none of {selector:?}"),
            None => format!("neither {SINGLE} with a config.json nor a GGUF file"),
        };
        return Err(HubError::Choice(format!("{repo} has {wanted}; there is {files}")));
    }
    let fitting: Vec<(&String, &Vec<&RepoFile>)> = match selector {
        None => models.iter().collect(),
        Some(selector) => {
            let is_it = |file: &&RepoFile| file.path == selector;
            let file = models.iter().find(|(_, files)| files.iter().any(is_it));
            match file {
                Some(found) => vec![found],
                None => models.iter().filter(|(name, _)| is_of(name, selector)).collect(),
            }
        }
    };
    let (name, files) = match fitting[..] {
        [one] => one,
        [] => {
            let selector = selector.unwrap_or_default();
            return Err(HubError::Choice(format!(
                "{repo} has no file or quantisation {selector:?}; there is {}",
                every()
            )));
        }
        _ => {
            let names = list(&mut fitting.iter().map(|(name, _)| format!("{name}.gguf")));
            return Err(HubError::Choice(format!(
                "{repo} has several models that fit: {names}; choose one as hf:{repo}:FILE or \
                 hf:{repo}:QUANT"
            )));
        }
    };
    check_parts(repo, name, files)?;
    let first = files.first().map(|file| file.path.clone());
    let weights = files.iter().copied().cloned().collect();
    Ok(Chosen { small: Vec::new(), weights, gguf: first })
}

/// # Errors
/// If some of a model's parts are not there.
fn check_parts(repo: &str, name: &str, files: &[&RepoFile]) -> Result<(), HubError> {
    let parts: Vec<_> = files
        .iter()
        .map(|file| part_of(file.path.get(..file.path.len() - 5).unwrap_or_default()))
        .collect();
    let whole = match parts[..] {
        [None] => true,
        _ => parts.iter().zip(1..).all(|(part, at)| {
            part.is_some_and(|(_, number, count)| number == at && count as usize == parts.len())
        }),
    };
    let problem = || HubError::Choice(format!("{repo}: {name} does not have all of its parts"));
    if whole { Ok(()) } else { Err(problem()) }
}

/// Whether a model's name contains a quantisation's as a word of its own: `Q4_K` is not in `Q4_K_M`,
/// nor `Q4_K_M` in `IQ4_K_M`.
fn is_of(name: &str, quantisation: &str) -> bool {
    let (name, wanted) = (name.to_lowercase(), quantisation.to_lowercase());
    let is_inside = |c: char| c.is_alphanumeric() || c == '_';
    name.match_indices(&wanted).any(|(at, found)| {
        let before = name[..at].chars().next_back();
        let after = name[at + found.len()..].chars().next();
        !before.is_some_and(is_inside) && !after.is_some_and(is_inside)
    })
}

#[cfg(test)]
mod tests {
    use super::super::listing::Expected;
    use super::*;

    fn listing(paths: &[&str]) -> Listing {
        let file = |path: &&str| RepoFile {
            path: (*path).to_owned(),
            size: 1,
            hash: Expected::GitBlob([0; 20]),
        };
        Listing { repo: "a/b".into(), commit: "c".into(), files: paths.iter().map(file).collect() }
    }

    fn chosen(paths: &[&str], selector: Option<&str>) -> Result<Vec<String>, String> {
        let mut index = |_: &RepoFile| Ok(vec!["m-1.safetensors".into(), "m-2.safetensors".into()]);
        let chosen = Chosen::of(&listing(paths), selector, &mut index);
        let chosen = chosen.map_err(|error| error.to_string())?;
        Ok(chosen.small.into_iter().chain(chosen.weights).map(|file| file.path).collect())
    }

    #[test]
    fn safetensors_come_with_what_belongs_to_them_and_nothing_else() {
        let beside = ["README.md", "config.json", "tokenizer.json", "pytorch_model.bin", "x.gguf"];
        let single = [&beside[..], &[SINGLE]].concat();
        assert_eq!(chosen(&single, None).unwrap(), ["config.json", "tokenizer.json", SINGLE]);
        let pieces = ["config.json", "tokenizer.model", "added_tokens.json", SINGLE];
        assert_eq!(chosen(&pieces, None).unwrap(), pieces, "instead of tokenizer.json");
        let with_both = [&single[..], &["tokenizer.model"]].concat();
        assert_eq!(chosen(&with_both, None).unwrap().len(), 3);
        let indexed = [&beside[..3], &[INDEX, "m-1.safetensors", "m-2.safetensors"]].concat();
        let want = [INDEX, "config.json", "tokenizer.json", "m-1.safetensors", "m-2.safetensors"];
        assert_eq!(chosen(&indexed, None).unwrap(), want);
        let torn = chosen(&indexed[..5], None).unwrap_err();
        assert!(torn.contains("m-2.safetensors") && torn.contains("not there"), "{torn}");
        let modules = [
            "config.json",
            SINGLE,
            "modules.json",
            "1_Pooling/config.json",
            "2_Dense/model.safetensors",
            "onnx/config.json",
        ];
        assert_eq!(
            chosen(&modules, None).unwrap(),
            ["config.json", "modules.json", "1_Pooling/config.json", SINGLE, modules[4]]
        );
        let error = chosen(&["config.json", "pytorch_model.bin"], None).unwrap_err();
        assert!(error.contains("pytorch_model.bin") && error.contains("neither"), "{error}");
    }

    #[test]
    fn a_gguf_is_chosen_by_file_or_quantisation_and_an_ambiguous_one_is_listed() {
        let files = [
            "m-Q4_K_M.gguf",
            "m-Q4_K.gguf",
            "m.IQ4_K_M.gguf",
            "mmproj-Q8_0.gguf",
            "Q8_0/m-Q8_0-00002-of-00002.gguf",
            "Q8_0/m-Q8_0-00001-of-00002.gguf",
            "config.json",
        ];
        let of = |selector| chosen(&files, Some(selector));
        assert_eq!(of("q4_k_m").unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(of("Q4_K").unwrap(), ["m-Q4_K.gguf"]);
        assert_eq!(of("m-Q4_K.gguf").unwrap(), ["m-Q4_K.gguf"]);
        let parts = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"];
        assert_eq!(of("Q8_0").unwrap(), parts);
        assert_eq!(of(parts[1]).unwrap(), parts, "any part means all");
        let none = of("Q5_K_M").unwrap_err();
        assert!(none.contains("Q5_K_M") && none.contains("m-Q4_K.gguf"), "{none}");
        let several = chosen(&files, None).unwrap_err();
        assert!(several.contains("several") && several.contains("Q8_0/m-Q8_0.gguf"), "{several}");
        assert!(!several.contains("mmproj"), "{several}");
        assert_eq!(chosen(&["m.gguf", "README.md"], None).unwrap(), ["m.gguf"]);
        let torn = chosen(&["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"], None).unwrap_err();
        assert!(torn.contains("parts"), "{torn}");
        assert!(chosen(&["README.md"], Some("Q8_0")).unwrap_err().contains("README.md"));
    }
}
