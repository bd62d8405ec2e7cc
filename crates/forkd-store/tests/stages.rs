//! Every operation of the store, killed and failing at every stage: at each system call that changes files.
//!
//! An operation runs in a process of its own, this program begun again, under the tracer of
//! [`forkd_testkit::faults`]. Where `strace` is missing or may not trace, every test is counted as ignored and
//! the reason is printed. To walk one more operation, add it to [`OPERATIONS`].

mod pack_support;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use forkd_memory::{LayerError, layer};
use forkd_store::pack::UnpackOptions;
use forkd_store::{Listed, MEMORY_LAYER, ParentRef, Store, StoreError};
use forkd_testkit::faults::{self, Call, Fault, Harm, Trace, check_flushed_before_named, mark};
use forkd_types::Digest;
use libtest_mimic::{Arguments, Failed, Trial};
use support::{blob, digest, layer_digest, publish, staged, tag};

/// How an operation ends.
type Outcome = Result<(), Box<dyn std::error::Error>>;

/// One operation.
struct Operation {
    name: &'static str,
    /// Makes the store as it is before.
    prepare: fn(&Store, &Path),
    /// Does it, on a store in the first directory with help of files in the second; what is walked is between two
    /// marks.
    run: fn(&Path, &Path) -> Outcome,
    /// How much of it may be done when it fails or is cut short.
    done: Done,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    /// All or nothing.
    Whole,
    /// Any of its single steps.
    Parts,
    /// Nothing; or all of it, when the store was opened again.
    Settled,
    /// It is refused, so nothing ever.
    Never,
}

const OPERATIONS: [Operation; 15] = [
    Operation {
        name: "open_and_sweep",
        prepare: |store, _| {
            let staging = store.root().join("staging");
            std::fs::create_dir(staging.join("7-py")).expect("mkdir");
            for file in ["7-py/vmstate", "7-py/memory.layer", "8-blob"] {
                std::fs::write(staging.join(file), "left").expect("write");
            }
        },
        run: |root, _| marked(|| Store::open(root)),
        done: Done::Whole,
    },
    Operation {
        name: "write_a_blob",
        prepare: |_, _| {},
        run: |root, _| {
            let store = Store::open(root)?;
            marked(|| {
                let mut writer = store.stage_blob()?;
                let written = writer.write_all(&[7; 3 << 20]).and_then(|()| writer.write_all(&[0; 2 << 20]));
                // The text of a failed write names the file; the caller makes an error of it.
                match written {
                    Ok(()) => writer.finish(None).map(drop),
                    Err(source) => Err(StoreError::Io { action: "write", path: root.to_owned(), source }),
                }
            })
        },
        done: Done::Whole,
    },
    Operation {
        name: "import_a_file",
        prepare: |_, aside| std::fs::write(aside.join("disk"), vec![5; 3 << 20]).expect("write"),
        run: |root, aside| {
            let store = Store::open(root)?;
            marked(|| store.import_file(&aside.join("disk")))
        },
        done: Done::Whole,
    },
    Operation {
        name: "remove_a_blob",
        prepare: |store, _| {
            blob(store, b"unused");
        },
        run: |root, _| {
            let store = Store::open(root)?;
            marked(|| store.remove_blob(&digest(b"unused")))
        },
        done: Done::Whole,
    },
    Operation {
        name: "publish_a_base",
        prepare: |_, _| {},
        run: |root, _| publish_marked(root, "new", None, false),
        done: Done::Whole,
    },
    Operation {
        name: "publish_over_a_parent",
        prepare: |_, _| {},
        run: |root, _| publish_marked(root, "new", Some("child"), false),
        done: Done::Whole,
    },
    Operation {
        name: "publish_with_linked_layers",
        prepare: |_, _| {},
        run: |root, _| {
            let store = Store::open(root)?;
            let base = store.get(&tag("base"))?;
            let (mut staged, mut meta) = staged(&store, "new", b"new");
            marked(|| {
                staged.link(&base.dir.join(MEMORY_LAYER), "memory-0.layer")?;
                let mut layer = base.meta.memory_layers[0].clone();
                layer.file = "memory-0.layer".to_owned();
                meta.memory_layers.insert(0, layer);
                store.publish(staged, meta, false).map(drop)
            })
        },
        done: Done::Whole,
    },
    Operation {
        name: "replace",
        prepare: |store, _| drop(publish(store, "old", b"old", None).expect("publish")),
        run: |root, _| publish_marked(root, "old", None, true),
        done: Done::Whole,
    },
    Operation {
        name: "refuse_a_taken_tag",
        prepare: |_, _| {},
        run: |root, _| publish_marked(root, "child", None, false),
        done: Done::Never,
    },
    Operation {
        name: "remove",
        prepare: |_, _| {},
        run: |root, _| {
            let store = Store::open(root)?;
            marked(|| store.remove(&tag("child")))
        },
        done: Done::Whole,
    },
    Operation {
        name: "refuse_to_remove_a_parent",
        prepare: |_, _| {},
        run: |root, _| {
            let store = Store::open(root)?;
            marked(|| store.remove(&tag("base")))
        },
        done: Done::Never,
    },
    Operation {
        name: "remove_cascade",
        prepare: |store, _| {
            let child = store.get(&tag("child")).expect("there");
            publish(store, "grandchild", b"grandchild", Some(&child)).expect("publish");
        },
        run: |root, _| {
            let store = Store::open(root)?;
            marked(|| {
                let doomed = store.descendants(&tag("base"))?;
                doomed.iter().chain([&tag("base")]).try_for_each(|tag| store.remove(tag))
            })
        },
        done: Done::Parts,
    },
    Operation {
        name: "remove_by_force",
        prepare: |_, _| {},
        run: |root, _| {
            let store = Store::open(root)?;
            marked(|| store.remove_forced(&tag("base")))
        },
        done: Done::Whole,
    },
    Operation {
        name: "unpack",
        prepare: |_, aside| {
            static PACK: OnceLock<Vec<u8>> = OnceLock::new();
            let pack = PACK.get_or_init(|| {
                let (_dir, store) = pack_support::store();
                let base = pack_support::publish_small(&store, "packed-base", 1, None);
                pack_support::publish_small(&store, "packed", 2, Some(&base));
                pack_support::pack(&store, "packed")
            });
            std::fs::write(aside.join("pack"), pack).expect("write");
        },
        run: |root, aside| {
            let store = Store::open(root)?;
            let pack = std::fs::read(aside.join("pack"))?;
            marked(|| store.unpack(&pack[..], &UnpackOptions::default(), |path| layer::verify(path, |_| ()), |_| ()))
        },
        done: Done::Settled,
    },
    Operation {
        name: "compact",
        prepare: |_, _| {},
        run: |root, _| {
            let store = Store::open(root)?;
            marked(|| {
                let (staged, mut meta) = staged_or_failed(&store, "flat")?;
                meta.branched_from = Some("compact:child".to_owned());
                store.publish(staged, meta, false)?;
                store.remove(&tag("child"))?;
                store.remove(&tag("base"))
            })
        },
        done: Done::Parts,
    },
];

/// Runs what is to be walked.
fn marked<T, E: std::error::Error + 'static>(work: impl FnOnce() -> Result<T, E>) -> Outcome {
    mark();
    let outcome = work();
    mark();
    Ok(outcome.map(drop)?)
}

fn publish_marked(root: &Path, name: &str, parent: Option<&str>, replace: bool) -> Outcome {
    let store = Store::open(root)?;
    marked(|| {
        let (staged, mut meta) = staged_or_failed(&store, name)?;
        if let Some(parent) = parent {
            let parent = store.get(&tag(parent))?;
            meta.parent = Some(ParentRef { tag: parent.meta.tag, digest: parent.digest });
        }
        store.publish(staged, meta, replace).map(drop)
    })
}

/// As [`staged`], whose writer may fail like any other.
fn staged_or_failed(
    store: &Store,
    name: &str,
) -> Result<(forkd_store::StagedSnapshot, forkd_store::SnapshotMeta), StoreError> {
    let staged = store.stage(&tag(name))?;
    let path = staged.path().to_owned();
    let meta = support::written(store, &staged, name.as_bytes()).map_err(|source| StoreError::Io {
        action: "write the files of",
        path,
        source,
    })?;
    Ok((staged, meta))
}

/// Directory of the process that runs an operation.
const DIRECTORY: &str = "FORKD_STORE_STAGES_DIRECTORY";
/// Index of the operation.
const OPERATION: &str = "FORKD_STORE_STAGES_OPERATION";

fn main() -> ExitCode {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return perform(&Scene(directory.into()));
    }
    // One after the other: a process that one test begins holds for a moment every lock of the others.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let missing = faults::cannot_trace();
    if let Some(reason) = &missing {
        support::skip(&format!("every test of this file: {reason}"));
    }
    let trials = OPERATIONS.iter().enumerate().map(|(index, operation)| {
        let trial =
            Trial::test(operation.name, move || walk(index).map_err(|error| Failed::from(format!("{error:#}"))));
        trial.with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// The part of the process that is harmed.
fn perform(scene: &Scene) -> ExitCode {
    let index = std::env::var(OPERATION).ok().and_then(|index| index.parse().ok());
    let Operation { run, .. } = OPERATIONS[index.unwrap_or(0_usize)];
    let text = match run(&scene.root(), &scene.aside()) {
        Ok(()) => String::new(),
        Err(error) => with_causes(&*error),
    };
    match std::fs::write(scene.outcome(), &text) {
        Ok(()) if text.is_empty() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The directories of one run.
struct Scene(PathBuf);

impl Scene {
    /// A store with a base and a child, and what `operation` needs besides.
    fn set(directory: &Path, operation: &Operation) -> Result<Self> {
        let scene = Self(directory.join("scene"));
        if scene.0.exists() {
            std::fs::remove_dir_all(&scene.0)?;
        }
        std::fs::create_dir_all(scene.aside())?;
        let store = Store::open(&scene.root())?;
        let base = publish(&store, "base", b"base", None)?;
        publish(&store, "child", b"child", Some(&base))?;
        (operation.prepare)(&store, &scene.aside());
        Ok(scene)
    }

    fn root(&self) -> PathBuf {
        self.0.join("root")
    }

    fn aside(&self) -> PathBuf {
        self.0.join("aside")
    }

    fn outcome(&self) -> PathBuf {
        self.0.join("outcome")
    }

    /// What the operation said when it failed; nothing when it succeeded.
    fn said(&self) -> Result<String> {
        std::fs::read_to_string(self.outcome()).context("the operation did not come to its end")
    }

    fn command(&self, operation: usize) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.env(DIRECTORY, &self.0).env(OPERATION, operation.to_string());
        Ok(command)
    }

    fn leftovers(&self) -> Result<Vec<PathBuf>> {
        let entries = self.root().join("staging").read_dir()?;
        Ok(entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?)
    }
}

/// Everything published: of each snapshot and blob its files and their bytes.
type State = BTreeMap<PathBuf, BTreeMap<String, Vec<u8>>>;

fn state(root: &Path) -> Result<State> {
    let mut state = State::new();
    for kind in ["snapshots", "blobs"] {
        for entry in root.join(kind).read_dir()? {
            let path = entry?.path();
            let files = match path.is_dir() {
                true => path.read_dir()?.map(|file| file.map(|file| file.path())).collect::<Result<Vec<_>, _>>()?,
                false => vec![path.clone()],
            };
            let read = |file: PathBuf| {
                let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                anyhow::Ok((name, std::fs::read(&file).with_context(|| file.display().to_string())?))
            };
            let files = files.into_iter().map(read).collect::<Result<_>>()?;
            state.insert(path.strip_prefix(root)?.to_owned(), files);
        }
    }
    Ok(state)
}

/// What an operation does to a store.
struct Effect {
    before: State,
    after: State,
    done: Done,
}

impl Effect {
    /// Fails unless everything that is there is whole and as it was before or will be after, and nothing is
    /// missing that is there in both.
    fn check(&self, now: &State) -> Result<()> {
        self.check_as(self.done, now)
    }

    fn check_as(&self, done: Done, now: &State) -> Result<()> {
        for (path, files) in now {
            let known = [&self.before, &self.after].iter().any(|state| state.get(path) == Some(files));
            ensure!(known, "{} is neither as before nor as after", path.display());
        }
        let lost = self.before.keys().find(|path| self.after.contains_key(*path) && !now.contains_key(*path));
        ensure!(lost.is_none(), "{} is gone", lost.unwrap_or(&PathBuf::new()).display());
        let whole = done != Done::Whole || self.is_before(now) || self.is_after(now);
        ensure!(whole, "it is done in part: {:?}", now.keys());
        Ok(())
    }

    fn is_before(&self, now: &State) -> bool {
        *now == self.before
    }

    fn is_after(&self, now: &State) -> bool {
        *now == self.after
    }
}

fn walk(index: usize) -> Result<()> {
    let operation = &OPERATIONS[index];
    // What is walked is the order of calls, not the disk: without one it goes much faster.
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    let trace = Trace::in_directory(directory.path());

    let scene = Scene::set(directory.path(), operation)?;
    let before = state(&scene.root())?;
    let calm = trace.run(&scene.command(index)?, None)?;
    let said = scene.said()?;
    ensure!(said.is_empty() != (operation.done == Done::Never), "unharmed it says {said:?}");
    ensure!(scene.leftovers()?.is_empty(), "unharmed it leaves {:?}", scene.leftovers()?);
    let effect = Effect { before, after: state(&scene.root())?, done: operation.done };
    let calls = calm.between_marks()?;
    let published = ["snapshots", "blobs"].map(|name| scene.root().join(name));
    check_flushed_before_named(calls, &scene.root(), &published.each_ref().map(PathBuf::as_path))?;

    let mut walked = 0;
    for call in calls {
        for harm in [Harm::Kill, Harm::Error("ENOSPC"), Harm::Error("EIO"), Harm::Error("EMFILE")] {
            if matches!(harm, Harm::Error(error) if !call.can_fail_with(error)) {
                continue;
            }
            let scene = Scene::set(directory.path(), operation)?;
            let trace = Trace::in_directory(directory.path());
            let (trace, call) = if calm.marking_thread() == Some(call.thread) {
                (trace, call.clone())
            } else {
                let (path, call) = calm.narrowed(call).context("it is on no path")?;
                (trace.only([path]), call)
            };
            let fault = Fault { call: call.clone(), harm };
            let run = trace.run(&scene.command(index)?, Some(&fault))?;
            let outcome = match harm {
                Harm::Kill => match run.status.success() {
                    true => Err(anyhow::anyhow!("it was not killed")),
                    false => after_a_kill(&scene, &effect),
                },
                Harm::Error(_) | Harm::Delay(_) => after_an_error(&scene, operation.name, &effect, &call),
            };
            let outcome = outcome.and_then(|()| reopened(&scene, index, &effect));
            outcome.with_context(|| format!("{harm:?} at {}", call.text))?;
            walked += 1;
        }
    }
    ensure!(walked >= 8, "only {walked} stages were found");
    support::note(&format!("{}: {walked} harms at {} calls", operation.name, calls.len()));
    Ok(())
}

fn after_a_kill(scene: &Scene, effect: &Effect) -> Result<()> {
    effect.check(&state(&scene.root())?)
}

/// The process lived on: it must have said what failed and have cleaned up, or have done all it was asked.
fn after_an_error(scene: &Scene, operation: &str, effect: &Effect, call: &Call) -> Result<()> {
    let said = scene.said()?;
    let now = state(&scene.root())?;
    effect.check(&now)?;
    if said.is_empty() {
        // It may do without something that it could not read or take away, and without leaving its number.
        let spared = call.is_removal() || call.name == "openat" || call.text.contains("/root/lock>");
        ensure!(spared, "it claims success");
        ensure!(effect.is_after(&now), "it claims success, but {:?}", now.keys());
        return Ok(());
    }
    let (root, aside) = (scene.root().display().to_string(), scene.aside().display().to_string());
    let objects = [root.as_str(), aside.as_str(), "child", "base", "packed"];
    ensure!(objects.iter().any(|object| said.contains(*object)), "it only says: {said}");
    ensure!(effect.done == Done::Parts || effect.is_before(&now), "it says {said}, but {:?}", now.keys());
    let untidy = call.is_removal() || OPERATIONS[0].name == operation;
    ensure!(untidy || scene.leftovers()?.is_empty(), "it says {said} and leaves {:?}", scene.leftovers()?);
    Ok(())
}

/// The digest of a layer, be it a real one or one that [`support`] made.
fn any_layer_digest(path: &Path) -> std::io::Result<Digest> {
    match layer::verify(path, |_| ()) {
        Err(LayerError::NotALayer) => layer_digest(path),
        outcome => outcome.map_err(std::io::Error::other),
    }
}

/// The next process finds whole snapshots and nothing else, and can do the same again.
fn reopened(scene: &Scene, index: usize, effect: &Effect) -> Result<()> {
    let store = Store::open(&scene.root())?;
    let settled = if effect.done == Done::Settled { Done::Whole } else { effect.done };
    effect.check_as(settled, &state(&scene.root())?)?;
    ensure!(scene.leftovers()?.is_empty(), "{:?} is not swept", scene.leftovers()?);
    for entry in scene.root().read_dir()? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        let empty = || anyhow::Ok(scene.root().join(&name).read_dir()?.next().is_none());
        let expected = ["blobs", "lock", "snapshots"].contains(&name.as_str()) || empty()?;
        ensure!(expected, "{name} in the store's directory holds something");
    }
    let mut tags = BTreeSet::new();
    for listed in store.list()? {
        let Listed::Ready { snapshot, .. } = listed else { bail!("{listed:?}") };
        ensure!(tags.insert(snapshot.meta.tag.clone()), "{} is listed twice", snapshot.meta.tag);
        // What lies over a snapshot that was removed by force says so.
        if OPERATIONS[index].name != "remove_by_force" {
            let report = store.verify(&snapshot.meta.tag, any_layer_digest, |_| {})?;
            ensure!(report.is_good(), "{report:?}");
        }
    }
    for blob in store.list_blobs()? {
        let bytes = std::fs::read(scene.root().join("blobs").join(blob.digest.hex()))?;
        ensure!(digest(&bytes) == blob.digest, "blob {} is {}", blob.digest, digest(&bytes));
    }
    drop(store);
    if effect.is_before(&state(&scene.root())?) {
        scene.command(index)?.status()?;
        let said = scene.said()?;
        ensure!(said.is_empty() != (effect.done == Done::Never), "again it says {said:?}");
        ensure!(effect.is_after(&state(&scene.root())?), "done again it has another effect");
    }
    Ok(())
}
