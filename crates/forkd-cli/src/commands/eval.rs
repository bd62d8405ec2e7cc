//! `eval`: source text in a warm interpreter.

use std::io::{IsTerminal, Read};
use std::time::Duration;

use clap::Args;
use forkd_proto::agent::{Eval, Evaluated};
use forkd_types::SandboxId;
use serde_json::{Value, json};

use super::{Context, lost, no_sandbox, sandbox_error};
use crate::direct_agent::{DirectAgent, DirectArgs};
use crate::failure::{UsageError, advised};
use crate::output;

/// Arguments of `forkd eval`.
#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    /// The sandbox
    #[arg(conflicts_with_all = ["target", "child"])]
    sandbox: Option<SandboxId>,
    /// python or node; the sandbox's default when absent
    #[arg(short, long, value_parser = ["python", "node"])]
    language: Option<String>,
    /// The interpreter is killed after this long
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout_secs: u64,
    /// Print the whole answer as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    direct: DirectArgs,
    /// The source, words joined by blanks; read from standard input when absent
    #[arg(last = true, value_name = "SOURCE")]
    source: Vec<String>,
}

impl EvalArgs {
    pub(crate) async fn run(self, context: &Context) -> anyhow::Result<u8> {
        let code = self.code()?;
        match (&self.sandbox, self.direct.agent()) {
            (Some(sandbox), _) => {
                let client = context.client().await?;
                let connection = client.agent(sandbox).await.map_err(sandbox_error)?;
                let eval =
                    Eval { language: self.language, code, timeout_ms: Some(self.timeout_secs.saturating_mul(1000)) };
                let evaluated = match connection.eval(eval).await {
                    Err(error) => return Err(lost(&client, error.into(), sandbox).await),
                    Ok(evaluated) => evaluated,
                };
                if self.json {
                    output::json(&evaluated)?;
                    return Ok(u8::from(evaluated.error.is_some()));
                }
                show(&evaluated)
            }
            (None, agent) => {
                let agent = match agent {
                    Some(agent) => agent,
                    None => DirectAgent::usual().await.ok_or_else(|| no_sandbox("eval"))?,
                };
                let wait = Duration::from_secs(self.timeout_secs);
                let answer = agent.ask(json!({ "action": "eval", "code": code }), Some(wait)).await?;
                if self.json {
                    output::json(&answer)?;
                    return Ok(u8::from(answer.get("error").is_some_and(Value::is_string)));
                }
                show(&older(&answer))
            }
        }
    }

    fn code(&self) -> anyhow::Result<String> {
        let mut code = self.source.join(" ");
        let mut stdin = std::io::stdin();
        if self.source.is_empty() && !stdin.is_terminal() {
            stdin.read_to_string(&mut code)?;
        }
        if code.trim().is_empty() {
            let error = UsageError("no source given: write it after --, or send it to standard input".into());
            return Err(advised(error, "forkd eval SANDBOX -- '1 + 1'"));
        }
        Ok(code)
    }
}

/// An answer of the older protocol in the newer shape.
fn older(answer: &Value) -> Evaluated {
    let text = |name: &str| answer.get(name).and_then(Value::as_str).map(str::to_owned);
    Evaluated {
        result: text("result_json").or_else(|| text("result")),
        error: text("traceback").or_else(|| text("stack")).or_else(|| text("error")),
        ..Evaluated::default()
    }
}

fn show(evaluated: &Evaluated) -> anyhow::Result<u8> {
    output::bytes(evaluated.stdout.as_bytes())?;
    if !evaluated.stderr.is_empty() {
        output::remark(evaluated.stderr.trim_end());
    }
    if let Some(result) = &evaluated.result {
        output::line(result)?;
    }
    match &evaluated.error {
        Some(error) => {
            output::remark(error.trim_end());
            Ok(1)
        }
        None => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_answers_keep_what_they_say() {
        let node = older(&json!({ "result_json": "{\"a\":1}", "result": null, "exit_code": 0 }));
        assert_eq!(node.result.as_deref(), Some("{\"a\":1}"));
        let failed = older(&json!({ "error": "ValueError: x", "traceback": "Traceback…", "exit_code": 1 }));
        assert_eq!(failed.error.as_deref(), Some("Traceback…"));
    }
}
