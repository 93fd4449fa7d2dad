//! Dates as text. Pure.

/// Seconds since 1970 as RFC 3339 writes a time in UTC, without what follows the seconds. The date is
/// `civil_from_days` of Howard Hinnant's "chrono-Compatible Low-Level Date Algorithms".
pub(crate) fn rfc3339(seconds: u64) -> String {
    // Eras of 400 years begin on the first of March.
    let (days, of_day) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march + 2) / 5 + 1;
    let month = if march < 10 { march + 3 } else { march - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}
