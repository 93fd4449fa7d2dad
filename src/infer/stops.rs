//! Texts that end a generation.
//!
//! They are found in the text, so it does not matter how it is divided into tokens. What could still
//! become one is held back, and a text that was found is not given out. The first to be complete
//! counts; of several complete at once, the longest.

/// The most texts of a request, and the most bytes of one.
pub const STOPS_MAX: usize = 16;
pub const STOP_BYTES_MAX: usize = 256;

/// Why texts cannot end a generation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    #[error("{0} stop texts are too many: at most {STOPS_MAX}")]
    Many(usize),
    #[error("a stop text is empty: it would end every answer at once")]
    Empty,
    #[error("a stop text of {0} bytes is too long: at most {STOP_BYTES_MAX}")]
    Long(usize),
}

/// Checked texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stops(Vec<String>);

impl Stops {
    /// # Errors
    /// If there are too many, or one is empty or too long.
    pub fn new(texts: &[String]) -> Result<Self, StopError> {
        if texts.len() > STOPS_MAX {
            return Err(StopError::Many(texts.len()));
        }
        for text in texts {
            match text.len() {
                0 => return Err(StopError::Empty),
                long if long > STOP_BYTES_MAX => return Err(StopError::Long(long)),
                _ => {}
            }
        }
        Ok(Self(texts.to_vec()))
    }

    /// Starts looking for them in a text.
    pub fn watch(&self) -> Watch {
        let begun = self.0.iter().map(|text| Begun::new(text)).collect();
        Watch { begun, held: String::new(), found: None }
    }
}

/// A text, and how much of it the end of the stream is (Knuth, Morris and Pratt, 1977).
#[derive(Debug)]
struct Begun {
    text: String,
    /// For each prefix, the length of its longest proper suffix that is a prefix, too.
    shorter: Vec<usize>,
    matched: usize,
}

impl Begun {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut shorter = vec![0; bytes.len()];
        for at in 1..bytes.len() {
            let mut length = shorter[at - 1];
            while length > 0 && bytes[at] != bytes[length] {
                length = shorter[length - 1];
            }
            shorter[at] = length + usize::from(bytes[at] == bytes[length]);
        }
        Self { text: text.to_owned(), shorter, matched: 0 }
    }

    /// Takes the next byte. True if the text is complete.
    fn take(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.shorter[self.matched - 1];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        self.matched == bytes.len()
    }
}

/// Looks for the texts in a stream.
#[derive(Debug)]
pub struct Watch {
    begun: Vec<Begun>,
    /// What may be the start of one of them.
    held: String,
    found: Option<String>,
}

impl Watch {
    /// Takes the next characters, and returns what can be given out.
    pub fn push(&mut self, text: &str) -> String {
        if self.begun.is_empty() {
            return text.to_owned();
        }
        if self.found.is_some() {
            return String::new();
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let complete =
                self.begun.iter_mut().filter_map(|one| one.take(byte).then_some(&*one.text));
            if let Some(found) = complete.max_by_key(|text| text.len()) {
                self.held.truncate(before + at + 1 - found.len());
                self.found = Some(found.to_owned());
                return std::mem::take(&mut self.held);
            }
        }
        // A match begins and ends where characters do, because its text does.
        let keep = self.begun.iter().map(|one| one.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// The text that was found.
    pub fn found(&self) -> Option<&str> {
        self.found.as_deref()
    }

    /// What is still held back: the stream ended, so it did not become one of the texts.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn stops(texts: &[&str]) -> Stops {
        Stops::new(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    /// All pieces given out, and what was found.
    fn watched<'a>(stops: &'a Stops, pieces: &[&str]) -> (Vec<String>, Option<&'a str>) {
        let mut watch = stops.watch();
        let mut out: Vec<String> = pieces.iter().map(|piece| watch.push(piece)).collect();
        let found = watch.found().map(str::to_owned);
        let found = stops.0.iter().map(|text| &**text).find(|text| found.as_deref() == Some(text));
        out.push(watch.finish());
        (out, found)
    }

    #[test]
    fn a_stop_text_is_found_across_pieces_and_not_shown() {
        let user = stops(&["User:"]);
        let (out, found) = watched(&user, &["Hi. ", "Us", "er", ": and more", "never"]);
        assert_eq!((out.concat().as_str(), found), ("Hi. ", Some("User:")));
        let (out, found) = watched(&user, &["Us", "ual"]);
        assert_eq!((out, found), (vec![String::new(), "Usual".into(), String::new()], None));
        let (out, found) = watched(&user, &["the Us"]);
        assert_eq!((out, found), (vec!["the ".into(), "Us".into()], None), "the end gives it out");
        // The start of a match within one that failed.
        let aab = stops(&["aab"]);
        let (out, found) = watched(&aab, &["aa", "ab", "x"]);
        assert_eq!((out.concat().as_str(), found), ("a", Some("aab")));
        // Characters of several bytes are held back whole.
        let whale = stops(&["\u{1f433}!"]);
        let (out, found) = watched(&whale, &["a\u{1f433}", "\u{1f433}", "!", "b"]);
        assert_eq!(out, ["a", "\u{1f433}", "", "", ""]);
        assert_eq!(found, Some("\u{1f433}!"));
        assert_eq!(watched(&stops(&[]), &["all", ""]).0.concat(), "all");
    }

    #[test]
    fn the_first_complete_text_counts_and_of_several_the_longest() {
        let both = stops(&["b", "abc", "ab"]);
        let (out, found) = watched(&both, &["xabc"]);
        assert_eq!((out.concat().as_str(), found), ("x", Some("ab")), "complete before abc");
        let (out, found) = watched(&both, &["xa", "b"]);
        assert_eq!((out.concat().as_str(), found), ("x", Some("ab")));
    }

    #[test]
    fn how_a_text_is_divided_makes_no_difference() {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let letters = ["a", "b", "\u{e9}", "\u{1f433}"];
        let any = |rng: &mut StdRng, most: usize| -> String {
            let length = rng.random_range(1..=most);
            (0..length).map(|_| letters[rng.random_range(0..letters.len())]).collect()
        };
        for _ in 0..2000 {
            let texts: Vec<String> =
                (0..rng.random_range(1..4)).map(|_| any(&mut rng, 4)).collect();
            let stops = Stops::new(&texts).unwrap();
            let text = any(&mut rng, 40);
            // The rule spelled out: the first end of any of them.
            let ends = texts
                .iter()
                .filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at)));
            let want = ends.min().map_or(text.as_str(), |(_, at)| &text[..at]);
            let mut watch = stops.watch();
            let (mut got, mut rest) = (String::new(), text.as_str());
            while !rest.is_empty() {
                let chars = rng.random_range(1..=rest.chars().count().min(5));
                let cut = rest.char_indices().nth(chars).map_or(rest.len(), |(at, _)| at);
                let (piece, later) = rest.split_at(cut);
                got.push_str(&watch.push(piece));
                rest = later;
            }
            let found = watch.found().is_some();
            got.push_str(&watch.finish());
            assert_eq!((got.as_str(), found), (want, want != text), "{texts:?} in {text:?}");
        }
    }

    #[test]
    fn texts_that_cannot_end_anything_are_refused() {
        let new = |texts: &[String]| Stops::new(texts).unwrap_err();
        assert_eq!(new(&vec!["x".to_owned(); 17]), StopError::Many(17));
        assert_eq!(new(&[String::new()]), StopError::Empty);
        assert_eq!(new(&["x".repeat(257)]), StopError::Long(257));
    }
}
