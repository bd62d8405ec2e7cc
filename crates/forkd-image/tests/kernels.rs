//! Debian's kernels, installed for real.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use forkd_image::kernel::{self, Kernel, KernelChoice};
use forkd_image::{BuildOptions, ImageError, build, build_initramfs};

#[test]
fn both_default_kernels_install_and_their_modules_resolve() {
    for (choice, release, ext4_is_module) in
        [(KernelChoice::DebianCloud612, "6.12.", false), (KernelChoice::Debian61Generic, "6.1.", true)]
    {
        let Some(kernel) = support::kernel(&choice) else { return };
        assert!(kernel.release.starts_with(release), "{kernel:?}");
        assert!(fs::read(&kernel.vmlinux).expect("vmlinux").starts_with(b"\x7fELF"));
        assert_eq!(kernel::install(&choice, &support::cache(), &mut |_| panic!("cached")).expect("again"), kernel);

        let dir = tempfile::tempdir().expect("tempdir");
        let out = dir.path().join("initramfs");
        // Any static program will do for its /init here; this test is one.
        let agent = std::env::current_exe().expect("own path");
        let digest = build_initramfs(&agent, &kernel, &["fuse"], &out).expect("initramfs");
        assert_eq!(build_initramfs(&agent, &kernel, &["fuse"], &out).expect("again"), digest);
        let list = module_list(&out);
        let at = |name: &str| list.iter().position(|module| module == name);
        assert!(at("vsock") < at("vmw_vsock_virtio_transport_common"), "{list:?}");
        assert!(at("vmw_vsock_virtio_transport_common") < at("vmw_vsock_virtio_transport"), "{list:?}");
        assert!(at("failover") < at("net_failover") && at("net_failover") < at("virtio_net"), "{list:?}");
        for needed in ["virtio_mmio", "virtio_blk", "virtio_balloon", "virtio_rng", "pvpanic_mmio", "overlay"] {
            assert!(at(needed).is_some(), "{needed}: {list:?}");
        }
        assert_eq!(at("ext4").is_some(), ext4_is_module, "{list:?}");
        assert!(!ext4_is_module || at("jbd2") < at("ext4") && at("crc32c_generic") < at("ext4"), "{list:?}");

        let error = build_initramfs(&agent, &kernel, &["no-such"], &out).expect_err("missing module");
        assert!(matches!(&error, ImageError::MissingModule { module, .. } if module == "no_such"), "{error}");
        assert!(out.is_file(), "a failure leaves the earlier file");
    }
}

#[test]
fn an_image_and_a_vmlinux_can_be_given_directly() {
    let Some(kernel) = support::kernel(&KernelChoice::DebianCloud612) else { return };
    let dir = tempfile::tempdir().expect("tempdir");
    let again = kernel::install(&KernelChoice::Image(kernel.vmlinux.clone()), dir.path(), &mut support::show)
        .expect("an uncompressed kernel is taken as it is");
    assert_eq!((&again.release, &again.modules_dir), (&kernel.release, &kernel.modules_dir), "they lie beside it");

    // As on an installed system; and the modules belong to the place, not to the kernel.
    let (boot, modules) = (dir.path().join("root/boot"), dir.path().join("root/lib/modules").join(&kernel.release));
    fs::create_dir_all(&boot).expect("mkdir");
    let installed = KernelChoice::Image(boot.join("vmlinux"));
    fs::copy(&kernel.vmlinux, boot.join("vmlinux")).expect("copy");
    let alone = kernel::install(&installed, dir.path(), &mut support::show).expect("without modules");
    assert_eq!((alone.vmlinux, alone.modules_dir), (again.vmlinux, None));
    fs::create_dir_all(&modules).expect("mkdir");
    fs::write(modules.join("modules.builtin"), "").expect("write");
    let whole = kernel::install(&installed, dir.path(), &mut support::show).expect("with modules");
    assert_eq!(whole.modules_dir.as_deref(), Some(modules.as_path()));

    let whole = fs::read(&kernel.vmlinux).expect("vmlinux");
    let cut = dir.path().join("cut");
    fs::write(&cut, &whole[..whole.len() / 2]).expect("write");
    let error = kernel::install(&KernelChoice::Image(cut), dir.path(), &mut support::show).expect_err("cut off");
    assert!(error.to_string().contains("cut off"), "{error}");
    assert_nothing_left(&dir.path().join("kernels"));
}

#[test]
fn what_is_no_package_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let deb = dir.path().join("x.deb");
    fs::write(&deb, "!<arch>\nnot really").expect("write");
    let error = kernel::install(&KernelChoice::Deb(deb), dir.path(), &mut support::show).expect_err("no package");
    assert!(matches!(error, ImageError::Malformed { .. } | ImageError::MissingTool { .. }), "{error}");
    assert_nothing_left(&dir.path().join("kernels"));
    let missing = KernelChoice::Deb(dir.path().join("none.deb"));
    assert!(kernel::install(&missing, dir.path(), &mut support::show).is_err());
}

#[test]
fn a_dynamically_linked_agent_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let kernel = Kernel { vmlinux: "/vmlinux".into(), release: "6.12".into(), modules_dir: None };
    let error = build_initramfs(Path::new("/bin/sh"), &kernel, &[], &dir.path().join("out")).expect_err("dynamic");
    assert!(error.to_string().contains("dynamically"), "{error}");
}

#[test]
#[ignore = "run by the test below, with an apt that knows no such package"]
fn apart_from_the_hosts_apt() {
    let dir = tempfile::tempdir().expect("tempdir");
    let choice = KernelChoice::DebianCloud612;
    match kernel::install(&choice, dir.path(), &mut support::show) {
        Err(error @ ImageError::NoNetwork { .. }) => return support::skip(&error.to_string()),
        installed => {
            let kernel = installed.expect("unpacked from the suite");
            assert!(kernel.release.starts_with("6.12.") && kernel.modules_dir.is_some(), "{kernel:?}");
        }
    }
    assert_eq!(kernel::cached(&choice, dir.path()).map(|kernel| kernel.vmlinux.is_file()), Some(true));
    assert_nothing_left(&dir.path().join("kernels"));
}

#[test]
fn a_host_of_another_distribution_gets_the_kernel_from_debian() {
    if !support::has("mmdebstrap") {
        return support::skip("mmdebstrap is not installed");
    }
    let bin = tempfile::tempdir().expect("tempdir");
    let fake = bin.path().join("apt-cache");
    // mmdebstrap asks apt-cache other things, in its own root.
    let script = "#!/bin/sh\n[ \"$1\" = depends ] || exec /usr/bin/apt-cache \"$@\"\nexit 100\n";
    fs::write(&fake, script).expect("write");
    fs::set_permissions(&fake, PermissionsExt::from_mode(0o755)).expect("chmod");
    let said = support::run_apart(&this(), "apart_from_the_hosts_apt", &[], Some(bin.path()));
    assert!(said.contains("from Debian bookworm") || said.contains("SKIPPED"), "{said}");
}

#[test]
#[ignore = "run by the test below, without a network"]
fn apart_from_the_network() {
    let dir = tempfile::tempdir().expect("tempdir");
    let error = kernel::install(&KernelChoice::DebianCloud612, dir.path(), &mut support::show).expect_err("offline");
    assert!(matches!(error, ImageError::NoNetwork { .. }), "{error}");
    assert_nothing_left(&dir.path().join("kernels"));

    let options = BuildOptions::new(dir.path().join("cache"), dir.path().join("scratch"));
    let error = build(&"debian:bookworm".parse().expect("source"), &options, &mut support::show).expect_err("offline");
    assert!(matches!(error, ImageError::NoNetwork { .. }), "{error}");
    assert!(error.to_string().contains("check the network"), "{error}");
}

#[test]
fn without_a_network_it_says_so() {
    if !rustix::process::geteuid().is_root() || !support::has("mmdebstrap") || !support::has("unshare") {
        return support::skip("needs root, mmdebstrap and unshare");
    }
    support::run_apart(&this(), "apart_from_the_network", &["unshare", "--net"], None);
}

fn this() -> std::path::PathBuf {
    std::env::current_exe().expect("own path")
}

fn assert_nothing_left(kernels: &Path) {
    let left: Vec<_> = kernels.read_dir().expect("list").map(|entry| entry.expect("entry").file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("build-")), "{left:?}");
}

/// `lib/forkd/modules.list` of an initramfs, whose entries are neither compressed nor many.
fn module_list(initramfs: &Path) -> Vec<String> {
    let bytes = fs::read(initramfs).expect("initramfs");
    let name = b"lib/forkd/modules.list\0";
    let at = bytes.windows(name.len()).rposition(|window| window == name).expect("list");
    let start = (at + name.len()).next_multiple_of(4);
    let end = start + bytes[start..].iter().position(|&byte| byte == 0 || byte == b'0').expect("end");
    let text = String::from_utf8_lossy(&bytes[start..end]).into_owned();
    text.lines().map(str::to_owned).collect()
}
