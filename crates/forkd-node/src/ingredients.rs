//! A kernel and a root disk that lie on this host, made ready to bake.

use std::io;
use std::path::{Path, PathBuf};

use forkd_image::kernel::{self, KernelChoice};
use forkd_image::{ImageError, build_initramfs};
use forkd_store::Store;
use forkd_types::rest::{BakeEvent, BakeRequest, CreateSnapshotRequest, SnapshotInfo};
use forkd_types::{Digest, Tag};
use tokio::sync::mpsc;

use crate::bake::Bake;
use crate::error::{NodeError, NodeResult, with_causes};
use crate::host::blocking;
use crate::node::Node;

/// The longest that a client may ask the boot to be waited for.
const LONGEST_WAIT_SECS: u64 = 60;

/// How long the guest may take until its agent answers.
const BOOT_LIMIT_SECS: u64 = 300;

/// The shape of every machine that is made this way.
const VCPUS: u32 = 2;
const MEMORY_MIB: u64 = 512;

/// What a guest boots from, as blobs.
struct Ingredients {
    kernel: Digest,
    initramfs: Digest,
    disk: Digest,
}

impl Node {
    /// Boots a kernel and a root disk that lie on this host, and snapshots the machine once its agent answers.
    /// Abandoned when dropped.
    pub async fn create_snapshot(&self, request: CreateSnapshotRequest) -> NodeResult<SnapshotInfo> {
        let tag: Tag = request.tag.parse()?;
        let (kernel, rootfs) = (PathBuf::from(&request.kernel), PathBuf::from(&request.rootfs));
        self.check_ingredients(&tag, &kernel, &rootfs, request.boot_wait_secs).await?;
        let agent = self.host.config.agent.clone();
        let (store, cache, own) = (self.host.store.clone(), self.host.config.state_dir.join("cache"), tag.clone());
        let making = blocking("preparing a boot", move || prepare(&store, &cache, &agent, &own, &kernel, &rootfs));
        let Ingredients { kernel, initramfs, disk } = making.await??;
        let request = BakeRequest {
            tag: request.tag,
            disk: disk.to_string(),
            kernel: kernel.to_string(),
            initramfs: initramfs.to_string(),
            vcpus: VCPUS,
            memory_mib: MEMORY_MIB,
            run: Vec::new(),
            warm: Vec::new(),
            boot_timeout_secs: BOOT_LIMIT_SECS,
            kernel_args: None,
            volumes: Vec::new(),
            replace: false,
        };
        let bake = Bake::prepare(&self.host, &self.zygotes, &self.brancher.claims, request).await?;
        let (events, mut told) = mpsc::channel(64);
        // Nobody follows this one.
        let ignoring = tokio::spawn(async move { while told.recv().await.is_some() {} });
        let outcome = bake.outcome(&events).await;
        drop(events);
        ignoring.abort();
        match outcome? {
            BakeEvent::Done { snapshot, .. } => Ok(*snapshot),
            other => Err(NodeError::Bake { tag, step: "ending".to_owned(), reason: format!("it said {other:?}") }),
        }
    }

    /// Checks what can be checked before anything is read, in the order that clients know.
    async fn check_ingredients(&self, tag: &Tag, kernel: &Path, rootfs: &Path, wait_secs: u64) -> NodeResult<()> {
        for (what, path) in [("kernel", kernel), ("rootfs", rootfs)] {
            if !path.is_file() {
                let reason = format!("{what} {} is no file on the daemon's host", path.display());
                return Err(NodeError::Ingredient { tag: tag.clone(), reason });
            }
        }
        if wait_secs > LONGEST_WAIT_SECS {
            let (field, value) = ("boot_wait_secs", wait_secs.to_string());
            return Err(NodeError::BadField {
                field,
                value,
                rule: "60 is the most; the guest's agent tells when it is up",
            });
        }
        let (store, own) = (self.host.store.clone(), tag.clone());
        if blocking("looking for a snapshot", move || store.get(&own).is_ok()).await? {
            let rule = "there is a snapshot of that tag already; remove it first, or choose another tag";
            return Err(NodeError::BadField { field: "tag", value: tag.to_string(), rule });
        }
        Ok(())
    }
}

/// Takes everything into the store, and makes the initramfs that fits the kernel.
fn prepare(
    store: &Store,
    cache: &Path,
    agent: &Path,
    tag: &Tag,
    kernel: &Path,
    rootfs: &Path,
) -> NodeResult<Ingredients> {
    if !agent.is_file() {
        let what = format!("read the guest agent {}, which belongs beside the daemon's own program", agent.display());
        return Err(NodeError::Io { what, source: io::ErrorKind::NotFound.into() });
    }
    let unusable = |error: ImageError| NodeError::Ingredient { tag: tag.clone(), reason: with_causes(&error) };
    let kernel = kernel::install(&KernelChoice::Image(kernel.to_owned()), cache, &mut |_| ()).map_err(unusable)?;
    // One of its own for each kernel, of which several may call themselves the same release.
    let name = kernel.vmlinux.parent().and_then(Path::file_name).unwrap_or_default();
    let initramfs = cache.join("initramfs").join(name).with_extension("cpio");
    build_initramfs(agent, &kernel, &[], &initramfs).map_err(unusable)?;
    Ok(Ingredients {
        kernel: store.import_file(&kernel.vmlinux)?,
        initramfs: store.import_file(&initramfs)?,
        disk: store.import_file(rootfs)?,
    })
}
