//! `bench api`: what the daemon costs on top of the monitor and the agent, and how it bears many clients.
//!
//! Three parts: single calls next to what the monitor and the agent took for them, children of one call next to
//! children of as many calls, and many clients against many sandboxes for a while.

mod calls;
mod fan_out;
mod report;
mod soak;

use std::time::Duration;

use clap::Args;
use forkd_types::Tag;
use forkd_types::rest::SPAWN_LIMIT;

use super::Host;
use crate::commands::{Context, spawn_error};
use crate::interrupt::Interrupts;
use crate::output;
use report::Report;

/// Evaluated in every child.
const DEFAULT_CODE: &str = "numpy.zeros(5).tolist()";

/// Arguments of `forkd bench api`.
#[derive(Args, Debug)]
pub(crate) struct ApiBenchArgs {
    /// The snapshot to fork
    #[arg(long, default_value = "quickstart")]
    tag: Tag,
    /// How often each single call is made
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// Children of one call, and calls for one child each; 0 leaves this part out
    #[arg(short, long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=i64::from(SPAWN_LIMIT)))]
    n: u32,
    /// What each child evaluates first, in Python
    #[arg(long, value_name = "SOURCE", default_value = DEFAULT_CODE)]
    code: String,
    /// Clients that ask at the same time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    clients: u32,
    /// Sandboxes that they ask
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=i64::from(SPAWN_LIMIT)))]
    sandboxes: u32,
    /// How long they ask; 0 leaves this part out
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    seconds: u64,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl ApiBenchArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        let endpoint = interrupts.guard(context.endpoint()).await?;
        let (client, progress) = (&endpoint.client, &context.progress);
        let calls =
            calls::measure(client, &self.tag, self.runs, &mut interrupts, progress).await.map_err(spawn_error)?;
        let fan_out = match self.n {
            0 => None,
            n => Some(fan_out::measure(client, &self.tag, n, &self.code, &mut interrupts, progress).await?),
        };
        let soak = match self.seconds {
            0 => None,
            seconds => {
                let order = soak::Order {
                    clients: self.clients,
                    sandboxes: self.sandboxes,
                    time: Duration::from_secs(seconds),
                };
                Some(soak::measure(client, &self.tag, order, &mut interrupts, progress).await?)
            }
        };
        let place = endpoint.place.describe();
        let report = Report { host: Host::here(), place, command: self.command(), calls, fan_out, soak };
        if self.json {
            output::json(&report)?;
        } else {
            report.print()?;
        }
        Ok(0)
    }

    fn command(&self) -> String {
        let Self { tag, runs, n, clients, sandboxes, seconds, .. } = self;
        format!(
            "forkd bench api --tag {tag} --runs {runs} -n {n} --clients {clients} --sandboxes {sandboxes} --seconds {seconds}"
        )
    }
}
