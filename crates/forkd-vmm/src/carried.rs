//! The descriptors that travel with a message, by role.

use std::fs::File;
use std::os::fd::OwnedFd;

use forkd_proto::monitor::Role;

/// What is wrong with the descriptors of a message.
#[derive(Debug, thiserror::Error)]
pub enum CarriedError {
    /// The message names another number of descriptors than it carries.
    #[error("the message names {named} descriptors and carries {carried}")]
    Count {
        /// Roles in the message.
        named: usize,
        /// Descriptors that came.
        carried: usize,
    },
    /// One that the request cannot do without is missing.
    #[error("the message carries no {0:?} descriptor")]
    Missing(Role),
    /// The number of disks does not match.
    #[error("{found} {role:?} descriptors for {expected} disks")]
    Disks {
        /// Which role.
        role: Role,
        /// How many came.
        found: usize,
        /// How many are needed.
        expected: usize,
    },
}

/// Descriptors by role, in the order they came.
#[derive(Debug, Default)]
pub struct Carried(Vec<(Role, OwnedFd)>);

impl Carried {
    /// Pairs the roles a message names with the descriptors it carried.
    pub fn new(roles: &[Role], fds: Vec<OwnedFd>) -> Result<Self, CarriedError> {
        if roles.len() != fds.len() {
            return Err(CarriedError::Count { named: roles.len(), carried: fds.len() });
        }
        Ok(Self(roles.iter().copied().zip(fds).collect()))
    }

    /// Takes the first descriptor of `role`, if there is one.
    pub fn take(&mut self, role: Role) -> Option<OwnedFd> {
        let at = self.0.iter().position(|(found, _)| *found == role)?;
        Some(self.0.remove(at).1)
    }

    /// Takes the first descriptor of `role`, which must be there.
    pub fn require(&mut self, role: Role) -> Result<OwnedFd, CarriedError> {
        self.take(role).ok_or(CarriedError::Missing(role))
    }

    /// Takes the first `count` of `role` as files; fewer are an error.
    pub fn files(&mut self, role: Role, count: usize) -> Result<Vec<File>, CarriedError> {
        let files: Vec<File> = std::iter::from_fn(|| self.take(role)).take(count).map(File::from).collect();
        if files.len() == count {
            Ok(files)
        } else {
            Err(CarriedError::Disks { role, found: files.len(), expected: count })
        }
    }

    /// Takes all of `role` as files.
    pub fn all(&mut self, role: Role) -> Vec<File> {
        std::iter::from_fn(|| self.take(role)).map(File::from).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").expect("open").into()
    }

    #[test]
    fn roles_are_taken_in_order_and_what_is_missing_is_named() {
        let mut carried =
            Carried::new(&[Role::DiskOverlay, Role::Control, Role::DiskOverlay], vec![null(), null(), null()])
                .expect("as many as named");
        assert_eq!(carried.files(Role::DiskOverlay, 2).expect("two").len(), 2);
        assert!(carried.require(Role::Control).is_ok());
        assert!(matches!(carried.require(Role::Control), Err(CarriedError::Missing(Role::Control))));
        assert!(matches!(carried.files(Role::DiskBase, 1), Err(CarriedError::Disks { found: 0, expected: 1, .. })));
    }

    #[test]
    fn a_message_that_names_more_than_it_carries_is_refused() {
        assert!(matches!(Carried::new(&[Role::Kvm], vec![]), Err(CarriedError::Count { named: 1, carried: 0 })));
    }
}
