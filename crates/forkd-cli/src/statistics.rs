//! Percentiles and medians of measured values.

use serde::Serialize;

/// What a list of measurements comes to.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub(crate) struct Summary {
    /// How many values.
    pub(crate) count: usize,
    /// Smallest.
    pub(crate) min: f64,
    /// Half are at most this.
    pub(crate) p50: f64,
    /// Nine in ten are at most this.
    pub(crate) p90: f64,
    /// 19 in twenty are at most this.
    pub(crate) p95: f64,
    /// 99 in a hundred are at most this.
    pub(crate) p99: f64,
    /// Largest.
    pub(crate) max: f64,
    /// Arithmetic mean.
    pub(crate) mean: f64,
}

/// Summarises `values`; all zeros when there are none.
pub(crate) fn summarise(values: impl IntoIterator<Item = f64>) -> Summary {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
        return Summary::default();
    };
    Summary {
        count: sorted.len(),
        min,
        p50: percentile(&sorted, 50.0),
        p90: percentile(&sorted, 90.0),
        p95: percentile(&sorted, 95.0),
        p99: percentile(&sorted, 99.0),
        max,
        mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
    }
}

/// The median of `values`, 0 of none.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    summarise(values).p50
}

/// The `percent`th percentile of ascending, non-empty `sorted`, linear between neighbours.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let position = percent / 100.0 * (sorted.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = position.ceil() as usize;
    sorted[below] + (sorted[above] - sorted[below]) * (position - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_values() {
        let summary = summarise((1..=101).rev().map(f64::from));
        assert_eq!((summary.p50, summary.p90, summary.p99), (51.0, 91.0, 100.0));
        assert_eq!((summary.min, summary.max, summary.mean, summary.count), (1.0, 101.0, 51.0, 101));
        assert_eq!(median([1.0, 2.0]), 1.5);
        assert_eq!(summarise([]).p50, 0.0);
    }

    proptest! {
        #[test]
        fn percentiles_are_ordered(values in proptest::collection::vec(0.0f64..1e9, 1..50)) {
            let s = summarise(values);
            prop_assert!(s.min <= s.p50 && s.p50 <= s.p90 && s.p90 <= s.p95 && s.p95 <= s.p99 && s.p99 <= s.max);
        }
    }
}
