//! The REST API: routes, errors to status codes, streaming.
//!
//! The handlers translate between HTTP and [`forkd_node::Node`] and hold no state of their own.
//!
//! | module | owns |
//! |---|---|
//! | [`mod@router`] | which route is answered by which handler, and what wraps them all |
//! | `error` | every error's status code and JSON body |
//! | `extract` | bodies, queries and path segments, with errors in the same JSON form |
//! | `guests` | connections to the agents in guests |
//! | [`auth`] | who asks, and what they may do |
//! | `idempotency` | requests that may be sent twice and are done once |
//! | [`limits`] | how much each client may ask for |
//! | [`audit`] | one line per request |
//! | `metrics` | `GET /metrics` |
//! | `readiness` | `GET /readyz` |
//! | [`reload`] | files that are read again when they change |
//! | [`server`] | listening on TCP, TLS and a unix socket until told to stop |

pub mod audit;
pub mod auth;
mod byte_range;
mod error;
mod extract;
mod guests;
mod held;
mod idempotency;
mod json_lines;
pub mod limits;
mod metrics;
mod openapi;
mod pieces;
mod readiness;
pub mod reload;
pub mod router;
mod routes;
pub mod server;
pub mod utc;

pub use router::{Api, router};
