//! Who may do what: three scopes, and one table that says which of them each route needs.

use std::fmt;
use std::str::FromStr;

use axum::http::Method;
use serde::{Deserialize, Serialize};

/// What a token may do. Each includes those before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Look at everything.
    Read,
    /// Make, use and end sandboxes, and keep snapshots of them.
    Spawn,
    /// Put into the store and take out of it.
    Admin,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Spawn => "spawn",
            Self::Admin => "admin",
        })
    }
}

/// A text that names no scope.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no scope; it is read, spawn or admin")]
pub struct ScopeError(String);

impl FromStr for Scope {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, ScopeError> {
        [Self::Read, Self::Spawn, Self::Admin]
            .into_iter()
            .find(|scope| scope.to_string() == text)
            .ok_or_else(|| ScopeError(text.to_owned()))
    }
}

/// Paths that need no token at all: probes have none, and what the API looks like is no secret.
pub(crate) const OPEN: [&str; 6] = ["/healthz", "/healthz/", "/readyz", "/readyz/", "/openapi.json", "/docs"];

/// Every route that needs a token, as the router spells it, with the scope it needs. `*` stands for every method.
/// A route that is not in it needs [`Scope::Admin`].
const TABLE: &[(&str, &str, Scope)] = &[
    ("GET", "/version", Scope::Read),
    ("GET", "/metrics", Scope::Read),
    ("GET", "/v1/sandboxes", Scope::Read),
    ("GET", "/v1/sandboxes/{id}", Scope::Read),
    ("GET", "/v1/sandboxes/{id}/memory", Scope::Read),
    ("GET", "/v1/sandboxes/{id}/console", Scope::Read),
    ("GET", "/v1/sandboxes/{id}/checkpoints", Scope::Read),
    ("POST", "/v1/sandboxes/{id}/ping", Scope::Read),
    ("GET", "/v1/workspaces", Scope::Read),
    ("GET", "/v1/workspaces/{name}", Scope::Read),
    ("GET", "/v1/events", Scope::Read),
    ("GET", "/v1/tree", Scope::Read),
    ("GET", "/v1/usage", Scope::Read),
    ("GET", "/v1/snapshots", Scope::Read),
    ("GET", "/v1/snapshots/{tag}/info", Scope::Read),
    ("GET", "/v1/snapshots/{tag}/pack", Scope::Read),
    ("GET", "/v1/blobs/{digest}", Scope::Read),
    ("GET", "/v1/sandboxes/{id}/files", Scope::Read),
    ("GET", "/v1/sandboxes/{id}/files/archive", Scope::Read),
    ("GET", "/v1/sandboxes/{id}/files/list", Scope::Read),
    ("GET", "/v1/sandboxes/{id}/files/stat", Scope::Read),
    ("GET", "/v1/sandboxes/{id}/files/watch", Scope::Read),
    ("POST", "/v1/sandboxes", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/timeout", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/suspend", Scope::Spawn),
    ("POST", "/v1/workspaces", Scope::Spawn),
    ("DELETE", "/v1/workspaces/{name}", Scope::Spawn),
    ("POST", "/v1/workspaces/{name}/suspend", Scope::Spawn),
    ("POST", "/v1/workspaces/{name}/resume", Scope::Spawn),
    // It reads whatever file of the host it is told to.
    ("POST", "/v1/snapshots", Scope::Admin),
    ("DELETE", "/v1/sandboxes/{id}", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/exec", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/eval", Scope::Spawn),
    ("GET", "/v1/sandboxes/{id}/exec/stream", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/exec/stream", Scope::Spawn),
    ("PUT", "/v1/sandboxes/{id}/files", Scope::Spawn),
    ("DELETE", "/v1/sandboxes/{id}/files", Scope::Spawn),
    ("PUT", "/v1/sandboxes/{id}/files/archive", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/files/mkdir", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/files/move", Scope::Spawn),
    ("*", "/v1/sandboxes/{id}/ports/{port}", Scope::Spawn),
    ("*", "/v1/sandboxes/{id}/ports/{port}/", Scope::Spawn),
    ("*", "/v1/sandboxes/{id}/ports/{port}/{*path}", Scope::Spawn),
    // Whatever the agent understands can be asked for there.
    ("GET", "/v1/sandboxes/{id}/agent", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/fork", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/branch", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/checkpoints", Scope::Spawn),
    ("DELETE", "/v1/sandboxes/{id}/checkpoints/{name}", Scope::Spawn),
    ("POST", "/v1/sandboxes/{id}/rewind", Scope::Spawn),
    ("POST", "/v1/snapshots/{tag}/compact", Scope::Spawn),
    ("POST", "/v1/snapshots/{tag}/verify", Scope::Spawn),
    ("DELETE", "/v1/snapshots/{tag}", Scope::Admin),
    ("POST", "/v1/bakes", Scope::Admin),
    ("POST", "/v1/packs", Scope::Admin),
    ("PUT", "/v1/blobs/{digest}", Scope::Admin),
];

/// The scope that a request needs, by the route that takes it.
pub(crate) fn needed(method: &Method, route: Option<&str>) -> Scope {
    // Whoever is known may be told that there is nothing.
    let Some(route) = route else { return Scope::Read };
    listed(method.as_str(), route).unwrap_or(Scope::Admin)
}

fn listed(method: &str, route: &str) -> Option<Scope> {
    let method = if method == "HEAD" { "GET" } else { method };
    let row = TABLE.iter().find(|(known, path, _)| *path == route && (*known == method || *known == "*"))?;
    Some(row.2)
}

/// Every `.route("…", …)` of the router with its methods, from the router's own text.
#[cfg(test)]
pub(crate) fn routes() -> Vec<(String, String)> {
    let text = include_str!("../router.rs");
    let mut all = Vec::new();
    for piece in text.split(".route(").skip(1) {
        let Some((path, rest)) = piece.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"')) else {
            continue;
        };
        let end = rest.find(".route(").unwrap_or(rest.len());
        let handlers = rest[..end].split("\n        .").next().unwrap_or_default();
        for method in ["get", "post", "put", "delete", "patch", "head", "any"] {
            let calls = [format!(" {method}("), format!(").{method}("), format!("::{method}(")];
            if calls.iter().any(|call| handlers.contains(call)) {
                all.push((method.to_uppercase(), path.to_owned()));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_says_which_scope_it_needs() {
        let routes = routes();
        assert!(routes.len() > 25, "the router's text is understood: {routes:?}");
        let unlisted: Vec<_> = routes
            .iter()
            .filter(|(method, path)| {
                let method = if method == "ANY" { "*" } else { method };
                !OPEN.contains(&path.as_str()) && listed(method, path).is_none()
            })
            .collect();
        assert!(unlisted.is_empty(), "give these a scope in TABLE: {unlisted:?}");
    }

    #[test]
    fn the_table_has_no_route_twice_and_none_that_is_gone() {
        let routes = routes();
        for (at, (method, path, _)) in TABLE.iter().enumerate() {
            assert!(TABLE[..at].iter().all(|row| (row.0, row.1) != (*method, *path)), "{method} {path} is there twice");
            let there = routes.iter().any(|(known, route)| {
                route == path
                    && (known == method || (known == "ANY" && *method == "*") || (known == "HEAD" && *method == "GET"))
            });
            assert!(there, "no route is {method} {path}");
        }
    }

    #[test]
    fn what_is_not_listed_is_for_admins_and_what_is_not_there_for_everyone() {
        assert_eq!(needed(&Method::GET, Some("/v1/sandboxes")), Scope::Read);
        assert_eq!(needed(&Method::HEAD, Some("/v1/sandboxes")), Scope::Read);
        assert_eq!(needed(&Method::POST, Some("/v1/sandboxes")), Scope::Spawn);
        assert_eq!(needed(&Method::DELETE, Some("/v1/snapshots/{tag}")), Scope::Admin);
        assert_eq!(needed(&Method::GET, Some("/v1/new")), Scope::Admin);
        assert_eq!(needed(&Method::POST, None), Scope::Read);
    }

    #[test]
    fn scopes_include_those_before_them_and_read_as_written() {
        assert!(Scope::Read < Scope::Spawn && Scope::Spawn < Scope::Admin);
        for scope in [Scope::Read, Scope::Spawn, Scope::Admin] {
            assert_eq!(scope.to_string().parse(), Ok(scope));
        }
        assert!("Admin".parse::<Scope>().is_err());
    }
}
