//! HTTP to servers in a guest: `/v1/sandboxes/:id/ports/:port/…`, and `<port>-<sandbox id>.<domain>` where the daemon
//! has a domain.
//!
//! Each request has a connection of its own, carried by the agent to the guest's loopback, so it needs no network in
//! the guest. Bodies stream both ways, and upgrades, WebSockets among them, become a stream of bytes.
//!
//! | header | by path | by host name |
//! |---|---|---|
//! | `Host` | `localhost:PORT`, which development servers insist on | as the client sent it |
//! | `X-Forwarded-Host`, `-Proto`, `-For` | set, unless a proxy in front has set them | the same |
//! | `X-Forwarded-Prefix` | the part of the path that was cut off | |
//! | `Location` of answers | the prefix is put in front again | as it is |
//! | `Authorization` | is for the daemon and stays here; what the client puts into `Forkd-Guest-Authorization` takes its place | the same |

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{self, HeaderName, HeaderValue};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use forkd_node::{GuestError, InUse, Tunnel};
use forkd_proto::agent::FailureCode;
use forkd_types::SandboxId;
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use crate::auth::ToGuest;
use crate::error::{ApiError, ApiResult};
use crate::router::Api;
use crate::server::{OverTls, Remote};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
const GUEST_AUTHORIZATION: HeaderName = HeaderName::from_static("forkd-guest-authorization");

/// Headers that are about one connection and not about the message (RFC 9110, section 7.6.1).
const OF_ONE_CONNECTION: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
];

/// Bytes on their way in each direction of an upgraded connection.
const BUFFER: usize = 64 << 10;

/// A server in a guest, and what to ask it.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    sandbox: String,
    port: String,
    /// What of the path was to find the server; none when the host name was.
    prefix: Option<String>,
    path: PathAndQuery,
}

/// `ANY /v1/sandboxes/:id/ports/:port/…`.
pub(crate) async fn by_path(State(api): State<Api>, request: Request) -> ApiResult<Response> {
    let target = Target::of_path(request.uri()).ok_or_else(|| ApiError::unknown_path(request.uri().path()))?;
    proxy(&api, target, request).await
}

/// What requests to `<port>-<sandbox id>.<domain>` are answered by.
#[derive(Clone)]
pub(crate) struct ByHost {
    pub(crate) api: Api,
    /// In lower case, without a dot at either end.
    pub(crate) domain: std::sync::Arc<str>,
}

/// Takes requests to host names of the daemon's domain; lets all others through.
pub(crate) async fn by_host(State(by): State<ByHost>, request: Request, next: Next) -> Response {
    match Target::of_host(&host_of(&request), &by.domain, request.uri()) {
        Some(target) => proxy(&by.api, target, request).await.into_response(),
        None => next.run(request).await,
    }
}

/// Notes on requests to host names of the daemon's domain that they are for a guest, whatever their path.
pub(crate) async fn mark_by_host(State(by): State<ByHost>, mut request: Request, next: Next) -> Response {
    if Target::of_host(&host_of(&request), &by.domain, request.uri()).is_some() {
        request.extensions_mut().insert(ToGuest);
    }
    next.run(request).await
}

fn host_of(request: &Request) -> String {
    let header = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    header.or_else(|| request.uri().authority().map(|authority| authority.as_str())).unwrap_or_default().to_owned()
}

impl Target {
    fn of_path(uri: &Uri) -> Option<Self> {
        let (sandbox, rest) = uri.path().strip_prefix("/v1/sandboxes/")?.split_once("/ports/")?;
        let (port, rest) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = Some(format!("/v1/sandboxes/{sandbox}/ports/{port}"));
        let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let path = format!("/{rest}{query}").parse().ok()?;
        Some(Self { sandbox: sandbox.to_owned(), port: port.to_owned(), prefix, path })
    }

    fn of_host(host: &str, domain: &str, uri: &Uri) -> Option<Self> {
        let host = host.to_ascii_lowercase();
        let (name, port) = host.rsplit_once(':').unwrap_or((&host, ""));
        let name = if port.bytes().all(|byte| byte.is_ascii_digit()) { name } else { &host };
        let label = name.trim_end_matches('.').strip_suffix(domain)?.strip_suffix('.')?;
        let (port, sandbox) = label.split_once('-')?;
        let path = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        Some(Self { sandbox: sandbox.to_owned(), port: port.to_owned(), prefix: None, path })
    }
}

async fn proxy(api: &Api, target: Target, mut request: Request) -> ApiResult<Response> {
    let id: SandboxId = target.sandbox.parse().map_err(|_| ApiError::no_such_sandbox(&target.sandbox))?;
    let port = target.port.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(|| {
        ApiError::bad_request("bad_port", format!("{:?} is no port; give a number from 1 to 65535", target.port))
    })?;
    let tunnel = connect(api, &id, port).await?;
    let client = hyper::upgrade::on(&mut request);
    let broken = |error: hyper::Error| {
        let message = format!("the server on port {port} of sandbox {id} broke off: {}", causes(&error));
        ApiError::bad_gateway("port_broken", message)
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(tunnel)).await.map_err(broken)?;
    let in_use = api.in_use(&id)?;
    tokio::spawn(async move {
        let _in_use = in_use;
        connection.with_upgrades().await
    });
    let outgoing = outgoing(request, &target, port);
    let mut response = sender.send_request(outgoing).await.map_err(broken)?;
    let upgraded = (response.status() == StatusCode::SWITCHING_PROTOCOLS).then(|| hyper::upgrade::on(&mut response));
    let mut response = response.map(Body::new);
    let protocol = response.headers().get(header::UPGRADE).cloned();
    strip(response.headers_mut());
    if let Some(prefix) = &target.prefix {
        relocate(response.headers_mut(), prefix, port);
    }
    if let (Some(guest), Some(protocol)) = (upgraded, protocol) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(header::UPGRADE, protocol);
        tokio::spawn(carry(client, guest, (id.clone(), api.in_use(&id)?), port));
    }
    Ok(response)
}

async fn connect(api: &Api, id: &SandboxId, port: u16) -> ApiResult<Tunnel> {
    match api.agent(id, false).await?.tunnel(port).await {
        Ok(tunnel) => Ok(tunnel),
        Err(GuestError::Refused(failure)) if failure.code == FailureCode::NotFound => {
            let message = format!("nothing listens on port {port} of sandbox {id}");
            Err(ApiError::bad_gateway("port_closed", message))
        }
        Err(error) => Err(api.guest_error(id, "connect to a port", error).await),
    }
}

/// The request as the server in the guest is to see it.
fn outgoing(request: Request, target: &Target, port: u16) -> Request {
    let host = host_of(&request);
    let (mut parts, body) = request.into_parts();
    let upgrade = parts.headers.get(header::UPGRADE).cloned();
    let upgrades = upgrade.filter(|_| has_token(&parts.headers, header::CONNECTION, "upgrade"));
    strip(&mut parts.headers);
    let headers = &mut parts.headers;
    if let Some(protocol) = upgrades {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol);
    }
    headers.remove(header::AUTHORIZATION);
    if let Some(authorization) = headers.remove(GUEST_AUTHORIZATION) {
        headers.insert(header::AUTHORIZATION, authorization);
    }
    let original = HeaderValue::from_str(&host).unwrap_or_else(|_| HeaderValue::from_static("localhost"));
    headers.entry(FORWARDED_HOST).or_insert_with(|| original.clone());
    let scheme = if parts.extensions.get::<OverTls>().is_some() { "https" } else { "http" };
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static(scheme));
    if let Some(Remote::Tcp(address)) = parts.extensions.get::<Remote>() {
        let so_far = headers.get(FORWARDED_FOR).and_then(|value| value.to_str().ok());
        let address = address.ip();
        let all = so_far.map_or_else(|| address.to_string(), |so_far| format!("{so_far}, {address}"));
        headers.extend(HeaderValue::from_str(&all).ok().map(|all| (FORWARDED_FOR, all)));
    }
    match &target.prefix {
        Some(prefix) => {
            headers.extend(HeaderValue::from_str(prefix).ok().map(|prefix| (FORWARDED_PREFIX, prefix)));
            let local = HeaderValue::from_str(&format!("localhost:{port}")).expect("a number is legal in a header");
            headers.insert(header::HOST, local);
        }
        None => {
            headers.insert(header::HOST, original);
        }
    }
    parts.uri = Uri::from(target.path.clone());
    parts.version = axum::http::Version::HTTP_11;
    Request::from_parts(parts, body)
}

/// Removes what is about one connection.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&OF_ONE_CONNECTION) {
        headers.remove(name);
    }
}

/// Whether a comma-separated header has `wanted` among its values.
pub(super) fn has_token(headers: &HeaderMap, name: HeaderName, wanted: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|token| token.trim().eq_ignore_ascii_case(wanted))
}

/// Puts the prefix in front of where an answer points within its own server.
fn relocate(headers: &mut HeaderMap, prefix: &str, port: u16) {
    let Some(location) = headers.get(header::LOCATION).and_then(|value| value.to_str().ok()) else { return };
    let own = [format!("http://localhost:{port}"), format!("http://127.0.0.1:{port}")];
    let path = own.iter().find_map(|own| location.strip_prefix(own.as_str())).unwrap_or(location);
    let absolute = path.starts_with('/') && !path.starts_with("//");
    if !absolute && !path.is_empty() {
        return;
    }
    if let Ok(moved) = HeaderValue::from_str(&format!("{prefix}{path}")) {
        headers.insert(header::LOCATION, moved);
    }
}

/// Carries an upgraded connection until both directions have ended.
async fn carry(client: OnUpgrade, guest: OnUpgrade, (id, _in_use): (SandboxId, Option<InUse>), port: u16) {
    let carried = async {
        let (client, guest) = tokio::try_join!(client, guest).map_err(std::io::Error::other)?;
        let (mut client, mut guest) = (TokioIo::new(client), TokioIo::new(guest));
        tokio::io::copy_bidirectional_with_sizes(&mut client, &mut guest, BUFFER, BUFFER).await
    };
    if let Err(error) = carried.await {
        tracing::debug!(sandbox = %id, port, %error, "an upgraded connection broke");
    }
}

fn causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_path(uri: &str) -> Option<(String, String, String)> {
        let target = Target::of_path(&uri.parse().expect("legal"))?;
        Some((target.sandbox, target.port, target.path.to_string()))
    }

    #[test]
    fn the_path_after_the_port_is_the_servers_own() {
        let found = |path: &str| Some(("sb-1-0000".to_owned(), "80".to_owned(), path.to_owned()));
        for (rest, path) in [
            ("", "/"),
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("//a", "//a"),
            ("/a%2Fb?c=%20&d", "/a%2Fb?c=%20&d"),
            ("?q", "/?q"),
            ("/x/ports/9", "/x/ports/9"),
        ] {
            assert_eq!(by_path(&format!("/v1/sandboxes/sb-1-0000/ports/80{rest}")), found(path), "{rest}");
        }
        assert_eq!(by_path("/v1/sandboxes/sb-1-0000/port/80"), None);
    }

    #[test]
    fn a_server_is_told_how_the_client_came_unless_a_proxy_has_said_so() {
        let target = || Target::of_path(&"/v1/sandboxes/sb-1-0000/ports/80/".parse().expect("legal")).expect("a port");
        let told = |secured: bool, said: Option<&'static str>| {
            let mut request = Request::new(Body::empty());
            if secured {
                request.extensions_mut().insert(OverTls);
            }
            request.headers_mut().extend(said.map(|said| (FORWARDED_PROTO, HeaderValue::from_static(said))));
            outgoing(request, &target(), 80).headers()[FORWARDED_PROTO].clone()
        };
        assert_eq!(told(false, None), "http");
        assert_eq!(told(true, None), "https");
        assert_eq!(told(false, Some("https")), "https");
    }

    #[test]
    fn host_names_of_the_domain_name_a_port_and_a_sandbox() {
        let uri: Uri = "/x?y".parse().expect("legal");
        let of = |host: &str| Target::of_host(host, "box.example", &uri).map(|target| (target.port, target.sandbox));
        let found = Some(("8080".to_owned(), "sb-1-0000".to_owned()));
        assert_eq!(of("8080-sb-1-0000.box.example"), found);
        assert_eq!(of("8080-SB-1-0000.Box.Example.:443"), found);
        for other in ["box.example", "8080-sb-1-0000.box.example.org", "8080-sb-1-0000box.example", "[::1]:80", ""] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn the_guest_sees_itself_and_whom_it_is_asked_for() {
        let request = Request::builder()
            .uri("/v1/sandboxes/sb-1-0000/ports/80/a")
            .header("host", "forkd.example:8889")
            .header("authorization", "Bearer the daemon's")
            .header("forkd-guest-authorization", "Basic the guest's")
            .header("connection", "keep-alive, X-Own")
            .header("x-own", "1")
            .header("te", "trailers")
            .header("cookie", "a=b")
            .body(Body::empty())
            .expect("request");
        let target = Target::of_path(request.uri()).expect("a port");
        let sent = outgoing(request, &target, 80);
        let header = |name: &str| sent.headers().get(name).map(|value| value.to_str().expect("text").to_owned());
        assert_eq!(sent.uri().to_string(), "/a");
        assert_eq!(header("host").as_deref(), Some("localhost:80"));
        assert_eq!(header("authorization").as_deref(), Some("Basic the guest's"));
        assert_eq!(header("x-forwarded-host").as_deref(), Some("forkd.example:8889"));
        assert_eq!(header("x-forwarded-prefix").as_deref(), Some("/v1/sandboxes/sb-1-0000/ports/80"));
        assert_eq!(header("cookie").as_deref(), Some("a=b"));
        for gone in ["forkd-guest-authorization", "x-own", "te", "connection"] {
            assert_eq!(header(gone), None, "{gone}");
        }
    }

    #[test]
    fn redirects_within_the_server_stay_below_the_prefix() {
        let moved = |location: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::LOCATION, location.parse().expect("header"));
            relocate(&mut headers, "/p", 80);
            headers[header::LOCATION].to_str().expect("text").to_owned()
        };
        assert_eq!(moved("/a?b"), "/p/a?b");
        assert_eq!(moved("http://localhost:80/a"), "/p/a");
        for other in ["a", "//elsewhere/a", "https://elsewhere/", "http://localhost:8080/a"] {
            assert_eq!(moved(other), other);
        }
    }
}
