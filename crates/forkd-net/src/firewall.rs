//! The rules, as `nft` takes them.
//!
//! Each namespace has a table of its own that says what its guest may send, so that a network that ends takes its
//! rules with it. The host has one table that is the same for all, and never changes: it holds even if a
//! namespace's own rules did not.
//!
//! ```text
//! guest ─► tap ─► [namespace: forward ─► from_guest ─► blocked? ─► egress] ─► SNAT ─► veth ─► [host: forward] ─► NAT
//! ```
//!
//! In every mode a guest reaches neither its neighbours, nor the host itself, nor link-local addresses, among them
//! the metadata services of clouds, nor anything by IPv6. The chain `egress` is empty: what it returns is let
//! through. An egress policy of one sandbox is the content of that chain and of sets beside it.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use crate::error::NetError;
use crate::plan::{Cidr, GATEWAY_ADDRESS, GUEST_ADDRESS, HOST_LINK_PREFIX, TAP, UPLINK};

/// The table of a namespace.
pub const TABLE: &str = "forkd";

/// What no guest may send to: this network, other guests and the links to them, loopback, link-local, and what is
/// no address of one host.
const NEVER: [&str; 8] = [
    "0.0.0.0/8",
    "10.42.0.0/24",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "192.0.0.0/24",
    "198.18.0.0/15",
    "224.0.0.0/3",
];

/// The rules of a namespace, replacing those it had and setting its counters to zero.
pub(crate) fn namespace_rules(range: Cidr) -> String {
    // Addresses for measurements and shared ones are there already; a private range is not.
    let extra = if NEVER.iter().any(|never| never.parse().is_ok_and(|never: Cidr| never.overlaps(range))) {
        String::new()
    } else {
        format!(", {range}")
    };
    let never = NEVER.join(", ");
    format!(
        r#"
table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
    set blocked {{ type ipv4_addr; flags interval; elements = {{ {never}{extra} }} }}
    counter sent {{ }}
    counter received {{ }}
    counter refused {{ }}
    chain egress {{ }}
    chain from_guest {{
        meta nfproto != ipv4 counter name refused drop
        ip saddr != {GUEST_ADDRESS} counter name refused drop
        ip daddr @blocked counter name refused drop
        jump egress
        counter name sent accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        iifname "{TAP}" ct state established,related counter name sent accept
        iifname "{TAP}" goto from_guest
        iifname "{UPLINK}" ct state established,related counter name received accept
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        ct state established,related accept
        iifname "{TAP}" ip saddr {GUEST_ADDRESS} ip daddr {GATEWAY_ADDRESS} icmp type echo-request accept
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{UPLINK}" masquerade
    }}
}}
"#
    )
}

/// The host's table for links out of `range`.
pub(crate) fn host_table(range: Cidr) -> String {
    format!("forkd_{}_{}", range.base().to_string().replace('.', "_"), range.prefix())
}

/// The host's rules for links out of `range`.
pub(crate) fn host_rules(range: Cidr) -> String {
    let table = host_table(range);
    let links = format!("{HOST_LINK_PREFIX}*");
    format!(
        r#"
table inet {table}
delete table inet {table}
table inet {table} {{
    chain input {{
        type filter hook input priority filter - 10; policy accept;
        iifname "{links}" ct state established,related accept
        iifname "{links}" drop
    }}
    chain forward {{
        type filter hook forward priority filter - 10; policy accept;
        iifname "{links}" oifname "{links}" drop
        iifname "{links}" meta nfproto != ipv4 drop
        iifname "{links}" ip daddr {{ 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }} drop
        oifname "{links}" ct state established,related accept
        oifname "{links}" drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {range} oifname != "{links}" masquerade
    }}
}}
"#
    )
}

/// What takes the host's rules away.
pub(crate) fn no_host_rules(range: Cidr) -> String {
    let table = host_table(range);
    format!("table inet {table}\ndelete table inet {table}\n")
}

/// Has `nft` carry out `rules`, all or none, in the calling thread's namespace.
pub(crate) fn apply(what: &str, rules: &str) -> Result<(), NetError> {
    let mut nft = command()
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| NetError::NoNft { source })?;
    let mut stdin = nft.stdin.take().expect("it was asked for");
    // A program that ended early says why itself.
    let written = stdin.write_all(rules.as_bytes());
    drop(stdin);
    let output = nft.wait_with_output().map_err(NetError::system("wait for nft"))?;
    if output.status.success() {
        return written.map_err(NetError::system("write to nft"));
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetError::Nft { what: what.to_owned(), said })
}

/// `nft`, also where the path of an ordinary user does not lead.
pub(crate) fn command() -> Command {
    let found = ["/usr/sbin/nft", "/sbin/nft", "/usr/local/sbin/nft"]
        .iter()
        .find(|path| io::Result::is_ok(&std::fs::metadata(path)));
    Command::new(found.copied().unwrap_or("nft"))
}
