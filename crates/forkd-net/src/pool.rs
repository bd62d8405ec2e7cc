//! Slots made ahead, leased, cleaned and taken away.
//!
//! ```text
//!            make                  lease                  the lease ends
//! (nothing) ─────► ready ────────────────────► leased ─────────────────► used
//!     ▲              ▲                            ▲                       │
//!     │              └────────── clean ───────────┼───────────────────────┤ every process that was
//!     └───────────── remove ──────────────────────┼───────────────────────┘ given the tap has ended
//!                                                 └── adopt: an earlier daemon leased it
//! ```
//!
//! A few threads do all that takes time. Whoever asks for a slot while none is ready is served before the pool is
//! filled. A slot is cleaned or removed only when no process has its tap any more, so that dropping a lease never
//! cuts a running machine off.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::sync::oneshot;

use crate::claims::{Claims, Tenant};
use crate::error::NetError;
use crate::inspection::host_routes;
use crate::plan::{AddressPlan, Cidr, USUAL_RANGES};
use crate::slot::{self, Ground, Slot};
use crate::{firewall, namespace};

/// How long the pool is not filled after that failed.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(10);

/// How many slots are kept ready at most because so many were once leased at the same time.
const KEPT: usize = 1024;

/// How long the processes of a lease that ended are waited for before others get their turn.
const ENDING_LIMIT: Duration = Duration::from_secs(2);

/// What networks there are to be.
#[derive(Clone, Debug)]
pub struct NetworksConfig {
    /// How many are made ahead.
    pub ready: usize,
    /// The range of the links' addresses; a free one of [`USUAL_RANGES`] unless given.
    pub range: Option<Cidr>,
    /// A path that exists while whoever made slots may come back for them; slots of others are left alone.
    pub owner: PathBuf,
    /// Where namespaces get names.
    pub namespaces: PathBuf,
    /// Where slots are claimed.
    pub claims: PathBuf,
}

impl NetworksConfig {
    /// Slots of `owner` at the usual places.
    pub fn new(owner: &Path) -> Self {
        Self {
            ready: 16,
            range: None,
            owner: owner.to_owned(),
            namespaces: "/run/netns".into(),
            claims: "/run/forkd/networks".into(),
        }
    }
}

/// How many slots there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SlotCounts {
    /// Ready to be leased.
    pub ready: usize,
    /// Leased.
    pub leased: usize,
    /// Used, and not clean yet.
    pub used: usize,
}

/// All networks of a daemon.
#[derive(Clone)]
pub struct Networks {
    shared: Arc<Shared>,
    workers: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

struct Shared {
    ground: Ground,
    claims: Claims,
    target: usize,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Slot>,
    waiting: VecDeque<Waiting>,
    used: VecDeque<Used>,
    /// Slots of an earlier daemon that nobody has asked for yet.
    found: HashMap<String, (u32, Tenant)>,
    /// Numbers that are taken as far as this daemon knows.
    taken: BTreeSet<u32>,
    leased: usize,
    /// The most that were leased at the same time.
    peak: usize,
    making: usize,
    busy: usize,
    paused_until: Option<Instant>,
    closed: bool,
}

struct Waiting {
    tenant: Tenant,
    answer: oneshot::Sender<Result<Lease, NetError>>,
}

struct Used {
    what: Rest,
    /// The processes that were given the tap.
    users: Vec<OwnedFd>,
}

/// What is left of a lease.
enum Rest {
    /// A slot that can be used again.
    Slot(Slot),
    /// One that is to go.
    Index(u32),
}

/// What a worker does next.
enum Job {
    Make,
    Settle(Used),
}

impl Networks {
    /// Takes over what an earlier daemon of the same owner leased, sets up what the host needs, and begins to fill
    /// the pool. One slot is made at once, so that a host that cannot have any says so.
    ///
    /// The calling thread's namespace becomes the one that guests get out through. Blocks.
    pub fn start(config: &NetworksConfig) -> Result<Self, NetError> {
        let host = namespace::current().map_err(NetError::system("open this process's network namespace"))?;
        for directory in [&config.namespaces, &config.claims] {
            std::fs::create_dir_all(directory).map_err(NetError::system(format!("create {}", directory.display())))?;
        }
        let claims = Claims::open(&config.claims, &config.owner)
            .map_err(NetError::system(format!("create {}", config.claims.display())))?;
        let plan = plan(config.range)?;
        let ground = Ground { host, namespaces: config.namespaces.clone(), plan };
        firewall::apply("set this host's rules", &firewall::host_rules(plan.range()))?;
        forward_packets()?;
        let mut state = State::default();
        for (index, tenant) in claims.own().map_err(NetError::system("read the claims of networks"))? {
            state.taken.insert(index);
            // Of two with one tenant, the first was about to be given back.
            let left = match tenant {
                Some(tenant) => state.found.insert(tenant.name.clone(), (index, tenant)).map(|(index, _)| index),
                None => Some(index),
            };
            state.used.extend(left.map(|index| Used { what: Rest::Index(index), users: Vec::new() }));
        }
        let shared =
            Arc::new(Shared { ground, claims, target: config.ready, state: Mutex::new(state), work: Condvar::new() });
        let first = shared.make()?;
        shared.lock().ready.push_back(first);
        let networks = Self { shared, workers: Arc::default() };
        networks.start_workers()?;
        Ok(networks)
    }

    fn start_workers(&self) -> Result<(), NetError> {
        // The kernel makes and removes namespaces and interfaces one after another; more threads would only wait.
        let count = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).clamp(1, 4);
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..count {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("forkd-networks".to_owned()).spawn(move || shared.serve());
            workers.push(thread.map_err(NetError::system("start a thread for networks"))?);
        }
        Ok(())
    }

    /// Leases a slot: at once when one is ready, else as soon as one was made.
    pub async fn lease(&self, tenant: Tenant) -> Result<Lease, NetError> {
        let (answer, made) = oneshot::channel();
        let ready = {
            let mut state = self.shared.lock();
            if state.closed {
                return Err(NetError::Closed);
            }
            match state.ready.pop_front() {
                Some(slot) => {
                    state.count_lease();
                    Ok(slot)
                }
                None => {
                    state.waiting.push_back(Waiting { tenant: tenant.clone(), answer });
                    Err(made)
                }
            }
        };
        self.shared.work.notify_one();
        match ready {
            Ok(slot) => Lease::begin(&self.shared, slot, tenant),
            Err(made) => made.await.unwrap_or(Err(NetError::Closed)),
        }
    }

    /// The slot that an earlier daemon leased to `name`, whose monitor is process `pid`, which `pidfd` holds.
    pub fn adopt(&self, name: &str, pid: i32, pidfd: BorrowedFd<'_>) -> Option<Lease> {
        let (index, tenant) = self.shared.lock().found.remove(name)?;
        match Slot::adopt(&self.shared.ground, index, pid, pidfd) {
            Ok(slot) => {
                self.shared.lock().count_lease();
                let given = Given { taps: 1, users: pidfd.try_clone_to_owned().into_iter().collect() };
                Some(Lease { shared: Arc::clone(&self.shared), slot: Some(slot), tenant, given: Mutex::new(given) })
            }
            Err(error) => {
                tracing::warn!(sandbox = name, slot = index, %error, "cannot take over the network of a sandbox");
                self.shared.give_up(index);
                None
            }
        }
    }

    /// Removes what an earlier daemon leased and nobody has asked for.
    pub fn sweep(&self) {
        let found: Vec<_> = self.shared.lock().found.drain().collect();
        for (name, (index, _)) in found {
            tracing::info!(sandbox = name, slot = index, "removing a network that an earlier daemon left");
            self.shared.give_up(index);
        }
    }

    /// How many slots there are.
    pub fn counts(&self) -> SlotCounts {
        let state = self.shared.lock();
        SlotCounts { ready: state.ready.len(), leased: state.leased, used: state.used.len() + state.busy }
    }

    /// Ends the pool: slots that nobody has go, those that are leased stay for the next daemon. Blocks.
    pub fn close(&self) {
        let ready = {
            let mut state = self.shared.lock();
            state.closed = true;
            state.waiting.clear();
            std::mem::take(&mut state.ready)
        };
        self.shared.work.notify_all();
        let workers = std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        for worker in workers {
            if worker.join().is_err() {
                tracing::error!("a thread for networks panicked");
            }
        }
        for slot in ready {
            self.shared.remove(slot.index, || Ok(()));
        }
        if self.shared.claims.none_left() {
            let range = self.shared.ground.plan.range();
            if let Err(error) = firewall::apply("remove this host's rules", &firewall::no_host_rules(range)) {
                tracing::warn!(%error, "cannot remove this host's rules");
            }
        }
    }
}

impl State {
    fn count_lease(&mut self) {
        self.leased += 1;
        self.peak = self.peak.max(self.leased);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker's life.
    fn serve(self: &Arc<Self>) {
        while let Some(job) = self.next_job() {
            match job {
                Job::Make => self.fill(),
                Job::Settle(used) => self.settle(used),
            }
        }
    }

    /// Waits for something to do; none when the pool is closed and what was used is settled.
    fn next_job(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            // Those that wait first; then what was used, which may serve them without making anything.
            if !state.closed && state.waiting.len() > state.making + state.used.len() {
                state.making += 1;
                return Some(Job::Make);
            }
            if let Some(used) = state.used.pop_front() {
                // At the end only what needs no waiting: machines may run on that have their taps.
                if !state.closed || !used.is_in_use() {
                    state.busy += 1;
                    return Some(Job::Settle(used));
                }
                continue;
            }
            if state.closed {
                return None;
            }
            let now = Instant::now();
            let pause = state.paused_until.and_then(|until| until.checked_duration_since(now));
            let wanted = state.ready.len() + state.making < self.target || state.waiting.len() > state.making;
            state = match pause {
                None if wanted => {
                    state.making += 1;
                    return Some(Job::Make);
                }
                Some(pause) if wanted => self.work.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0,
                _ => self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Makes one slot, for who waits or for the pool.
    fn fill(self: &Arc<Self>) {
        let made = self.make();
        let mut state = self.lock();
        state.making -= 1;
        match made {
            Ok(slot) => self.offer(state, slot),
            Err(error) => {
                state.paused_until = Some(Instant::now() + PAUSE_AFTER_FAILURE);
                match state.waiting.pop_front() {
                    Some(waiting) => {
                        drop(state);
                        let _ = waiting.answer.send(Err(error));
                    }
                    None => tracing::warn!(%error, "cannot make a network ahead"),
                }
            }
        }
    }

    /// Gives a slot to the first who waits, or to the pool.
    fn offer(self: &Arc<Self>, mut state: MutexGuard<'_, State>, slot: Slot) {
        while let Some(Waiting { tenant, answer }) = state.waiting.pop_front() {
            if answer.is_closed() {
                continue;
            }
            state.count_lease();
            drop(state);
            // One who went away meanwhile drops the lease, which brings the slot back.
            let _ = answer.send(Lease::begin(self, slot, tenant));
            return;
        }
        if !state.closed && state.ready.len() < self.target.max(state.peak.min(KEPT)) {
            state.ready.push_back(slot);
            return;
        }
        drop(state);
        let index = slot.index;
        self.remove(index, move || {
            drop(slot);
            Ok(())
        });
    }

    fn make(&self) -> Result<Slot, NetError> {
        let began = Instant::now();
        let index = self.take_index()?;
        match Slot::make(&self.ground, index) {
            Ok(slot) => {
                observe("make", began);
                Ok(slot)
            }
            Err(error) => {
                self.give_back(index);
                Err(error)
            }
        }
    }

    /// A number that nobody has.
    fn take_index(&self) -> Result<u32, NetError> {
        let plan = self.ground.plan;
        for index in 1..=plan.slots() {
            if !self.lock().taken.insert(index) {
                continue;
            }
            // Somebody else's namespaces may be called so too.
            if self.ground.is_occupied(index) {
                continue;
            }
            match self.claims.take(index) {
                Ok(true) => return Ok(index),
                // It may be free the next time.
                Ok(false) => {
                    self.lock().taken.remove(&index);
                }
                Err(error) => {
                    self.lock().taken.remove(&index);
                    return Err(NetError::system(format!("claim network {index}"))(error));
                }
            }
        }
        Err(NetError::Full { range: plan.range(), slots: plan.slots() })
    }

    fn give_back(&self, index: u32) {
        self.claims.give_back(index);
        self.lock().taken.remove(&index);
    }

    /// Has slot `index` removed.
    fn give_up(&self, index: u32) {
        self.lock().used.push_back(Used { what: Rest::Index(index), users: Vec::new() });
        self.work.notify_one();
    }

    /// Cleans or removes what is left of a lease.
    fn settle(self: &Arc<Self>, mut used: Used) {
        if !used.wait(ENDING_LIMIT) {
            let mut state = self.lock();
            state.busy -= 1;
            state.used.push_back(used);
            return;
        }
        let began = Instant::now();
        match used.what {
            Rest::Slot(slot) => match slot.clean(&self.ground) {
                Ok(()) => {
                    self.claims.end_lease(slot.index);
                    observe("clean", began);
                    let mut state = self.lock();
                    state.busy -= 1;
                    self.offer(state, slot);
                    return;
                }
                Err(error) => {
                    tracing::warn!(slot = slot.index, %error, "a network cannot be cleaned; it is removed");
                    let index = slot.index;
                    self.remove(index, move || slot.destroy(&self.ground));
                }
            },
            Rest::Index(index) => self.remove(index, || Ok(())),
        }
        self.lock().busy -= 1;
        self.work.notify_one();
    }

    /// Removes slot `index`, of which `first` lets go. Its number stays taken when that fails.
    fn remove(&self, index: u32, first: impl FnOnce() -> Result<(), NetError>) {
        let began = Instant::now();
        match first().and_then(|()| slot::remove(&self.ground, index)) {
            Ok(()) => {
                observe("remove", began);
                self.give_back(index);
            }
            Err(error) => tracing::error!(slot = index, %error, "cannot remove a network"),
        }
    }
}

impl Used {
    fn is_in_use(&self) -> bool {
        self.users.iter().any(|user| !has_ended(user, Duration::ZERO))
    }

    /// Waits until all users have ended; tells whether they have.
    fn wait(&mut self, limit: Duration) -> bool {
        self.users.retain(|user| !has_ended(user, limit));
        self.users.is_empty()
    }
}

/// Whether the process behind `pidfd` has ended within `limit`.
fn has_ended(pidfd: &OwnedFd, limit: Duration) -> bool {
    let mut poll = [PollFd::new(pidfd, PollFlags::IN)];
    let limit = Timespec::try_from(limit).expect("some seconds are in range");
    rustix::event::poll(&mut poll, Some(&limit)).is_ok_and(|ready| ready > 0)
}

/// What a lease's tap was given to.
#[derive(Default)]
struct Given {
    /// How many descriptors were given away.
    taps: usize,
    /// The processes that have them.
    users: Vec<OwnedFd>,
}

/// A slot in use. Dropping it gives the slot back once nobody has its tap any more.
pub struct Lease {
    shared: Arc<Shared>,
    /// Taken when this is dropped.
    slot: Option<Slot>,
    tenant: Tenant,
    given: Mutex<Given>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("netns", &self.netns()).field("tenant", &self.tenant).finish_non_exhaustive()
    }
}

impl Lease {
    fn begin(shared: &Arc<Shared>, slot: Slot, tenant: Tenant) -> Result<Self, NetError> {
        let noted = shared.claims.begin_lease(slot.index, &tenant);
        let lease = Self { shared: Arc::clone(shared), slot: Some(slot), tenant, given: Mutex::default() };
        noted.map_err(NetError::system(format!("note whose {} is", lease.netns())))?;
        Ok(lease)
    }

    fn slot(&self) -> &Slot {
        self.slot.as_ref().expect("it is taken only by drop")
    }

    /// The name of its namespace.
    pub fn netns(&self) -> String {
        self.slot().name()
    }

    /// To whom it is leased.
    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    /// A descriptor of its tap, for one process; [`used_by`](Self::used_by) tells which, once there is one.
    pub fn tap(&self) -> io::Result<OwnedFd> {
        let tap = self.slot().tap()?;
        self.given().taps += 1;
        Ok(tap)
    }

    /// Notes that the process behind `pidfd` has the tap that was given away last.
    pub fn used_by(&self, pidfd: impl AsFd) -> io::Result<()> {
        let pidfd = pidfd.as_fd().try_clone_to_owned()?;
        self.given().users.push(pidfd);
        Ok(())
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        let Given { taps, users } = std::mem::take(self.given.get_mut().unwrap_or_else(PoisonError::into_inner));
        // A tap that went who knows where can be taken away only with the slot.
        let what = if taps > users.len() { Rest::Index(slot.index) } else { Rest::Slot(slot) };
        let mut state = self.shared.lock();
        state.leased -= 1;
        state.used.push_back(Used { what, users });
        drop(state);
        self.shared.work.notify_one();
    }
}

/// The plan of links: out of `range` if one is asked for, else out of one that this host does not use.
fn plan(range: Option<Cidr>) -> Result<AddressPlan, NetError> {
    let taken: Vec<Cidr> = host_routes().map_err(NetError::system("read this host's routes"))?;
    let candidates = range.as_ref().map_or(&USUAL_RANGES[..], std::slice::from_ref);
    AddressPlan::choose(candidates, &taken).map_err(|clashes| NetError::NoRange { clashes })
}

/// Makes this host pass packets on, which a host by itself does not.
fn forward_packets() -> Result<(), NetError> {
    const SETTING: &str = "/proc/sys/net/ipv4/ip_forward";
    let failed = |what: &str| NetError::system(format!("{what} {SETTING}"));
    if std::fs::read_to_string(SETTING).map_err(failed("read"))?.trim() == "0" {
        std::fs::write(SETTING, "1").map_err(failed("write 1 to"))?;
        tracing::info!("net.ipv4.ip_forward was 0 and is 1 now, so that guests have a way out");
    }
    Ok(())
}

fn observe(step: &'static str, began: Instant) {
    metrics::histogram!("forkd_network_slot_seconds", "step" => step).record(began.elapsed().as_secs_f64());
}
