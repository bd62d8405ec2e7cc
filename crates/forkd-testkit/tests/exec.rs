//! Programs in a sandbox: streams, exit codes, limits.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Said, finish, on_real_guests};

#[test]
fn exit_codes_and_both_streams_come_through() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let output = sandbox.exec_with(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"])?;
        ensure!((output.code, output.stdout.as_str()) == (7, "out\n"), "{output:?}");
        output.stderr.says(&["err"])
    })
}

#[test]
fn environment_directory_and_user_are_as_asked() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let script = "echo $GREETING; pwd; id -u";
        let options = ["--env", "GREETING=hello", "--cwd", "/usr", "--user", "nobody"];
        let output = sandbox.exec_with(&options, &["sh", "-c", script])?.success()?;
        ensure!(output == "hello\n/usr\n65534\n", "{output}");
        Ok(())
    })
}

#[test]
fn standard_input_is_streamed() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let mut child = host
            .command(&["exec", "-i", sandbox.id().as_str(), "--", "sha256sum"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut stdin = child.stdin.take().context("it is piped")?;
        stdin.write_all(b"abc")?;
        drop(stdin);
        let output = child.wait_with_output()?;
        // The digest of "abc" from FIPS 180-2, appendix B.1.
        String::from_utf8(output.stdout)?.says(&["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"])
    })
}

#[test]
fn a_program_that_does_not_exist_is_named() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let output = sandbox.exec_with(&[], &["no-such-program"])?;
        ensure!(output.code != 0, "{output:?}");
        output.stderr.says(&["no-such-program"])
    })
}

#[test]
fn a_timeout_ends_the_whole_process_group() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let started = Instant::now();
        let output = sandbox.exec_with(&["--timeout-secs", "2"], &["sh", "-c", "sleep 300 & sleep 300"])?;
        ensure!(output.code != 0, "{output:?}");
        ensure!(started.elapsed() < Duration::from_secs(60), "it took {:?}", started.elapsed());
        // A bracket keeps grep from finding its own command line.
        ensure!(sandbox.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '[s]leep 300' || true")? == "0");
        Ok(())
    })
}

#[test]
fn two_hundred_mebibytes_of_output_arrive_whole() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let mut child = host
            .command(&[
                "exec",
                "--timeout-secs",
                "600",
                sandbox.id().as_str(),
                "--",
                "head",
                "-c",
                "209715200",
                "/dev/zero",
            ])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut stdout = child.stdout.take().context("it is piped")?;
        let reader = std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        let status = finish(child, "exec head -c 209715200 /dev/zero")?;
        let bytes = reader.join().expect("copying does not panic")?;
        ensure!(status.success(), "early eof: {bytes} bytes, {status}");
        ensure!(bytes == 200 << 20, "{bytes} bytes");
        Ok(())
    })
}

/// Takes all but the last few mebibytes at once and writes those.
const FILL: &str = "
fallocate -l $(($(df --output=avail -k /root | tail -n 1) - 8192))k /root/most
head -c 1G /dev/zero > /root/full
echo code $?
rm /root/most /root/full
echo fine > /root/after
cat /root/after";

#[test]
fn a_full_disk_in_the_guest_is_the_guests_own_trouble() -> Result<()> {
    on_real_guests(|host| {
        let siblings = host.spawn(host.numpy()?, 2)?;
        let said = siblings[0].exec_with(&["--timeout-secs", "600"], &["sh", "-c", FILL])?;
        said.stderr.says(&["No space left on device"])?;
        said.success()?.says(&["code 1", "fine"])?;
        ensure!(siblings[1].sh("echo fine > /root/after; cat /root/after")? == "fine");
        Ok(())
    })
}
