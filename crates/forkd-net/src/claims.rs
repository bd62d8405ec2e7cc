//! Whose a slot is, in files that every daemon of the host sees.
//!
//! ```text
//! <directory>/<index>           its owner's name; made with O_EXCL, which is what decides
//!             <index>.lease     symbolic link that "leads" to the sandbox it is leased to
//! ```
//!
//! The directory lies in `/run`: like namespaces, claims do not outlive the host's boot.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What a slot is leased to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tenant {
    /// The sandbox, or whatever else uses it.
    pub name: String,
    /// Whether clients are told the name of its namespace.
    pub shown: bool,
}

impl Tenant {
    fn encode(&self) -> String {
        format!("{}:{}", if self.shown { "shown" } else { "hidden" }, self.name)
    }

    fn decode(text: &str) -> Option<Self> {
        let (shown, name) = text.split_once(':')?;
        let shown = match shown {
            "shown" => true,
            "hidden" => false,
            _ => return None,
        };
        Some(Self { name: name.to_owned(), shown })
    }
}

/// The claims of one owner.
#[derive(Clone, Debug)]
pub(crate) struct Claims {
    directory: PathBuf,
    owner: String,
}

impl Claims {
    /// Those of `owner`, an absolute path that exists while the owner may still come back.
    pub(crate) fn open(directory: &Path, owner: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        Ok(Self { directory: directory.to_owned(), owner: owner.display().to_string() })
    }

    /// Takes slot `index`; false when somebody has it.
    pub(crate) fn take(&self, index: u32) -> io::Result<bool> {
        match OpenOptions::new().write(true).create_new(true).open(self.path(index)) {
            Ok(mut file) => {
                file.write_all(self.owner.as_bytes()).inspect_err(|_| drop(fs::remove_file(self.path(index))))?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives slot `index` back.
    pub(crate) fn give_back(&self, index: u32) {
        self.end_lease(index);
        remove(&self.path(index));
    }

    /// Notes to whom slot `index` is leased.
    pub(crate) fn begin_lease(&self, index: u32, tenant: &Tenant) -> io::Result<()> {
        std::os::unix::fs::symlink(tenant.encode(), self.lease_path(index))
    }

    /// Notes that slot `index` is not leased any more.
    pub(crate) fn end_lease(&self, index: u32) {
        remove(&self.lease_path(index));
    }

    /// The slots of this owner, and those whose owner will not come back, with their tenants.
    pub(crate) fn own(&self) -> io::Result<Vec<(u32, Option<Tenant>)>> {
        let mut own = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let Some(index) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            let owner = match fs::read_to_string(self.path(index)) {
                Ok(owner) => owner,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            // One without an owner was not written to its end, or is just being written.
            if owner == self.owner || (!owner.is_empty() && !Path::new(&owner).exists()) {
                own.push((index, self.tenant(index).filter(|_| owner == self.owner)));
            }
        }
        own.sort_unstable_by_key(|(index, _)| *index);
        Ok(own)
    }

    /// Whether nobody has any slot.
    pub(crate) fn none_left(&self) -> bool {
        fs::read_dir(&self.directory).is_ok_and(|mut entries| entries.next().is_none())
    }

    fn tenant(&self, index: u32) -> Option<Tenant> {
        Tenant::decode(fs::read_link(self.lease_path(index)).ok()?.to_str()?)
    }

    fn path(&self, index: u32) -> PathBuf {
        self.directory.join(index.to_string())
    }

    fn lease_path(&self, index: u32) -> PathBuf {
        self.directory.join(format!("{index}.lease"))
    }
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove the claim of a network");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_has_one_owner_and_tells_its_tenant() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mine, theirs) = (dir.path().join("mine"), dir.path().join("theirs"));
        for owner in [&mine, &theirs] {
            fs::create_dir(owner).expect("mkdir");
        }
        let claims = dir.path().join("claims");
        let [my, their] = [&mine, &theirs].map(|owner| Claims::open(&claims, owner).expect("open"));
        assert!(my.take(1).expect("take") && their.take(2).expect("take") && my.take(3).expect("take"));
        assert!(!their.take(1).expect("refused"));
        let tenant = Tenant { name: "sb-1-0000".to_owned(), shown: true };
        my.begin_lease(3, &tenant).expect("lease");
        assert!(my.begin_lease(3, &tenant).is_err(), "it is leased");
        assert_eq!(my.own().expect("list"), [(1, None), (3, Some(tenant.clone()))]);
        // An owner that will not come back leaves its slots to whoever finds them, without its tenants.
        fs::remove_dir(&mine).expect("rmdir");
        assert_eq!(their.own().expect("list"), [(1, None), (2, None), (3, None)]);
        for index in 1..=3 {
            their.give_back(index);
        }
        assert!(their.none_left());
    }

    #[test]
    fn tenants_are_written_and_read() {
        for shown in [true, false] {
            let tenant = Tenant { name: "sb-7:x".to_owned(), shown };
            assert_eq!(Tenant::decode(&tenant.encode()), Some(tenant));
        }
        assert_eq!(Tenant::decode("nonsense"), None);
    }
}
