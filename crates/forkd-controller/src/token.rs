//! `forkd-controller token`: the file of named tokens.

use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use forkd_api::auth::{NamedToken, Scope, TokensEditor, TokensFile};
use forkd_api::utc::utc;
use serde::Serialize;

use crate::args::{TokenArgs, TokenCommand};

/// A token as `list --json` shows it.
#[derive(Serialize)]
struct Shown {
    name: String,
    scope: Scope,
    created_at_unix: u64,
}

/// Does what the command says.
pub(crate) fn run(args: TokenArgs) -> anyhow::Result<()> {
    let path = args.tokens.context("name the file of named tokens with --tokens, or in FORKD_TOKENS")?;
    let mut out = std::io::stdout().lock();
    match args.command {
        TokenCommand::Create { name, scope } => {
            let text = TokensEditor::open(&path, true)?.create(&name, scope)?;
            writeln!(out, "{text}")?;
        }
        TokenCommand::Rotate { name, overlap } => {
            let text = TokensEditor::open(&path, false)?.rotate(&name, overlap)?;
            writeln!(out, "{text}")?;
        }
        TokenCommand::Revoke { name } => TokensEditor::open(&path, false)?.revoke(&name)?,
        TokenCommand::List { json: true } => {
            let file = TokensFile::read(&path)?;
            let shown = |token: &NamedToken| Shown {
                name: token.name.clone(),
                scope: token.scope,
                created_at_unix: token.created_at_unix,
            };
            let all: Vec<_> = file.tokens().iter().map(shown).collect();
            writeln!(out, "{}", serde_json::to_string(&all)?)?;
        }
        TokenCommand::List { json: false } => {
            let file = TokensFile::read(&path)?;
            let width = file.tokens().iter().map(|token| token.name.len()).max().unwrap_or(0).max("NAME".len());
            writeln!(out, "{:width$}  {:5}  CREATED", "NAME", "SCOPE")?;
            for token in file.tokens() {
                let created = utc(UNIX_EPOCH + Duration::from_secs(token.created_at_unix));
                writeln!(out, "{:width$}  {:5}  {created}", token.name, token.scope.to_string())?;
            }
        }
    }
    Ok(())
}
