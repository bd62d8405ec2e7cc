//! `bench`: measurements, each next to the floor or the memory of the host it ran on.

mod api;
mod branch;
mod chain;
mod chart;
mod floor;
mod pack;
mod raw;
mod spawn;

use clap::{Args, Subcommand};

use crate::commands::Context;

/// Arguments of `forkd bench`.
#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Fork a real snapshot: time until the agent answered and until the first evaluation
    Spawn(spawn::SpawnBenchArgs),
    /// Fork the monitor with a tiny built-in guest, next to fork(2) and bare KVM; needs no Linux guest
    Raw(raw::RawBenchArgs),
    /// Branch a running machine: how long it stands still and when the copy runs, next to fork(2) and bare KVM
    Branch(branch::BranchBenchArgs),
    /// Spawn from snapshots over ever more others: time, and bytes on disk; needs no Linux guest
    Chain(chain::ChainBenchArgs),
    /// Pack a snapshot and unpack it, next to `zstd -T0` on the same bytes; needs no guest
    Pack(pack::PackBenchArgs),
    /// Call the daemon: what it costs on top of the monitor and the agent, and how it bears many clients
    Api(api::ApiBenchArgs),
}

impl BenchArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        match self.what {
            What::Spawn(args) => args.run(context).await,
            What::Raw(args) => args.run(context).await,
            What::Branch(args) => args.run(context).await,
            What::Chain(args) => args.run(context).await,
            What::Pack(args) => args.run(context).await,
            What::Api(args) => args.run(context).await,
        }
    }
}

/// The machine a figure was measured on, for reports.
#[derive(Clone, Debug, serde::Serialize)]
struct Host {
    cpu: String,
    cpus: usize,
    memory_mib: u64,
    kernel: String,
    forkd: &'static str,
}

impl Host {
    fn here() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let memory = rustix::system::sysinfo();
        Self {
            cpu: model.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: (memory.totalram as u64 * u64::from(memory.mem_unit)) >> 20,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            forkd: env!("CARGO_PKG_VERSION"),
        }
    }

    fn describe(&self) -> String {
        format!("{} × {}, {} MiB, Linux {}, forkd {}", self.cpus, self.cpu, self.memory_mib, self.kernel, self.forkd)
    }
}
