//! Every environment variable that `forkd` reads, in one place.

/// Address of the daemon: `http://HOST:PORT` or `unix:///PATH`.
pub(crate) const FORKD_URL: &str = "FORKD_URL";

/// Bearer token for the daemon; empty counts as unset.
pub(crate) const FORKD_TOKEN: &str = "FORKD_TOKEN";

/// Token that HTTP clients of `mcp --http` must present; empty counts as unset.
pub(crate) const FORKD_MCP_TOKEN: &str = "FORKD_MCP_TOKEN";

/// Where `pull` finds packages by name: the URL or path of a `registry.json`.
pub(crate) const FORKD_HUB_URL: &str = "FORKD_HUB_URL";

/// Guest kernel for `snapshot` and `from-image`.
pub(crate) const FORKD_KERNEL: &str = "FORKD_KERNEL";

/// Root disk for `snapshot`.
pub(crate) const FORKD_ROOTFS: &str = "FORKD_ROOTFS";

/// Where clients look for a single child's agent on this host: `HOST:PORT`.
pub(crate) const FORKD_TARGET: &str = "FORKD_TARGET";

/// Parent of the data directory, as the XDG base directory specification has it.
pub(crate) const XDG_DATA_HOME: &str = "XDG_DATA_HOME";

/// The user's home, used when `XDG_DATA_HOME` is not set.
pub(crate) const HOME: &str = "HOME";

/// Set to anything, it turns colours off (<https://no-color.org>).
pub(crate) const NO_COLOR: &str = "NO_COLOR";

/// The kind of terminal; `dumb` gets plain lines.
pub(crate) const TERM: &str = "TERM";

/// Directories in which programs are found.
pub(crate) const PATH: &str = "PATH";
