//! Who may use the unix socket.
//!
//! The socket's permissions keep others from connecting. This asks again, of the kernel's own record of who is at
//! the other end: permissions can be changed by mistake, and a descriptor can be passed on.

use std::fs;
use std::io;

use crate::server::Peer;

/// Those who may use the socket.
#[derive(Clone, Debug)]
pub struct Peers {
    owner: u32,
    group: Option<u32>,
}

/// Why a group cannot be given the socket.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The list of groups cannot be read.
    #[error("cannot read /etc/group to find the group {group}")]
    Read {
        /// The group.
        group: String,
        /// Why.
        source: io::Error,
    },
    /// There is no such group.
    #[error("there is no group {group} in /etc/group; make it, or give its number")]
    Unknown {
        /// The group.
        group: String,
    },
}

/// The number of the group that `text` names, or is.
pub fn group_id(text: &str) -> Result<u32, GroupError> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let groups =
        fs::read_to_string("/etc/group").map_err(|source| GroupError::Read { group: text.to_owned(), source })?;
    find_group(&groups, text).ok_or_else(|| GroupError::Unknown { group: text.to_owned() })
}

fn find_group(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

impl Peers {
    /// Root, this process's own user and, if there is one, the members of `group`.
    pub fn new(group: Option<u32>) -> Self {
        Self { owner: rustix::process::geteuid().as_raw(), group }
    }

    /// Whether `peer` is one of them.
    pub(super) fn admits(&self, peer: &Peer) -> bool {
        let Peer { uid, gid, pid } = *peer;
        uid == 0 || uid == self.owner || self.group.is_some_and(|group| gid == group || is_member(pid, group))
    }
}

/// Whether the process is in `group` besides its first. The kernel has checked it when the process connected.
fn is_member(pid: Option<i32>, group: u32) -> bool {
    let Some(pid) = pid else { return false };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    lists_group(&status, group)
}

fn lists_group(status: &str, group: u32) -> bool {
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    groups.split_whitespace().any(|member| member.parse() == Ok(group))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_owner_and_the_group_are_admitted_and_nobody_else() {
        let peer = |uid, gid| Peer { uid, gid, pid: None };
        let peers = Peers { owner: 990, group: None };
        assert!(peers.admits(&peer(0, 5)) && peers.admits(&peer(990, 5)));
        assert!(!peers.admits(&peer(1000, 990)));
        let peers = Peers { owner: 990, group: Some(77) };
        assert!(peers.admits(&peer(1000, 77)));
        assert!(!peers.admits(&peer(1000, 78)));
        assert!(!peers.admits(&Peer { uid: 1000, gid: 78, pid: Some(0) }));
    }

    #[test]
    fn groups_are_found_by_name_and_number() {
        let groups = "root:x:0:\nkvm:x:106:ann\nkvmx:x:107:\nbad:x::\n";
        assert_eq!(find_group(groups, "kvm"), Some(106));
        assert_eq!((find_group(groups, "kv"), find_group(groups, "bad"), find_group(groups, "")), (None, None, None));
        assert_eq!(group_id("4242").expect("a number"), 4242);
        assert!(group_id("no-such-group-here").is_err());
        assert!(lists_group("Name:\tx\nGroups:\t4 24 106 \n", 24) && !lists_group("Groups:\t4 24\n", 2));
    }
}
