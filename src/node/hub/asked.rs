//! What `hf:ORG/MODEL[:FILE|:QUANT][@REVISION]` means. Pure.

use super::error::HubError;

/// The beginning of such a text.
const SCHEME: &str = "hf:";
/// The Hub's own limit on a repository's name is 96 characters for each part.
const PART_MAX: usize = 96;
/// The longest file name or revision.
const TEXT_MAX: usize = 512;

/// A model of the Hub, as somebody asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// `ORG/MODEL`, or the name of an old model without an owner.
    pub repo: String,
    /// A file's path, or the name of a quantisation.
    pub selector: Option<String>,
    /// A branch, a tag or a commit. `main` if absent.
    pub revision: Option<String>,
}

/// Whether a model's name is one of the Hub.
pub fn is_hub(text: &str) -> bool {
    text.starts_with(SCHEME)
}

impl Asked {
    /// # Errors
    /// If it is no such text.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let wrong = || HubError::Name(text.to_owned());
        let rest = text.strip_prefix(SCHEME).ok_or_else(wrong)?;
        // Either order: the revision may stand before the file or behind it.
        let end = rest.find([':', '@']).unwrap_or(rest.len());
        let (repo, mut rest) = rest.split_at(end);
        let (mut selector, mut revision) = (None, None);
        while let Some(mark) = rest.chars().next() {
            let other = if mark == ':' { '@' } else { ':' };
            let body = &rest[1..];
            let end = body.find(other).unwrap_or(body.len());
            let slot = if mark == ':' { &mut selector } else { &mut revision };
            if slot.is_some() || !is_text(&body[..end]) {
                return Err(wrong());
            }
            *slot = Some(body[..end].to_owned());
            rest = &body[end..];
        }
        let parts: Vec<&str> = repo.split('/').collect();
        if !(1..=2).contains(&parts.len()) || !parts.iter().all(|part| is_part(part)) {
            return Err(wrong());
        }
        Ok(Self { repo: repo.to_owned(), selector, revision })
    }

    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{SCHEME}{}", self.repo)?;
        self.selector.iter().try_for_each(|selector| write!(f, ":{selector}"))?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

fn is_part(part: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=PART_MAX).contains(&part.len()) && part.chars().all(plain) && !part.starts_with('.')
}

fn is_text(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_graphic() && !"\\?#%:@".contains(c);
    (1..=TEXT_MAX).contains(&text.len())
        && text.chars().all(plain)
        && text.split('/').all(|part| !part.is_empty() && part != ".." && part != ".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_found_in_either_order_and_nothing_else_is_taken() {
        let asked = |repo: &str, selector: Option<&str>, revision: Option<&str>| Asked {
            repo: repo.to_owned(),
            selector: selector.map(str::to_owned),
            revision: revision.map(str::to_owned),
        };
        for (text, want) in [
            ("hf:a/b", asked("a/b", None, None)),
            ("hf:gpt2", asked("gpt2", None, None)),
            ("hf:a/b:Q4_K_M", asked("a/b", Some("Q4_K_M"), None)),
            ("hf:a/b:d/x.gguf@v1", asked("a/b", Some("d/x.gguf"), Some("v1"))),
            ("hf:a/b@refs/pr/1:q8_0", asked("a/b", Some("q8_0"), Some("refs/pr/1"))),
        ] {
            assert_eq!(Asked::parse(text).unwrap(), want, "{text}");
            assert_eq!(Asked::parse(&want.to_string()).unwrap(), want);
        }
        for bad in [
            "a/b",
            "hf:",
            "hf:a/",
            "hf:/b",
            "hf:a/b/c",
            "hf:a/../b",
            "hf:a b/c",
            "hf:a/b:",
            "hf:a/b@",
            "hf:a/b:x:y",
            "hf:a/b@x@y",
            "hf:a/b:../x.gguf",
            "hf:a/b@x?y=1",
            "hf:.a/b",
        ] {
            assert!(matches!(Asked::parse(bad), Err(HubError::Name(_))), "{bad}");
        }
    }
}
