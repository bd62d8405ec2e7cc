//! Snapshots of the tiny guest on disk, each a layer over the one before.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use forkd_memory::Layer;
use forkd_proto::monitor::{self, Contents, Event, Role, SnapshotFacts, ZygoteConfig};
use forkd_types::PAGE_SIZE;
use rustix::fs::{Mode, OFlags};
use vm_memory::{Bytes, GuestAddress};

use super::guest::{self, Failure, Private};
use super::zygote::{RawZygote, Size};
use crate::carried::Carried;
use crate::fork::{self, Side};
use crate::seed::Seed;
use crate::stopwatch::Stopwatch;
use crate::vcpu_thread::chain;
use crate::{writer, zygote};

/// The first guest page that changes; what is below belongs to the guest's program.
const FIRST_PAGE: u64 = (1 << 20) / PAGE_SIZE;

/// A base and its layers, the base first, in one directory.
#[derive(Debug)]
pub(super) struct Chain {
    directory: PathBuf,
    size: Size,
    /// What the writers said, by depth.
    pub(super) facts: Vec<SnapshotFacts>,
}

impl Chain {
    /// Boots the guest and writes the base.
    pub(super) fn begin(directory: &Path, size: Size) -> Result<Self, Failure> {
        let mut chain = Self { directory: directory.to_owned(), size, facts: Vec::new() };
        let memory = guest::memory_layer(directory, size.memory_mib << 20, size.touched_mib << 20)?;
        let private = Private::new(directory)?;
        let keep = [memory.as_raw_fd(), private.vsock.as_raw_fd(), private.overlay.as_raw_fd()];
        chain.write(&keep, Contents::Whole, || guest::boot(memory, size.memory_mib << 20, private))?;
        Ok(chain)
    }

    /// Writes a layer over the newest snapshot in which `pages` pages of memory and as many blocks of the disk
    /// have changed: half of them in one run, half scattered.
    pub(super) fn grow(&mut self, pages: u64) -> Result<(), Failure> {
        let (roles, fds) = self.carry(self.facts.len() - 1)?;
        let keep: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let (depth, directory, room) = (self.facts.len() as u64, self.directory.clone(), self.room());
        self.write(&keep, Contents::Changes, || {
            let config = ZygoteConfig { backing: monitor::Backing::File, prefetch: Vec::new() };
            let (mut seed, _) = zygote::load(&config, &mut Carried::new(&roles, fds)?)?;
            change(&mut seed, &directory, depth, pages, room)?;
            Ok(seed)
        })
    }

    /// Pages that layers may change.
    fn room(&self) -> u64 {
        (self.size.memory_mib << 20) / PAGE_SIZE - FIRST_PAGE
    }

    /// A zygote of the snapshot at `depth`, and how long it took to load.
    pub(super) fn zygote(&self, depth: usize) -> Result<(RawZygote, std::time::Duration), Failure> {
        let (roles, fds) = self.carry(depth)?;
        let started = Instant::now();
        let zygote = RawZygote::over(&self.directory, &roles, fds)?;
        Ok((zygote, started.elapsed()))
    }

    /// Reads every byte of the layers at `depth` and compares digests.
    pub(super) fn verify(&self, depth: usize) -> Result<(), Failure> {
        for file in [writer::MEMORY_FILE.to_owned(), writer::disk_file(0)] {
            Layer::open(File::open(self.snapshot(depth).join(file))?)?.verify(|_| ())?;
        }
        Ok(())
    }

    fn snapshot(&self, depth: usize) -> PathBuf {
        self.directory.join(depth.to_string())
    }

    /// What a zygote of the snapshot at `depth` is given.
    fn carry(&self, depth: usize) -> Result<(Vec<Role>, Vec<OwnedFd>), Failure> {
        let open = |depth, name: &str| File::open(self.snapshot(depth).join(name));
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let mut carried = vec![
            (Role::Kvm, kvm),
            (Role::VmState, open(depth, writer::STATE_FILE)?),
            (Role::DiskBase, guest::disk_base()?),
        ];
        for depth in 0..=depth {
            carried.push((Role::MemoryLayer, open(depth, writer::MEMORY_FILE)?));
            carried.push((Role::DiskLayer, open(depth, &writer::disk_file(0))?));
        }
        Ok(carried.into_iter().map(|(role, file)| (role, OwnedFd::from(file))).unzip())
    }

    /// Writes the next snapshot from what `seed` makes, in a process of its own, which keeps no descriptors but
    /// `keep`: a machine lives as long as its process.
    fn write(
        &mut self,
        keep: &[i32],
        contents: Contents,
        seed: impl FnOnce() -> Result<Seed, Failure>,
    ) -> Result<(), Failure> {
        let directory = self.snapshot(self.facts.len());
        std::fs::create_dir(&directory)?;
        let directory = OwnedFd::from(File::open(directory)?);
        let (ours, theirs) = UnixStream::pair()?;
        if fork::fork()? == Side::Child {
            let keep: Vec<_> = keep.iter().copied().chain([directory.as_raw_fd(), theirs.as_raw_fd()]).collect();
            fork::close_all_but(&keep);
            let mut stopwatch = Stopwatch::since(Instant::now());
            let written = seed().and_then(|seed| Ok(writer::write(&seed, &directory, contents, &mut stopwatch)?));
            let event = match written {
                Ok(facts) => Event::Written { facts, stages: stopwatch.finish() },
                Err(error) => Event::Failed { error: chain(&*error) },
            };
            fork::exit(i32::from(monitor::send(&theirs, &event, &[]).is_err()));
        }
        drop(theirs);
        match monitor::receive(&ours)?.0 {
            Event::Written { facts, .. } => {
                self.facts.push(facts);
                Ok(())
            }
            other => Err(format!("no snapshot was written: {other:?}").into()),
        }
    }
}

/// Changes `pages` of the `room` pages of memory and blocks of the disk, otherwise at each `depth`.
fn change(seed: &mut Seed, scratch: &Path, depth: u64, pages: u64, room: u64) -> Result<(), Failure> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let overlay = || rustix::fs::open(scratch, flags, Mode::from_raw_mode(0o600)).map(File::from);
    let mut disk = seed.disks.remove(0).with_overlay(overlay()?);
    let mut bytes = vec![0; PAGE_SIZE as usize];
    for index in 0..pages {
        // Layers overlap, and every run ends within what is there.
        let run = (depth * pages / 4) % (room - pages);
        let scattered = (index * 7919 + depth * 131) % room;
        let page = FIRST_PAGE + if index < pages / 2 { run + index } else { scattered };
        blake3::Hasher::new().update(&depth.to_le_bytes()).update(&page.to_le_bytes()).finalize_xof().fill(&mut bytes);
        seed.ram.memory().write_slice(&bytes, GuestAddress(page * PAGE_SIZE))?;
        disk.write_at(page * PAGE_SIZE, &bytes)?;
    }
    disk.seal(overlay()?);
    seed.disks = vec![disk.image()?];
    Ok(())
}
