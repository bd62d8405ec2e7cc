//! `pack`, `unpack`, `pull` and `push` against a real daemon's API and real HTTP servers.

mod http_server;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use forkd_api::server::ServerLimits;
use forkd_api::{Api, router, server};
use forkd_node::{Node, NodeConfig};
use http_server::{Reply, Server, ranged};
use serde_json::{Value, json};
use sha2::Digest;
use tokio::sync::watch;

/// The snapshots `base` and `top`.
const PACK: &[u8] = include_bytes!("../../forkd-store/fixtures/pack-v1.forkd-snapshot.tar.zst");

// Made for these tests: openssl genpkey -algorithm ed25519; openssl pkey -pubout
const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\n\
                       MC4CAQAwBQYDK2VwBCIEIMJJ/Sg6Ejt/3Kmsy2A4nugUUNHFOKIWoe+Q+Zn46CrF\n\
                       -----END PRIVATE KEY-----\n";
const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\n\
                      MCowBQYDK2VwAyEAru9SBEE3157luvPCbNsbuV7xD8SpGilrwxGYh8anEAk=\n\
                      -----END PUBLIC KEY-----\n";

/// A daemon, as long as this lives.
struct Daemon {
    directory: tempfile::TempDir,
    url: String,
    _stop: watch::Sender<bool>,
}

impl Daemon {
    async fn start() -> Self {
        Self::listening(false).await
    }

    async fn listening(on_tcp: bool) -> Self {
        let directory = tempfile::tempdir().expect("scratch directory");
        let state = directory.path().join("state");
        let config = NodeConfig::new(&state, Path::new("/nonexistent/forkd-vmm")).expect("a short path");
        let node = Node::start(config).await.expect("an empty node starts");
        let router = router(Api::new(node), None, None);
        let (stop, stopped) = watch::channel(false);
        let url = if on_tcp {
            let listener = server::listen_tcp("127.0.0.1:0").await.expect("a free port");
            let url = format!("http://{}", listener.local_addr().expect("bound"));
            tokio::spawn(server::serve_tcp(listener, router, None, ServerLimits::default(), stopped));
            url
        } else {
            let socket = directory.path().join("api.sock");
            let listener = server::listen_unix(&socket, None).await.expect("a free socket");
            tokio::spawn(server::serve_unix(listener, router, ServerLimits::default(), stopped));
            format!("unix://{}", socket.display())
        };
        Self { directory, url, _stop: stop }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, content).expect("write");
        path.display().to_string()
    }

    fn command(&self, words: &[&str]) -> std::process::Command {
        let mut forkd = std::process::Command::new(env!("CARGO_BIN_EXE_forkd"));
        forkd.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        forkd.env("FORKD_URL", &self.url).env("HOME", self.directory.path()).current_dir(self.directory.path());
        forkd.args(words);
        forkd
    }

    async fn forkd(&self, words: &[&str]) -> Assert {
        let mut forkd = Command::from_std(self.command(words));
        tokio::task::spawn_blocking(move || forkd.assert()).await.expect("no panic")
    }

    async fn json(&self, words: &[&str]) -> Value {
        let assert = self.forkd(words).await.success();
        serde_json::from_slice(&assert.get_output().stdout).expect("JSON")
    }

    async fn tags(&self) -> Vec<String> {
        let images = self.json(&["images", "--json"]).await;
        let mut tags: Vec<_> = images.as_array().expect("a list").iter().map(|one| one["tag"].to_string()).collect();
        tags.sort();
        tags
    }

    /// What is in the cache of downloads.
    fn cached(&self) -> usize {
        let dir = self.path(".local/share/forkd/cache/packs");
        dir.read_dir().map_or(0, |entries| entries.count())
    }
}

fn stdout(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stdout).into_owned()
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

fn sha256(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn archive(pack: &[u8]) -> Vec<u8> {
    zstd::decode_all(pack).expect("sound zstd")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_goes_to_another_daemon_and_says_what_came_of_it() {
    let here = Daemon::start().await;
    let pack = here.file("in", PACK);
    let unpack = here.forkd(&["unpack", &pack]).await.success();
    assert_eq!(stdout(&unpack), "top\n");
    assert!(stderr(&unpack).contains("Snapshot top is ready") && stderr(&unpack).contains("new: base, top"));
    let again = here.forkd(&["unpack", &pack]).await.success();
    assert!(stderr(&again).contains("top is there already, the same"), "{}", stderr(&again));

    let facts = here.json(&["pack", "--tag", "top", "--description", "of version 1", "--json"]).await;
    let written = std::fs::read(here.path("top.forkd-snapshot.tar.zst")).expect("in the working directory");
    assert!(archive(&written) == archive(PACK), "another pack came out");
    assert_eq!((&facts["snapshots"], &facts["blobs"]), (&json!(["base", "top"]), &json!(3)));
    assert_eq!((&facts["bytes"], &facts["sha256"]), (&json!(written.len()), &json!(sha256(&written))));
    assert_eq!((&facts["path"], &facts["signed"]), (&json!("top.forkd-snapshot.tar.zst"), &json!(false)));
    let plain = here.forkd(&["pack", "--tag", "base", "-o", "b"]).await.success();
    assert_eq!(stdout(&plain), "b\n");
    let leftovers: Vec<_> = here.directory.path().read_dir().expect("list").flatten().map(|e| e.file_name()).collect();
    assert!(leftovers.iter().all(|name| !name.to_string_lossy().starts_with(".b.")), "{leftovers:?}");

    let there = Daemon::start().await;
    let packed = here.path("top.forkd-snapshot.tar.zst").display().to_string();
    let report = there.json(&["unpack", &packed, "--tag", "mine", "--json"]).await;
    assert_eq!(report["snapshots"][1], json!({"tag": "mine", "fate": "published"}));
    assert_eq!(there.tags().await, ["\"base\"", "\"mine\""]);
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_travel_through_pipes() {
    let daemon = Daemon::start().await;
    daemon.forkd(&["unpack", &daemon.file("in", PACK)]).await.success();
    let packed = daemon.forkd(&["pack", "--tag", "top", "--description", "of version 1", "--out", "-"]).await.success();
    assert!(archive(&packed.get_output().stdout) == archive(PACK), "another pack came out");
    let mut unpack = Command::from_std(daemon.command(&["unpack", "-", "--tag", "again"]));
    let unpack = tokio::task::spawn_blocking(move || unpack.write_stdin(PACK).assert()).await.expect("no panic");
    assert_eq!(stdout(&unpack.success()), "again\n");
    let both = daemon.forkd(&["pack", "--tag", "top", "--out", "-", "--json"]).await.code(2);
    assert!(stderr(&both).contains("standard output"), "{}", stderr(&both));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_said_with_the_next_command() {
    let daemon = Daemon::start().await;
    let pack = daemon.file("in", PACK);
    for (words, says) in [
        (vec!["pack", "--tag", "none"], "there is no snapshot none"),
        (vec!["pack", "--tag", "none", "--out", "/none/x"], "/none"),
        (vec!["pack", "--tag", "none", "--sign", &pack], "holds no ed25519 private key"),
        (vec!["unpack", "/none/x"], "could not read /none/x"),
        (vec!["unpack", &pack, "--verify-key", "/none"], "cannot read the key file /none"),
        (vec!["unpack", "/proc/self/exe"], "not compressed with zstd"),
    ] {
        let text = stderr(&daemon.forkd(&words).await.code(1));
        assert!(text.contains(says), "{words:?} said: {text}");
    }
    assert!(!daemon.path("none.forkd-snapshot.tar.zst").exists());
    let half = daemon.file("half", &PACK[..PACK.len() / 2]);
    let text = stderr(&daemon.forkd(&["unpack", &half]).await.code(1));
    assert!(text.contains("it was cut off"), "{text}");
    // Another snapshot of the name.
    daemon.forkd(&["unpack", &pack]).await.success();
    std::fs::create_dir(daemon.path("state/snapshots/mine")).expect("mkdir");
    let text = stderr(&daemon.forkd(&["unpack", &pack, "--tag", "mine"]).await.code(1));
    assert!(text.contains("another snapshot mine already") && text.contains("--tag NEW"), "{text}");
    let forced = daemon.forkd(&["unpack", &pack, "--tag", "mine", "--force"]).await.success();
    assert!(stderr(&forced).contains("replaced: mine"), "{}", stderr(&forced));
    for (words, says) in [
        (&["pack"][..], "--tag"),
        (&["pack", "--tag", "x", "--level", "20"], "1..=19"),
        (&["unpack"], "PATH"),
        (&["pull", "nonsense"], "names no pack"),
        (&["pull", "me/python"], "no index was named"),
        (&["push", "me/python", "--tag", "x"], "no URL"),
        (&["push", "ftp://x/y", "--tag", "x"], "names no pack"),
    ] {
        let text = stderr(&daemon.forkd(words).await.code(2));
        assert!(text.contains(says), "{words:?} said: {text}");
    }
    assert!(stderr(&daemon.forkd(&["pull", "me/python"]).await).contains("FORKD_HUB_URL"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    for on_tcp in [false, true] {
        let daemon = Daemon::listening(on_tcp).await;
        // A foreign pack, refused at its first member, with much behind it.
        let mut header = tar::Header::new_ustar();
        let manifest = b"forkd_pack_version = 2\ntag = \"py\"\n";
        header.set_path("manifest.toml").expect("short");
        header.set_size(manifest.len() as u64);
        header.set_cksum();
        let mut content = [header.as_bytes().as_slice(), manifest].concat();
        content.resize(1024, 0);
        let mut noise = vec![0; 96 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        content.extend_from_slice(&noise);
        let foreign = daemon.file("foreign", zstd::encode_all(content.as_slice(), 1).expect("compress"));
        for _ in 0..3 {
            let text = stderr(&daemon.forkd(&["unpack", &foreign]).await.code(1));
            assert!(text.contains("made by another engine"), "on TCP: {on_tcp}, said: {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_is_made_here_and_checked_there() {
    let daemon = Daemon::start().await;
    let (private, public) = (daemon.file("key.pem", PRIVATE), daemon.file("key.pub", PUBLIC));
    let unsigned = daemon.file("in", PACK);
    daemon.forkd(&["unpack", &unsigned]).await.success();
    let facts = daemon.json(&["pack", "--tag", "top", "--sign", &private, "--out", "signed", "--json"]).await;
    assert_eq!(facts["signed"], true);
    assert_eq!(facts["sha256"], sha256(&std::fs::read(daemon.path("signed")).expect("written")));
    let there = Daemon::start().await;
    let signed = daemon.path("signed").display().to_string();
    let text = stderr(&there.forkd(&["unpack", &unsigned, "--verify-key", &public]).await.code(1));
    assert!(text.contains("not signed"), "{text}");
    assert!(there.tags().await.is_empty());
    let text = stderr(&there.forkd(&["unpack", &signed, "--verify-key", &public]).await.success());
    assert!(text.contains("signature is good"), "{text}");
    let other = PUBLIC.replace("u9S", "u9T");
    let text = stderr(&there.forkd(&["unpack", &signed, "--verify-key", &there.file("other", other)]).await.code(1));
    assert!(text.contains("not by the given key") || text.contains("no ed25519 public key"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_pack_leaves_no_file() {
    let daemon = Daemon::start().await;
    // A daemon that never comes to the end.
    let endless = Server::start(|request, _| match request.path.as_str() {
        "/version" => Reply::new(200, r#"{"version":"0","api":"v1"}"#),
        _ => {
            std::thread::sleep(Duration::from_secs(3600));
            Reply::default()
        }
    });
    let mut child = daemon
        .command(&["--daemon-url", &endless.url, "pack", "--tag", "top", "--out", "out/x"])
        .stderr(Stdio::null())
        .spawn_in(&daemon.path("out"));
    let growing = || daemon.path("out").read_dir().expect("list").count();
    let end = Instant::now() + Duration::from_secs(20);
    while growing() == 0 {
        assert!(Instant::now() < end, "it never began to write");
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("signal");
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    assert_eq!(growing(), 0, "something was left");
}

/// Makes a directory and spawns.
trait SpawnIn {
    fn spawn_in(&mut self, dir: &Path) -> std::process::Child;
}

impl SpawnIn for std::process::Command {
    fn spawn_in(&mut self, dir: &Path) -> std::process::Child {
        std::fs::create_dir(dir).expect("mkdir");
        self.spawn().expect("it runs")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_answer_of_the_daemon_leaves_no_file() {
    let daemon = Daemon::start().await;
    let cut = Server::start(|request, _| match request.path.as_str() {
        "/version" => Reply::new(200, r#"{"version":"0","api":"v1"}"#),
        _ => Reply::new(200, PACK).cut_after(PACK.len() / 2),
    });
    let damaged = Server::start(|request, _| match request.path.as_str() {
        "/version" => Reply::new(200, r#"{"version":"0","api":"v1"}"#),
        _ => Reply::new(200, &PACK[..PACK.len() / 2]),
    });
    for (server, says) in [(cut, "did not come to its end"), (damaged, "the pack that came is damaged")] {
        let words = ["--daemon-url", &server.url, "pack", "--tag", "top", "--out", "x"];
        let text = stderr(&daemon.forkd(&words).await.code(1));
        assert!(text.contains(says), "{text}");
        let names: Vec<_> =
            daemon.directory.path().read_dir().expect("list").flatten().map(|e| e.file_name()).collect();
        assert!(!names.iter().any(|name| name.to_string_lossy().contains('x')), "{names:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_is_pulled_and_the_cache_is_empty_afterwards() {
    let daemon = Daemon::start().await;
    let server = Server::of_file(PACK.to_vec(), "\"one\"");
    let pull = daemon.forkd(&["pull", &format!("{}/top.tar.zst", server.url)]).await.success();
    assert_eq!(stdout(&pull), "top\n");
    assert_eq!((daemon.cached(), server.seen().len()), (0, 1));
    assert_eq!(server.seen()[0].header("accept-encoding"), Some("identity"));
    // There already, which is found when it has come.
    let again = daemon.json(&["pull", &format!("{}/top.tar.zst", server.url), "--json"]).await;
    assert_eq!(again["snapshots"][0]["fate"], "reused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_is_taken_up_where_it_was() {
    let daemon = Daemon::start().await;
    // Twice in the middle, then a moment of being busy.
    let server = Server::start(|request, before| match before {
        0 => ranged(request, PACK, "\"one\"").cut_after(1000),
        1 => ranged(request, PACK, "\"one\"").cut_after(700),
        2 => Reply::new(503, "busy").with("retry-after", 0),
        _ => ranged(request, PACK, "\"one\""),
    });
    daemon.forkd(&["pull", &format!("{}/x", server.url)]).await.success();
    let ranges: Vec<_> = server.seen().iter().map(|request| request.header("range").map(str::to_owned)).collect();
    let range = |from: usize| Some(format!("bytes={from}-"));
    assert_eq!(ranges, [None, range(1000), range(1700), range(1700)]);
    assert!(server.seen()[1..].iter().all(|request| request.header("if-range") == Some("\"one\"")));
    assert_eq!(daemon.tags().await, ["\"base\"", "\"top\""]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_was_given_up_is_taken_up_by_the_next_run() {
    let daemon = Daemon::start().await;
    let server = Server::start(|request, before| match before {
        0 => ranged(request, PACK, "\"one\"").cut_after(1200),
        1 => Reply::new(403, "not today"),
        _ => ranged(request, PACK, "\"one\""),
    });
    let words = ["pull", &format!("{}/x", server.url)];
    let text = stderr(&daemon.forkd(&words).await.code(1));
    assert!(text.contains("403") && text.contains("not today") && text.contains("goes on where it stopped"), "{text}");
    assert_eq!(daemon.cached(), 2);
    daemon.forkd(&words).await.success();
    assert_eq!(server.seen()[2].range_start(), Some(1200));
    assert_eq!(daemon.cached(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changed_meanwhile_is_fetched_anew() {
    let daemon = Daemon::start().await;
    // What came first is of another file, which would not fit.
    let other: Vec<u8> = PACK.iter().rev().copied().collect();
    let server = Server::start(move |request, before| match before {
        0 => ranged(request, &other, "\"old\"").cut_after(1000),
        _ => ranged(request, PACK, "\"new\""),
    });
    daemon.forkd(&["pull", &format!("{}/x", server.url)]).await.success();
    let second = &server.seen()[1];
    assert_eq!((second.range_start(), second.header("if-range")), (Some(1000), Some("\"old\"")));
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_without_ranges_or_names_for_their_files_are_asked_from_the_beginning() {
    let daemon = Daemon::start().await;
    let no_ranges = Server::start(|_, before| {
        let whole = Reply::new(200, PACK).with("etag", "\"one\"");
        if before == 0 { whole.cut_after(1500) } else { whole }
    });
    daemon.forkd(&["pull", &format!("{}/x", no_ranges.url)]).await.success();
    assert_eq!(no_ranges.seen()[1].range_start(), Some(1500));
    // Without an ETag, or with a weak one, nobody can say that it is the same file.
    for etag in [None, Some("W/\"one\"")] {
        let nameless = Server::start(move |_, before| {
            let whole = Reply::new(200, PACK);
            let whole = etag.map_or(whole.clone(), |etag| whole.with("etag", etag));
            if before == 0 { whole.cut_after(1500) } else { whole }
        });
        daemon.forkd(&["pull", &format!("{}/x", nameless.url)]).await.success();
        assert_eq!((nameless.seen().len(), nameless.seen()[1].range_start()), (2, None));
    }
    // Of a date it can be said.
    let dated = Server::start(|request, before| {
        let date = "Sun, 22 Nov 2026 12:00:00 GMT";
        let reply = ranged(request, PACK, date).with("last-modified", date);
        if before == 0 { reply.cut_after(1500) } else { reply }
    });
    daemon.forkd(&["pull", &format!("{}/x", dated.url)]).await.success();
    assert_eq!(dated.seen()[1].range_start(), Some(1500));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_sends_another_part_is_not_believed() {
    let daemon = Daemon::start().await;
    let server = Server::start(|request, before| match before {
        0 => ranged(request, PACK, "\"one\"").cut_after(1000),
        1 => {
            Reply::new(206, &PACK[900..]).with("content-range", format!("bytes 900-{}/{}", PACK.len() - 1, PACK.len()))
        }
        _ => ranged(request, PACK, "\"one\""),
    });
    let words = ["pull", &format!("{}/x", server.url)];
    let text = stderr(&daemon.forkd(&words).await.code(1));
    assert!(text.contains("another part than was asked for: bytes 900-"), "{text}");
    daemon.forkd(&words).await.success();
    assert_eq!(server.seen()[2].range_start(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_told_with_status_and_words_but_no_secrets() {
    let daemon = Daemon::start().await;
    let server = Server::start(|_, _| Reply::new(404, "<html>\n  no such\u{1b}[2J pack </html>"));
    let url = server.url.replace("http://", "http://me:hunter2@");
    let assert = daemon.forkd(&["pull", &format!("{url}/x?token=hunter3")]).await.code(1);
    let text = stderr(&assert);
    assert!(text.contains("404") && text.contains("no such") && !text.contains('\u{1b}'), "{text}");
    assert!(!text.contains("hunter"), "{text}");
    assert_eq!(server.seen().len(), 1, "a 404 is not asked for again");
    let authorization = server.seen()[0].header("authorization").expect("the secret is for the server").to_owned();
    assert!(authorization.starts_with("Basic "), "{authorization}");
    let nobody = daemon.forkd(&["pull", "http://me:hunter2@127.0.0.1:1/x?token=hunter3"]).await.code(1);
    assert!(stderr(&nobody).contains("could not download http://127.0.0.1:1/x") && !stderr(&nobody).contains("hunter"));
    for file in daemon.path(".local/share/forkd/cache/packs").read_dir().expect("list").flatten() {
        let content = std::fs::read_to_string(file.path()).expect("text");
        assert!(!content.contains("hunter") && !file.file_name().to_string_lossy().contains("hunter"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_followed_but_not_for_ever() {
    let daemon = Daemon::start().await;
    let file = Server::of_file(PACK.to_vec(), "\"one\"");
    let target = format!("{}/x", file.url);
    let server = Server::start(move |request, _| match request.path.as_str() {
        "/once" => Reply::new(302, "").with("location", &target),
        _ => Reply::new(302, "").with("location", "/round"),
    });
    daemon.forkd(&["pull", &format!("{}/once", server.url)]).await.success();
    let round = daemon.forkd(&["pull", &format!("{}/round", server.url)]).await.code(1);
    assert!(stderr(&round).contains("redirect"), "{}", stderr(&round));
    assert!(server.seen().len() < 10, "{} requests", server.seen().len());
}

fn index(url: &str, sha256: &str) -> String {
    let entry = json!({"url": url, "sha256": sha256, "size_bytes": PACK.len(), "memory_mib": 512});
    json!({"_comment": "any", "schema_version": 1, "packages": {"me/top": {"versions": {"latest": entry, "v1": entry}}}})
        .to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn packages_are_pulled_by_name_and_checked() {
    let daemon = Daemon::start().await;
    let server = Server::of_file(PACK.to_vec(), "\"one\"");
    let good = daemon.file("good.json", index(&format!("{}/top", server.url), &sha256(PACK).to_uppercase()));
    daemon.forkd(&["pull", "me/top", "--hub", &good]).await.success();
    assert_eq!(daemon.tags().await, ["\"base\"", "\"top\""]);
    let by_environment = daemon.command(&["pull", "me/top@v1", "--tag", "mine"]).env("FORKD_HUB_URL", &good).output();
    assert!(by_environment.expect("it runs").status.success());
    // The index too may be on a server, and name its packs relative to itself.
    let hub = Server::start(|request, _| match request.path.as_str() {
        "/hub/registry.json" => Reply::new(200, index("packs/top", &sha256(PACK))),
        "/hub/packs/top" => ranged(request, PACK, "\"one\""),
        _ => Reply::new(404, ""),
    });
    daemon
        .forkd(&["pull", "me/top", "--tag", "third", "--hub", &format!("{}/hub/registry.json", hub.url)])
        .await
        .success();

    let bad = daemon.file("bad.json", index(&format!("{}/top", server.url), &sha256(b"another")));
    let text = stderr(&daemon.forkd(&["pull", "me/top", "--tag", "fourth", "--hub", &bad]).await.code(1));
    assert!(text.contains(&sha256(PACK)) && text.contains("it was not unpacked"), "{text}");
    let short = daemon.file(
        "short.json",
        index(&format!("{}/top", server.url), &sha256(PACK)).replace("size_bytes\":3", "size_bytes\":4"),
    );
    let text = stderr(&daemon.forkd(&["pull", "me/top", "--tag", "fourth", "--hub", &short]).await.code(1));
    assert!(text.contains("the index says 4"), "{text}");
    for (words, says) in [
        (["pull", "me/none", "--hub", &good], "it has me/top"),
        (["pull", "me/top@v7", "--hub", &good], "it has latest, v1"),
        (["pull", "me/top", "--hub", "/none.json"], "could not read the index /none.json"),
        (["pull", "me/top", "--hub", &server.url], "makes no sense"),
    ] {
        let text = stderr(&daemon.forkd(&words).await.code(1));
        assert!(text.contains(says), "{words:?} said: {text}");
    }
    assert_eq!(daemon.tags().await.len(), 4);
    assert_eq!(
        daemon
            .path(".local/share/forkd/cache/packs")
            .read_dir()
            .expect("list")
            .flatten()
            .filter(|entry| entry.metadata().is_ok_and(|m| m.len() > 100))
            .count(),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_only_in_the_way_keeps_what_it_fetched() {
    let daemon = Daemon::start().await;
    std::fs::create_dir(daemon.path("state/snapshots/top")).expect("mkdir");
    let server = Server::of_file(PACK.to_vec(), "\"one\"");
    let url = format!("{}/x", server.url);
    let text = stderr(&daemon.forkd(&["pull", &url]).await.code(1));
    assert!(text.contains("another snapshot top already") && text.contains("forkd pull http"), "{text}");
    daemon.forkd(&["pull", &url, "--force"]).await.success();
    assert_eq!((server.seen().len(), daemon.cached()), (1, 0), "it was fetched once");
    // What is no pack is of no use in the cache.
    let nonsense = Server::of_file(b"nonsense".to_vec(), "\"one\"");
    daemon.forkd(&["pull", &format!("{}/x", nonsense.url)]).await.code(1);
    assert_eq!(daemon.cached(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_smallest_benchmark_reports_every_field() {
    let daemon = Daemon::start().await;
    daemon.forkd(&["unpack", &daemon.file("in", PACK)]).await.success();
    let made_up = ["bench", "pack", "--memory", "16M", "--level", "1", "--level", "2", "--runs", "1", "--json"];
    let given = ["bench", "pack", "--tag", "top", "--runs", "2", "--json"];
    for (words, levels) in [(&made_up[..], &[1, 2][..]), (&given, &[3])] {
        let report = daemon.json(words).await;
        let rows = report["rows"].as_array().cloned().unwrap_or_default();
        assert_eq!(rows.iter().map(|row| row["level"].as_i64().expect("a level")).collect::<Vec<_>>(), levels);
        for row in &rows {
            for figure in ["pack_ms", "read_ms", "zstd_ms", "pack_ratio", "unpack_ms", "unzstd_ms", "unpack_ratio"] {
                assert!(row[figure].as_f64().is_some_and(|value| value > 0.0), "{figure}: {row}");
            }
            let bytes = |name: &str| row[name].as_u64().expect("bytes");
            assert!(bytes("pack_bytes") < bytes("archive_bytes") && bytes("archive_bytes") < bytes("logical_bytes"));
            assert!(bytes("zstd_bytes") > 0);
        }
        assert!(report["zstd"].as_str().is_some_and(|version| version.contains("v1.")), "{report}");
    }
    let scratch = daemon.path(".local/share/forkd/cache/bench");
    assert_eq!(scratch.read_dir().expect("list").count(), 0, "scratch files were left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_is_one_put_and_a_refusal_is_quoted() {
    let daemon = Daemon::start().await;
    daemon.forkd(&["unpack", &daemon.file("in", PACK)]).await.success();
    let server = Server::start(|request, _| match request.path.as_str() {
        "/good?key=hunter3" => Reply::new(201, ""),
        _ => Reply::new(403, "the bucket is\n full"),
    });
    let url = server.url.replace("http://", "http://me:hunter2@");
    let good = format!("{url}/good?key=hunter3");
    let words = ["push", &good, "--tag", "top", "--description", "of version 1", "--json"];
    let assert = daemon.forkd(&words).await.success();
    let facts: Value = serde_json::from_slice(&assert.get_output().stdout).expect("JSON");
    assert!(!stdout(&assert).contains("hunter") && !stderr(&assert).contains("hunter"), "{}", stderr(&assert));
    let put = &server.seen()[0];
    assert_eq!((put.method.as_str(), put.header("content-length")), ("PUT", Some(put.body.len().to_string().as_str())));
    assert!(archive(&put.body) == archive(PACK), "another pack was pushed");
    assert_eq!((&facts["sha256"], &facts["bytes"]), (&json!(sha256(&put.body)), &json!(put.body.len())));
    assert_eq!(put.header("transfer-encoding"), None);

    let text = stderr(&daemon.forkd(&["push", &format!("{url}/bad"), "--tag", "top"]).await.code(1));
    assert!(text.contains("403") && text.contains("the bucket is full") && !text.contains("hunter"), "{text}");
    assert_eq!(server.seen().len(), 2, "a push is not tried again");
    assert_eq!(daemon.cached(), 0, "the packed file is gone");
}
