//! `snapshot.json`: what a snapshot is made of and what it needs to run.
//!
//! Within one version, fields may be added with a default and readers ignore fields they do not
//! know. A change of meaning is a new version, which older readers refuse by name. A description is written in the
//! oldest version that can say it, so that a snapshot without volumes is of use to every reader.
//!
//! | version | since |
//! |---|---|
//! | 1 | the first |
//! | 2 | disks besides the root disk, each a volume |

use std::fmt;

use forkd_proto::monitor::{Backing, SnapshotFacts};
use forkd_types::{Digest, MountPoint, Tag, VolumePolicy, check_places};
use serde::{Deserialize, Serialize};

use crate::seal;

/// The newest version that this code writes and reads.
pub const CURRENT: u32 = 2;
/// The oldest version that has volumes.
const WITH_VOLUMES: u32 = 2;
/// The largest `snapshot.json` that is read.
pub(crate) const SIZE_LIMIT: u64 = 1 << 20;

/// File name of the description.
pub const SNAPSHOT_JSON: &str = "snapshot.json";
/// File name of the CPU and device state.
pub const VMSTATE: &str = "vmstate";
/// File name of the guest pages that differ from the parent.
pub const MEMORY_LAYER: &str = "memory.layer";
/// File names of block layers start with this; [`disk_layer_name`] makes the whole name.
pub const DISK_LAYER_PREFIX: &str = "disk-";

/// File name of the blocks of disk `index` that differ from the parent: `disk-0.layer`.
pub fn disk_layer_name(index: usize) -> String {
    format!("{DISK_LAYER_PREFIX}{index}.layer")
}

/// The contents of `snapshot.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// Format version, as [`SnapshotMeta::fitting_version`] says when written by this code.
    pub version: u32,
    /// Name; the directory is called the same.
    pub tag: Tag,
    /// When it was made, seconds since the Unix epoch.
    pub created_at_unix: u64,
    /// The snapshot that the layers are differences from; none for a base.
    #[serde(default)]
    pub parent: Option<ParentRef>,
    /// Id of the sandbox it was taken from, if any.
    #[serde(default)]
    pub branched_from: Option<String>,
    /// Id of the sandbox that this is a checkpoint of, on disk; such a snapshot is not for users to see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_of: Option<String>,
    /// How long that sandbox stood still, microseconds.
    #[serde(default)]
    pub pause_us: Option<u64>,
    /// What had changed in that sandbox, when that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff: Option<DiffFacts>,
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// How a zygote's memory is best backed, unless a request says otherwise.
    #[serde(default)]
    pub memory_backing: Backing,
    /// CPU and device state.
    pub vmstate: VmState,
    /// Guest memory over the parent's, oldest first.
    pub memory_layers: Vec<MemoryLayer>,
    /// Disks, in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// What the guest was booted from and how it is reached.
    #[serde(flatten)]
    pub boot: Boot,
    /// Languages whose runtime was running, warm.
    #[serde(default)]
    pub warm: Vec<String>,
}

/// What differs between a sandbox and the snapshot it was forked from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiffFacts {
    /// How long finding and writing it took, microseconds.
    pub us: u64,
    /// Changed memory as stored, bytes.
    pub bytes: u64,
}

/// A snapshot that another one builds on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ParentRef {
    /// Its tag.
    pub tag: Tag,
    /// BLAKE3 of its `snapshot.json`, and so of everything in it.
    pub digest: Digest,
}

/// The file [`VMSTATE`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmState {
    /// BLAKE3 of the whole file.
    pub digest: Digest,
    /// Length of the file.
    pub bytes: u64,
}

/// A file of guest pages.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemoryLayer {
    /// File name in the snapshot's directory.
    pub file: String,
    /// Digest as the layer's writer defines it.
    pub digest: Digest,
    /// Pages it holds.
    pub pages: u64,
}

/// One disk of the guest: an immutable base with layers over it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// The blob that holds the base image.
    pub base: Digest,
    /// Size as the guest sees it, bytes.
    pub logical_bytes: u64,
    /// Blocks over the parent's, oldest first.
    pub layers: Vec<DiskLayer>,
    /// What it is for the guest, unless it is the root disk, which is the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<Volume>,
}

/// Where a guest has a disk that is not its root disk, and what copies have of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Volume {
    /// Where it is mounted, or was to be.
    pub path: MountPoint,
    /// What copies have of it.
    pub policy: VolumePolicy,
}

impl Disk {
    /// Whether the guest can write to it.
    pub fn is_writable(&self) -> bool {
        self.volume.as_ref().is_none_or(|volume| volume.policy.is_writable())
    }

    /// What is wrong with it as disk `index`, if anything is.
    fn check(&self, index: usize) -> Result<(), String> {
        match &self.volume {
            Some(volume) if index == 0 => Err(format!("its root disk is a volume on {}", volume.path)),
            Some(volume) if !self.is_writable() && !self.layers.is_empty() => {
                Err(format!("its volume on {} has changes, and cannot be written", volume.path))
            }
            _ => Ok(()),
        }
    }
}

/// A file of disk blocks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskLayer {
    /// File name in the snapshot's directory.
    pub file: String,
    /// Digest as the layer's writer defines it.
    pub digest: Digest,
    /// Blocks it holds.
    pub blocks: u64,
}

/// What a guest was booted from and how it is reached: equal in a snapshot and all that derive from it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// The blob that holds the kernel.
    pub kernel: Digest,
    /// The blob that holds the initramfs.
    #[serde(default)]
    pub initramfs: Option<Digest>,
    /// Release text of the kernel, as `uname -r` shows it.
    pub kernel_release: String,
    /// Version of the agent in the guest.
    pub agent_version: String,
    /// Context id of the guest's vsock device.
    pub guest_cid: u32,
    /// The processor that the guest saw.
    pub cpu: CpuFacts,
}

impl Boot {
    /// Fails with the first thing in which it is another machine than `other`, and what each has.
    fn check_same(&self, other: &Self) -> Result<(), (&'static str, String, String)> {
        let Self { kernel, initramfs, kernel_release, agent_version, guest_cid, cpu } = self;
        let initramfs_of = |one: &Option<Digest>| one.map_or_else(|| "none".to_owned(), |digest| digest.to_string());
        let things = [
            ("kernel", kernel.to_string(), other.kernel.to_string()),
            ("initramfs", initramfs_of(initramfs), initramfs_of(&other.initramfs)),
            ("kernel release", kernel_release.clone(), other.kernel_release.clone()),
            ("agent version", agent_version.clone(), other.agent_version.clone()),
            ("vsock context id", guest_cid.to_string(), other.guest_cid.to_string()),
            ("processor", cpu.to_string(), other.cpu.to_string()),
        ];
        things.into_iter().find(|(_, own, others)| own != others).map_or(Ok(()), Err)
    }
}

impl fmt::Display for CpuFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vendor, family, model, stepping, features } = self;
        write!(f, "{vendor} family {family} model {model} stepping {stepping} with {}", features.join(" "))
    }
}

/// The processor that a guest saw; a host that lacks one of these features cannot run it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CpuFacts {
    /// Vendor text of CPUID leaf 0, for example `AuthenticAMD`.
    pub vendor: String,
    /// Family, extended family added.
    pub family: u32,
    /// Model, extended model included.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// Feature names as `/proc/cpuinfo` spells them, sorted.
    pub features: Vec<String>,
}

impl SnapshotMeta {
    /// The description of a base snapshot with the files that its writer reported in `facts`.
    ///
    /// `bases` holds the base blob and logical size of each disk, in disk order. Parent, source,
    /// [volumes](Self::set_volumes) and warm languages are left for the caller to fill in.
    pub fn new(
        tag: Tag,
        created_at_unix: u64,
        facts: &SnapshotFacts,
        vmstate_bytes: u64,
        bases: &[(Digest, u64)],
        boot: Boot,
    ) -> Self {
        let layer_of = |index: usize| {
            let written = match facts.disk_numbers.as_slice() {
                [] => Some(index),
                numbers => numbers.iter().position(|number| *number == index),
            };
            let (digest, blocks) = *facts.disks.get(written?)?;
            Some(DiskLayer { file: disk_layer_name(index), digest, blocks })
        };
        Self {
            version: 1,
            tag,
            created_at_unix,
            parent: None,
            branched_from: None,
            checkpoint_of: None,
            pause_us: None,
            diff: None,
            vcpus: facts.vcpus,
            memory_bytes: facts.memory_bytes,
            memory_backing: Backing::default(),
            vmstate: VmState { digest: facts.vmstate_digest, bytes: vmstate_bytes },
            memory_layers: vec![MemoryLayer {
                file: MEMORY_LAYER.to_owned(),
                digest: facts.memory_digest,
                pages: facts.memory_pages,
            }],
            disks: bases
                .iter()
                .enumerate()
                .map(|(index, &(base, logical_bytes))| Disk {
                    base,
                    logical_bytes,
                    layers: layer_of(index).into_iter().collect(),
                    volume: None,
                })
                .collect(),
            boot,
            warm: Vec::new(),
        }
    }

    /// Says what the disks besides the root disk are, in disk order.
    pub fn set_volumes(&mut self, volumes: impl IntoIterator<Item = Volume>) {
        for (disk, volume) in self.disks.iter_mut().skip(1).zip(volumes) {
            disk.volume = Some(volume);
        }
        self.version = self.fitting_version();
    }

    /// The disks besides the root disk, and what they are.
    pub fn volumes(&self) -> impl Iterator<Item = (&Disk, &Volume)> {
        self.disks.iter().filter_map(|disk| Some((disk, disk.volume.as_ref()?)))
    }

    /// The oldest version that can say what this says.
    pub fn fitting_version(&self) -> u32 {
        match self.disks.iter().any(|disk| disk.volume.is_some()) {
            true => WITH_VOLUMES,
            false => 1,
        }
    }

    /// Every blob that the snapshot needs: kernel, initramfs, disk bases.
    pub fn blobs(&self) -> impl Iterator<Item = Digest> + '_ {
        let boot = [Some(self.boot.kernel), self.boot.initramfs];
        boot.into_iter().flatten().chain(self.disks.iter().map(|disk| disk.base))
    }

    /// Names of the files beside `snapshot.json`: state, memory layers, disk layers.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let memory = self.memory_layers.iter().map(|layer| layer.file.as_str());
        let disks = self.disks.iter().flat_map(|disk| &disk.layers).map(|layer| layer.file.as_str());
        [VMSTATE].into_iter().chain(memory).chain(disks)
    }

    /// The bytes of `snapshot.json`, sealed.
    ///
    /// # Errors
    /// In words, what JSON cannot hold.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        #[derive(Serialize)]
        struct Sealed<'a> {
            #[serde(flatten)]
            meta: &'a SnapshotMeta,
            seal: &'static str,
        }
        let sealed = Sealed { meta: self, seal: seal::OPEN };
        let mut json = serde_json::to_vec_pretty(&sealed).map_err(|error| error.to_string())?;
        json.push(b'\n');
        seal::close(&mut json)?;
        Ok(json)
    }

    /// Reads a description. The error says what is wrong in words that fit after "unusable:".
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let malformed = |error| format!("{SNAPSHOT_JSON} is malformed: {error}");
        let Versioned { version } = serde_json::from_slice(bytes).map_err(malformed)?;
        if version == 0 || version > CURRENT {
            return Err(format!(
                "{SNAPSHOT_JSON} has format version {version}, this program reads versions 1 to {CURRENT}; \
                 a newer forkd wrote it"
            ));
        }
        let meta: Self = serde_json::from_slice(bytes).map_err(malformed)?;
        seal::check(bytes).map_err(|reason| format!("{SNAPSHOT_JSON} is damaged: {reason}"))?;
        meta.check()?;
        Ok(meta)
    }

    /// Whether the layers can lie over those of `parent`: memory and disks must be of the same size, disks over
    /// the same images, and the machine that ran the same that was once booted.
    pub(crate) fn check_over(&self, parent: &Self) -> Result<(), String> {
        let tag = &parent.tag;
        let disks = |meta: &Self| meta.disks.iter().map(|disk| (disk.base, disk.logical_bytes)).collect::<Vec<_>>();
        let (own, parents) = (disks(self), disks(parent));
        if self.memory_bytes != parent.memory_bytes {
            let (own, parents) = (self.memory_bytes, parent.memory_bytes);
            return Err(format!("it has {own} bytes of memory, its parent {tag} has {parents}"));
        }
        if self.vcpus != parent.vcpus {
            return Err(format!("it has {} vCPUs, its parent {tag} has {}", self.vcpus, parent.vcpus));
        }
        if own.len() != parents.len() {
            return Err(format!("it has {} disks, its parent {tag} has {}", own.len(), parents.len()));
        }
        for (index, ((base, bytes), (parents_base, parents_bytes))) in own.into_iter().zip(parents).enumerate() {
            if bytes != parents_bytes {
                return Err(format!(
                    "its disk {index} has {bytes} bytes, that of its parent {tag} has {parents_bytes}"
                ));
            }
            if base != parents_base {
                return Err(format!(
                    "its disk {index} lies over image {base}, that of its parent {tag} over {parents_base}"
                ));
            }
        }
        for (index, (own, parents)) in self.disks.iter().zip(&parent.disks).enumerate() {
            if own.volume != parents.volume {
                let told = |volume: &Option<Volume>| {
                    volume.as_ref().map_or_else(
                        || "no volume".to_owned(),
                        |volume| format!("a {} volume on {}", volume.policy, volume.path),
                    )
                };
                let (own, parents) = (told(&own.volume), told(&parents.volume));
                return Err(format!("its disk {index} is {own}, that of its parent {tag} is {parents}"));
            }
        }
        self.boot
            .check_same(&parent.boot)
            .map_err(|(what, own, parents)| format!("its {what} is {own}, that of its parent {tag} is {parents}"))
    }

    /// What would make the description unusable whatever files there are.
    pub(crate) fn check(&self) -> Result<(), String> {
        for file in self.files() {
            let plain = !file.is_empty() && !file.starts_with('.') && !file.contains(['/', '\0']);
            if !plain || file == SNAPSHOT_JSON {
                return Err(format!("{file:?} is not a plain name of a file in the snapshot's directory"));
            }
        }
        if self.parent.as_ref().is_some_and(|parent| parent.tag == self.tag) {
            return Err(format!("it names itself, {}, as its parent", self.tag));
        }
        for (index, disk) in self.disks.iter().enumerate() {
            disk.check(index)?;
        }
        check_places(self.volumes().map(|(_, volume)| &volume.path)).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    const VERSION_1: &str = include_str!("../fixtures/snapshot-v1.json");
    /// Made by the test of it with `UPDATE_GOLDEN=1`, once.
    const VERSION_2: &str = include_str!("../fixtures/snapshot-v2.json");

    /// The description that the fixture holds.
    pub(crate) fn sample(tag: &str) -> SnapshotMeta {
        let digest = |byte| Digest::from_bytes([byte; 32]);
        let facts = SnapshotFacts {
            vcpus: 2,
            memory_bytes: 512 << 20,
            vmstate_digest: digest(1),
            memory_digest: digest(2),
            memory_pages: 23_456,
            memory_zero_pages: 0,
            disks: vec![(digest(3), 789)],
            disk_numbers: vec![0],
            disk_zero_blocks: vec![0],
            stored_bytes: 0,
        };
        let boot = Boot {
            kernel: digest(4),
            initramfs: Some(digest(5)),
            kernel_release: "6.12.117+deb12-cloud-amd64".into(),
            agent_version: "0.1.0".into(),
            guest_cid: 3,
            cpu: CpuFacts {
                vendor: "AuthenticAMD".into(),
                family: 25,
                model: 17,
                stepping: 1,
                features: vec!["avx2".into(), "sse4_2".into()],
            },
        };
        let mut meta = SnapshotMeta::new(
            tag.parse().expect("legal tag"),
            1_795_344_404,
            &facts,
            65_536,
            &[(digest(6), 1 << 30)],
            boot,
        );
        meta.parent = Some(ParentRef { tag: "base".parse().expect("legal tag"), digest: digest(7) });
        meta.branched_from = Some("sb-6b02c814-0000".into());
        meta.pause_us = Some(1200);
        meta.warm = vec!["python".into()];
        meta
    }

    #[test]
    fn version_1_is_written_and_read_as_released() {
        assert_eq!(SnapshotMeta::parse(VERSION_1.as_bytes()).expect("fixture"), sample("py"));
        let text = String::from_utf8(sample("py").encode().expect("plain data")).expect("JSON is text");
        assert_eq!(text, VERSION_1, "the format changed: add a version and a fixture");
    }

    /// The description that the fixture of version 2 holds: with a private volume that has no changes, another
    /// that has, and a shared one.
    fn sample_with_volumes() -> SnapshotMeta {
        let mut meta = sample("py");
        let digest = |byte| Digest::from_bytes([byte; 32]);
        let disk = |number: u8, changed: bool| {
            let layer = DiskLayer { file: disk_layer_name(number.into()), digest: digest(20 + number), blocks: 3 };
            let layers = if changed { vec![layer] } else { Vec::new() };
            Disk { base: digest(10 + number), logical_bytes: 512 * u64::from(number), layers, volume: None }
        };
        meta.disks.extend([disk(1, false), disk(2, true), disk(3, false)]);
        let volume = |path: &str, policy| Volume { path: path.parse().expect("legal"), policy };
        meta.set_volumes([
            volume("/data", VolumePolicy::Private),
            volume("/srv/db", VolumePolicy::Private),
            volume("/models", VolumePolicy::SharedRo),
        ]);
        meta
    }

    #[test]
    fn version_2_is_written_and_read_as_released() {
        let text = String::from_utf8(sample_with_volumes().encode().expect("plain data")).expect("JSON is text");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/snapshot-v2.json");
            std::fs::write(path, &text).expect("the fixture can be written");
        }
        assert_eq!(text, VERSION_2, "the format changed: add a version and a fixture");
        let read = SnapshotMeta::parse(VERSION_2.as_bytes()).expect("fixture");
        assert_eq!(read, sample_with_volumes());
        let writable: Vec<_> = read.disks.iter().map(Disk::is_writable).collect();
        assert_eq!(writable, [true, true, true, false]);
        assert_eq!(read.blobs().count(), 6, "its images are among what it needs");
    }

    #[test]
    fn layers_are_those_of_the_disks_that_were_written() {
        let digest = |byte| Digest::from_bytes([byte; 32]);
        let mut facts = SnapshotFacts {
            vcpus: 1,
            memory_bytes: 0,
            vmstate_digest: digest(1),
            memory_digest: digest(1),
            memory_pages: 0,
            memory_zero_pages: 0,
            disks: vec![(digest(2), 5), (digest(3), 7)],
            disk_numbers: vec![0, 3],
            disk_zero_blocks: vec![0, 0],
            stored_bytes: 0,
        };
        let files = |facts: &SnapshotFacts| {
            let bases = [(digest(6), 512); 4];
            let boot = sample("py").boot;
            let meta = SnapshotMeta::new("t".parse().expect("legal tag"), 0, facts, 0, &bases, boot);
            let files_of = |disk: &Disk| disk.layers.iter().map(|layer| (layer.file.clone(), layer.blocks)).collect();
            meta.disks.iter().map(files_of).collect::<Vec<Vec<_>>>()
        };
        let (first, last) = (("disk-0.layer".to_owned(), 5), ("disk-3.layer".to_owned(), 7));
        assert_eq!(files(&facts), [vec![first.clone()], vec![], vec![], vec![last]]);
        // Of a monitor that numbers nothing.
        facts.disk_numbers.clear();
        assert_eq!(files(&facts), [vec![first], vec![("disk-1.layer".to_owned(), 7)], vec![], vec![]]);
    }

    #[test]
    fn volumes_that_cannot_be_are_refused() {
        type Change = fn(&mut SnapshotMeta);
        let cases: [(&str, Change); 4] = [
            ("its root disk is a volume on /data", |meta| meta.disks[0].volume = meta.disks[1].volume.clone()),
            ("its volume on /srv/db has changes, and cannot be written", |meta| {
                meta.disks[2].volume.as_mut().expect("it has one").policy = VolumePolicy::SharedRo;
            }),
            ("two volumes were given for /data", |meta| meta.disks[2].volume = meta.disks[1].volume.clone()),
            ("25 volumes were given, a guest can have 24", |meta| {
                for number in 3..25 {
                    let volume = Volume { path: format!("/v{number}").parse().expect("legal"), ..volume_of(meta, 1) };
                    meta.disks.push(Disk { volume: Some(volume), ..meta.disks[1].clone() });
                }
            }),
        ];
        for (expected, change) in cases {
            let mut meta = sample_with_volumes();
            change(&mut meta);
            let error = SnapshotMeta::parse(&meta.encode().expect("plain data")).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }

    fn volume_of(meta: &SnapshotMeta, disk: usize) -> Volume {
        meta.disks[disk].volume.clone().expect("it has one")
    }

    #[test]
    fn a_layer_lies_only_over_the_same_volumes() {
        let parent = sample_with_volumes();
        parent.check_over(&parent).expect("the same");
        let mut child = parent.clone();
        child.disks[3].volume.as_mut().expect("it has one").policy = VolumePolicy::Private;
        let error = child.check_over(&parent).expect_err("another policy");
        assert_eq!(
            error,
            "its disk 3 is a private volume on /models, that of its parent py is a shared-ro volume on /models"
        );
    }

    #[test]
    fn a_later_version_is_refused_by_name_even_when_nothing_else_fits() {
        let error = SnapshotMeta::parse(br#"{"version": 3, "layers": 7}"#).expect_err("future");
        assert!(error.contains("version 3") && error.contains("1 to 2"), "{error}");
        assert!(SnapshotMeta::parse(br#"{"version": 0}"#).is_err());
        assert!(SnapshotMeta::parse(b"").is_err());
    }

    #[test]
    fn unknown_fields_are_ignored_and_optional_ones_may_be_absent() {
        let mut value: serde_json::Value = serde_json::from_str(VERSION_1).expect("json");
        let object = value.as_object_mut().expect("object");
        for optional in ["parent", "branched_from", "pause_us", "memory_backing", "initramfs", "warm"] {
            assert!(object.remove(optional).is_some(), "{optional}");
        }
        object.insert("colour".into(), "blue".into());
        let mut text = value.to_string().into_bytes();
        seal::close(&mut text).expect("it has a seal");
        let meta = SnapshotMeta::parse(&text).expect("still readable");
        assert_eq!(meta.parent, None);
        assert_eq!(meta.blobs().count(), 2);
    }

    #[test]
    fn file_names_cannot_leave_the_directory() {
        for name in ["../x", "/etc/passwd", "", ".", "..", "a/b", SNAPSHOT_JSON] {
            let mut meta = sample("py");
            meta.memory_layers[0].file = name.into();
            let text = meta.encode().expect("plain data");
            let error = SnapshotMeta::parse(&text).expect_err("it would leave");
            assert!(error.contains("not a plain name"), "{name:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn damaged_descriptions_are_noticed(at in 0..VERSION_1.len(), byte: u8) {
            let mut bytes = VERSION_1.as_bytes().to_vec();
            bytes[at] = byte;
            prop_assert_eq!(SnapshotMeta::parse(&bytes).is_ok(), bytes == VERSION_1.as_bytes());
            prop_assert!(SnapshotMeta::parse(&bytes[..at]).is_err());
        }
    }
}
