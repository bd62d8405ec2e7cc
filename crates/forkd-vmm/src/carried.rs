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
    /// A layer came before any disk that it could lie over.
    #[error("a {:?} descriptor was carried without a {:?} before it", Role::DiskLayer, Role::DiskBase)]
    StrayLayer,
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

/// What was carried for one disk.
#[derive(Debug)]
pub struct CarriedDisk {
    /// Its base image.
    pub base: File,
    /// Whether its machine cannot write to it.
    pub shared: bool,
    /// The layers over the base, oldest first.
    pub layers: Vec<File>,
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

    /// Takes what was carried for `count` disks, in their order; another number is an error.
    pub fn disks(&mut self, count: usize) -> Result<Vec<CarriedDisk>, CarriedError> {
        let mut disks: Vec<CarriedDisk> = Vec::with_capacity(count);
        let of_disks =
            |(role, _): &mut (Role, OwnedFd)| matches!(role, Role::DiskBase | Role::DiskShared | Role::DiskLayer);
        for (role, fd) in self.0.extract_if(.., of_disks) {
            let file = File::from(fd);
            match disks.last_mut() {
                Some(CarriedDisk { shared: false, layers, .. }) if role == Role::DiskLayer => layers.push(file),
                _ if role == Role::DiskLayer => return Err(CarriedError::StrayLayer),
                _ => disks.push(CarriedDisk { base: file, shared: role == Role::DiskShared, layers: Vec::new() }),
            }
        }
        match disks.len() {
            found if found == count => Ok(disks),
            found => Err(CarriedError::Disks { role: Role::DiskBase, found, expected: count }),
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
    fn layers_belong_to_the_disk_that_was_carried_last_before_them() {
        use Role::{DiskBase, DiskLayer, DiskOverlay, DiskShared, MemoryLayer};
        let of =
            |roles: &[Role]| Carried::new(roles, roles.iter().map(|_| null()).collect()).expect("as many as named");
        let roles = [
            DiskBase,
            MemoryLayer,
            DiskLayer,
            DiskOverlay,
            DiskLayer,
            DiskShared,
            DiskBase,
            DiskLayer,
            MemoryLayer,
            DiskBase,
        ];
        let mut carried = of(&roles);
        let disks = carried.disks(4).expect("four");
        let found: Vec<_> = disks.iter().map(|disk| (disk.shared, disk.layers.len())).collect();
        assert_eq!(found, [(false, 2), (true, 0), (false, 1), (false, 0)]);
        assert_eq!(carried.all(MemoryLayer).len(), 2, "what is not of a disk is left");
        assert!(carried.take(DiskOverlay).is_some());
        assert!(matches!(of(&[DiskLayer, DiskBase]).disks(1), Err(CarriedError::StrayLayer)));
        assert!(matches!(of(&[DiskShared, DiskLayer]).disks(1), Err(CarriedError::StrayLayer)));
        assert!(matches!(of(&[DiskBase]).disks(2), Err(CarriedError::Disks { found: 1, expected: 2, .. })));
        assert!(matches!(of(&[DiskBase, DiskBase]).disks(1), Err(CarriedError::Disks { found: 2, expected: 1, .. })));
    }

    #[test]
    fn a_message_that_names_more_than_it_carries_is_refused() {
        assert!(matches!(Carried::new(&[Role::Kvm], vec![]), Err(CarriedError::Count { named: 1, carried: 0 })));
    }
}
