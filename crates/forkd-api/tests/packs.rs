//! Packs over HTTP, against a real node: what goes in comes out, and what goes wrong is told.

use std::io::Write;
use std::path::Path;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, header};
use bytes::Bytes;
use forkd_api::{Api, router};
use forkd_node::{Node, NodeConfig};
use forkd_store::Store;
use forkd_store::pack::UnpackOptions;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

/// The snapshots `base` and `top`, of version 1 of the format.
const PACK: &[u8] = include_bytes!("../../forkd-store/fixtures/pack-v1.forkd-snapshot.tar.zst");

struct Daemon {
    dir: tempfile::TempDir,
    router: Router,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// Status and code of an error.
    fn code(&self) -> (u16, String) {
        (self.status, self.json()["code"].as_str().expect("a code").to_owned())
    }
}

impl Daemon {
    async fn start() -> Self {
        Self::in_dir(tempfile::tempdir().expect("tempdir")).await
    }

    async fn in_dir(dir: tempfile::TempDir) -> Self {
        let config = NodeConfig::new(dir.path(), Path::new("/nonexistent/forkd-vmm")).expect("short path");
        let node = Node::start(config).await.expect("an empty node starts");
        Self { router: router(Api::new(node), None, None), dir }
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.expect("infallible");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, body: response.into_body().collect().await.expect("body").to_bytes() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).expect("request")).await
    }

    async fn unpack(&self, query: &str, pack: &[u8]) -> Answer {
        let pieces: Vec<_> =
            pack.chunks(700).map(|piece| Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece))).collect();
        let body = Body::from_stream(tokio_stream::iter(pieces));
        self.send(Request::post(format!("/v1/packs{query}")).body(body).expect("request")).await
    }

    /// What a failure may not leave behind.
    fn leftovers(&self) -> usize {
        ["staging", "arriving"].iter().map(|dir| self.dir.path().join(dir).read_dir().expect("list").count()).sum()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_goes_in_and_comes_out_the_same() {
    let daemon = Daemon::start().await;
    let answer = daemon.unpack("", PACK).await;
    let report = json!({
        "tag": "top",
        "snapshots": [{"tag": "base", "fate": "published"}, {"tag": "top", "fate": "published"}],
        "new_blobs": 3, "reused_blobs": 0, "written_bytes": answer.json()["written_bytes"], "verified": false,
    });
    assert_eq!((answer.status, answer.json()), (201, report));
    assert!(answer.json()["written_bytes"].as_u64().is_some_and(|bytes| bytes > 30_000), "{}", answer.json());
    let listed = daemon.get("/v1/snapshots").await.json();
    assert_eq!((listed[1]["tag"].as_str(), listed[1]["bootable"].as_bool()), (Some("top"), Some(true)), "{listed}");

    let again = daemon.unpack("", PACK).await;
    assert_eq!((again.status, &again.json()["snapshots"][1]["fate"]), (200, &json!("reused")));

    let pack = daemon.get("/v1/snapshots/top/pack?description=of%20version%201").await;
    assert_eq!(pack.status, 200);
    assert_eq!(pack.headers[header::CONTENT_TYPE], "application/zstd");
    let disposition = pack.headers[header::CONTENT_DISPOSITION].to_str().expect("ascii");
    assert!(disposition.contains("top.forkd-snapshot.tar.zst"), "{disposition}");
    let archive = |pack: &[u8]| zstd::decode_all(pack).expect("sound zstd");
    assert!(archive(&pack.body) == archive(PACK), "another pack came out");
    let archive_bytes: usize = pack.headers["forkd-archive-bytes"].to_str().expect("ascii").parse().expect("a number");
    assert_eq!(archive_bytes, archive(PACK).len());
    // A higher level makes a smaller pack of the same archive.
    let small = daemon.get("/v1/snapshots/top/pack?description=of%20version%201&level=19").await;
    assert!(archive(&small.body) == archive(PACK) && small.body.len() <= pack.body.len());
    assert_eq!(daemon.leftovers(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_name_and_what_is_in_the_way() {
    let daemon = Daemon::start().await;
    assert_eq!(daemon.unpack("?tag=mine", PACK).await.json()["tag"], "mine");
    assert_eq!(daemon.unpack("?tag=base", PACK).await.code(), (400, "bad_pack".to_owned()));
    assert_eq!(daemon.unpack("?tag=a%2Fb", PACK).await.code(), (400, "bad_tag".to_owned()));
    assert_eq!(daemon.unpack("?force=1", PACK).await.code(), (400, "bad_query".to_owned()));
    // Another snapshot of the name: the same under another name.
    assert_eq!(daemon.unpack("", PACK).await.status, 201);
    let broken = daemon.dir.path().join("snapshots/broken");
    std::fs::create_dir(&broken).expect("mkdir");
    assert_eq!(daemon.unpack("?tag=broken", PACK).await.code(), (409, "snapshot_exists".to_owned()));
    let answer = daemon.unpack("?tag=broken&force=true", PACK).await;
    assert_eq!((answer.status, &answer.json()["snapshots"][1]["fate"]), (201, &json!("replaced")));
    assert_eq!(daemon.leftovers(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_told_and_leaves_nothing() {
    let daemon = Daemon::start().await;
    for (query, pack, code) in [
        ("", &b"nonsense"[..], "bad_pack"),
        ("", &PACK[..PACK.len() / 2], "bad_pack"),
        ("", &[PACK, b"more"].concat(), "bad_pack"),
        ("?verify_key=xyz", PACK, "bad_key"),
        ("?verify_key=aeef52044137df5ee5baf3c26cdb1bb95ef10fc4a91a296bc3119887c6a71009", PACK, "pack_unsigned"),
    ] {
        assert_eq!(daemon.unpack(query, pack).await.code(), (400, code.to_owned()), "{query}");
        assert_eq!(daemon.leftovers(), 0);
    }
    let pieces = [Ok(Bytes::from_static(&PACK[..1000])), Err(std::io::Error::other("the cable"))];
    let body = Body::from_stream(tokio_stream::iter(pieces));
    let answer = daemon.send(Request::post("/v1/packs").body(body).expect("request")).await;
    assert_eq!(answer.code(), (400, "broken_body".to_owned()));
    assert_eq!(daemon.get("/v1/snapshots").await.json(), json!([]));
    assert_eq!(daemon.leftovers(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_packed_is_told_before_the_first_byte() {
    let daemon = Daemon::start().await;
    assert_eq!(daemon.get("/v1/snapshots/none/pack").await.code(), (404, "snapshot_not_found".to_owned()));
    assert_eq!(daemon.get("/v1/snapshots/a%20b/pack").await.code(), (400, "bad_tag".to_owned()));
    assert_eq!(daemon.unpack("", PACK).await.status, 201);
    assert_eq!(daemon.get("/v1/snapshots/top/pack?level=20").await.code(), (400, "bad_field".to_owned()));
    assert_eq!(daemon.get("/v1/snapshots/top/pack?level=x").await.code(), (400, "bad_query".to_owned()));
    let vmstate = daemon.dir.path().join("snapshots/base/vmstate");
    std::fs::remove_file(&vmstate).expect("remove");
    std::fs::write(&vmstate, [0; 700]).expect("write");
    assert_eq!(daemon.get("/v1/snapshots/top/pack").await.code(), (409, "snapshot_damaged".to_owned()));
}

/// Adds a snapshot `large` with a kernel of many megabytes that do not compress.
fn add_large(root: &Path) -> std::path::PathBuf {
    let store = Store::open(root).expect("open");
    let digest = |path: &Path| forkd_memory::layer::verify(path, |_| ());
    store.unpack(PACK, &UnpackOptions::default(), digest, |_| ()).expect("unpack");
    let base = store.get(&"base".parse().expect("legal")).expect("unpacked");
    let mut kernel = store.stage_blob().expect("stage");
    let mut noise = vec![0; 24 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    kernel.write_all(&noise).expect("write");
    let mut meta = base.meta.clone();
    meta.tag = "large".parse().expect("legal");
    meta.boot.kernel = kernel.finish(None).expect("finish");
    let staged = store.stage(&meta.tag).expect("stage");
    for file in meta.files() {
        std::fs::copy(base.dir.join(file), staged.path().join(file)).expect("copy");
    }
    let kernel = root.join("blobs").join(meta.boot.kernel.hex());
    store.publish(staged, meta, false).expect("publish");
    kernel
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_cannot_be_finished_breaks_off() {
    let dir = tempfile::tempdir().expect("tempdir");
    let kernel = add_large(dir.path());
    let daemon = Daemon::in_dir(dir).await;
    let request = Request::get("/v1/snapshots/large/pack").body(Body::empty()).expect("request");
    let response = daemon.router.clone().oneshot(request).await.expect("infallible");
    assert_eq!(response.status(), 200);
    // More than can wait for the client is still to be read.
    std::fs::File::options().write(true).open(&kernel).and_then(|file| file.set_len(1 << 20)).expect("cut");
    let error = response.into_body().collect().await.expect_err("it is no whole pack");
    assert!(error.to_string().contains("not written to its end"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_in_the_middle_leaves_nothing_at_work() {
    let daemon = Daemon::start().await;
    assert_eq!(daemon.unpack("", PACK).await.status, 201);
    let request = Request::get("/v1/snapshots/top/pack").body(Body::empty()).expect("request");
    let response = daemon.router.clone().oneshot(request).await.expect("infallible");
    let mut body = response.into_body();
    body.frame().await.expect("a first piece").expect("which is whole");
    drop(body);
    // The snapshot is free again at once: nothing holds it but its files.
    let answer = daemon.send(Request::delete("/v1/snapshots/top").body(Body::empty()).expect("request")).await;
    assert_eq!(answer.status, 204);
}
