//! `fork`: fork children, hold them in the foreground, kill them.
//!
//! A single child's agent can meanwhile be reached from this host, which is how clients use it that start this
//! program for a sandbox of their own and end it by SIGTERM.

mod bridge;
mod own_address;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use clap::Args;
use forkd_types::Tag;
use forkd_types::rest::SPAWN_LIMIT;

use self::bridge::{Bridge, Landing};
use super::spawn::ChildOptions;
use super::{Context, spawn_error};
use crate::children::Children;
use crate::environment;
use crate::interrupt::Interrupts;
use crate::output;

/// Arguments of `forkd fork`.
#[derive(Args, Debug)]
pub(crate) struct ForkArgs {
    /// The snapshot to fork
    #[arg(long)]
    tag: Tag,
    /// How many children
    #[arg(short, long, value_parser = clap::value_parser!(u32).range(0..=i64::from(SPAWN_LIMIT)))]
    n: u32,
    /// How long to hold the children
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    settle_secs: u64,
    #[command(flatten)]
    options: ChildOptions,
    /// Where the agent of a single child can be reached from this host while it is held
    #[arg(long, value_name = "ADDRESS:PORT", env = environment::FORKD_TARGET, value_parser = bridge::address,
          default_value_t = bridge::usual_address())]
    listen: SocketAddr,
    /// Accepted for existing scripts: there is no work directory
    #[arg(long, hide = true)]
    keep_workdir: bool,
}

impl ForkArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        if self.n == 0 {
            print(Duration::ZERO, Duration::ZERO, Duration::ZERO, 0, 0)?;
            return Ok(0);
        }
        let mut interrupts = Interrupts::catch()?;
        let landing = (self.n == 1).then(|| Landing::prepare(self.listen));
        let client = context.client().await?;
        let began = Instant::now();
        let request = self.options.request(&self.tag, self.n);
        let children =
            Children::spawn(&client, &request, &mut interrupts, &context.progress).await.map_err(spawn_error)?;
        let total = began.elapsed();
        let report = children.report();
        // All sockets exist once the last child's monitor was forked; all restores have happened once
        // the last child's vCPUs run. Both are read off the children's stages.
        let latest = |last_stage: &str| {
            let until = |stages: &forkd_types::StageTimings| {
                let upto = stages.0.iter().position(|stage| stage.name == last_stage)?;
                // A stage with a dot in its name is part of another.
                let own = stages.0[..=upto].iter().filter(|stage| !stage.name.contains('.'));
                Some(own.map(|stage| stage.us).sum::<u64>())
            };
            let us = report.timings.iter().filter_map(|timings| until(&timings.stages)).max();
            us.map_or(total, Duration::from_micros).min(total)
        };
        for failure in &report.failures {
            context.progress.warn(format_args!("{}: {}", failure.id, failure.error));
        }
        print(latest("fork"), latest("restore"), total, report.sandboxes.len(), self.n)?;
        let settle = Duration::from_secs(self.settle_secs);
        let only = match &report.sandboxes[..] {
            [only] if self.n == 1 => Some(only.id.clone()),
            _ => None,
        };
        let held = children.scope(&mut interrupts, async {
            let holding = tokio::time::sleep(settle);
            let bridging = async {
                let sandbox = only?;
                let opened = match landing? {
                    Ok(landing) => Bridge::open(landing, &client, &sandbox, &context.progress).await,
                    Err(error) => Err(error),
                };
                opened.inspect_err(|error| context.progress.warn(error)).ok()
            };
            tokio::pin!(holding);
            tokio::select! {
                () = &mut holding => {}
                _bridge = bridging => holding.await,
            }
            Ok(())
        });
        held.await.map(|()| 0)
    }
}

/// The four lines that existing scripts read.
fn print(sockets: Duration, restores: Duration, total: Duration, alive: usize, n: u32) -> anyhow::Result<()> {
    output::line(format_args!("sockets up:       {} ms", sockets.as_millis()))?;
    output::line(format_args!("restores fired:   {} ms", restores.as_millis()))?;
    output::line(format_args!("total wall-clock: {} ms", total.as_millis()))?;
    output::line(format_args!("{alive} / {n} children alive"))
}
