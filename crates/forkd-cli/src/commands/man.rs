//! `man`: the manual as pages for man(1).

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use crate::output;

/// Arguments of `forkd man`.
#[derive(Args, Debug)]
pub(crate) struct ManArgs {
    /// Where to put the pages, as /usr/local/share/man/man1; made when missing
    directory: PathBuf,
}

impl ManArgs {
    /// Writes a page for `command` and for each of its verbs.
    pub(crate) fn run(self, command: clap::Command) -> anyhow::Result<u8> {
        let directory = &self.directory;
        let failed = || format!("could not write man pages to {}", directory.display());
        std::fs::create_dir_all(directory).with_context(failed)?;
        clap_mangen::generate_to(command, directory).with_context(failed)?;
        output::line(directory.display())?;
        Ok(0)
    }
}
