//! The namespaces that play host and internet.

use std::fs;
use std::future::Future;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use forkd_net::{Lease, NetworksConfig};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// The host's address on the internet.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// A server there.
pub(crate) const INTERNET: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// Where clouds serve their metadata; the same server has it.
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A host of the test's own.
pub(crate) struct Stage {
    directory: tempfile::TempDir,
    internet: OwnedFd,
}

/// What this machine lacks to play.
pub(crate) fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("it is not run as root");
    }
    let runs = |program: &str, flag| Command::new(program).arg(flag).output().is_ok();
    if !runs("/usr/sbin/nft", "--version") {
        return Some("nft does not run: apt-get install nftables");
    }
    (!runs("ip", "-V")).then_some("ip does not run: apt-get install iproute2")
}

/// Runs a test on a thread that nothing outside is seen from.
pub(crate) fn on_a_stage(test: fn(&Stage)) -> Result<(), String> {
    let playing = std::thread::spawn(move || {
        leave(UnshareFlags::NEWNET | UnshareFlags::NEWNS);
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).expect("private mounts");
        let directory = tempfile::tempdir().expect("tempdir");
        let (ours, theirs) = (own_namespace(), fresh_namespace());
        run("ip link set lo up");
        run("ip link add uplink type veth peer name eth0");
        move_link("eth0", &theirs);
        run(&format!("ip address add {HOST}/24 dev uplink"));
        run("ip link set uplink up");
        run(&format!("ip route add {METADATA}/32 dev uplink"));
        drop(ours);
        within_namespace(&theirs, || {
            run("ip link set lo up");
            run(&format!("ip address add {INTERNET}/24 dev eth0"));
            run(&format!("ip address add {METADATA}/32 dev eth0"));
            run("ip link set eth0 up");
        });
        fs::create_dir(directory.path().join("owner")).expect("mkdir");
        test(&Stage { directory, internet: theirs });
    });
    playing.join().map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().map_or("it panicked".to_owned(), |text| (*text).to_owned()),
    })
}

impl Stage {
    pub(crate) fn config(&self) -> NetworksConfig {
        NetworksConfig {
            namespaces: self.directory.path().join("netns"),
            claims: self.directory.path().join("claims"),
            ..NetworksConfig::new(&self.directory.path().join("owner"))
        }
    }

    pub(crate) fn namespaces(&self) -> PathBuf {
        self.directory.path().join("netns")
    }

    /// Runs `work` in the namespace called `netns`.
    pub(crate) fn within<T: Send>(&self, netns: &str, work: impl FnOnce() -> T + Send) -> T {
        let namespace = fs::File::open(self.namespaces().join(netns)).expect("the namespace is there");
        within_namespace(&namespace.into(), work)
    }

    pub(crate) fn on_the_internet<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within_namespace(&self.internet, work)
    }

    pub(crate) fn serve_on_the_internet(&self, port: u16) -> Server {
        self.on_the_internet(|| Server::start(port, None))
    }

    pub(crate) fn serve_on_the_host(&self, port: u16) -> Server {
        Server::start(port, None)
    }

    /// The names of the host's ends of links.
    pub(crate) fn links(&self) -> Vec<String> {
        let text = run("ip -o link show");
        let names = text.lines().filter_map(|line| line.split([':', '@']).nth(1));
        names.map(|name| name.trim().to_owned()).filter(|name| name.starts_with("forkd-v-")).collect()
    }

    pub(crate) fn link_exists(&self, netns: &str) -> bool {
        self.links().contains(&link_name(netns))
    }

    /// The host's address on the link to a slot.
    pub(crate) fn link_address(&self, lease: &Lease) -> Ipv4Addr {
        address(&run(&format!("ip -o -4 address show dev {}", link_name(&lease.netns()))))
    }

    /// The slot's address on it.
    pub(crate) fn slot_address(&self, lease: &Lease) -> Ipv4Addr {
        address(&self.within(&lease.netns(), || run("ip -o -4 address show dev veth0")))
    }
}

fn link_name(netns: &str) -> String {
    format!("forkd-v-{}h", netns.rsplit('-').next().expect("names end in a number"))
}

fn address(shown: &str) -> Ipv4Addr {
    let mut words = shown.split_whitespace().skip_while(|word| *word != "inet").skip(1);
    words.next().and_then(|word| word.split('/').next()?.parse().ok()).unwrap_or_else(|| panic!("no address: {shown}"))
}

/// Says a word to whoever connects, or where they come from, until it is dropped.
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    serving: Option<JoinHandle<()>>,
}

impl Server {
    /// In the calling thread's namespace.
    pub(crate) fn start(port: u16, word: Option<String>) -> Self {
        let listener = TcpListener::bind(("0.0.0.0", port)).expect("bind");
        listener.set_nonblocking(true).expect("nonblocking");
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let serving = std::thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((mut stream, from)) => {
                        let text = word.clone().unwrap_or_else(|| from.ip().to_string());
                        let _ = stream.write_all(text.as_bytes());
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self { stop, serving: Some(serving) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(serving) = self.serving.take() {
            let _ = serving.join();
        }
    }
}

/// Runs a command line and returns what it prints.
pub(crate) fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let program = match words.next().expect("a program") {
        "nft" => "/usr/sbin/nft",
        other => other,
    };
    let output = Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{line}: {error}"));
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("runtime").block_on(work)
}

pub(crate) fn within_namespace<T: Send>(namespace: &OwnedFd, work: impl FnOnce() -> T + Send) -> T {
    use std::os::fd::AsFd;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A namespace that nobody is in.
pub(crate) fn fresh_namespace() -> OwnedFd {
    std::thread::spawn(|| {
        leave(UnshareFlags::NEWNET);
        own_namespace()
    })
    .join()
    .expect("made")
}

fn own_namespace() -> OwnedFd {
    fs::File::open(Path::new("/proc/thread-self/ns/net")).expect("own namespace").into()
}

/// Moves an interface of the calling thread's namespace into another.
fn move_link(name: &str, to: &OwnedFd) {
    use std::os::fd::AsRawFd;
    // `ip` takes a process of the namespace; /proc gives it the file as one of its own.
    let path = format!("/proc/{}/fd/{}", std::process::id(), to.as_raw_fd());
    run(&format!("ip link set {name} netns {path}"));
}

#[allow(unsafe_code)]
fn leave(what: UnshareFlags) {
    // SAFETY: descriptor tables stay shared, which is all that is unsafe about it.
    unsafe { rustix::thread::unshare_unsafe(what) }.expect("unshare, as root");
}
