//! What a host says about itself, to choose addresses and to advise its owner.

use std::fs;
use std::io;
use std::path::Path;

use crate::firewall;
use crate::netlink::Netlink;
use crate::plan::{Cidr, GUEST_NETWORK, HOST_LINK_PREFIX, USUAL_RANGES};

/// What this host's routes lead to, but for forkd's own and the ways to everywhere.
pub(crate) fn host_routes() -> io::Result<Vec<Cidr>> {
    let mut netlink = Netlink::open()?;
    let mut taken = Vec::new();
    for route in netlink.routes()? {
        if !route.through.is_some_and(is_own_link) {
            taken.push(route.to);
        }
    }
    Ok(taken)
}

fn is_own_link(index: u32) -> bool {
    let Ok(socket) = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None) else {
        return false;
    };
    rustix::net::netdevice::index_to_name(socket, index).is_ok_and(|name| name.starts_with(HOST_LINK_PREFIX))
}

/// One thing that networks need of a host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What was looked at.
    pub subject: &'static str,
    /// What is the case.
    pub detail: String,
    /// What mends it; none where nothing needs to be.
    pub remedy: Option<String>,
}

impl Finding {
    fn good(subject: &'static str, detail: impl Into<String>) -> Self {
        Self { subject, detail: detail.into(), remedy: None }
    }

    fn bad(subject: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject, detail: detail.into(), remedy: Some(remedy.into()) }
    }
}

/// Looks at everything that networks need of this host, changing nothing.
pub fn inspect() -> Vec<Finding> {
    vec![taps(), rules(), forwarding(), forward_policy(), addresses()]
}

fn taps() -> Finding {
    const DEVICE: &str = "/dev/net/tun";
    match fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => Finding::good("taps", DEVICE),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Finding::good("taps", format!("{DEVICE} is there, for root"))
        }
        Err(error) => Finding::bad("taps", format!("{DEVICE}: {error}"), "sudo modprobe tun"),
    }
}

fn rules() -> Finding {
    let output = firewall::command().arg("--version").output();
    match output {
        Ok(output) => Finding::good("nftables", String::from_utf8_lossy(&output.stdout).trim()),
        Err(error) => Finding::bad("nftables", format!("nft does not run: {error}"), "sudo apt-get install nftables"),
    }
}

fn forwarding() -> Finding {
    match fs::read_to_string("/proc/sys/net/ipv4/ip_forward") {
        Ok(text) if text.trim() == "1" => Finding::good("forwarding", "net.ipv4.ip_forward is 1"),
        Ok(_)
            if Path::new("/proc/sys/net/ipv4/ip_forward")
                .metadata()
                .is_ok_and(|file| !file.permissions().readonly()) =>
        {
            Finding::good("forwarding", "net.ipv4.ip_forward is 0; the daemon sets it to 1 when it has networks")
        }
        Ok(_) => Finding::bad(
            "forwarding",
            "net.ipv4.ip_forward is 0 and cannot be changed from here",
            "sudo sysctl -w net.ipv4.ip_forward=1",
        ),
        Err(error) => {
            Finding::bad("forwarding", format!("net.ipv4.ip_forward: {error}"), "cat /proc/sys/net/ipv4/ip_forward")
        }
    }
}

/// Another firewall that drops what this host forwards also drops what guests send.
fn forward_policy() -> Finding {
    let chains = firewall::command().args(["list", "chains", "ip"]).output();
    let text = match chains {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        _ => return Finding::good("firewall", "its rules cannot be read without root"),
    };
    if drops_forwarded(&text) {
        return Finding::bad(
            "firewall",
            "another firewall of this host drops what it forwards, and so everything that guests send",
            format!(
                "sudo iptables -I FORWARD -i {HOST_LINK_PREFIX}+ -j ACCEPT; sudo iptables -I FORWARD -o {HOST_LINK_PREFIX}+ -j ACCEPT"
            ),
        );
    }
    Finding::good("firewall", "lets through what this host forwards")
}

/// Whether a base chain at the forward hook in `listing`, as `nft list chains` prints it, drops by default.
fn drops_forwarded(listing: &str) -> bool {
    listing.lines().any(|line| line.contains("hook forward") && line.contains("policy drop"))
}

fn addresses() -> Finding {
    let taken = match host_routes() {
        Ok(taken) => taken,
        Err(error) => return Finding::bad("addresses", format!("the routes cannot be read: {error}"), "ip route"),
    };
    let free = USUAL_RANGES.iter().find(|range| !taken.iter().any(|other| range.overlaps(*other)));
    // The host's own 10.42.0.2 is how one guest is reached from it.
    let clash = taken.iter().find(|other| other.prefix() < 32 && GUEST_NETWORK.overlaps(**other));
    match (free, clash) {
        (None, _) => Finding::bad(
            "addresses",
            "every range that links to networks could have is in use on this host",
            "forkd-controller serve --network-range RANGE, with one that ip route does not show",
        ),
        (Some(_), Some(clash)) => Finding::bad(
            "addresses",
            format!(
                "this host has a route to {clash}; guests, whose own network is {GUEST_NETWORK}, do not reach that"
            ),
            format!("give what is behind {clash} another range if guests are to reach it"),
        ),
        (Some(range), None) => Finding::good("addresses", format!("{range} is free for links to networks")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_firewall_that_drops_forwarded_packets_is_seen() {
        let docker = "table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n";
        assert!(drops_forwarded(docker));
        assert!(!drops_forwarded(&docker.replace("policy drop", "policy accept")));
        assert!(!drops_forwarded("type filter hook input priority filter; policy drop;"));
    }
}
