//! What networks of sandboxes need of this host.

use forkd_net::inspection;

use super::Check;

/// Looks at this host if sandboxes run on it, and not in a machine that brings its own.
pub(super) fn checks(on_this_host: bool) -> Vec<Check> {
    inspection::inspect()
        .into_iter()
        .map(|finding| match finding.remedy {
            None => Check::pass(finding.subject, finding.detail),
            Some(_) if !on_this_host => Check::skip(finding.subject, format!("{}; not needed here", finding.detail)),
            Some(remedy) => Check::warn(finding.subject, finding.detail, remedy),
        })
        .collect()
}
