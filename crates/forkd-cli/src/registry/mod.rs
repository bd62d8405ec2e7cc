//! Packs from and to HTTP servers, and the index that names them.
//!
//! | module | owns |
//! |---|---|
//! | `location` | what a person may write to name a pack, and URLs without their secrets |
//! | `index` | `registry.json` |
//! | `transport` | the HTTP client, and what its failures are called |
//! | `download` | fetching a file that may take several attempts |

mod download;
mod index;
mod location;
mod transport;

pub(crate) use download::Download;
pub(crate) use index::Index;
pub(crate) use location::{Hub, Source, Target, shown};
pub(crate) use transport::Transport;
