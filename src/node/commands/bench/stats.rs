//! Statistics of several measurements of the same thing.

use serde::Serialize;

/// Median and spread. Robust figures, because a busy machine causes outliers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// Median of the distances from the median.
    pub mad: f64,
    /// Every measurement, in the order taken.
    pub all: Vec<f64>,
}

impl Summary {
    /// All zero if there are no measurements.
    pub fn of(all: Vec<f64>) -> Self {
        let mut sorted = all.clone();
        sorted.sort_by(f64::total_cmp);
        let median = middle(&sorted);
        let mut off: Vec<f64> = sorted.iter().map(|value| (value - median).abs()).collect();
        off.sort_by(f64::total_cmp);
        Self {
            median,
            min: sorted.first().copied().unwrap_or_default(),
            max: sorted.last().copied().unwrap_or_default(),
            mad: middle(&off),
            all,
        }
    }
}

fn middle(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => 0.0,
        len => (sorted[(len - 1) / 2] + sorted[len / 2]) / 2.0,
    }
}

impl std::fmt::Display for Summary {
    /// `41.3   (38.0 to 42.1, MAD 0.6)`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { median, min, max, mad, .. } = self;
        // Four digits, whatever the size.
        let digits = (3 - median.abs().max(1e-9).log10().floor() as i32).clamp(0, 9) as usize;
        write!(f, "{median:.digits$}   ({min:.digits$} to {max:.digits$}, MAD {mad:.digits$})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads_are_of_the_sorted_values() {
        let summary = Summary::of(vec![9.0, 1.0, 4.0, 3.0]);
        assert_eq!((summary.median, summary.min, summary.max), (3.5, 1.0, 9.0));
        assert_eq!(summary.mad, 1.5); // 0.5, 0.5, 2.5, 5.5
        assert_eq!(summary.all, [9.0, 1.0, 4.0, 3.0]);
        assert_eq!(summary.to_string(), "3.500   (1.000 to 9.000, MAD 1.500)");
        assert_eq!(Summary::of(vec![2.0]).mad, 0.0);
        assert_eq!(Summary::of(vec![]).median, 0.0);
    }
}
