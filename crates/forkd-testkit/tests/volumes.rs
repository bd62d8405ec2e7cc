//! Volumes on real guests: a private one is its machine's alone however that was made, a shared one is the same for
//! all and written by nobody, and the image that either began as is never touched.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Host, NUMPY_DISK, Sandbox, on_real_guests};
use forkd_types::VolumePolicy;
use forkd_types::rest::{SnapshotInfo, VolumeInfo, WorkspaceInfo};

/// What the tests make, children before their parents.
const TAGS: [&str; 3] = ["testkit-volumes-layer", "testkit-volumes-whole", "testkit-volumes"];
/// The workspace that they make.
const WORKSPACE: &str = "testkit-volumes-workspace";

/// Removes what an earlier attempt left.
fn without_leftovers(host: &Host) -> Result<()> {
    let all: Vec<WorkspaceInfo> = host.forkd(&["workspace", "list", "--json"])?.json()?;
    if all.iter().any(|workspace| workspace.name == WORKSPACE) {
        host.forkd(&["workspace", "delete", WORKSPACE])?.success()?;
    }
    let there = host.snapshots()?;
    for tag in TAGS.iter().filter(|tag| there.iter().any(|info| info.tag.as_str() == **tag)) {
        host.forkd(&["rmi", tag])?.success()?;
    }
    Ok(())
}

/// The path of an image of a file system that holds one file.
fn image(directory: &Path, name: &str, note: &str) -> Result<String> {
    let (root, image) = (directory.join(name), directory.join(format!("{name}.img")));
    std::fs::create_dir(&root)?;
    std::fs::write(root.join("note"), note)?;
    let options = ["-q", "-t", "ext4", "-O", "^has_journal", "-d"];
    let made = Command::new("/sbin/mke2fs").args(options).args([&root, &image]).arg("16M").output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(image.to_str().context("text")?.to_owned())
}

fn volumes(host: &Host, tag: &str) -> Result<Vec<VolumeInfo>> {
    let of_tag = |info: &SnapshotInfo| info.tag.as_str() == tag;
    Ok(host.snapshots()?.into_iter().find(of_tag).with_context(|| format!("there is no {tag}"))?.volumes)
}

/// The sandbox of the workspace after a command that leaves it running.
fn workspace<'h>(host: &'h Host, command: &[&str]) -> Result<Sandbox<'h>> {
    let info: WorkspaceInfo = host.forkd(&[&["workspace"], command, &["--json"]].concat())?.json()?;
    let id = info.live_sandbox_id.with_context(|| format!("after {command:?} it does not run"))?;
    let found = host.sandboxes()?.into_iter().find(|sandbox| sandbox.id == id);
    Ok(host.adopt(found.with_context(|| format!("sandbox {id} is not listed"))?))
}

fn notes(sandbox: &Sandbox<'_>) -> Result<String> {
    Ok(sandbox.sh("cat /data/note")?.replace('\n', " "))
}

fn note(sandbox: &Sandbox<'_>, text: &str) -> Result<()> {
    sandbox.sh(&format!("echo {text} >> /data/note")).map(drop)
}

#[test]
fn every_copy_has_private_volumes_of_its_own_and_shared_ones_are_the_same_for_all() -> Result<()> {
    on_real_guests(|host| {
        without_leftovers(host)?;
        let scratch = tempfile::tempdir()?;
        let data = image(scratch.path(), "data", "image\n")?;
        let models = image(scratch.path(), "models", "for everybody\n")?;
        let untouched = [&data, &models].map(std::fs::read);
        let options = [
            "--volume",
            &format!("{data}:/data"),
            "--volume",
            &format!("{models}:/srv/models:ro"),
            "--run",
            "echo baked >> /data/note",
        ];
        let baked = host.bake_of(NUMPY_DISK, "testkit-volumes", &options)?;
        let listed: Vec<_> =
            volumes(host, &baked.tag)?.into_iter().map(|v| (v.path.to_string(), v.policy, v.bytes)).collect();
        let expected = [
            ("/data".to_owned(), VolumePolicy::Private, 16 << 20),
            ("/srv/models".to_owned(), VolumePolicy::SharedRo, 16 << 20),
        ];
        ensure!(listed == expected, "{listed:?}");

        let children = host.spawn(&baked, 2)?;
        let [one, other] = &children[..] else { anyhow::bail!("two were asked for") };
        note(one, "one")?;
        note(other, "other")?;
        ensure!(notes(one)? == "image baked one" && notes(other)? == "image baked other", "they share a volume");
        for child in [one, other] {
            ensure!(
                child.sh("cat /srv/models/note; cat /sys/block/vdc/ro /sys/block/vdb/ro")? == "for everybody\n1\n0"
            );
            child.sh(
                "! touch /srv/models/new && ! mount -o remount,rw /srv/models && ! head -c 512 /dev/zero >/dev/vdc",
            )?;
        }

        // A running one is copied as it is at that instant, what is only in its page cache included.
        let branch = one.branch_once()?;
        note(one, "later")?;
        note(&branch, "branch")?;
        ensure!(notes(one)? == "image baked one later" && notes(&branch)? == "image baked one branch");
        branch.sh("sync && echo 3 > /proc/sys/vm/drop_caches")?;
        ensure!(notes(&branch)? == "image baked one branch" && branch.sh("cat /srv/models/note")? == "for everybody");

        // A checkpoint, in memory and on disk, brings the volume back too.
        let id = one.id().as_str();
        for place in [&[][..], &["--disk"]] {
            host.forkd(&[&["checkpoint", id], place].concat())?.success()?;
            one.sh("rm /data/note && sync")?;
            host.forkd(&["rewind", id])?.success()?;
            ensure!(notes(one)? == "image baked one later", "after a rewind {place:?}");
        }

        // Snapshots of it, on their own and as a layer.
        host.forkd(&["snapshot", "--from-sandbox", id, "--tag", "testkit-volumes-whole"])?.success()?;
        let other_id = other.id().as_str();
        host.forkd(&["snapshot", "--from-sandbox", other_id, "--tag", "testkit-volumes-layer", "--layer"])?
            .success()?;
        for (tag, expected) in
            [("testkit-volumes-whole", "image baked one later"), ("testkit-volumes-layer", "image baked other")]
        {
            ensure!(volumes(host, tag)? == volumes(host, &baked.tag)?, "{tag} has other volumes");
            let copy = host.spawn_one(&host.snapshot(tag))?;
            ensure!(notes(&copy)? == expected, "{tag}: {}", notes(&copy)?);
            ensure!(copy.sh("cat /srv/models/note")? == "for everybody", "{tag}");
            note(&copy, tag)?;
        }

        // A workspace that was put on disk comes back with its volumes.
        let made = workspace(host, &["create", WORKSPACE, "--snapshot", "testkit-volumes-layer"])?;
        note(&made, "worked")?;
        host.forkd(&["workspace", "suspend", WORKSPACE])?.success()?;
        drop(made);
        let back = workspace(host, &["resume", WORKSPACE])?;
        ensure!(notes(&back)? == "image baked other worked" && back.sh("cat /srv/models/note")? == "for everybody");
        host.forkd(&["workspace", "delete", WORKSPACE])?.success()?;
        ensure!(notes(one)? == "image baked one later" && notes(other)? == "image baked other");
        for (path, before) in [&data, &models].into_iter().zip(untouched) {
            ensure!(std::fs::read(path)? == before?, "{path} was written to");
        }
        without_leftovers(host)
    })
}

#[test]
fn a_volume_that_cannot_be_is_refused_before_anything_is_booted() -> Result<()> {
    on_real_guests(|host| {
        let scratch = tempfile::tempdir()?;
        let path = |name: &str| scratch.path().join(name).display().to_string();
        std::fs::write(path("odd"), [0; 513])?;
        std::fs::write(path("fine"), [0; 512])?;
        for (volumes, code, says) in [
            (vec![format!("{}:/data", path("missing"))], 1, "missing"),
            (vec![format!("{}:/data", path("odd"))], 2, "513 bytes"),
            (vec![format!("{}:/data", path(""))], 2, "not a file"),
            (vec![format!("{}:data", path("fine"))], 2, "HOST:GUEST"),
            (vec![format!("{}:/data:perhaps", path("fine"))], 2, "perhaps"),
            (vec![format!("{}:/a", path("fine")), format!("{}:/a/", path("fine"))], 2, "two volumes"),
            ((0..25).map(|number| format!("{}:/v{number}", path("fine"))).collect(), 2, "25 volumes"),
        ] {
            let mut arguments = vec!["from-image", NUMPY_DISK, "--tag", "testkit-volumes-refused"];
            arguments.extend(volumes.iter().flat_map(|volume| ["--volume", volume]));
            let said = host.forkd(&arguments)?;
            let text = format!("{}{}", said.stdout, said.stderr);
            ensure!(text.contains(says), "{volumes:?}: {text}");
            said.failure(code)?;
        }
        Ok(())
    })
}
