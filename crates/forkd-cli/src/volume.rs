//! Volumes of a bake: disk images of this host, and what the guest has of them.

use std::fs;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context as _;
use forkd_types::rest::BakeVolume;
use forkd_types::{MountPoint, VolumePolicy, check_places};

use crate::blob::Blob;
use crate::client::Client;
use crate::data_dir::DataDir;
use crate::failure::{UsageError, advised};
use crate::progress::Progress;

/// The unit in which a guest addresses a disk.
const SECTOR: u64 = 512;

/// A volume as the command line names it: `HOST:GUEST[:POLICY]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct VolumeArg {
    image: PathBuf,
    path: MountPoint,
    policy: VolumePolicy,
}

/// A volume whose image was read.
#[derive(Clone, Debug)]
pub(crate) struct Volume {
    image: Blob,
    path: MountPoint,
    policy: VolumePolicy,
}

impl FromStr for VolumeArg {
    type Err = String;

    /// From the right, where there are no colons in paths: the image may have some in its name.
    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "it has the form HOST:GUEST[:POLICY], as in data.img:/data:ro".to_owned();
        let (front, last) = text.rsplit_once(':').ok_or_else(form)?;
        let (image, path, policy) = match last.starts_with('/') {
            true => (front, last, VolumePolicy::default()),
            false => {
                let (image, path) = front.rsplit_once(':').ok_or_else(form)?;
                (image, path, last.parse().map_err(|error: forkd_types::VolumePolicyError| error.to_string())?)
            }
        };
        if image.is_empty() {
            return Err(form());
        }
        let path = path.parse().map_err(|error: forkd_types::MountPointError| error.to_string())?;
        Ok(Self { image: image.into(), path, policy })
    }
}

impl VolumeArg {
    /// Says what is wrong with the image, if anything is, before it is read.
    fn check_image(&self) -> anyhow::Result<()> {
        let image = self.image.display();
        let metadata = fs::metadata(&self.image).with_context(|| format!("could not look at the volume {image}"))?;
        if !metadata.is_file() {
            let error = UsageError(format!("the volume {image} is not a file; a volume is the image of a disk"));
            return Err(advised(error, "truncate -s 1G data.img && mkfs.ext4 -q data.img"));
        }
        let bytes = metadata.len();
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            let error =
                UsageError(format!("the volume {image} has {bytes} bytes; a disk has whole sectors of {SECTOR} bytes"));
            return Err(advised(error, format!("truncate -s %{SECTOR} {image}")));
        }
        Ok(())
    }
}

/// Checks the volumes of a guest, then reads their images.
pub(crate) async fn read(args: &[VolumeArg], data: &DataDir, progress: &Progress) -> anyhow::Result<Vec<Volume>> {
    check_places(args.iter().map(|volume| &volume.path)).map_err(|error| UsageError(error.to_string()))?;
    args.iter().try_for_each(VolumeArg::check_image)?;
    let mut volumes = Vec::with_capacity(args.len());
    for VolumeArg { image, path, policy } in args {
        let image = Blob::of(image.clone(), "volume", &data.digests(), progress).await?;
        volumes.push(Volume { image, path: path.clone(), policy: *policy });
    }
    Ok(volumes)
}

impl Volume {
    /// Sends its image unless the daemon has it.
    pub(crate) async fn upload(&self, client: &Client, progress: &Progress) -> anyhow::Result<()> {
        self.image.upload(client, &format!("volume for {}", self.path), progress).await
    }

    /// As a request for a bake names it.
    pub(crate) fn wanted(&self) -> BakeVolume {
        BakeVolume { image: self.image.digest().to_string(), path: self.path.clone(), policy: self.policy }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(String, String, VolumePolicy), String> {
        let VolumeArg { image, path, policy } = text.parse()?;
        Ok((image.display().to_string(), path.to_string(), policy))
    }

    #[test]
    fn a_volume_is_an_image_a_place_and_perhaps_a_policy() {
        use VolumePolicy::{Private, SharedRo};
        let is = |image: &str, path: &str, policy| Ok((image.to_owned(), path.to_owned(), policy));
        assert_eq!(parse("data.img:/data"), is("data.img", "/data", Private));
        assert_eq!(parse("/a/b.img:/srv/db/:ro"), is("/a/b.img", "/srv/db", SharedRo));
        assert_eq!(parse("x:/y:rw"), is("x", "/y", Private));
        assert_eq!(parse("x:/y:shared-ro"), is("x", "/y", SharedRo));
        assert_eq!(parse("x:/y:private"), is("x", "/y", Private));
        assert_eq!(parse("at 12:30.img:/data"), is("at 12:30.img", "/data", Private));
    }

    #[test]
    fn what_is_no_volume_is_told_apart() {
        for (text, says) in [
            ("data.img", "HOST:GUEST"),
            (":/data", "HOST:GUEST"),
            ("data.img:data", "HOST:GUEST"),
            ("data.img:/data:sometimes", "\"sometimes\""),
            ("data.img:/", "the root disk is there"),
            ("data.img:data:ro", "absolute"),
            ("data.img:/proc/x:ro", "kernel"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn images_must_be_files_of_whole_sectors() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let volume = |name: &str| VolumeArg {
            image: directory.path().join(name),
            path: "/data".parse().expect("legal"),
            policy: VolumePolicy::Private,
        };
        for (name, bytes, says) in [("odd", 513, "513 bytes"), ("empty", 0, "0 bytes")] {
            fs::write(directory.path().join(name), vec![1; bytes]).expect("write");
            let error = volume(name).check_image().expect_err(name).to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(volume("missing").check_image().is_err());
        assert!(volume(".").check_image().expect_err("a directory").to_string().contains("is not a file"));
        fs::write(directory.path().join("fine"), [1; 1024]).expect("write");
        volume("fine").check_image().expect("two sectors");
    }
}
