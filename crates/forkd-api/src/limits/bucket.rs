//! A token bucket: what is not used within the rate's own time is lost.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// So many requests a second or a minute; as many may come at once after a pause of that time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    count: NonZeroU32,
    per: Duration,
}

/// A text that is no rate.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no rate; write how many requests a second or a minute, at least 1, as in 50/s or 600/m")]
pub struct RateError(String);

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let wrong = || RateError(text.to_owned());
        let (count, unit) = text.split_once('/').ok_or_else(wrong)?;
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            _ => return Err(wrong()),
        };
        Ok(Self { count: count.parse().map_err(|_| wrong())?, per: Duration::from_secs(seconds) })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = if self.per == Duration::from_secs(1) { "second" } else { "minute" };
        write!(f, "{} requests a {unit}", self.count)
    }
}

/// What one client may still take.
#[derive(Debug)]
pub(super) struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    pub(super) fn full(rate: Rate, now: Instant) -> Self {
        Self { left: f64::from(rate.count.get()), at: now }
    }

    /// Takes one, or says how long it takes until there is one.
    pub(super) fn take(&mut self, rate: Rate, now: Instant) -> Result<(), Duration> {
        let (count, per) = (f64::from(rate.count.get()), rate.per.as_secs_f64());
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + elapsed * count / per).min(count);
        self.at = self.at.max(now);
        if self.left >= 1.0 {
            self.left -= 1.0;
            Ok(())
        } else {
            Err(Duration::from_secs_f64((1.0 - self.left) * per / count))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rates_read_as_written_and_others_are_refused() {
        assert_eq!("50/s".parse::<Rate>().expect("good").to_string(), "50 requests a second");
        assert_eq!("1/m".parse::<Rate>().expect("good").to_string(), "1 requests a minute");
        for bad in ["", "50", "0/s", "-1/s", "5/h", "5/", "/s", "5 /s", "99999999999/s", "1.5/s"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// Whatever the arrivals, no more than the rate's count and what flowed in since is taken, and whoever waits
        /// as told is served.
        #[test]
        fn no_more_than_the_rate_is_taken(count in 1u32..200, gaps in prop::collection::vec(0u64..400, 1..200)) {
            let rate = Rate { count: count.try_into().expect("at least 1"), per: Duration::from_secs(1) };
            let start = Instant::now();
            let mut bucket = Bucket::full(rate, start);
            let (mut now, mut taken) = (start, 0u32);
            for gap in gaps {
                now += Duration::from_millis(gap);
                match bucket.take(rate, now) {
                    Ok(()) => taken += 1,
                    Err(wait) => {
                        prop_assert!(wait <= Duration::from_secs(1));
                        now += wait + Duration::from_micros(1);
                        prop_assert!(bucket.take(rate, now).is_ok());
                        taken += 1;
                    }
                }
                let most = f64::from(count) * (1.0 + (now - start).as_secs_f64());
                prop_assert!(f64::from(taken) <= most + 0.001, "{taken} of {most}");
            }
        }
    }
}
