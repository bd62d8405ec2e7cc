//! The REST API: routes, errors to status codes, streaming.
