//! The volumes of a bake: what its request says of them, checked, and how its guest gets to know.

use forkd_store::{Blob, Snapshot, Store, Volume};
use forkd_types::rest::{BakeVolume, VolumeInfo};
use forkd_types::{Digest, check_places};

use crate::error::{NodeError, NodeResult};

/// The unit in which a guest addresses a disk.
const SECTOR: u64 = 512;

/// A volume whose image is there.
pub(crate) struct Image {
    pub(crate) digest: Digest,
    pub(crate) blob: Blob,
    pub(crate) volume: Volume,
}

/// Checks what can be checked without the images.
pub(crate) fn check(wanted: &[BakeVolume]) -> NodeResult<Vec<(Digest, Volume)>> {
    let bad = |value: String, rule| NodeError::BadField { field: "volumes", value, rule };
    check_places(wanted.iter().map(|volume| &volume.path))
        .map_err(|error| bad(error.to_string(), "a guest can have 24 volumes, each in a place of its own"))?;
    let checked = |wanted: &BakeVolume| {
        let digest = wanted.image.parse().map_err(|_| {
            bad(format!("{:?}", wanted.image), "a volume's image is named by \"blake3:\" and 64 lower-case hex digits")
        })?;
        Ok((digest, Volume { path: wanted.path.clone(), policy: wanted.policy }))
    };
    wanted.iter().map(checked).collect()
}

/// Opens the images.
pub(crate) fn find(store: &Store, wanted: Vec<(Digest, Volume)>) -> NodeResult<Vec<Image>> {
    let found = |(digest, volume)| {
        let blob = store.blob(&digest)?.ok_or(NodeError::BlobMissing { what: "volume", digest })?;
        if blob.size == 0 || !blob.size.is_multiple_of(SECTOR) {
            let value = format!("an image of {} bytes", blob.size);
            return Err(NodeError::BadField { field: "volumes", value, rule: "a disk has whole sectors of 512 bytes" });
        }
        Ok(Image { digest, blob, volume })
    };
    wanted.into_iter().map(found).collect()
}

/// The kernel's arguments: those asked for, and the one that tells the guest's agent where each volume belongs.
pub(crate) fn kernel_args(asked: Option<&str>, images: &[Image]) -> String {
    let mut args = asked.unwrap_or_default().trim().to_owned();
    let mount = |(letter, image): (char, &Image)| {
        let access = if image.volume.policy.is_writable() { "" } else { ":ro" };
        format!("vd{letter}:{}{access}", image.volume.path)
    };
    let mounts: Vec<_> = ('b'..='z').zip(images).map(mount).collect();
    if !mounts.is_empty() {
        // Last, and so what counts.
        args = format!("{args} forkd.mounts={}", mounts.join(","));
    }
    args
}

/// The volumes of a snapshot as clients see them.
pub(crate) fn infos(snapshot: &Snapshot) -> Vec<VolumeInfo> {
    let info = |(disk, volume): (&forkd_store::Disk, &Volume)| VolumeInfo {
        path: volume.path.clone(),
        policy: volume.policy,
        image: disk.base.to_string(),
        bytes: disk.logical_bytes,
    };
    snapshot.meta.volumes().map(info).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wanted(volumes: serde_json::Value) -> Vec<BakeVolume> {
        serde_json::from_value(volumes).expect("valid")
    }

    fn store() -> (tempfile::TempDir, Store, impl Fn(&[u8]) -> String) {
        let dir = tempfile::tempdir().expect("scratch directory");
        let store = Store::open(&dir.path().join("store")).expect("a store");
        let (own, scratch) = (store.clone(), dir.path().join("image"));
        let import = move |content: &[u8]| {
            std::fs::write(&scratch, content).expect("write");
            own.import_file(&scratch).expect("import").to_string()
        };
        (dir, store, import)
    }

    #[test]
    fn the_guest_is_told_where_each_volume_belongs() {
        let (_dir, store, import) = store();
        let (data, models) = (import(&[1; 512]), import(&[2; 1024]));
        let volumes = wanted(json!([
            {"image": data, "path": "/data/"},
            {"image": models, "path": "/models", "policy": "shared-ro"},
            {"image": data, "path": "/again", "policy": "private"},
        ]));
        let images = find(&store, check(&volumes).expect("fine")).expect("there");
        assert_eq!(
            kernel_args(Some(" quiet "), &images),
            "quiet forkd.mounts=vdb:/data,vdc:/models:ro,vdd:/again",
            "the agent reads it as it stands here"
        );
        assert_eq!(images.iter().map(|image| image.blob.size).collect::<Vec<_>>(), [512, 1024, 512]);
        assert_eq!(kernel_args(None, &[]), "");
    }

    #[test]
    fn volumes_that_cannot_be_are_refused_with_what_is_wrong() {
        let (_dir, store, import) = store();
        let (odd, empty, fine) = (import(&[1; 513]), import(b""), import(&[1; 512]));
        let gone = format!("blake3:{}", "7".repeat(64));
        let error = |volumes| match check(&wanted(volumes)).and_then(|checked| find(&store, checked)) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("it was taken"),
        };
        for (volumes, says) in [
            (json!([{"image": odd, "path": "/a"}]), "513 bytes"),
            (json!([{"image": empty, "path": "/a"}]), "0 bytes"),
            (json!([{"image": "sha256:1", "path": "/a"}]), "sha256:1"),
            (json!([{"image": gone, "path": "/a"}]), "7777"),
            (json!([{"image": fine, "path": "/a"}, {"image": fine, "path": "/a/"}]), "two volumes were given for /a"),
        ] {
            let error = error(volumes);
            assert!(error.contains(says), "{says}: {error}");
        }
        let many: Vec<_> = (0..25).map(|number| json!({"image": fine, "path": format!("/v{number}")})).collect();
        assert!(error(many.into()).contains("25 volumes"));
    }
}
