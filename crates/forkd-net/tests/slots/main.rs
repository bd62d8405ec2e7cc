//! Slots in a network of the test's own: a namespace that plays the host, one behind it that plays the internet.
//!
//! Nothing of the machine that this runs on is touched, and no packet leaves it. Needs root, `nft` and `ip`; where
//! one is missing the tests are counted as ignored.

// Tells why nothing was tested, and how long it took.
#![allow(clippy::print_stderr)]

mod guest;
mod stage;

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use forkd_net::{Lease, NetError, Networks, NetworksConfig, Tenant};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::PidfdFlags;

use guest::Guest;
use stage::{INTERNET, Stage, run};

const GUEST: Ipv4Addr = forkd_net::plan::GUEST_ADDRESS;
const AGENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(GUEST), 8888);

type Test = fn(&Stage);

fn main() {
    let arguments = Arguments::from_args();
    let missing = stage::missing();
    if let Some(missing) = &missing {
        eprintln!("slots: ignored, because {missing}");
    }
    let tests: [(&str, Test); 8] = [
        ("a_guest_reaches_its_gateway_and_the_internet_and_nothing_of_the_host", reach),
        ("siblings_have_the_same_address_and_do_not_meet", siblings),
        ("a_slot_comes_back_clean", clean),
        ("a_slot_whose_tap_is_still_somewhere_is_not_used_again", strayed),
        ("a_running_machine_keeps_its_slot_when_its_lease_is_dropped", kept),
        ("a_restarted_daemon_takes_over_leases_and_removes_the_rest", restart),
        ("a_range_that_clashes_is_not_used", clash),
        ("five_hundred_slots_at_once_leave_nothing_behind", crowd),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || stage::on_a_stage(test).map_err(Failed::from)).with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

fn tenant(name: &str) -> Tenant {
    Tenant { name: name.to_owned(), shown: true }
}

/// Waits for what happens on another thread.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn networks(stage: &Stage, ready: usize) -> Networks {
    Networks::start(&NetworksConfig { ready, ..stage.config() }).expect("start")
}

fn lease(networks: &Networks, name: &str) -> Lease {
    stage::block_on(networks.lease(tenant(name))).expect("lease")
}

/// Whether a connection comes about.
fn connects(to: SocketAddr) -> bool {
    TcpStream::connect_timeout(&to, Duration::from_millis(700)).is_ok()
}

/// Everything that a server says to whoever connects.
fn said_at(server: SocketAddr) -> String {
    let mut text = String::new();
    let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(5)).expect("connect");
    stream.read_to_string(&mut text).expect("read");
    text
}

fn reach(stage: &Stage) {
    let networks = networks(stage, 1);
    let lease = lease(&networks, "sb-1");
    let guest = Guest::plug_in(&lease);
    // The agent's port from inside the namespace.
    let serving = guest.serve(AGENT.port());
    let answer = stage.within(&lease.netns(), || said_at(AGENT));
    assert_eq!(answer, "10.42.0.1", "the agent sees the gateway");
    drop(serving);
    guest.within(|| guest::ping(Ipv4Addr::new(10, 42, 0, 1)));
    // Out by way of the host, whose address is seen there.
    let server = stage.serve_on_the_internet(80);
    let seen = guest.within(|| said_at((INTERNET, 80).into()));
    assert_eq!(seen, stage::HOST.to_string(), "addresses of links do not leave the host");
    drop(server);
    // The host itself, by any of its addresses; the cloud's metadata service, which the host reaches.
    let host_server = stage.serve_on_the_host(7000);
    let metadata = stage.serve_on_the_internet(8080);
    assert!(connects((stage::METADATA, 8080).into()), "the host reaches the metadata service");
    let link = stage.link_address(&lease);
    for blocked in [
        SocketAddr::from((stage::HOST, 7000)),
        (link, 7000).into(),
        (Ipv4Addr::new(10, 42, 0, 1), 7000).into(),
        (stage::METADATA, 8080).into(),
    ] {
        assert!(!guest.within(|| connects(blocked)), "{blocked} must not be reached");
    }
    let counters = stage.within(&lease.netns(), || run("nft list counter inet forkd refused"));
    assert!(!counters.contains("packets 0 "), "refusals are counted: {counters}");
    drop((host_server, metadata));
}

fn siblings(stage: &Stage) {
    let networks = networks(stage, 2);
    let leases = [lease(&networks, "sb-1"), lease(&networks, "sb-2")];
    let guests = leases.each_ref().map(Guest::plug_in);
    let serving = guests.each_ref().map(|guest| guest.serve_word(8888, guest.name()));
    for (lease, guest) in leases.iter().zip(&guests) {
        let answer = stage.within(&lease.netns(), || said_at(AGENT));
        assert_eq!(answer, guest.name(), "each namespace has its own guest");
    }
    drop(serving);
    // The sibling's end of its link, and the host's end of it.
    let listening = stage.within(&leases[1].netns(), || TcpListener::bind("0.0.0.0:9000").expect("bind"));
    let there = stage.slot_address(&leases[1]);
    for blocked in [SocketAddr::from((there, 9000)), (stage.link_address(&leases[1]), 9000).into()] {
        assert!(!guests[0].within(|| connects(blocked)), "{blocked} must not be reached");
        // Not even past the rules of its own namespace.
        assert!(!stage.within(&leases[0].netns(), || connects(blocked)), "{blocked} must not be reached from the slot");
    }
    // Nobody from outside gets in, even by a route.
    stage.on_the_internet(|| {
        run(&format!("ip route add {there}/32 via {}", stage::HOST));
        assert!(!connects((there, 9000).into()), "slots are not reached from outside");
    });
    drop(listening);
}

fn clean(stage: &Stage) {
    // None ahead but the first, so that it is the next one too.
    let networks = networks(stage, 0);
    let first = lease(&networks, "sb-1");
    let netns = first.netns();
    {
        let guest = Guest::plug_in(&first);
        let server = stage.serve_on_the_internet(80);
        assert!(guest.within(|| connects((INTERNET, 80).into())));
        drop(server);
    }
    // Frames that nobody reads, and a rule of the sandbox's own.
    stage.within(&netns, || {
        run("ip neigh replace 10.42.0.2 lladdr aa:fc:00:00:00:09 dev forkd-tap0 nud permanent");
        run("nft add rule inet forkd egress drop");
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("bind");
        for _ in 0..20 {
            socket.send_to(b"left over", "10.42.0.2:5").expect("send");
        }
    });
    drop(first);
    eventually("the slot is ready", || networks.counts().ready == 1 && networks.counts().used == 0);
    let second = lease(&networks, "sb-2");
    assert_eq!(second.netns(), netns, "the same slot again");
    let tap = second.tap().expect("tap");
    stage.within(&netns, || {
        assert_eq!(run("ip neigh show dev forkd-tap0 nud permanent"), "");
        let rules = run("nft list table inet forkd");
        assert_eq!(rules.matches("packets 0 bytes 0").count(), 3, "counters are at zero: {rules}");
        assert!(!rules.contains("\t\tdrop\n"), "the policy is empty: {rules}");
        if let Ok(connections) = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack") {
            assert!(!connections.contains("10.42.0.2"), "{connections}");
        }
    });
    let mut frame = [0; 2048];
    let left = std::iter::from_fn(|| rustix::io::read(&tap, &mut frame).ok().map(|len| frame[..len].to_vec()));
    assert!(!left.into_iter().any(|frame| frame.windows(9).any(|part| part == b"left over")));
}

fn strayed(stage: &Stage) {
    let networks = networks(stage, 1);
    let lease = lease(&networks, "sb-1");
    let (netns, tap) = (lease.netns(), lease.tap().expect("tap"));
    // It was given to somebody, and nobody said to whom.
    drop(lease);
    eventually("the slot is gone", || !stage.namespaces().join(&netns).exists() || networks.counts().used == 0);
    let mut frame = [0; 64];
    let read = rustix::io::read(&tap, &mut frame);
    assert_eq!(read, Err(rustix::io::Errno::BADFD), "the tap itself is gone");
}

fn kept(stage: &Stage) {
    let networks = networks(stage, 1);
    let lease = lease(&networks, "sb-1");
    let netns = lease.netns();
    let mut machine = std::process::Command::new("sleep").arg("600").spawn().expect("sleep");
    let pid = rustix::process::Pid::from_raw(machine.id() as i32).expect("a pid");
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).expect("pidfd");
    let _tap = lease.tap().expect("tap");
    lease.used_by(&pidfd).expect("note");
    drop(lease);
    std::thread::sleep(Duration::from_millis(100));
    assert!(stage.link_exists(&netns), "its machine runs");
    assert_eq!(networks.counts().used, 1);
    machine.kill().expect("kill");
    machine.wait().expect("wait");
    eventually("it is settled", || networks.counts().used == 0);
}

fn restart(stage: &Stage) {
    let before = networks(stage, 2);
    let [kept, lost] = ["sb-kept", "sb-lost"].map(|name| lease(&before, name));
    let kept_name = kept.netns();
    eventually("the pool is full", || before.counts().ready == 2);
    // As after a crash: nothing is given back, and only the monitor has the tap.
    let _tap = kept.tap().expect("tap");
    std::mem::forget((kept, lost, before));
    let after = networks(stage, 1);
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).expect("pidfd");
    let adopted = after.adopt("sb-kept", std::process::id() as i32, own.as_fd()).expect("adopted");
    assert_eq!((adopted.netns(), adopted.tenant()), (kept_name.clone(), &tenant("sb-kept")));
    adopted.tap().expect("its tap was found again");
    assert!(after.adopt("sb-never", 1, own.as_fd()).is_none());
    after.sweep();
    eventually("the rest is removed", || after.counts().used == 0 && after.counts().ready == 1);
    assert!(stage.link_exists(&kept_name));
    assert_eq!(stage.links().len(), 2, "the adopted one and one that is ready: {:?}", stage.links());
    after.close();
    assert_eq!(stage.links().len(), 1, "a lease outlives the daemon");
    // Another owner leaves it alone.
    let other = Networks::start(&NetworksConfig { owner: "/proc".into(), ready: 1, ..stage.config() }).expect("start");
    other.sweep();
    assert!(stage.link_exists(&kept_name));
    other.close();
    std::mem::forget(adopted);
}

fn clash(stage: &Stage) {
    let usual = forkd_net::plan::USUAL_RANGES;
    run(&format!("ip route add {} via {INTERNET}", usual[0]));
    let networks = networks(stage, 1);
    let lease = lease(&networks, "sb-1");
    assert!(usual[1].contains(stage.slot_address(&lease)));
    drop(lease);
    networks.close();
    let asked = NetworksConfig { range: Some(usual[0]), ..stage.config() };
    let error = Networks::start(&asked).err().expect("refused");
    assert!(matches!(error, NetError::NoRange { .. }), "{error}");
    assert!(error.to_string().contains("100.127.0.0/16 with 100.127.0.0/16"), "{error}");
}

fn crowd(stage: &Stage) {
    const SLOTS: usize = 500;
    let began = Instant::now();
    let networks = networks(stage, SLOTS);
    eventually_slowly("the pool is full", || networks.counts().ready == SLOTS);
    let made = began.elapsed();
    let mut times = Vec::new();
    let mut leases = Vec::new();
    for number in 0..SLOTS {
        let began = Instant::now();
        let lease = lease(&networks, &format!("sb-{number}"));
        drop(lease.tap().expect("tap"));
        times.push(began.elapsed());
        leases.push(lease);
    }
    times.sort_unstable();
    eprintln!(
        "{SLOTS} slots made in {made:.2?}, {:.2?} each; leased and tap given in p50 {:.1?}, p99 {:.1?}",
        made / SLOTS as u32,
        times[SLOTS / 2],
        times[SLOTS * 99 / 100]
    );
    let mut names: Vec<_> = leases.iter().map(Lease::netns).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), SLOTS);
    assert!(stage.links().len() >= SLOTS, "the pool is filled again meanwhile");
    drop(leases);
    networks.close();
    assert_eq!(stage.links(), Vec::<String>::new(), "no link is left");
    for directory in [stage.namespaces(), stage.config().claims] {
        assert_eq!(
            std::fs::read_dir(&directory).expect("list").count(),
            0,
            "nothing is left in {}",
            directory.display()
        );
    }
    assert_eq!(run("nft list tables"), "", "no rule is left");
}

fn eventually_slowly(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(300), "{what}: not within 300 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}
