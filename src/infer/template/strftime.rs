//! Dates as `strftime` prints them, in UTC and in English.
//!
//! Reference: C's `strftime` in the C locale. Unknown directives stay as they are.

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// The longest text. Formats in use have a dozen characters.
const TEXT_BYTES_MAX: usize = 1024;

/// `now` in this format.
pub fn utc(now: SystemTime, format: &str) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = ((seconds / 86_400) as i64, seconds % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let weekday = DAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let of_year = days - first_day(year) + 1;
    let half = if hour < 12 { "AM" } else { "PM" };
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next().filter(|_| out.len() < TEXT_BYTES_MAX) {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        // A hyphen means: not padded.
        let bare = directive == Some('-');
        if bare {
            directive = chars.next();
        }
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year.rem_euclid(100) as u64),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:>2}"),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => half.to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('j') if bare => of_year.to_string(),
            Some('j') => format!("{of_year:03}"),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        });
    }
    out
}

/// Year, month and day of a day counted from 1970-01-01.
///
/// Reference: `civil_from_days` in Howard Hinnant's "chrono-Compatible Low-Level Date Algorithms".
fn date(days: i64) -> (i64, u64, u64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month as u64, day as u64)
}

/// January 1 of a year, in days from 1970-01-01.
const fn first_day(year: i64) -> i64 {
    let before = year - 1;
    365 * (year - 1970) + before / 4 - before / 100 + before / 400 - 477
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_c() {
        let at = |seconds, format| utc(UNIX_EPOCH + Duration::from_secs(seconds), format);
        // From date(1) with TZ=UTC and LC_ALL=C.
        assert_eq!(at(1_796_023_013, "%Y-%m-%d %H:%M:%S %a %j"), "2026-11-30 07:16:53 Mon 334");
        assert_eq!(
            at(951_782_400, "%d %b %Y, %A %-d %B %y %e"),
            "29 Feb 2000, Tuesday 29 February 00 29"
        );
        assert_eq!(
            at(0, "%F %T %I %p %-m %Z%z %% %Q %"),
            "1970-01-01 00:00:00 12 AM 1 UTC+0000 % %Q %"
        );
        assert_eq!(at(1_709_251_199, "%F %j"), "2024-02-29 060");
    }
}
