//! Which model a text means: one rule for every command and for the node. Pure.
//!
//! A whole id always means an id, even if a model has it as its name. Any other text means a model
//! of this node by its name, then one of a trusted publisher; then the start of an id or a name of
//! either; only then a stranger's model, by its whole name or the start of its id; and last that of
//! a refused publisher. So a stranger gains nothing by taking a known name, or by taking the start
//! of a known id as a name. The start of a stranger's name means nothing.

use std::collections::BTreeMap;
use std::fmt;

use doppler_store::ModelId;

/// The fewest characters of an id or a name that identify it.
pub const PREFIX_MIN: usize = 4;
/// Suggestions in an error.
const NEAR_MAX: usize = 3;
/// Models that an error lists.
const LISTED_MAX: usize = 8;

/// How well this node knows who signed a model; better ones first.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    Own,
    Trusted,
    #[default]
    Stranger,
    /// Removed from the trusted publishers, and not added again.
    Refused,
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Own => "own",
            Self::Trusted => "trusted",
            Self::Stranger => "no",
            Self::Refused => "refused",
        })
    }
}

/// A model under the name that one of its signers gave it. A model with several signers is several
/// candidates.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub id: ModelId,
    pub name: String,
    /// The signer's public key. Empty if it is not known.
    pub publisher: String,
    pub standing: Standing,
}

/// Why a text does not identify a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    #[error("no model {text:?} is known here{}{hint}", did_you_mean(near))]
    Unknown {
        text: String,
        /// Names that look like it.
        near: Vec<String>,
        /// What to do about it, with a space before it; may be empty.
        hint: String,
    },
    #[error("{text:?} is more than one model; give the id: {}", List(of))]
    Ambiguous {
        text: String,
        /// Each id with its name and publisher.
        of: Vec<String>,
    },
}

impl Unresolved {
    /// A stable name for the table of failures.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "unknown_model",
            Self::Ambiguous { .. } => "ambiguous",
        }
    }
}

/// `; did you mean A, B?`, or nothing.
pub fn did_you_mean(near: &[String]) -> String {
    match near {
        [] => String::new(),
        _ => format!("; did you mean {}?", List(near)),
    }
}

struct List<'a>(&'a [String]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// Finds the one model that `text` means.
///
/// # Errors
/// If it means none, or several of equal rank.
pub fn resolve(text: &str, models: &[Candidate]) -> Result<ModelId, Unresolved> {
    use Standing::{Own, Refused, Stranger, Trusted};
    let lower = text.to_lowercase();
    let id = |model: &Candidate| model.id.to_string() == lower;
    let name = |model: &Candidate| model.name == text;
    let cased = |model: &Candidate| model.name.to_lowercase() == lower;
    let id_begins =
        |model: &Candidate| text.len() >= PREFIX_MIN && model.id.to_string().starts_with(&lower);
    let begins = |model: &Candidate| {
        id_begins(model)
            || text.len() >= PREFIX_MIN && model.name.to_lowercase().starts_with(&lower)
    };
    // Neither of two strangers comes first: one may have taken the start of the other's id as a
    // name.
    let either = |model: &Candidate| name(model) || id_begins(model);
    type Matches<'a> = &'a dyn Fn(&Candidate) -> bool;
    let steps: [(Standing, Matches); 10] = [
        (Own, &name),
        (Own, &cased),
        (Trusted, &name),
        (Trusted, &cased),
        (Own, &begins),
        (Trusted, &begins),
        (Stranger, &either),
        (Stranger, &cased),
        (Refused, &either),
        (Refused, &cased),
    ];
    if is_whole_id(&lower) {
        return match models.iter().find(|model| id(model)) {
            Some(model) => Ok(model.id),
            None => Err(Unresolved::Unknown {
                text: text.to_owned(),
                near: Vec::new(),
                hint: String::new(),
            }),
        };
    }
    for (standing, matches) in steps {
        let found = models.iter().filter(|model| model.standing == standing && matches(model));
        let mut by_id: BTreeMap<ModelId, Vec<&Candidate>> = BTreeMap::new();
        for model in found {
            by_id.entry(model.id).or_default().push(model);
        }
        match by_id.len() {
            0 => {}
            1 => return by_id.into_keys().next().ok_or_else(|| unknown(text, &lower, models)),
            more => {
                let mut of: Vec<String> = by_id.iter().take(LISTED_MAX).map(describe).collect();
                if more > LISTED_MAX {
                    of.push(format!("and {} more", more - LISTED_MAX));
                }
                return Err(Unresolved::Ambiguous { text: text.to_owned(), of });
            }
        }
    }
    Err(unknown(text, &lower, models))
}

/// Whether a text is as long as an id and made of its digits.
pub fn is_whole_id(lower: &str) -> bool {
    lower.len() == 64 && lower.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn unknown(text: &str, lower: &str, models: &[Candidate]) -> Unresolved {
    let near = near(lower, models);
    Unresolved::Unknown { text: text.to_owned(), near, hint: String::new() }
}

/// A model with the names that matched, and the publishers that gave them.
fn describe((id, named): (&ModelId, &Vec<&Candidate>)) -> String {
    let name = |model: &&Candidate| match model.publisher.as_str() {
        "" => model.name.clone(),
        publisher => format!("{}, signed by {publisher}", model.name),
    };
    let mut names: Vec<String> = named.iter().map(name).collect();
    names.dedup();
    format!("{id} ({})", names.join("; "))
}

/// Names that a mistyped `text` may have meant, the likeliest first.
fn near(text: &str, models: &[Candidate]) -> Vec<String> {
    // A third of the letters wrong is a typing error; more is another word.
    let length = text.chars().count();
    let far = (length / 3).max(2);
    let mut near: Vec<(usize, &str)> = Vec::new();
    for Candidate { name, .. } in models {
        let lower = name.to_lowercase();
        let distance = strsim::damerau_levenshtein(text, &lower);
        let part = length >= 3 && (lower.contains(text) || text.contains(&lower));
        // The start of a name with a typing error in it.
        let start: String = lower.chars().take(length).collect();
        let starts = length >= 5 && strsim::damerau_levenshtein(text, &start) <= 2;
        if distance <= far || part || starts {
            near.push((distance, name));
        }
    }
    near.sort_unstable();
    near.dedup();
    near.into_iter().take(NEAR_MAX).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8, last: u8) -> ModelId {
        let mut bytes = [byte; 32];
        bytes[31] = last;
        bytes[2] = last;
        ModelId::from(bytes)
    }

    fn a() -> ModelId {
        id(0xaa, 0x11)
    }

    fn b() -> ModelId {
        id(0xaa, 0x22)
    }

    fn model(id: ModelId, name: &str, standing: Standing) -> Candidate {
        let publisher = format!("key-of-{name}-{standing}");
        Candidate { id, name: name.to_owned(), publisher, standing }
    }

    #[test]
    fn a_model_is_found_by_id_name_case_and_start() {
        let models = [
            model(a(), "Mixtral-q4_k_m", Standing::Own),
            model(a(), "the-lab's", Standing::Trusted),
            model(b(), "Qwen3-30B", Standing::Trusted),
        ];
        let (of_a, of_b) = (a().to_string(), b().to_string());
        for (text, id) in [
            (of_a.as_str(), a()),
            (&of_a.to_uppercase(), a()),
            (&of_b[..6], b()),
            ("Mixtral-q4_k_m", a()),
            ("the-lab's", a()),
            ("mixtral-Q4_K_M", a()),
            ("qwen3-30b", b()),
            ("mixt", a()),
            ("Qwen3", b()),
        ] {
            assert_eq!(resolve(text, &models), Ok(id), "{text}");
        }
        assert_eq!(of_a[..4], of_b[..4]);
        assert_eq!(resolve(&of_a[..4], &models), Ok(a()), "an own one before a trusted one");
        let strangers = [model(a(), "x", Standing::Stranger), model(b(), "y", Standing::Stranger)];
        assert!(matches!(resolve(&of_a[..4], &strangers), Err(Unresolved::Ambiguous { .. })));
        for text in ["aaa", "mix", "", "xtral", "nothing"] {
            assert!(matches!(resolve(text, &models), Err(Unresolved::Unknown { .. })), "{text}");
        }
    }

    #[test]
    fn own_and_trusted_come_before_strangers_and_a_whole_id_before_names() {
        let stranger = model(b(), "mixtral", Standing::Stranger);
        let posing = model(b(), &a().to_string(), Standing::Stranger);
        for standing in [Standing::Own, Standing::Trusted] {
            let models = [stranger.clone(), posing.clone(), model(a(), "mixtral", standing)];
            assert_eq!(resolve("mixtral", &models), Ok(a()));
            assert_eq!(resolve(&a().to_string(), &models), Ok(a()), "a name like an id");
            assert_eq!(resolve("aaaa", &models), Ok(a()));
        }
        // A stranger who signs an own model under a trusted one's name changes nothing either.
        let models = [
            model(a(), "mine", Standing::Own),
            model(a(), "mixtral", Standing::Stranger),
            model(b(), "mixtral", Standing::Trusted),
        ];
        assert_eq!(resolve("mixtral", &models), Ok(b()));
        // A stranger's whole name is its name; the start of it is not, its id's start is.
        let models = [stranger];
        assert_eq!(resolve("MIXTRAL", &models), Ok(b()));
        assert!(resolve("mixtr", &models).is_err());
        assert_eq!(resolve(&b().to_string()[..8], &models), Ok(b()));
    }

    #[test]
    fn the_start_of_a_known_id_is_nobody_elses_name_and_a_whole_id_nobodys() {
        let start = &a().to_string()[..8];
        let posing = |name: &str| model(id(0xbb, 1), name, Standing::Stranger);
        for standing in [Standing::Own, Standing::Trusted] {
            let models = [posing(start), model(a(), "mixtral", standing)];
            assert_eq!(resolve(start, &models), Ok(a()), "{standing}");
        }
        // Neither of two strangers is preferred, but each is found by its whole id.
        let models = [posing(start), model(a(), "mixtral", Standing::Stranger)];
        let error = resolve(start, &models).unwrap_err().to_string();
        assert!(error.contains("key-of-mixtral-no") && error.contains("more than one"), "{error}");
        assert_eq!(resolve(&a().to_string(), &models), Ok(a()));
        // An unknown whole id is not looked for among names.
        let gone = id(0xcc, 3).to_string();
        assert!(resolve(&gone, &[posing(&gone)]).is_err());
        // A known name in another letter case wins over a stranger's exact name, too.
        let models = [posing("mixtral"), model(a(), "Mixtral", Standing::Trusted)];
        assert_eq!(resolve("mixtral", &models), Ok(a()));
        // Refused publishers come after strangers.
        let models =
            [model(b(), "m", Standing::Refused), model(id(0xbb, 1), "m", Standing::Stranger)];
        assert_eq!(resolve("m", &models), Ok(id(0xbb, 1)));
        assert_eq!(resolve("m", &models[..1]), Ok(b()));
    }

    #[test]
    fn every_signers_name_finds_the_same_bytes() {
        let models = [
            model(a(), "first-name", Standing::Stranger),
            model(a(), "later-name", Standing::Stranger),
        ];
        for name in ["first-name", "later-name"] {
            assert_eq!(resolve(name, &models), Ok(a()));
        }
    }

    #[test]
    fn a_flood_of_one_name_is_counted_not_listed() {
        let many: Vec<Candidate> =
            (0..100).map(|last| model(id(1, last), "m", Standing::Stranger)).collect();
        let error = resolve("m", &many).unwrap_err().to_string();
        assert!(error.contains("and 92 more") && error.len() < 2048, "{error}");
    }

    #[test]
    fn what_is_ambiguous_lists_ids_and_publishers() {
        let mut models =
            [model(a(), "mixtral", Standing::Trusted), model(b(), "mixtral", Standing::Trusted)];
        models[1].publisher = "another-key".into();
        let error = resolve("mixtral", &models).unwrap_err().to_string();
        let ids = [a().to_string(), b().to_string()];
        for part in [&*ids[0], &*ids[1], "key-of-mixtral", "another-key", "give the id"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_mistyped_name_is_answered_with_the_nearest() {
        let models = [
            model(a(), "tiny-mixtral-q4_k_m", Standing::Own),
            model(b(), "Qwen3-30B-q8_0", Standing::Stranger),
        ];
        for (text, near) in [
            ("tiny-mixtral-q4_k_n", "tiny-mixtral-q4_k_m"),
            ("tiny-mitxral-q4km", "tiny-mixtral-q4_k_m"),
            ("mixtral", "tiny-mixtral-q4_k_m"),
            ("tiny-mixtra1", "tiny-mixtral-q4_k_m"),
            ("qwen3-30b", "Qwen3-30B-q8_0"),
        ] {
            let error = resolve(text, &models).unwrap_err().to_string();
            assert!(error.contains(&format!("did you mean {near}?")), "{text}: {error}");
        }
        let error = resolve("llama", &models).unwrap_err().to_string();
        assert!(error.contains("\"llama\"") && !error.contains("did you mean"), "{error}");
    }
}
