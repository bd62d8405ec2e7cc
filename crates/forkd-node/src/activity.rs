//! Whether something is being run in a sandbox, and when that was last so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::host::unix_now;

/// What is known of the use of one sandbox. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Activity(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    users: AtomicUsize,
    last_unix: AtomicU64,
}

impl Activity {
    /// In use just now.
    pub(crate) fn now() -> Self {
        Self(Arc::new(Counts { users: AtomicUsize::new(0), last_unix: AtomicU64::new(unix_now()) }))
    }

    /// Notes that it is used now.
    pub(crate) fn touch(&self) {
        self.0.last_unix.store(unix_now(), Ordering::Relaxed);
    }

    /// Notes that it is used until what is returned is dropped.
    pub(crate) fn begin(&self) -> InUse {
        self.touch();
        self.0.users.fetch_add(1, Ordering::Relaxed);
        InUse(self.clone())
    }

    /// When it was last in use; now, while it is.
    pub(crate) fn last_unix(&self) -> u64 {
        if self.0.users.load(Ordering::Relaxed) > 0 {
            self.touch();
        }
        self.0.last_unix.load(Ordering::Relaxed)
    }
}

/// A sandbox is in use while this is held, and is not suspended for being idle.
#[derive(Debug)]
pub struct InUse(Activity);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.touch();
        self.0.0.users.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_is_never_idle() {
        let activity = Activity::now();
        activity.0.last_unix.store(7, Ordering::Relaxed);
        assert_eq!(activity.last_unix(), 7);
        let (one, other) = (activity.begin(), activity.begin());
        activity.0.last_unix.store(7, Ordering::Relaxed);
        drop(one);
        activity.0.last_unix.store(7, Ordering::Relaxed);
        assert!(activity.last_unix() > 7, "the other one still uses it");
        activity.0.last_unix.store(7, Ordering::Relaxed);
        drop(other);
        assert!(activity.last_unix() > 7, "it was used until now");
    }
}
