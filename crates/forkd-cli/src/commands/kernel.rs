//! `kernel install`: fetch and unpack a guest kernel ahead of its first use.

use clap::{Args, Subcommand};
use forkd_image::KernelChoice;

use super::Context;
use crate::interrupt::Interrupts;
use crate::{ingredients, output};

/// Arguments of `forkd kernel`.
#[derive(Args, Debug)]
pub(crate) struct KernelArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Fetch and unpack a guest kernel; prints where it is
    Install {
        /// debian-6.12-cloud, debian-6.1-generic, apt:PACKAGE, or the path of a .deb, bzImage or vmlinux
        #[arg(default_value = ingredients::DEFAULT_KERNEL)]
        kernel: KernelChoice,
        /// Look for a newer package although one is installed
        #[arg(long)]
        upgrade: bool,
    },
}

impl KernelArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let Verb::Install { kernel, upgrade } = self.verb;
        let mut interrupts = Interrupts::catch()?;
        let work = ingredients::kernel(kernel, upgrade, &context.data, &context.progress);
        let kernel = interrupts.guard(work).await?;
        output::line(kernel.vmlinux.display())?;
        Ok(0)
    }
}
