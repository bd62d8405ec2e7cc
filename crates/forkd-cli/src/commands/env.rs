//! `env`: where the daemon is, for programs that speak to it themselves.

use clap::Args;
use serde::Serialize;

use super::Context;
use crate::environment::{FORKD_TOKEN, FORKD_URL};
use crate::output;

/// Arguments of `forkd env`.
#[derive(Args, Debug)]
#[command(after_help = "\
For the SDKs and other clients of the API, in a shell:
  eval \"$(forkd env)\"")]
pub(crate) struct EnvArgs {
    /// Print JSON instead of shell commands
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Access<'a> {
    url: String,
    token: Option<&'a str>,
}

impl EnvArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let client = context.client().await?;
        let (url, token) = (client.address().to_string(), client.token());
        if self.json {
            output::json(&Access { url, token })?;
        } else {
            output::line(format_args!("export {FORKD_URL}={}", shell_word(&url)?))?;
            match token {
                Some(token) => output::line(format_args!("export {FORKD_TOKEN}={}", shell_word(token)?))?,
                None => output::line(format_args!("unset {FORKD_TOKEN}"))?,
            }
        }
        Ok(0)
    }
}

/// `text` as one word of a shell.
fn shell_word(text: &str) -> anyhow::Result<String> {
    Ok(shlex::try_quote(text)?.into_owned())
}
