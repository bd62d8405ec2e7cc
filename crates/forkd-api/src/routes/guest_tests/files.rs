use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request};
use bytes::Bytes;
use http_body_util::BodyExt;
use serde_json::json;

use super::{BASE, Server};

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_any_size_goes_in_whole_and_comes_out_in_ranges() {
    let server = Server::start().await;
    let (path, size) = (server.at("deep/er/big"), 12 << 20);
    let content: Vec<u8> = (0..size as u32).map(|n| (n * 7 % 251) as u8).collect();
    let url = format!("{BASE}/files?path={path}");
    let refused = server.call(Method::PUT, &url, content.clone()).await;
    assert_eq!(refused.refusal(), (404, "guest_not_found".into()), "no parent");
    let written = server.call(Method::PUT, &format!("{url}&parents=true&mode=0640"), content.clone()).await;
    assert_eq!((written.status, written.json()), (200, json!({ "path": path, "size": size })));
    assert_eq!(std::fs::metadata(&path).expect("written").permissions().mode() & 0o7777, 0o640);

    let all = server.get(&url).await;
    assert_eq!((all.status, all.headers["content-length"].to_str().expect("text")), (200, &*size.to_string()));
    assert!(all.bytes == content);
    for (range, expected, content_range) in [
        ("bytes=10-19", &content[10..20], "bytes 10-19/12582912"),
        ("bytes=-5", &content[size - 5..], "bytes 12582907-12582911/12582912"),
        ("bytes=12582910-", &content[size - 2..], "bytes 12582910-12582911/12582912"),
    ] {
        let request = Request::get(&url).header("host", "x").header("range", range).body(Body::empty());
        let part = super::collect(server.send(request.expect("request")).await).await;
        assert_eq!((part.status, part.headers["content-range"].to_str().expect("text")), (206, content_range));
        assert!(part.bytes == expected, "{range}");
    }
    let request = Request::get(&url).header("host", "x").header("range", "bytes=12582912-").body(Body::empty());
    let beyond = super::collect(server.send(request.expect("request")).await).await;
    assert_eq!(beyond.refusal(), (416, "range_not_satisfiable".into()));
    assert!(!server.get(&format!("{BASE}/files?path=/proc/self/status")).await.bytes.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_changes_nothing() {
    let server = Server::start().await;
    let path = server.at("file");
    std::fs::write(&path, "old").expect("write");
    let broken = futures_util::stream::iter([Ok(Bytes::from_static(b"half")), Err(std::io::Error::other("gone"))]);
    let request = Request::put(format!("{BASE}/files?path={path}")).header("host", "x");
    let request = request.body(Body::from_stream(broken)).expect("request");
    let stream = tokio::net::TcpStream::connect(server.address).await.expect("it listens");
    let handshake = hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.expect("handshake");
    tokio::spawn(connection);
    let _ = sender.send_request(request).await;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(std::fs::read_to_string(&path).expect("still there"), "old");
    }
    let temporary = std::fs::read_dir(server.dir.path()).expect("list").flatten();
    let left: Vec<_> = temporary.filter(|entry| entry.file_name().to_string_lossy().contains(".forkd-")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_are_made_listed_moved_and_removed() {
    let server = Server::start().await;
    let at = |name: &str| server.at(name);
    let post = async |route: &str, body: serde_json::Value| {
        server.call(Method::POST, &format!("{BASE}/files/{route}"), body.to_string()).await
    };
    let made = post("mkdir", json!({ "path": at("tree/below") })).await;
    assert_eq!(made.status, 204, "{}", made.text());
    std::fs::write(at("tree/file"), "four").expect("write");
    std::os::unix::fs::symlink("file", at("tree/link")).expect("link");
    let listed = server.get(&format!("{BASE}/files/list?path={}", at("tree"))).await.json();
    let names: Vec<_> = listed.as_array().expect("array").iter().map(|entry| entry["name"].clone()).collect();
    assert_eq!(names, ["below", "file", "link"]);
    assert_eq!(listed[1]["path"], at("tree/file").as_str());
    assert_eq!((&listed[1]["type"], &listed[1]["size"]), (&"file".into(), &4.into()));
    assert_eq!((&listed[2]["type"], &listed[2]["target"]), (&"symlink".into(), &"file".into()));
    let stat = server.get(&format!("{BASE}/files/stat?path={}", at("tree"))).await.json();
    assert_eq!((&stat["name"], &stat["type"]), (&"tree".into(), &"directory".into()));

    assert_eq!(post("move", json!({ "from": at("tree/file"), "to": at("tree/moved") })).await.status, 204);
    let gone = server.get(&format!("{BASE}/files/stat?path={}", at("tree/file"))).await;
    assert_eq!(gone.refusal(), (404, "guest_not_found".into()));
    let remove =
        async |query: &str| server.call(Method::DELETE, &format!("{BASE}/files?path={}{query}", at("tree")), "").await;
    assert_eq!(remove("").await.refusal(), (409, "guest_conflict".into()), "it is not empty");
    assert_eq!(remove("&recursive=true").await.status, 204);
    assert_eq!(remove("&recursive=true").await.refusal(), (404, "guest_not_found".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_told_what_is_wrong() {
    let server = Server::start().await;
    for (path, status, code) in [
        ("/files?path=relative", 400, "guest_invalid"),
        ("/files?path=/", 400, "guest_invalid"),
        ("/files", 400, "bad_query"),
        ("/files/list?path=/nowhere", 404, "guest_not_found"),
        ("/files/watch?path=/nowhere", 404, "guest_not_found"),
        ("/files/archive?path=/nowhere", 404, "guest_not_found"),
    ] {
        assert_eq!(server.get(&format!("{BASE}{path}")).await.refusal(), (status, code.into()), "{path}");
    }
    let mode = server.call(Method::PUT, &format!("{BASE}/files?path=/tmp/x&mode=999"), "x").await;
    assert_eq!(mode.refusal(), (400, "bad_field".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_with_very_many_files_is_listed() {
    let server = Server::start().await;
    let directory = server.at("many");
    std::fs::create_dir(&directory).expect("mkdir");
    // More than one message of the agent holds.
    for number in 0..9000 {
        std::fs::write(format!("{directory}/{number:0150}"), "").expect("write");
    }
    let listed = server.get(&format!("{BASE}/files/list?path={directory}")).await;
    assert_eq!(listed.status, 200, "{}", listed.text());
    let listed = listed.json();
    assert_eq!(listed.as_array().expect("array").len(), 9000);
    assert!(listed[8999]["name"].as_str().expect("name").ends_with("8999"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_goes_out_and_in_as_a_tar_stream() {
    let server = Server::start().await;
    std::fs::create_dir_all(server.at("tree/sub")).expect("mkdir");
    std::fs::write(server.at("tree/sub/file"), "content").expect("write");
    std::fs::set_permissions(server.at("tree/sub/file"), PermissionsExt::from_mode(0o751)).expect("chmod");
    let stream = server.get(&format!("{BASE}/files/archive?path={}", server.at("tree"))).await;
    assert_eq!((stream.status, stream.headers["content-type"].to_str().expect("text")), (200, "application/x-tar"));
    let into = format!("{BASE}/files/archive?path={}", server.at("copy"));
    let nowhere = server.call(Method::PUT, &into, stream.bytes.clone()).await;
    assert_eq!(nowhere.refusal(), (404, "guest_not_found".into()));
    std::fs::create_dir(server.at("copy")).expect("mkdir");
    assert_eq!(server.call(Method::PUT, &into, stream.bytes.clone()).await.status, 204);
    let copied = server.at("copy/tree/sub/file");
    assert_eq!(std::fs::read_to_string(&copied).expect("unpacked"), "content");
    assert_eq!(std::fs::metadata(&copied).expect("unpacked").permissions().mode() & 0o7777, 0o751);
    let torn = server.call(Method::PUT, &into, stream.bytes[..700].to_vec()).await;
    assert!(torn.status >= 400, "{}", torn.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_told_as_they_happen() {
    let server = Server::start().await;
    let directory = server.at("watched");
    std::fs::create_dir(&directory).expect("mkdir");
    let request = Request::get(format!("{BASE}/files/watch?path={directory}&recursive=true")).header("host", "x");
    let response = server.send(request.body(Body::empty()).expect("request")).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut body = response.into_body();
    std::fs::create_dir(format!("{directory}/sub")).expect("mkdir");
    let mut seen = String::new();
    let until_written = async {
        while !seen.contains("event: written") {
            // What is written before the new directory is watched is told as created only.
            std::fs::write(format!("{directory}/sub/file"), "x").expect("write");
            let next = tokio::time::timeout(Duration::from_millis(200), body.frame());
            let Ok(frame) = next.await else { continue };
            let frame = frame.expect("no end").expect("no error");
            seen.push_str(&String::from_utf8_lossy(&frame.into_data().expect("data")));
        }
    };
    tokio::time::timeout(Duration::from_secs(20), until_written).await.expect("told in time");
    assert!(
        seen.contains(&format!(r#"data: {{"type":"created","path":"{directory}/sub","directory":true}}"#)),
        "{seen}"
    );
    assert!(seen.contains(&format!(r#""path":"{directory}/sub/file""#)), "{seen}");
    std::fs::remove_dir_all(&directory).expect("remove");
    let rest = tokio::time::timeout(Duration::from_secs(20), body.collect()).await.expect("it ends").expect("cleanly");
    let rest = String::from_utf8_lossy(&rest.to_bytes()).into_owned();
    assert!(rest.contains("event: error") && rest.contains("guest_not_found"), "{rest}");
}
