//! Who asks, and what they may do.
//!
//! ```text
//! request ──► open path? ──► who is it? ──► may they? ──► not too much? ──► handler
//!                │ /healthz     │ 401, 403      │ 403          │ 429
//!                │ /readyz      ▼               ▼              ▼
//!                └──► handler
//! ```
//!
//! Over TCP, who asks is told by a bearer token; without tokens, which only loopback may be, everyone is an
//! administrator of this host. Over the unix socket it is told by the kernel.
//!
//! | module | owns |
//! |---|---|
//! | `bearer` | the token file: one token without a name |
//! | `tokens` | the tokens file: named tokens, hashed, and how they are changed |
//! | `keyring` | the tokens in force |
//! | `scope` | which scope each route needs |
//! | `peer` | who may use the unix socket |

mod bearer;
mod keyring;
mod peer;
pub(crate) mod scope;
mod tokens;

use std::fmt;
use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

pub use bearer::{Token, TokenError};
pub use keyring::Keyring;
pub use peer::{GroupError, Peers, group_id};
pub use scope::{Scope, ScopeError};
pub use tokens::{NamedToken, PreviousSecret, TokenHash, TokensEditor, TokensError, TokensFile};

use crate::error::ApiError;
use crate::held::hold;
use crate::limits::{Limits, RequestLimits};
use crate::server::Remote;

/// Who asked. In the extensions of requests that were let in and of their answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Principal {
    /// The name of the token, where it has one.
    pub(crate) token: Option<String>,
    /// What they may do.
    pub(crate) scope: Scope,
}

impl Principal {
    /// Someone whom no token tells from others.
    const UNNAMED_ADMIN: Self = Self { token: None, scope: Scope::Admin };
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.token {
            Some(name) => write!(f, "token {name}"),
            None => f.write_str("this client"),
        }
    }
}

/// In the extensions of requests that a server in a guest is to answer, whatever their path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ToGuest;

#[derive(Debug)]
enum Door {
    /// Whoever can connect.
    Open,
    /// Whoever has a token.
    Tokens(Keyring),
    /// Whoever the kernel says is one of these.
    Socket(Peers),
}

/// What a listener asks of each request. Clones share it.
#[derive(Clone, Debug)]
pub struct Guard(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    door: Door,
    limits: Limits,
}

impl Guard {
    /// Lets everyone in who can connect, as one and the same client.
    pub fn open(limits: RequestLimits) -> Self {
        Self::new(Door::Open, limits)
    }

    /// Lets in who presents one of the tokens; each of them has limits of its own.
    pub fn tokens(keyring: Keyring, limits: RequestLimits) -> Self {
        Self::new(Door::Tokens(keyring), limits)
    }

    /// Lets in who the kernel says is one of `peers`, without limits.
    pub fn socket(peers: Peers) -> Self {
        Self::new(Door::Socket(peers), RequestLimits::default())
    }

    fn new(door: Door, limits: RequestLimits) -> Self {
        Self(Arc::new(Inner { door, limits: Limits::new(limits) }))
    }

    fn identify(&self, request: &Request) -> Result<Principal, ApiError> {
        match &self.0.door {
            Door::Open => Ok(Principal::UNNAMED_ADMIN),
            Door::Tokens(keyring) => {
                let presented = presented(request.headers()).ok_or_else(ApiError::missing_token)?;
                let holder = keyring.holder(presented).ok_or_else(ApiError::invalid_token)?;
                Ok(Principal { token: holder.name, scope: holder.scope })
            }
            Door::Socket(peers) => match request.extensions().get::<Remote>() {
                Some(Remote::Unix(peer)) if peers.admits(peer) => Ok(Principal::UNNAMED_ADMIN),
                other => Err(ApiError::forbidden_peer(other)),
            },
        }
    }
}

/// Lets a request through, or answers it.
pub(crate) async fn require(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    let to_guest = request.extensions().get::<ToGuest>().is_some();
    if !to_guest && scope::OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let principal = match guard.identify(&request) {
        Ok(principal) => principal,
        Err(refusal) => return refuse(refusal),
    };
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let needed = if to_guest { Scope::Spawn } else { scope::needed(request.method(), route) };
    let permit = if principal.scope < needed {
        Err(ApiError::forbidden_scope(needed, &principal))
    } else {
        guard.0.limits.admit(&principal).map_err(|refusal| ApiError::too_many(&refusal))
    };
    let mut response = match permit {
        Ok(permit) => {
            request.extensions_mut().insert(principal.clone());
            hold(next.run(request).await, permit)
        }
        Err(refusal) => refuse(refusal),
    };
    response.extensions_mut().insert(principal);
    response
}

/// The answer to a request that is not let in.
fn refuse(refusal: ApiError) -> Response {
    metrics::counter!("forkd_requests_refused_total", "reason" => refusal.code()).increment(1);
    refusal.into_response()
}

fn presented(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    Some(value.strip_prefix("Bearer ")?.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_is_case_sensitive_and_the_token_trimmed() {
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().expect("header"));
            presented(&headers).map(str::to_owned)
        };
        assert_eq!(with("Bearer  abc "), Some("abc".to_owned()));
        assert_eq!(with("bearer abc"), None);
        assert_eq!(with("Basic abc"), None);
    }
}
