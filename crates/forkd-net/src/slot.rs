//! One network: made, cleaned, taken away.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::error::NetError;
use crate::netlink::Netlink;
use crate::plan::{
    self, AddressPlan, GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_NETWORK, LINK_PREFIX, LinkAddresses, TAP, UPLINK,
};
use crate::{conntrack, firewall, namespace, tap};

/// What slots are made of and where.
pub(crate) struct Ground {
    /// The namespace that they lead out through.
    pub(crate) host: OwnedFd,
    /// Where namespaces get names.
    pub(crate) namespaces: PathBuf,
    pub(crate) plan: AddressPlan,
}

impl Ground {
    /// Where the namespace of slot `index` is.
    pub(crate) fn path(&self, index: u32) -> PathBuf {
        self.namespaces.join(plan::namespace_name(index))
    }

    /// Whether somebody else has something of the name of slot `index`.
    pub(crate) fn is_occupied(&self, index: u32) -> bool {
        self.path(index).exists()
    }
}

/// A network that nobody uses, or a lease's.
pub(crate) struct Slot {
    pub(crate) index: u32,
    /// Its namespace.
    namespace: OwnedFd,
    /// The one queue of its tap. Missing in one whose tap could not be found again.
    tap: Option<OwnedFd>,
}

impl Slot {
    /// Makes slot `index`. Nothing is left of it when that fails.
    pub(crate) fn make(ground: &Ground, index: u32) -> Result<Self, NetError> {
        let link =
            ground.plan.link(index).ok_or(NetError::Full { range: ground.plan.range(), slots: ground.plan.slots() })?;
        let making = namespace::in_thread(|| build(ground, index, link));
        making.map_err(NetError::system("start a thread for a network"))?.inspect_err(|_| {
            if let Err(error) = remove(ground, index) {
                tracing::warn!(slot = index, %error, "cannot remove a network that could not be made");
            }
        })
    }

    /// Slot `index` as an earlier daemon made it, whose tap process `pid` has open.
    pub(crate) fn adopt(ground: &Ground, index: u32, pid: i32, pidfd: BorrowedFd<'_>) -> Result<Self, NetError> {
        let path = ground.path(index);
        let namespace = namespace::open(&path).map_err(NetError::system(format!("open {}", path.display())))?;
        let tap = tap::of_process(pid, pidfd)
            .inspect_err(|error| tracing::warn!(slot = index, pid, %error, "cannot take over the tap of a monitor"))
            .ok();
        Ok(Self { index, namespace, tap })
    }

    /// The name of its namespace.
    pub(crate) fn name(&self) -> String {
        plan::namespace_name(self.index)
    }

    /// Another descriptor of its tap.
    pub(crate) fn tap(&self) -> io::Result<OwnedFd> {
        let lost = || io::Error::new(io::ErrorKind::NotFound, format!("the tap of {} was lost", self.name()));
        self.tap.as_ref().ok_or_else(lost)?.try_clone()
    }

    /// Makes it as good as new: no packets under way, no neighbours, no connections, no policy, counters at zero.
    pub(crate) fn clean(&self, ground: &Ground) -> Result<(), NetError> {
        let name = self.name();
        let tap = self.tap.as_ref().ok_or_else(|| {
            NetError::system(format!("clean {name}"))(io::Error::new(io::ErrorKind::NotFound, "its tap was lost"))
        })?;
        let cleaning = namespace::in_thread(|| {
            let failed = |what: &str| NetError::system(format!("{what} in {name}"));
            namespace::enter(&self.namespace).map_err(failed("work"))?;
            let mut netlink = Netlink::open().map_err(failed("talk to the kernel"))?;
            let interface = netlink.expect_index_of(TAP).map_err(failed("find the tap"))?;
            // An interface that goes down forgets its neighbours.
            netlink.set_up(interface, false).map_err(failed("bring the tap down"))?;
            tap::drain(tap).map_err(failed("empty the tap"))?;
            firewall::apply(&format!("renew the rules of {name}"), &firewall::namespace_rules(ground.plan.range()))?;
            conntrack::flush().map_err(failed("forget connections"))?;
            netlink.set_up(interface, true).map_err(failed("bring the tap up"))
        });
        cleaning.map_err(NetError::system("start a thread for a network"))?
    }

    /// Takes it away.
    pub(crate) fn destroy(self, ground: &Ground) -> Result<(), NetError> {
        let index = self.index;
        drop(self);
        remove(ground, index)
    }
}

/// On a thread of its own: makes slot `index` and leaves the thread in the host's namespace.
fn build(ground: &Ground, index: u32, link: LinkAddresses) -> Result<Slot, NetError> {
    let (name, outside) = (plan::namespace_name(index), plan::host_link_name(index));
    let failed = |what: &str| NetError::system(format!("{what} of {name}"));
    let path = ground.path(index);
    namespace::enter_fresh().map_err(failed("make the namespace"))?;
    let own = namespace::current().map_err(failed("open the namespace"))?;
    namespace::pin(&path).map_err(NetError::system(format!("keep a namespace as {}", path.display())))?;
    let tap = tap::create(TAP).map_err(failed("make the tap"))?;
    let mut netlink = Netlink::open().map_err(failed("talk to the kernel for the network"))?;
    netlink.add_link_to(UPLINK, &outside, ground.host.as_fd()).map_err(failed("make the link"))?;
    for (file, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/disable_ipv6", "1")] {
        set_up_kernel(file, value).map_err(failed(&format!("set net/{file}")))?;
    }
    let interface = |netlink: &mut Netlink, name: &str| netlink.expect_index_of(name);
    let [lo, inner, uplink] = ["lo", TAP, UPLINK].map(|name| interface(&mut netlink, name));
    let (lo, inner, uplink) = (
        lo.map_err(failed("find loopback"))?,
        inner.map_err(failed("find the tap"))?,
        uplink.map_err(failed("find the link"))?,
    );
    netlink.set_mac(inner, GATEWAY_MAC).map_err(failed("set the Ethernet address of the tap"))?;
    let address = |netlink: &mut Netlink, interface, address: Ipv4Addr, prefix| {
        netlink
            .add_address(interface, address, prefix)
            .map_err(failed(&format!("add {address}/{prefix} to the network")))
    };
    address(&mut netlink, inner, GATEWAY_ADDRESS, GUEST_NETWORK.prefix())?;
    address(&mut netlink, uplink, link.slot, LINK_PREFIX)?;
    firewall::apply(&format!("set the rules of {name}"), &firewall::namespace_rules(ground.plan.range()))?;
    for interface in [lo, inner, uplink] {
        netlink.set_up(interface, true).map_err(failed("bring up the interfaces"))?;
    }
    namespace::enter(&ground.host).map_err(failed("go back to the host from the namespace"))?;
    let mut host = Netlink::open().map_err(NetError::system("talk to the kernel"))?;
    let outer = host.expect_index_of(&outside).map_err(failed("find the host's end"))?;
    address(&mut host, outer, link.host, LINK_PREFIX)?;
    host.set_up(outer, true).map_err(failed("bring up the host's end"))?;
    // The gateway can be reached only now that both ends are up.
    netlink.add_default_route(link.host).map_err(failed("set the way out"))?;
    Ok(Slot { index, namespace: own, tap: Some(tap) })
}

/// Takes away whatever there is of slot `index`.
pub(crate) fn remove(ground: &Ground, index: u32) -> Result<(), NetError> {
    let removing = namespace::in_thread(|| {
        let path = ground.path(index);
        // A descriptor of the tap that somebody still has would keep it, and the namespace with it.
        if let Ok(namespace) = namespace::open(&path)
            && namespace::enter(&namespace).is_ok()
        {
            let tap = Netlink::open().and_then(|mut netlink| match netlink.index_of(TAP)? {
                Some(tap) => netlink.remove_link(tap),
                None => Ok(()),
            });
            if let Err(error) = tap {
                tracing::warn!(slot = index, %error, "cannot remove a tap");
            }
        }
        let link = plan::host_link_name(index);
        let failed = |what: &str| NetError::system(format!("{what} {link}"));
        namespace::enter(&ground.host).map_err(failed("go to the host to remove"))?;
        let mut netlink = Netlink::open().map_err(failed("talk to the kernel about"))?;
        if let Some(index) = netlink.index_of(&link).map_err(failed("find"))? {
            match netlink.remove_link(index) {
                // Its other end went first.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                other => other.map_err(failed("remove"))?,
            }
        }
        namespace::unpin(&path).map_err(NetError::system(format!("remove {}", path.display())))
    });
    removing.map_err(NetError::system("start a thread for a network"))?
}

/// Sets a setting of the calling thread's namespace; one that the kernel was built without is left out.
fn set_up_kernel(file: &str, value: &str) -> io::Result<()> {
    match fs::write(Path::new("/proc/sys/net").join(file), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
