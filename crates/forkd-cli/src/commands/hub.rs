//! `pull`, `push`: packs on HTTP servers.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use forkd_types::{ByteSize, Tag};
use http::header::CONTENT_LENGTH;
use serde::Serialize;
use tokio::io::AsyncReadExt;
use url::Url;

use super::Context;
use super::packs::{PackRecipe, UnpackRecipe, beside, explain, report};
use crate::client::ClientError;
use crate::failure::{UsageError, advised};
use crate::interrupt::Interrupts;
use crate::pack_file::{self, PackFacts};
use crate::registry::{Download, Hub, Index, Source, Target, Transport, shown};
use crate::{environment, output};

/// How often a bar is moved.
const REDRAW: Duration = Duration::from_millis(100);

/// Bytes of a file that are read at a time.
const CHUNK: usize = 256 << 10;

/// Arguments of `forkd pull`.
#[derive(Args, Debug)]
pub(crate) struct PullArgs {
    /// The pack: a URL, or OWNER/NAME or OWNER/NAME@VERSION of an index
    #[arg(value_name = "URL|PACKAGE")]
    target: String,
    /// The index: the URL or path of a registry.json
    #[arg(long, value_name = "URL|FILE", env = environment::FORKD_HUB_URL, hide_env_values = true)]
    hub: Option<String>,
    #[command(flatten)]
    recipe: UnpackRecipe,
}

impl PullArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        interrupts.guard(self.pull(context)).await
    }

    async fn pull(self, context: &Context) -> anyhow::Result<u8> {
        let target: Target = self.target.parse().map_err(|error| UsageError(format!("{error}")))?;
        let query = self.recipe.resolve()?;
        let transport = Transport::new()?;
        let source = self.source(target, &transport, context).await?;
        // Before anything is fetched: a daemon that cannot be had would be a pity afterwards.
        let client = context.client().await?;
        let mut download = Download::open(&source, &context.data.packs())?;
        download.finish(&transport, &context.progress).await?;
        let name = shown(&source.url);
        let (file, bytes) = (download.open_file()?, Some(download.bytes()));
        match self.recipe.send(&client, &query, file, bytes, &name, &context.progress).await {
            Ok(answer) => {
                download.discard();
                report(&answer, self.recipe.json, &context.progress)?;
                Ok(0)
            }
            Err(error) => {
                // One that is good and only in the way, or lacks room, need not be fetched again.
                if matches!(&error, ClientError::Refused { status, .. } if *status == http::StatusCode::BAD_REQUEST) {
                    download.discard();
                }
                Err(explain(error, &format!("forkd pull {}", self.target_shown())))
            }
        }
    }

    async fn source(&self, target: Target, transport: &Transport, context: &Context) -> anyhow::Result<Source> {
        let (name, version) = match target {
            Target::Url(url) => return Ok(Source { url, sha256: None, size_bytes: None }),
            Target::Package { name, version } => (name, version),
        };
        let Some(hub) = self.hub.as_ref().filter(|hub| !hub.is_empty()) else {
            let error = UsageError(format!("{name} is a package of an index, and no index was named"));
            return Err(advised(error, format!("forkd pull {name} --hub URL|FILE   (or set FORKD_HUB_URL)")));
        };
        let hub: Hub = hub.parse().map_err(|error| UsageError(format!("--hub: {error}")))?;
        let source = Index::read(&hub, transport).await?.find(&name, &version, &hub)?;
        if source.sha256.is_none() {
            context.progress.warn(format_args!("the index has no SHA-256 of {name}@{version}; what comes is taken"));
        }
        Ok(source)
    }

    /// The target as it may be printed.
    fn target_shown(&self) -> String {
        self.target.parse::<Url>().map_or_else(|_| self.target.clone(), |url| shown(&url))
    }
}

/// Arguments of `forkd push`.
#[derive(Args, Debug)]
pub(crate) struct PushArgs {
    /// Where to put the pack, with one HTTP PUT
    url: String,
    /// The snapshot
    #[arg(long)]
    tag: Tag,
    #[command(flatten)]
    recipe: PackRecipe,
    /// Print what was pushed as JSON, with what an index says of it
    #[arg(long)]
    json: bool,
}

/// What `push --json` prints.
#[derive(Serialize)]
struct Pushed<'a> {
    url: String,
    #[serde(flatten)]
    facts: &'a PackFacts,
}

impl PushArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let mut interrupts = Interrupts::catch()?;
        interrupts.guard(self.push(context)).await
    }

    async fn push(self, context: &Context) -> anyhow::Result<u8> {
        let url = match self.url.parse() {
            Ok(Target::Url(url)) => url,
            Ok(Target::Package { .. }) => {
                return Err(UsageError(format!("{} is no URL to put a pack at", self.url)).into());
            }
            Err(error) => return Err(UsageError(error.to_string()).into()),
        };
        let (query, key) = self.recipe.resolve()?;
        let transport = Transport::new()?;
        let client = context.client().await?;
        // A PUT says beforehand how long it is.
        let scratch = context.data.packs();
        std::fs::create_dir_all(&scratch).with_context(|| format!("could not create {}", scratch.display()))?;
        let (file, path) = beside(&scratch.join("push"))?;
        let facts = pack_file::fetch(&client, &self.tag, &query, key, file, &context.progress).await?;
        put(&transport, &url, path.to_path_buf(), facts.bytes, context).await?;
        if self.json {
            output::json(&Pushed { url: shown(&url), facts: &facts })?;
        } else {
            output::line(shown(&url))?;
        }
        Ok(0)
    }
}

/// Sends the file at `path`.
async fn put(transport: &Transport, url: &Url, path: PathBuf, bytes: u64, context: &Context) -> anyhow::Result<()> {
    let step = context.progress.step(format!("Sending to {}", shown(url)));
    step.set_bytes(bytes);
    let file = tokio::fs::File::open(&path).await.with_context(|| format!("could not read {}", path.display()))?;
    let sent = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&sent);
    let stream = futures_util::stream::try_unfold(file, move |mut file| {
        let counted = Arc::clone(&counted);
        async move {
            let mut chunk = Vec::with_capacity(CHUNK);
            (&mut file).take(CHUNK as u64).read_to_end(&mut chunk).await?;
            counted.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            Ok::<_, std::io::Error>((!chunk.is_empty()).then_some((chunk, file)))
        }
    });
    let request = transport.put(url).header(CONTENT_LENGTH, bytes).body(reqwest::Body::wrap_stream(stream));
    let sending = transport.send(url, request);
    tokio::pin!(sending);
    let mut redraw = tokio::time::interval(REDRAW);
    loop {
        tokio::select! {
            done = &mut sending => {
                done.context("the pack was not taken")?;
                break;
            }
            _ = redraw.tick() => step.set_position(sent.load(Ordering::Relaxed)),
        }
    }
    step.done(format_args!("Sent {} to {}", ByteSize(bytes), shown(url)));
    Ok(())
}
