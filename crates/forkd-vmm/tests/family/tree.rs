//! A random tree of guests, frozen copies and snapshots, every node compared with the model.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use forkd_memory::Layer;
use forkd_memory::layer::DATA_OFFSET;
use forkd_proto::monitor::Contents;
use forkd_store::pack::{PackOptions, UnpackOptions};
use forkd_store::{Boot, CpuFacts, ParentRef, Snapshot, SnapshotMeta, Store, Volume};
use forkd_types::{Digest, Tag, VolumePolicy};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::guest::{self, Content, Model};
use crate::monitor::{self, Failure, Room, Running, Source, Still};

/// The most guests, and the most frozen copies, at one time; each is a process or two.
const MOST: usize = 12;
/// A guest is spawned from one of so many snapshots that have the most ancestors.
const DEEPEST: usize = 6;

/// What is done next, to whichever node the index means.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// A running guest writes; the next act does not wait for it.
    Step(Index, u32),
    /// A running guest is copied.
    Branch(Index),
    /// A running guest is copied into a frozen one: a checkpoint.
    Freeze(Index),
    /// A frozen copy is copied into a running one.
    Thaw(Index),
    /// A running guest is replaced by a copy of a frozen one.
    Rewind(Index, Index),
    /// A snapshot's zygote is copied into a running guest.
    Spawn(Index),
    /// A running guest writes a snapshot, and a step while it is being written.
    Snapshot(Index, Over, u32),
    /// A frozen copy writes a snapshot.
    Keep(Index, Over),
    /// A snapshot is written anew without a parent.
    Compact(Index),
    /// A snapshot is packed with all that it builds on, unpacked in an empty store, and here under another name.
    Carry(Index),
    /// A running guest ends.
    Kill(Index),
    /// A snapshot is removed, if no other needs it.
    Remove(Index),
}

/// How a snapshot lies over the one that its guest was forked from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Over {
    /// As a layer that needs it.
    Parent,
    /// With everything in it.
    Nothing,
}

/// Acts in about the proportions of real use, writes above all.
pub(crate) fn act() -> impl Strategy<Value = Act> {
    let over = || prop_oneof![5 => Just(Over::Parent), 1 => Just(Over::Nothing)];
    let seed = || 2u32..;
    prop_oneof![
        8 => (any::<Index>(), seed()).prop_map(|(node, seed)| Act::Step(node, seed)),
        3 => any::<Index>().prop_map(Act::Branch),
        2 => any::<Index>().prop_map(Act::Freeze),
        2 => any::<Index>().prop_map(Act::Thaw),
        2 => (any::<Index>(), any::<Index>()).prop_map(|(node, frozen)| Act::Rewind(node, frozen)),
        5 => any::<Index>().prop_map(Act::Spawn),
        5 => (any::<Index>(), over(), seed()).prop_map(|(node, over, seed)| Act::Snapshot(node, over, seed)),
        2 => (any::<Index>(), over()).prop_map(|(frozen, over)| Act::Keep(frozen, over)),
        1 => any::<Index>().prop_map(Act::Compact),
        1 => any::<Index>().prop_map(Act::Carry),
        1 => any::<Index>().prop_map(Act::Kill),
        1 => any::<Index>().prop_map(Act::Remove),
    ]
}

/// A node with the snapshot that it was forked from; what was booted has none.
struct Node<T> {
    is: T,
    model: Model,
    origin: Option<Tag>,
}

/// A published snapshot, and how many ancestors it has.
struct Kept {
    tag: Tag,
    depth: usize,
    model: Model,
}

/// All that lives.
pub(crate) struct Family {
    room: Room,
    store: Store,
    boot: Boot,
    bases: Vec<Digest>,
    running: Vec<Node<Running>>,
    frozen: Vec<Node<Still>>,
    kept: Vec<Kept>,
    names: u32,
    /// What was made, by kind.
    pub(crate) made: Made,
}

/// How many nodes were made and compared.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Made {
    pub(crate) copies: usize,
    pub(crate) frozen: usize,
    pub(crate) snapshots: usize,
    pub(crate) deepest: usize,
    pub(crate) compared: usize,
}

impl Made {
    pub(crate) fn nodes(&self) -> usize {
        self.copies + self.frozen + self.snapshots
    }
}

impl Family {
    /// One booted guest.
    pub(crate) fn begin(directory: &Path) -> Result<Self, Failure> {
        let store = Store::open(&directory.join("store"))?;
        let room = Room::new(directory);
        let blob = |name: &str, bytes: &[u8]| -> Result<Digest, Failure> {
            let path = directory.join(name);
            std::fs::write(&path, bytes)?;
            Ok(store.import_file(&path)?)
        };
        let kernel = blob("kernel", &guest::kernel())?;
        let (mut bases, mut images) = (Vec::new(), Vec::new());
        for number in 0..guest::DISKS {
            let name = format!("disk-{number}");
            bases.push(blob(&name, &guest::disk_image(number))?);
            images.push(File::open(directory.join(name))?);
        }
        let guest = monitor::boot(&room, &File::open(directory.join("kernel"))?, &images)?;
        let boot = Boot {
            kernel,
            initramfs: None,
            kernel_release: "family".into(),
            agent_version: "none".into(),
            guest_cid: 3,
            cpu: CpuFacts::default(),
        };
        let first = Node { is: guest, model: Model::default(), origin: None };
        Ok(Self {
            room,
            store,
            boot,
            bases,
            running: vec![first],
            frozen: Vec::new(),
            kept: Vec::new(),
            names: 0,
            made: Made::default(),
        })
    }

    /// Does one act; nothing when there is no node of the kind it wants.
    pub(crate) fn act(&mut self, act: &Act) -> Result<(), Failure> {
        match act {
            Act::Step(node, seed) => {
                let node = pick_mut(&mut self.running, node);
                let Some(node) = node else { return Ok(()) };
                node.is.settle()?;
                node.is.step(*seed)
            }
            Act::Branch(node) => {
                let Some(node) = pick(&self.running, node) else { return Ok(()) };
                let mut copy = node.is.copy(&self.room)?;
                copy.inherit(&node.is.model)?;
                self.add_running(copy, node.origin.clone())
            }
            Act::Freeze(node) => {
                // A frozen copy cannot be asked what it holds.
                let Some(node) = pick_mut(&mut self.running, node) else { return Ok(()) };
                node.is.settle()?;
                let frozen = node.is.freeze(&self.room)?;
                let (model, origin) = (node.is.model.clone(), node.origin.clone());
                self.frozen.push(Node { is: frozen, model, origin });
                self.made.frozen += 1;
                if self.frozen.len() > MOST {
                    let oldest = self.frozen.remove(0);
                    self.end_frozen(oldest)?;
                }
                Ok(())
            }
            Act::Thaw(frozen) => self.thaw(frozen),
            Act::Rewind(node, frozen) => {
                if self.frozen.is_empty() || self.running.is_empty() {
                    return Ok(());
                }
                let old = self.running.swap_remove(node.index(self.running.len()));
                self.end_running(old)?;
                self.thaw(frozen)
            }
            Act::Spawn(snapshot) => {
                self.kept.sort_by_key(|kept| std::cmp::Reverse(kept.depth));
                let deepest = &self.kept[..self.kept.len().min(DEEPEST)];
                let Some(kept) = pick(deepest, snapshot) else { return Ok(()) };
                let (tag, model) = (kept.tag.clone(), kept.model.clone());
                let zygote = self.zygote(&tag)?;
                let mut copy = zygote.copy(&self.room)?;
                copy.inherit(&model)?;
                expect_steps(&copy.model, &model)?;
                zygote.end()?;
                self.add_running(copy, Some(tag))
            }
            Act::Snapshot(node, over, seed) => {
                let Some(at) = index(&self.running, node) else { return Ok(()) };
                let mut node = self.running.swap_remove(at);
                node.is.settle()?;
                let model = node.is.model.clone();
                let mut stepped = Ok(());
                let source = node.is.handle()?;
                let kept = self.keep(&source, &model, node.origin.clone(), *over, || {
                    stepped = node.is.step(*seed);
                    Ok(())
                });
                self.running.push(node);
                kept?;
                stepped
            }
            Act::Keep(frozen, over) => {
                let Some(at) = index(&self.frozen, frozen) else { return Ok(()) };
                let node = self.frozen.swap_remove(at);
                let kept = self.keep(&node.is, &node.model, node.origin.clone(), *over, || Ok(()));
                self.frozen.push(node);
                kept.map(|_| ())
            }
            Act::Compact(snapshot) => {
                let Some(kept) = pick(&self.kept, snapshot) else { return Ok(()) };
                let (tag, model) = (kept.tag.clone(), kept.model.clone());
                let zygote = self.zygote(&tag)?;
                self.keep(&zygote, &model, Some(tag), Over::Nothing, || Ok(()))?;
                zygote.end()
            }
            Act::Carry(snapshot) => {
                let Some(kept) = pick(&self.kept, snapshot) else { return Ok(()) };
                let (tag, model) = (kept.tag.clone(), kept.model.clone());
                self.carry(&tag, &model)
            }
            Act::Kill(node) => {
                // The last one stays: a family that died out has no more to show.
                if self.running.len() == 1 {
                    return Ok(());
                }
                let node = self.running.swap_remove(node.index(self.running.len()));
                self.end_running(node)
            }
            Act::Remove(snapshot) => {
                let Some(at) = index(&self.kept, snapshot) else { return Ok(()) };
                match self.store.remove(&self.kept[at].tag) {
                    // What was forked from it can now only be kept whole.
                    Ok(()) => drop(self.kept.swap_remove(at)),
                    Err(forkd_store::StoreError::HasChildren { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
                Ok(())
            }
        }
    }

    /// Compares every node that is left, and ends it.
    pub(crate) fn end(mut self) -> Result<Made, Failure> {
        for node in std::mem::take(&mut self.running) {
            self.end_running(node)?;
        }
        for node in std::mem::take(&mut self.frozen) {
            self.end_frozen(node)?;
        }
        for kept in std::mem::take(&mut self.kept) {
            self.compare(&kept.tag, &kept.model)?;
            let report = self.store.verify(&kept.tag, |path| forkd_memory::layer::verify(path, |_| ()), |_| ())?;
            if !report.is_good() {
                return Err(format!("snapshot {} is damaged: {report:?}", kept.tag).into());
            }
        }
        Ok(self.made)
    }

    fn thaw(&mut self, frozen: &Index) -> Result<(), Failure> {
        let Some(node) = pick(&self.frozen, frozen) else { return Ok(()) };
        let mut copy = node.is.copy(&self.room)?;
        copy.inherit(&node.model)?;
        expect_steps(&copy.model, &node.model)?;
        self.add_running(copy, node.origin.clone())
    }

    fn add_running(&mut self, copy: Running, origin: Option<Tag>) -> Result<(), Failure> {
        let model = copy.model.clone();
        self.running.push(Node { is: copy, model, origin });
        self.made.copies += 1;
        if self.running.len() > MOST {
            let oldest = self.running.remove(0);
            self.end_running(oldest)?;
        }
        Ok(())
    }

    /// Compares a guest with its model, by way of a snapshot of it, and ends it.
    fn end_running(&mut self, mut node: Node<Running>) -> Result<(), Failure> {
        node.is.settle()?;
        let model = node.is.model.clone();
        let source = node.is.handle()?;
        let tag = self.keep(&source, &model, node.origin, Over::Nothing, || Ok(()))?;
        self.forget(&tag)?;
        node.is.end()
    }

    fn end_frozen(&mut self, node: Node<Still>) -> Result<(), Failure> {
        let tag = self.keep(&node.is, &node.model, node.origin, Over::Nothing, || Ok(()))?;
        self.forget(&tag)?;
        node.is.end()
    }

    /// Removes a snapshot that was only made to compare its source.
    fn forget(&mut self, tag: &Tag) -> Result<(), Failure> {
        self.kept.retain(|kept| kept.tag != *tag);
        self.made.snapshots -= 1;
        Ok(self.store.remove(tag)?)
    }

    /// Has `source` write a snapshot, publishes it and compares it with `model`.
    fn keep(
        &mut self,
        source: &impl Source,
        model: &Model,
        origin: Option<Tag>,
        over: Over,
        meanwhile: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<Tag, Failure> {
        self.names += 1;
        let tag: Tag = format!("node-{}", self.names).parse()?;
        // A snapshot that was removed is nobody's parent any more.
        let parent = origin.and_then(|origin| self.store.get(&origin).ok());
        let parent = parent.filter(|_| matches!(over, Over::Parent));
        let contents = if parent.is_some() { Contents::Changes } else { Contents::Whole };
        let staged = self.store.stage(&tag)?;
        let facts = source.write(&self.room, staged.dir(), contents, meanwhile)?;
        let bytes = staged.vmstate_bytes()?;
        let bases: Vec<_> = self.bases.iter().map(|base| (*base, guest::DISK_BYTES as u64)).collect();
        let mut meta = SnapshotMeta::new(tag.clone(), 1, &facts, bytes, &bases, self.boot.clone());
        meta.set_volumes(
            [("/shared", VolumePolicy::SharedRo), ("/data", VolumePolicy::Private)]
                .map(|(path, policy)| Volume { path: path.parse().expect("a legal place"), policy }),
        );
        meta.parent = parent.map(|parent| ParentRef { tag: parent.meta.tag, digest: parent.digest });
        self.store.publish(staged, meta, false)?;
        self.added(&tag, model)?;
        Ok(tag)
    }

    fn carry(&mut self, tag: &Tag, model: &Model) -> Result<(), Failure> {
        let mut pack = Vec::new();
        self.store.pack(tag, &PackOptions { level: 1, ..PackOptions::default() }, |_| ())?.write(&mut pack, |_| ())?;
        let verify = |path: &Path| forkd_memory::layer::verify(path, |_| ());
        let there = tempfile::tempdir()?;
        let elsewhere = Store::open(there.path())?;
        elsewhere.unpack(pack.as_slice(), &UnpackOptions::default(), verify, |_| ())?;
        self.compare_in(&elsewhere, tag, model)?;
        self.names += 1;
        let name: Tag = format!("node-{}", self.names).parse()?;
        let options = UnpackOptions { rename: Some(name.clone()), ..UnpackOptions::default() };
        self.store.unpack(pack.as_slice(), &options, verify, |_| ())?;
        self.added(&name, model)
    }

    /// Takes note of a published snapshot and compares it with `model`.
    fn added(&mut self, tag: &Tag, model: &Model) -> Result<(), Failure> {
        let depth = self.store.chain(tag)?.len() - 1;
        self.made.snapshots += 1;
        self.made.deepest = self.made.deepest.max(depth);
        self.compare(tag, model)?;
        self.kept.push(Kept { tag: tag.clone(), depth, model: model.clone() });
        Ok(())
    }

    fn compare(&mut self, tag: &Tag, model: &Model) -> Result<(), Failure> {
        self.compare_in(&self.store.clone(), tag, model)
    }

    fn compare_in(&mut self, store: &Store, tag: &Tag, model: &Model) -> Result<(), Failure> {
        self.made.compared += 1;
        let (found, expected) = (content(&store.chain(tag)?)?, model.content());
        if found == expected {
            return Ok(());
        }
        Err(format!("{tag}, after {} steps: {}", model.steps(), found.difference(&expected)).into())
    }

    fn zygote(&self, tag: &Tag) -> Result<Still, Failure> {
        let chain = self.store.chain(tag)?;
        let newest = chain.last().ok_or("a chain ends in its snapshot")?;
        let memory: Vec<PathBuf> = chain.iter().flat_map(Snapshot::memory_layers).collect();
        let disk = |(number, base): (usize, &Digest)| {
            let layers = chain.iter().flat_map(|snapshot| snapshot.disk_layers(number)).collect();
            (self.store.root().join("blobs").join(base.hex()), layers)
        };
        let disks: Vec<_> = self.bases.iter().enumerate().map(disk).collect();
        monitor::zygote(&newest.vmstate(), &memory, &disks)
    }
}

/// A copy of something that stood still holds exactly what that held.
fn expect_steps(copy: &Model, source: &Model) -> Result<(), Failure> {
    match (copy.steps(), source.steps()) {
        (copy, source) if copy == source => Ok(()),
        (copy, source) => Err(format!("a copy has done {copy} steps, what it was copied from {source}").into()),
    }
}

/// What a snapshot's files say that memory and disks hold, read without the code that restores from them.
fn content(chain: &[Snapshot]) -> Result<Content, Failure> {
    let mut content = Model::default().content();
    content.window.fill(0);
    for snapshot in chain {
        for path in snapshot.memory_layers() {
            lay(&path, guest::WINDOW, &mut content.window)?;
        }
        for (number, disk) in guest::WRITTEN.into_iter().zip(&mut content.disks) {
            for path in snapshot.disk_layers(number) {
                lay(&path, 0, disk)?;
            }
        }
    }
    Ok(content)
}

/// Lays what a layer holds of the range that begins at `start` over `bytes`.
fn lay(path: &Path, start: u64, bytes: &mut [u8]) -> Result<(), Failure> {
    let layer = Layer::open(File::open(path)?)?;
    let end = start + bytes.len() as u64;
    let part = |from: u64, to: u64| {
        let (from, to) = (from.clamp(start, end), to.clamp(start, end));
        (from < to).then_some((from, (from - start) as usize..(to - start) as usize))
    };
    for run in layer.data() {
        if let Some((from, range)) = part(run.offset(), run.offset() + run.bytes()) {
            layer.file().read_exact_at(&mut bytes[range], DATA_OFFSET + from)?;
        }
    }
    for run in layer.zero() {
        if let Some((_, range)) = part(run.offset(), run.offset() + run.bytes()) {
            bytes[range].fill(0);
        }
    }
    Ok(())
}

fn index<T>(among: &[T], index: &Index) -> Option<usize> {
    (!among.is_empty()).then(|| index.index(among.len()))
}

fn pick<'a, T>(among: &'a [T], at: &Index) -> Option<&'a T> {
    index(among, at).map(|at| &among[at])
}

fn pick_mut<'a, T>(among: &'a mut [T], at: &Index) -> Option<&'a mut T> {
    index(among, at).map(|at| &mut among[at])
}
