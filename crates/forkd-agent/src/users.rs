//! Users and groups of the guest, from `/etc/passwd` and `/etc/group`.
//!
//! The agent is static and asks no name service: what is in the two files is what there is.

use std::fs;
use std::io;
use std::path::Path;

use rustix::process::{Gid, Uid};

/// Whom a program runs as.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Credentials {
    /// User.
    pub uid: Uid,
    /// Primary group.
    pub gid: Gid,
    /// All groups.
    pub groups: Vec<Gid>,
}

/// A user and what its programs should find in their environment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct User {
    /// Whom its programs run as.
    pub credentials: Credentials,
    /// Login name, when the user has an entry.
    pub name: Option<String>,
    /// Home directory.
    pub home: String,
    /// Login shell, when the entry names one.
    pub shell: Option<String>,
}

/// Why a user specification means nobody.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// No entry of that name, and it is not a number.
    #[error("no such user: {name:?} is not in /etc/passwd and is not a numeric id")]
    NoUser {
        /// What was given.
        name: String,
    },
    /// No group of that name, and it is not a number.
    #[error("no such group: {name:?} is not in /etc/group and is not a numeric id")]
    NoGroup {
        /// What was given.
        name: String,
    },
    /// A file is there but cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// Which file.
        file: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Finds `specification`: `user`, `user:group`, each a name or a numeric id.
pub fn find(specification: &str) -> Result<User, UserError> {
    resolve(specification, &read("/etc/passwd")?, &read("/etc/group")?)
}

fn read(file: &'static str) -> Result<String, UserError> {
    match fs::read(Path::new(file)) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(UserError::Read { file, source }),
    }
}

/// One usable line of `/etc/passwd`.
struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
    shell: &'a str,
}

fn entry(line: &str) -> Option<Entry<'_>> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1)?;
    Some(Entry { name, uid, gid, home, shell: fields.next().unwrap_or_default() })
}

/// Name, id and members of one usable line of `/etc/group`.
fn group(line: &str) -> Option<(&str, u32, impl Iterator<Item = &str>)> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let gid = fields.nth(1)?.parse().ok()?;
    Some((name, gid, fields.next().unwrap_or_default().split(',')))
}

fn resolve(specification: &str, passwd: &str, groups: &str) -> Result<User, UserError> {
    let (user, group_name) = match specification.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (specification, None),
    };
    let found = passwd.lines().filter_map(entry).find(|entry| entry.name == user);
    let numeric = id(user);
    let found = found.or_else(|| passwd.lines().filter_map(entry).find(|entry| Some(entry.uid) == numeric));
    let uid = match (&found, numeric) {
        (Some(entry), _) => entry.uid,
        (None, Some(uid)) => uid,
        (None, None) => return Err(UserError::NoUser { name: user.to_owned() }),
    };
    let gid = match group_name {
        Some(name) => groups
            .lines()
            .filter_map(group)
            .find(|(found, ..)| *found == name)
            .map(|(_, gid, _)| gid)
            .or_else(|| id(name))
            .ok_or_else(|| UserError::NoGroup { name: name.to_owned() })?,
        // A number without an entry gets the group of the same number: root's is not given away.
        None => found.as_ref().map_or(uid, |entry| entry.gid),
    };
    let mut all = vec![gid];
    if let (Some(entry), None) = (&found, group_name) {
        all.extend(
            groups
                .lines()
                .filter_map(group)
                .filter_map(|(_, gid, mut members)| members.any(|member| member.trim() == entry.name).then_some(gid)),
        );
        all.sort_unstable();
        all.dedup();
    }
    let home = found.as_ref().map(|entry| entry.home).filter(|home| !home.is_empty()).unwrap_or("/");
    Ok(User {
        credentials: Credentials {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: all.into_iter().map(Gid::from_raw).collect(),
        },
        home: home.to_owned(),
        name: found.as_ref().map(|entry| entry.name.to_owned()),
        shell: found.as_ref().map(|entry| entry.shell.to_owned()).filter(|shell| !shell.is_empty()),
    })
}

/// A numeric id; the all-ones value means "unchanged" to the kernel and is not one.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:1000:Ann,,,:/home/ann:/bin/sh\n77:x:5:6::/srv:\n";
    const GROUP: &str = "root:x:0:\nann:x:1000:\ndocker:x:998:bob, ann\nwheel:x:10:ann\nodd\n";

    fn ids(user: &User) -> (u32, u32, Vec<u32>) {
        let credentials = &user.credentials;
        (
            credentials.uid.as_raw(),
            credentials.gid.as_raw(),
            credentials.groups.iter().map(|gid| gid.as_raw()).collect(),
        )
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let ann = resolve("ann", PASSWD, GROUP).expect("ann");
        assert_eq!(ids(&ann), (1000, 1000, vec![10, 998, 1000]));
        assert_eq!((ann.home.as_str(), ann.shell.as_deref()), ("/home/ann", Some("/bin/sh")));
        assert_eq!(resolve("1000", PASSWD, GROUP).expect("by id"), ann);
        assert_eq!(ids(&resolve("77", PASSWD, GROUP).expect("a name wins over a number")).0, 5);
        assert_eq!(ids(&resolve("4242", PASSWD, GROUP).expect("no entry")), (4242, 4242, vec![4242]));
        assert_eq!(ids(&resolve("ann:wheel", PASSWD, GROUP).expect("group")), (1000, 10, vec![10]));
        assert_eq!(ids(&resolve("0:7", "", "").expect("numbers need no files")), (0, 7, vec![7]));
        assert!(matches!(resolve("eve", PASSWD, GROUP), Err(UserError::NoUser { .. })));
        assert!(matches!(resolve("ann:eve", PASSWD, GROUP), Err(UserError::NoGroup { .. })));
        assert!(resolve("4294967295", PASSWD, GROUP).is_err());
    }

    proptest! {
        #[test]
        fn any_files_are_read_without_panic(name in ".{0,8}", passwd in "([a-z0-9:,]{0,20}\n){0,6}", group in "([a-z0-9:,]{0,20}\n){0,6}") {
            let _ = resolve(&name, &passwd, &group);
        }
    }
}
