//! `bench pack`: packing and unpacking next to `zstd -T0` on the same bytes, in interleaved pairs.
//!
//! The floor is `zstd` on the archive that a pack holds: the same bytes at the same level with as many threads, and
//! the way back. Ours finds the data of sparse files and hashes it before compressing, and on the way back checks
//! every digest and writes the files; both flush what they wrote.

mod guest;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use clap::Args;
use forkd_store::Store;
use forkd_store::pack::{DEFAULT_LEVEL, LEVELS, PackOptions, UnpackOptions};
use forkd_types::{ByteSize, Tag};
use serde::Serialize;

use super::Host;
use crate::client::PackQuery;
use crate::commands::Context;
use crate::failure::advised;
use crate::progress::Step;
use crate::statistics::{Summary, median, summarise};
use crate::{output, pack_file, programs, units};

/// Arguments of `forkd bench pack`.
#[derive(Args, Debug)]
pub(crate) struct PackBenchArgs {
    /// Pack this snapshot instead of a made-up one
    #[arg(long)]
    tag: Option<Tag>,
    /// Guest memory of the made-up snapshot
    #[arg(long, value_name = "SIZE", default_value = "512M", conflicts_with = "tag")]
    memory: ByteSize,
    /// Compression level; may be given several times
    #[arg(long, default_values_t = [DEFAULT_LEVEL], value_parser = clap::value_parser!(i32).range(*LEVELS.start() as i64..=*LEVELS.end() as i64))]
    level: Vec<i32>,
    /// Pairs of runs
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// The figures for one level.
#[derive(Debug, Serialize)]
struct Row {
    level: i32,
    runs: u32,
    /// Length of the snapshot's files, holes counted.
    logical_bytes: u64,
    /// What there is to compress.
    archive_bytes: u64,
    /// The pack.
    pack_bytes: u64,
    /// The same compressed by `zstd`.
    zstd_bytes: u64,
    /// Median of packing.
    pack_ms: f64,
    /// Median of the part of it that finds and hashes the data.
    read_ms: f64,
    /// Median of compressing by `zstd`.
    zstd_ms: f64,
    /// `pack_ms` divided by `zstd_ms`.
    pack_ratio: f64,
    /// Median of unpacking.
    unpack_ms: f64,
    /// Median of decompressing by `zstd`.
    unzstd_ms: f64,
    /// `unpack_ms` divided by `unzstd_ms`.
    unpack_ratio: f64,
    pack: Summary,
    zstd: Summary,
    unpack: Summary,
    unzstd: Summary,
}

/// The whole report.
#[derive(Debug, Serialize)]
struct Report {
    host: Host,
    command: String,
    /// What `zstd --version` says.
    zstd: String,
    rows: Vec<Row>,
}

/// One run of ours and of the floor, milliseconds.
#[derive(Default)]
struct Times {
    pack: Vec<f64>,
    read: Vec<f64>,
    zstd: Vec<f64>,
    unpack: Vec<f64>,
    unzstd: Vec<f64>,
}

impl PackBenchArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let zstd = programs::in_path("zstd")
            .ok_or_else(|| advised(anyhow::anyhow!("there is no zstd to compare with"), "sudo apt-get install zstd"))?;
        let scratch = tempfile::tempdir_in(context.data.bench()?)?;
        let (tag, given) = match &self.tag {
            Some(tag) => {
                let path = scratch.path().join("given");
                let file = File::create(&path)?;
                let client = context.client().await?;
                pack_file::fetch(&client, tag, &PackQuery::default(), None, file, &context.progress).await?;
                (tag.clone(), Some(path))
            }
            None => ("bench".parse::<Tag>().expect("legal"), None),
        };
        let step = context.progress.step(format!("packing, {}", units::count(self.runs as usize, "pair")));
        step.set_items(u64::from(self.runs) * self.level.len() as u64);
        let (command, levels, runs, json) = (self.command(), self.level, self.runs, self.json);
        let bench = Bench { root: scratch.path().to_owned(), zstd, tag, memory: self.memory };
        let measuring = tokio::task::spawn_blocking(move || {
            let report = bench.run(given.as_deref(), &levels, runs, command, &step)?;
            step.vanish();
            anyhow::Ok(report)
        });
        let report = measuring.await??;
        if json {
            output::json(&report)?
        } else {
            report.print()?
        }
        Ok(0)
    }

    fn command(&self) -> String {
        let what = match &self.tag {
            Some(tag) => format!("--tag {tag}"),
            None => format!("--memory {}M", self.memory.as_mib()),
        };
        let levels: String = self.level.iter().map(|level| format!(" --level {level}")).collect();
        format!("forkd bench pack {what}{levels} --runs {}", self.runs)
    }
}

struct Bench {
    root: PathBuf,
    zstd: PathBuf,
    tag: Tag,
    memory: ByteSize,
}

impl Bench {
    fn run(
        &self,
        given: Option<&Path>,
        levels: &[i32],
        runs: u32,
        command: String,
        step: &Step,
    ) -> anyhow::Result<Report> {
        let source = Store::open(&self.root.join("source"))?;
        match given {
            Some(pack) => drop(source.unpack(File::open(pack)?, &UnpackOptions::default(), digest, |_| ())?),
            None => guest::write(&source, &self.tag, self.memory.bytes())?,
        }
        let archive = self.root.join("archive.tar");
        let pack = self.pack(&source, DEFAULT_LEVEL)?;
        zstd::stream::copy_decode(File::open(&pack.path)?, File::create(&archive)?)?;
        let mut rows = Vec::new();
        for &level in levels {
            let mut times = Times::default();
            let mut bytes = (0, 0);
            for pair in 0..runs {
                bytes = self.pair(&source, &archive, level, pair, &mut times)?;
                step.set_position(rows.len() as u64 * u64::from(runs) + u64::from(pair) + 1);
            }
            let logical_bytes = self.logical_bytes(&source)?;
            rows.push(row(level, runs, logical_bytes, archive.metadata()?.len(), bytes, times));
        }
        let zstd = output_of(Command::new(&self.zstd).arg("--version"))?.trim().to_owned();
        Ok(Report { host: Host::here(), command, zstd, rows })
    }

    /// One of ours and one of the floor; they take turns in going first. Returns the sizes of both packs.
    fn pair(
        &self,
        source: &Store,
        archive: &Path,
        level: i32,
        pair: u32,
        times: &mut Times,
    ) -> anyhow::Result<(u64, u64)> {
        let (compressed, plain) = (self.root.join("archive.zst"), self.root.join("archive.out"));
        let ours = |times: &mut Times| -> anyhow::Result<u64> {
            let packed = self.pack(source, level)?;
            times.pack.push(packed.total_ms);
            times.read.push(packed.read_ms);
            times.unpack.push(self.unpack(&packed.path)?);
            Ok(packed.path.metadata()?.len())
        };
        let floor = |times: &mut Times| -> anyhow::Result<u64> {
            let options = [format!("-{level}"), "-T0".to_owned()];
            times.zstd.push(self.run_zstd(&options, archive, &compressed)?);
            times.unzstd.push(self.run_zstd(&["-d".to_owned()], &compressed, &plain)?);
            let bytes = compressed.metadata()?.len();
            fs::remove_file(&plain)?;
            Ok(bytes)
        };
        Ok(if pair.is_multiple_of(2) {
            let ours = ours(times)?;
            (ours, floor(times)?)
        } else {
            let floor = floor(times)?;
            (ours(times)?, floor)
        })
    }

    fn pack(&self, source: &Store, level: i32) -> anyhow::Result<Packed> {
        let path = self.root.join("pack");
        let _ = fs::remove_file(&path);
        let began = Instant::now();
        let pack = source.pack(&self.tag, &PackOptions { level, ..PackOptions::default() }, |_| ())?;
        let read_ms = milliseconds(began);
        let file = File::create(&path)?;
        pack.write(io::BufWriter::with_capacity(1 << 20, &file), |_| ())?;
        file.sync_all()?;
        Ok(Packed { path, total_ms: milliseconds(began), read_ms })
    }

    fn unpack(&self, pack: &Path) -> anyhow::Result<f64> {
        let root = self.root.join("target");
        let target = Store::open(&root)?;
        let began = Instant::now();
        target.unpack(File::open(pack)?, &UnpackOptions::default(), digest, |_| ())?;
        let took = milliseconds(began);
        drop(target);
        fs::remove_dir_all(&root)?;
        Ok(took)
    }

    fn run_zstd(&self, options: &[String], from: &Path, to: &Path) -> anyhow::Result<f64> {
        let _ = fs::remove_file(to);
        let began = Instant::now();
        output_of(Command::new(&self.zstd).arg("-q").args(options).arg(from).arg("-o").arg(to))?;
        File::open(to)?.sync_all()?;
        Ok(milliseconds(began))
    }

    fn logical_bytes(&self, source: &Store) -> anyhow::Result<u64> {
        let mut total = 0;
        for snapshot in source.chain(&self.tag)? {
            for file in snapshot.meta.files() {
                total += snapshot.dir.join(file).metadata()?.len();
            }
        }
        Ok(total + source.list_blobs()?.iter().map(|blob| blob.size).sum::<u64>())
    }
}

struct Packed {
    path: PathBuf,
    total_ms: f64,
    read_ms: f64,
}

fn digest(path: &Path) -> Result<forkd_types::Digest, forkd_memory::LayerError> {
    forkd_memory::layer::verify(path, |_| ())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().context("could not run zstd")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "zstd failed ({}): {}", output.status, said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn row(
    level: i32,
    runs: u32,
    logical_bytes: u64,
    archive_bytes: u64,
    (pack_bytes, zstd_bytes): (u64, u64),
    times: Times,
) -> Row {
    let Times { pack, read, zstd, unpack, unzstd } = times;
    let (pack, zstd, unpack, unzstd) = (summarise(pack), summarise(zstd), summarise(unpack), summarise(unzstd));
    Row {
        level,
        runs,
        logical_bytes,
        archive_bytes,
        pack_bytes,
        zstd_bytes,
        pack_ms: pack.p50,
        read_ms: median(read),
        zstd_ms: zstd.p50,
        pack_ratio: pack.p50 / zstd.p50,
        unpack_ms: unpack.p50,
        unzstd_ms: unzstd.p50,
        unpack_ratio: unpack.p50 / unzstd.p50,
        pack,
        zstd,
        unpack,
        unzstd,
    }
}

impl Report {
    fn print(&self) -> anyhow::Result<()> {
        let mut table = output::table(&[
            "LEVEL",
            "ARCHIVE",
            "PACK",
            "ZSTD",
            "PACK ms",
            "of it READING",
            "ZSTD -T0 ms",
            "RATIO",
            "UNPACK ms",
            "ZSTD -d ms",
            "RATIO",
        ]);
        for row in &self.rows {
            table.add_row([
                row.level.to_string(),
                ByteSize(row.archive_bytes).to_string(),
                ByteSize(row.pack_bytes).to_string(),
                ByteSize(row.zstd_bytes).to_string(),
                format!("{:.0}", row.pack_ms),
                format!("{:.0}", row.read_ms),
                format!("{:.0}", row.zstd_ms),
                format!("{:.2}", row.pack_ratio),
                format!("{:.0}", row.unpack_ms),
                format!("{:.0}", row.unzstd_ms),
                format!("{:.2}", row.unpack_ratio),
            ]);
        }
        output::print_table(&mut table)?;
        if let Some(row) = self.rows.first() {
            output::line(format_args!("files of {}, holes counted", ByteSize(row.logical_bytes)))?;
        }
        output::line(format_args!("{}\n{}\n{}", self.host.describe(), self.zstd, self.command))
    }
}
