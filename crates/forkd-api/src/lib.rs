//! The REST API: routes, errors to status codes, streaming.
//!
//! The handlers translate between HTTP and [`forkd_node::Node`] and hold no state of their own.
//!
//! | module | owns |
//! |---|---|
//! | [`mod@router`] | which route is answered by which handler, and what wraps them all |
//! | `error` | every error's status code and JSON body |
//! | `extract` | bodies, queries and path segments, with errors in the same JSON form |
//! | [`auth`] | the bearer token |
//! | [`audit`] | one line per request |
//! | `metrics` | `GET /metrics` |
//! | [`server`] | listening on TCP and a unix socket until told to stop |

pub mod audit;
pub mod auth;
mod error;
mod extract;
mod json_lines;
mod metrics;
mod pieces;
pub mod router;
mod routes;
pub mod server;

pub use router::{Api, router};
