//! What happened on this node, for whoever listens.
//!
//! The newest events are kept in a ring. A listener holds nothing but the id of the last event it was given, so
//! that one that is slow, or that never reads, costs nothing and can hold nobody up; what it comes too late for it
//! is told of as [`EventKind::Lost`]. The ring does not outlive the process, but ids rise over restarts: they
//! begin at the start's time, and whoever comes back with one of an earlier daemon is told that something was lost.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_types::rest::{EndCode, Event, EventKind};
use forkd_types::{SandboxId, Tag};
use tokio::sync::watch;

use crate::host::{Host, unix_now};
use crate::lifecycle::End;

/// How many events are kept.
const KEPT: usize = 8192;

/// How many events a listener is given at a time.
const BATCH: usize = 256;

/// Ids of one second of starting; 2^53, the most that every client can count to, lasts for 270 years.
const IDS_PER_SECOND: u64 = 1 << 20;

/// What happened, before it has a place in the order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct News {
    kind: EventKind,
    sandbox: Option<SandboxId>,
    snapshot: Option<Tag>,
    checkpoint: Option<String>,
    workspace: Option<String>,
    reason: Option<String>,
    code: Option<EndCode>,
}

impl News {
    /// Something of `kind`.
    pub(crate) fn of(kind: EventKind) -> Self {
        Self { kind, sandbox: None, snapshot: None, checkpoint: None, workspace: None, reason: None, code: None }
    }

    /// It is about this sandbox.
    pub(crate) fn sandbox(self, id: &SandboxId) -> Self {
        Self { sandbox: Some(id.clone()), ..self }
    }

    /// It is about this snapshot.
    pub(crate) fn snapshot(self, tag: &Tag) -> Self {
        Self { snapshot: Some(tag.clone()), ..self }
    }

    /// It is about this checkpoint of the sandbox.
    pub(crate) fn checkpoint(self, name: &str) -> Self {
        Self { checkpoint: Some(name.to_owned()), ..self }
    }

    /// It is about this workspace.
    pub(crate) fn workspace(self, name: &str) -> Self {
        Self { workspace: Some(name.to_owned()), ..self }
    }

    /// Why it happened.
    pub(crate) fn because(self, reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..self }
    }

    /// A machine ended like this.
    pub(crate) fn ended(self, end: &End) -> Self {
        Self { code: Some(end.code), ..self.because(end.reason.clone()) }
    }

    fn numbered(self, id: u64) -> Event {
        let Self { kind, sandbox, snapshot, checkpoint, workspace, reason, code } = self;
        Event { id, at_unix: unix_now(), event: kind, sandbox, snapshot, checkpoint, workspace, reason, code }
    }
}

/// What happened, and who wants to know.
#[derive(Debug)]
pub(crate) struct Events {
    ring: Mutex<Ring>,
    /// The id of the newest event, or nothing more to come.
    newest: watch::Sender<Newest>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Newest {
    Event(u64),
    Closed,
}

#[derive(Debug)]
struct Ring {
    events: VecDeque<Event>,
    next: u64,
    /// The last event that is not kept any more, or before which there was none.
    forgotten: u64,
}

impl Events {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self::beginning_at(unix_now() * IDS_PER_SECOND)
    }

    fn beginning_at(id: u64) -> Self {
        let ring = Ring { events: VecDeque::new(), next: id + 1, forgotten: id };
        Self { ring: Mutex::new(ring), newest: watch::Sender::new(Newest::Event(id)) }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody. Never waits for a listener.
    pub(crate) fn tell(&self, news: News) {
        let mut ring = self.ring();
        let id = ring.next;
        ring.next += 1;
        ring.events.push_back(news.numbered(id));
        if ring.events.len() > KEPT
            && let Some(oldest) = ring.events.pop_front()
        {
            ring.forgotten = oldest.id;
        }
        // With the ring held, so that ids rise for those who watch.
        self.newest.send_if_modified(|newest| {
            let open = *newest != Newest::Closed;
            if open {
                *newest = Newest::Event(id);
            }
            open
        });
    }

    /// Lets every listener end once it has been given everything.
    pub(crate) fn close(&self) {
        self.newest.send_replace(Newest::Closed);
    }

    /// The id of the newest event.
    fn newest_id(&self) -> u64 {
        self.ring().next - 1
    }

    /// What came after event `after`, oldest first, at most [`BATCH`].
    fn after(&self, after: u64) -> Vec<Event> {
        let ring = self.ring();
        let mut found = Vec::new();
        // An id that was never given is one of another daemon, whose clock was ahead.
        let lost = after < ring.forgotten || after >= ring.next;
        if lost {
            let (kind, id) = (EventKind::Lost, ring.forgotten);
            let reason = "some events are not kept any more; list what there is anew";
            found.push(News::of(kind).because(reason).numbered(id));
        }
        let from = if lost { 0 } else { ring.events.partition_point(|event| event.id <= after) };
        found.extend(ring.events.iter().skip(from).take(BATCH).cloned());
        found
    }
}

/// One who wants to know; see [`crate::Node::listen`].
pub struct Listener {
    host: Arc<Host>,
    watching: watch::Receiver<Newest>,
    /// The last event that was given.
    last: u64,
    /// Only what is about this sandbox.
    sandbox: Option<SandboxId>,
}

impl Listener {
    pub(crate) fn new(host: &Arc<Host>, after: Option<u64>, sandbox: Option<SandboxId>) -> Self {
        let watching = host.events.newest.subscribe();
        let last = after.unwrap_or_else(|| host.events.newest_id());
        Self { host: Arc::clone(host), watching, last, sandbox }
    }

    /// The id of the last event that was given, or after which it listens.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// The next events, at least one; nothing when there are no more to come.
    pub async fn next(&mut self) -> Option<Vec<Event>> {
        loop {
            // Marked as seen before the ring is looked at: what comes in between is seen twice, never missed.
            let closed = *self.watching.borrow_and_update() == Newest::Closed;
            let found = self.host.events.after(self.last);
            match found.last() {
                Some(newest) => {
                    self.last = newest.id;
                    let found: Vec<Event> = found.into_iter().filter(|event| self.wants(event)).collect();
                    if !found.is_empty() {
                        return Some(found);
                    }
                }
                None if closed => return None,
                None => {
                    if self.watching.changed().await.is_err() {
                        return None;
                    }
                }
            }
        }
    }

    fn wants(&self, event: &Event) -> bool {
        event.event == EventKind::Lost || self.sandbox.as_ref().is_none_or(|id| event.sandbox.as_ref() == Some(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tell(events: &Events, count: usize) {
        for _ in 0..count {
            events.tell(News::of(EventKind::SnapshotReady));
        }
    }

    /// Everything that a listener is given that has seen `last`, and whether it was told of a loss.
    fn read_from(events: &Events, mut last: u64) -> (Vec<u64>, bool) {
        let (mut ids, mut lost) = (Vec::new(), false);
        loop {
            let batch = events.after(last);
            let Some(newest) = batch.last() else { return (ids, lost) };
            last = newest.id;
            lost |= batch.iter().any(|event| event.event == EventKind::Lost);
            ids.extend(batch.iter().filter(|event| event.event != EventKind::Lost).map(|event| event.id));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_listener_is_given_all_that_came_after_or_told_of_a_loss(count in 0usize..KEPT * 2, seen in 0usize..KEPT * 2) {
            let events = Events::beginning_at(1000);
            tell(&events, count);
            let newest = 1000 + count as u64;
            let seen = (1000 + seen as u64).min(newest);
            let (ids, lost) = read_from(&events, seen);
            let kept = newest.saturating_sub(KEPT as u64).max(1000);
            prop_assert_eq!(lost, seen < kept);
            prop_assert_eq!(ids, (seen.max(kept) + 1..=newest).collect::<Vec<_>>());
        }
    }

    #[test]
    fn ids_of_another_daemon_are_told_to_be_lost_whether_they_are_older_or_newer() {
        let events = Events::beginning_at(1000);
        tell(&events, 3);
        for foreign in [7, 5000] {
            assert_eq!(read_from(&events, foreign), (vec![1001, 1002, 1003], true), "{foreign}");
        }
        assert_eq!(read_from(&Events::beginning_at(1000), 7), (vec![], true));
    }
}
