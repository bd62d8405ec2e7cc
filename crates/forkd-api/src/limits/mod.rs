//! How much each client may ask for: so many requests in a time, and so many at once.

mod bucket;
mod stall;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::auth::Principal;

pub use bucket::{Rate, RateError};
pub(crate) use stall::steady;

use bucket::Bucket;

/// How soon a client that has too much under way may try again.
const BUSY_RETRY: Duration = Duration::from_secs(1);

/// The limits of each client; none means none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RequestLimits {
    /// How many requests in a time.
    pub rate: Option<Rate>,
    /// How many requests at once. A connection that changed its protocol counts as a connection, not as a request.
    pub in_flight: Option<usize>,
}

/// Why a request is not taken now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Refusal {
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) retry_after: Duration,
}

/// A request's place among those of its client; none when there is no limit.
pub(crate) type Place = Option<OwnedSemaphorePermit>;

/// What every client has used of its limits.
#[derive(Debug)]
pub(crate) struct Limits {
    limits: RequestLimits,
    /// By token. A token that is revoked leaves a few bytes here; only administrators make tokens.
    clients: Mutex<HashMap<Option<String>, Arc<Client>>>,
}

#[derive(Debug)]
struct Client {
    bucket: Option<Mutex<Bucket>>,
    places: Option<Arc<Semaphore>>,
}

impl Limits {
    pub(crate) fn new(limits: RequestLimits) -> Self {
        Self { limits, clients: Mutex::default() }
    }

    /// Lets a request of `principal` in, or says why not and until when.
    pub(crate) fn admit(&self, principal: &Principal) -> Result<Place, Refusal> {
        if self.limits == RequestLimits::default() {
            return Ok(None);
        }
        let client = self.client(&principal.token);
        if let (Some(bucket), Some(rate)) = (&client.bucket, self.limits.rate) {
            let taken = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(rate, Instant::now());
            taken.map_err(|wait| Refusal {
                code: "rate_limited",
                message: format!("{principal} asked more than {rate}"),
                retry_after: wait,
            })?;
        }
        let Some(places) = &client.places else { return Ok(None) };
        Arc::clone(places).try_acquire_owned().map(Some).map_err(|_| Refusal {
            code: "too_many_in_flight",
            message: format!(
                "{principal} has {} requests under way, the most it may have",
                self.limits.in_flight.unwrap_or_default()
            ),
            retry_after: BUSY_RETRY,
        })
    }

    fn client(&self, token: &Option<String>) -> Arc<Client> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(token) {
            return Arc::clone(client);
        }
        let client = Arc::new(Client {
            bucket: self.limits.rate.map(|rate| Mutex::new(Bucket::full(rate, Instant::now()))),
            places: self.limits.in_flight.map(|most| Arc::new(Semaphore::new(most))),
        });
        clients.insert(token.clone(), Arc::clone(&client));
        client
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Scope;

    fn principal(name: &str) -> Principal {
        Principal { token: Some(name.to_owned()), scope: Scope::Spawn }
    }

    #[test]
    fn each_client_has_limits_of_its_own() {
        let limits = Limits::new(RequestLimits { rate: None, in_flight: Some(2) });
        let (ann, bob) = (principal("ann"), principal("bob"));
        let (first, _second) = (limits.admit(&ann).expect("one"), limits.admit(&ann).expect("two"));
        let refusal = limits.admit(&ann).expect_err("three");
        assert_eq!((refusal.code, refusal.retry_after), ("too_many_in_flight", BUSY_RETRY));
        assert!(refusal.message.contains("token ann") && refusal.message.contains('2'), "{}", refusal.message);
        limits.admit(&bob).expect("bob's first");
        drop(first);
        limits.admit(&ann).expect("a place is free again");
    }

    #[test]
    fn the_rate_is_refused_with_the_time_to_wait() {
        let limits = Limits::new(RequestLimits { rate: Some("2/m".parse().expect("rate")), in_flight: None });
        let ann = principal("ann");
        assert!(limits.admit(&ann).is_ok() && limits.admit(&ann).is_ok());
        let refusal = limits.admit(&ann).expect_err("three");
        assert_eq!(refusal.code, "rate_limited");
        assert!((28..=30).contains(&refusal.retry_after.as_secs()), "{:?}", refusal.retry_after);
        assert!(limits.admit(&principal("bob")).is_ok());
    }
}
