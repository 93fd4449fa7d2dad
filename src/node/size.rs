//! Byte sizes as people write them, with a unit: `2GiB`, `500MB`, `4096B`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

/// A number of bytes. Reads `B`, `KB`/`MB`/`GB`/`TB` (powers of 1000) and `KiB`/`MiB`/`GiB`/`TiB`
/// (powers of 1024), with an optional fraction; prints the latter. Only 0 needs no unit: someone
/// who writes `--ram-budget 4` means 4 GiB, not 4 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a size (write 2GiB, 500MB or 4096B)");
        let text_trimmed = text.trim();
        let digits_end = text_trimmed
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text_trimmed.len());
        let (number, unit) = text_trimmed.split_at(digits_end);
        let unit = unit.trim();
        let scale = if unit.is_empty() {
            match number.parse::<f64>() {
                Ok(0.0) => 1,
                Ok(_) => {
                    return Err(format!("{text:?} has no unit (write {number}GiB or {number}B)"));
                }
                Err(_) => return Err(bad()),
            }
        } else {
            UNITS
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(unit))
                .map(|(_, scale)| *scale)
                .ok_or_else(bad)?
        };
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(scale).ok_or_else(bad)?,
            Err(_) => {
                let number: f64 = number.parse().map_err(|_| bad())?;
                let bytes = number * scale as f64;
                if !bytes.is_finite() || bytes >= u64::MAX as f64 {
                    return Err(bad());
                }
                bytes as u64
            }
        };
        Ok(Self(bytes))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match UNITS[..4].iter().find(|(_, scale)| self.0 >= *scale) {
            Some((unit, scale)) => format!("{:.2} {unit}", self.0 as f64 / *scale as f64),
            None => format!("{} B", self.0),
        };
        f.pad(&text)
    }
}

/// `1 object`, `2 objects`: a number of things whose plural ends in s.
pub fn count(number: impl TryInto<u64>, thing: &str) -> String {
    match number.try_into() {
        Ok(1) => format!("1 {thing}"),
        Ok(number) => format!("{number} {thing}s"),
        Err(_) => format!("many {thing}s"),
    }
}

/// Bytes a second: a size, optionally followed by `/s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ByteRate(pub u64);

impl FromStr for ByteRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let trimmed = text.trim();
        let size = trimmed.strip_suffix("/s").unwrap_or(trimmed);
        let size = size.parse().map(|ByteSize(size)| Self(size));
        size.map_err(|_| format!("{text:?} is not a rate (write 10MB/s or 500KiB/s)"))
    }
}

/// A number of bytes, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeOrOff {
    Off,
    Bytes(ByteSize),
}

impl SizeOrOff {
    /// How many bytes; `off` is none.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Off => 0,
            Self::Bytes(size) => size.0,
        }
    }
}

impl FromStr for SizeOrOff {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "off" => Ok(Self::Off),
            size => size.parse().map(Self::Bytes).map_err(|error| format!("{error}, or off")),
        }
    }
}

/// How long something stays: seconds, minutes or hours, or for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepAlive(pub Option<Duration>);

/// The longest that is meant: a year.
const KEEP_MAX_S: u64 = 365 * 86_400;

impl FromStr for KeepAlive {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "forever" {
            return Ok(Self(None));
        }
        let bad = || format!("{text:?} is not a duration (write 30s, 5m, 2h or forever)");
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "" if number == "0" => 1,
            _ => return Err(bad()),
        };
        let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(seconds));
        let seconds = seconds.filter(|seconds| *seconds <= KEEP_MAX_S).ok_or_else(bad)?;
        Ok(Self(Some(Duration::from_secs(seconds))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096B", 4096),
            ("2GiB", 2 << 30),
            ("1.5 MiB", 3 << 19),
            ("500MB", 500_000_000),
            ("0", 0),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "2 parsecs", "1e9", "99999999TiB", "1.2.3", "1.2.3GiB"] {
            assert!(text.parse::<ByteSize>().unwrap_err().contains("is not a size"), "{text}");
        }
        for text in ["4", "4096", "0.5"] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert!(error.contains("no unit") && error.contains(&format!("{text}GiB")), "{error}");
        }
    }

    #[test]
    fn rates_are_sizes_a_second() {
        for (text, rate) in [("10MB/s", 10_000_000), ("64KiB", 65_536), (" 1 MiB/s ", 1 << 20)] {
            assert_eq!(text.parse(), Ok(ByteRate(rate)), "{text}");
        }
        for text in ["", "/s", "10Mbit/s", "10MB/m", "-1MB/s", "10", "10/s"] {
            assert!(text.parse::<ByteRate>().unwrap_err().contains("not a rate"), "{text}");
        }
    }

    #[test]
    fn durations_have_a_unit_or_never_end() {
        let seconds = |text: &str| text.parse::<KeepAlive>().map(|KeepAlive(time)| time);
        for (text, want) in [("30s", 30), ("5m", 300), ("2h", 7200), ("0", 0), ("0s", 0)] {
            assert_eq!(seconds(text), Ok(Some(Duration::from_secs(want))), "{text}");
        }
        assert_eq!(seconds("forever"), Ok(None));
        for text in ["", "5", "s", "-1s", "1.5h", "5 minutes", "99999999h"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn things_are_counted() {
        let words = [0_usize, 1, 2].map(|number| count(number, "object"));
        assert_eq!(words, ["0 objects", "1 object", "2 objects"]);
    }

    #[test]
    fn sizes_print_in_powers_of_1024() {
        assert_eq!(ByteSize(12).to_string(), "12 B");
        assert_eq!(ByteSize(3 << 19).to_string(), "1.50 MiB");
    }
}
