//! The open connections of a listener.
//!
//! ```text
//!            bytes come            header is there
//! Silent ───────────────► Heading ────────────────► Busy ──► (other protocol: Busy for good)
//!   ▲ │ idle, evicted        │ too slow, evicted     │
//!   │ └────────► (closed) ◄──┘                       │
//!   └────────────────── answer is sent ──────────────┘
//! ```
//!
//! A line that is *Silent* or *Heading* has no request under way, and can be closed when others need its place. The
//! one that has been so for longest goes first; those that nobody has identified himself on go before all others,
//! so that strangers cannot push clients out.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::ServerLimits;

/// How often one looks for a line to close while all places are taken.
const RETRY: Duration = Duration::from_millis(20);

/// How long a line must have been silent to be closed for another: the first request may be on its way in, or the end
/// of the last answer on its way out.
const REST: Duration = Duration::from_millis(100);

/// All connections of one listener.
#[derive(Debug)]
pub(super) struct Lines {
    listener: &'static str,
    limits: ServerLimits,
    places: Arc<Semaphore>,
    serial: AtomicU64,
    /// How many have been asked to close and have not yet.
    leaving: AtomicUsize,
    /// Those without a request under way, in the order in which they are to go.
    silent: Mutex<BTreeMap<Key, Arc<Line>>>,
}

/// By rank, then the oldest.
type Key = (Rank, u64);

/// Who goes before whom.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Rank {
    /// No request was ever made on it.
    Unused,
    /// Only requests of nobody in particular: probes, and those that were refused.
    Stranger,
    /// Requests of somebody who may be here.
    Client,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Line {
    lines: Arc<Lines>,
    state: Mutex<State>,
    hang_up: Notify,
    /// It counts among those that have been asked to close.
    asked: AtomicBool,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// Since when it is in this phase.
    since: Instant,
    /// Where it is among the silent.
    key: Option<Key>,
    /// A request has been answered on it.
    answered: bool,
    /// And somebody who may be here had made it.
    known: bool,
    place: Option<OwnedSemaphorePermit>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Silent,
    Heading,
    Busy,
    Closed,
}

impl Lines {
    pub(super) fn new(listener: &'static str, limits: ServerLimits) -> Arc<Self> {
        let places = Arc::new(Semaphore::new(limits.connections.max(1)));
        Arc::new(Self {
            listener,
            limits,
            places,
            serial: AtomicU64::default(),
            leaving: AtomicUsize::default(),
            silent: Mutex::default(),
        })
    }

    /// A line for a new connection, as soon as there is a place for it.
    pub(super) async fn admit(self: &Arc<Self>) -> Arc<Line> {
        let place = loop {
            if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
                break place;
            }
            self.evict_one();
            if let Ok(place) = tokio::time::timeout(RETRY, Arc::clone(&self.places).acquire_owned()).await {
                break place.expect("the semaphore is never closed");
            }
        };
        self.open(place)
    }

    fn open(self: &Arc<Self>, place: OwnedSemaphorePermit) -> Arc<Line> {
        let now = Instant::now();
        let state =
            State { phase: Phase::Busy, since: now, key: None, answered: false, known: false, place: Some(place) };
        let line = Arc::new(Line {
            lines: Arc::clone(self),
            state: Mutex::new(state),
            hang_up: Notify::new(),
            asked: AtomicBool::new(false),
        });
        line.rest(&mut line.state());
        metrics::gauge!("forkd_connections_open", "listener" => self.listener).increment(1.0);
        line
    }

    /// Asks the line that is to go first to close, if there is one and none has been asked that is still there.
    pub(super) fn evict_one(&self) {
        if self.leaving.load(Ordering::Acquire) > 0 {
            return;
        }
        let mut silent = self.silent();
        let Some((&key, line)) = silent.first_key_value() else { return };
        // While the first may stay, so may those after it: a flood of strangers makes strangers wait, not clients go.
        if !line.state.try_lock().is_ok_and(|state| state.since.elapsed() >= REST) {
            return;
        }
        if let Some(line) = silent.remove(&key) {
            metrics::counter!("forkd_connections_evicted_total", "listener" => self.listener).increment(1);
            line.asked.store(true, Ordering::Release);
            self.leaving.fetch_add(1, Ordering::AcqRel);
            line.hang_up.notify_one();
        }
    }

    fn silent(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<Line>>> {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// Bytes came from the peer.
    pub(super) fn heard(&self) {
        let mut state = self.state();
        if state.phase == Phase::Silent {
            state.phase = Phase::Heading;
            // A new connection has one limit for all until its first header is there.
            if state.answered {
                state.since = Instant::now();
            }
        }
    }

    /// A request is there.
    pub(super) fn begin(self: &Arc<Self>) -> Busy {
        let mut state = self.state();
        self.leave_silent(&mut state);
        (state.phase, state.since) = (Phase::Busy, Instant::now());
        drop(state);
        Busy { line: Arc::clone(self), known: false, for_good: false }
    }

    /// The connection is gone.
    pub(super) fn close(&self) {
        let mut state = self.state();
        self.leave_silent(&mut state);
        if state.phase != Phase::Closed {
            (state.phase, state.place) = (Phase::Closed, None);
            metrics::gauge!("forkd_connections_open", "listener" => self.lines.listener).decrement(1.0);
        }
    }

    /// Whether no request is under way.
    pub(super) fn is_at_rest(&self) -> bool {
        self.state().phase != Phase::Busy
    }

    /// Ends when the line is to be closed: it is overdue, or its place is needed.
    pub(super) async fn hung_up(&self) {
        loop {
            let Some(patience) = self.patience(Instant::now()) else { return };
            tokio::select! {
                () = tokio::time::sleep(patience) => {}
                // A request may have come in the meantime; then it is not this line that goes.
                () = self.hang_up.notified() => if self.is_at_rest() { return },
            }
        }
    }

    /// How long nobody has to look whether the line is overdue; none when it is.
    fn patience(&self, now: Instant) -> Option<Duration> {
        let ServerLimits { header, idle, .. } = self.lines.limits;
        let state = self.state();
        let limit = match state.phase {
            // It may become silent and late within this.
            Phase::Busy => return Some(header.min(idle)),
            Phase::Silent if state.answered => idle,
            Phase::Silent | Phase::Heading => header,
            Phase::Closed => return None,
        };
        let left = limit.checked_sub(now.saturating_duration_since(state.since)).filter(|left| !left.is_zero());
        // A header may begin at any time, and has a limit of its own.
        left.map(|left| left.min(header))
    }

    /// Nothing is under way.
    fn rest(self: &Arc<Self>, state: &mut State) {
        let rank = match (state.answered, state.known) {
            (_, true) => Rank::Client,
            (true, false) => Rank::Stranger,
            (false, false) => Rank::Unused,
        };
        let key = (rank, self.lines.serial.fetch_add(1, Ordering::Relaxed));
        (state.phase, state.since, state.key) = (Phase::Silent, Instant::now(), Some(key));
        self.lines.silent().insert(key, Arc::clone(self));
    }

    fn leave_silent(&self, state: &mut State) {
        if let Some(key) = state.key.take() {
            self.lines.silent().remove(&key);
        }
        // After that: who asks lines to close does so under the lock of the silent ones.
        if self.asked.swap(false, Ordering::AcqRel) {
            self.lines.leaving.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request under way; the line is silent again when this is dropped.
#[derive(Debug)]
pub(super) struct Busy {
    line: Arc<Line>,
    known: bool,
    for_good: bool,
}

impl Busy {
    /// Somebody who may be here made the request.
    pub(super) fn is_known(&mut self) {
        self.known = true;
    }

    /// The connection changes its protocol: it is never silent again.
    pub(super) fn for_good(mut self) {
        self.for_good = true;
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.line.state();
        if !self.for_good && state.phase == Phase::Busy {
            state.answered = true;
            state.known |= self.known;
            self.line.rest(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(connections: usize) -> Arc<Lines> {
        let limits = ServerLimits { connections, header: Duration::from_secs(10), idle: Duration::from_secs(75) };
        Lines::new("test", limits)
    }

    async fn within_moments<T>(what: impl Future<Output = T>) -> Option<T> {
        tokio::time::timeout(Duration::from_millis(300), what).await.ok()
    }

    #[tokio::test]
    async fn the_longest_silent_stranger_goes_before_clients_and_nobody_goes_while_all_work() {
        let lines = lines(3);
        let (client, first, second) = (lines.admit().await, lines.admit().await, lines.admit().await);
        let mut request = client.begin();
        request.is_known();
        drop(request);
        tokio::time::sleep(REST).await;
        let admit = || {
            let lines = Arc::clone(&lines);
            tokio::spawn(async move { lines.admit().await })
        };
        let admitting = admit();
        within_moments(first.hung_up()).await.expect("the older stranger is asked to go");
        let others = async {
            tokio::select! { () = client.hung_up() => {}, () = second.hung_up() => {} }
        };
        assert!(within_moments(others).await.is_none(), "one place is enough, however long it takes");
        first.close();
        let third = admitting.await.expect("admitted");
        let admitting = admit();
        within_moments(second.hung_up()).await.expect("now it is the oldest stranger");
        second.close();
        let fourth = admitting.await.expect("admitted");
        let requests = (client.begin(), third.begin(), fourth.begin());
        assert!(within_moments(lines.admit()).await.is_none(), "new ones wait while all work");
        drop(requests.1);
        tokio::time::sleep(REST).await;
        let admitting = admit();
        within_moments(third.hung_up()).await.expect("it has become silent");
        third.close();
        admitting.await.expect("admitted");
    }

    #[tokio::test]
    async fn each_phase_has_its_limit() {
        let line = lines(1).admit().await;
        let start = line.state().since;
        let at = |seconds: u64| line.patience(start + Duration::from_secs(seconds)).map(|left| left.as_secs());
        assert_eq!((at(0), at(9), at(10)), (Some(10), Some(1), None), "a new line has the header's limit");
        line.heard();
        assert_eq!((at(9), at(10)), (Some(1), None), "and its first bytes do not prolong it");
        let request = line.begin();
        assert_eq!(at(1000), Some(10), "a request takes what it takes");
        drop(request);
        line.state().since = start;
        assert_eq!((at(0), at(70), at(75)), (Some(10), Some(5), None), "then it may be idle");
        line.heard();
        line.state().since = start;
        assert_eq!((at(9), at(10)), (Some(1), None), "but a header has to go on");
        line.begin().for_good();
        assert_eq!(at(100_000), Some(10), "another protocol has no limit");
        line.close();
        assert_eq!(at(0), None);
    }

    #[tokio::test]
    async fn a_request_that_comes_just_in_time_saves_its_line() {
        let lines = lines(1);
        let line = lines.admit().await;
        tokio::time::sleep(REST).await;
        lines.evict_one();
        let _request = line.begin();
        assert!(within_moments(line.hung_up()).await.is_none());
    }
}
