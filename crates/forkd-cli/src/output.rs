//! Results on standard output, remarks on standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::environment;

/// Writes one line of results.
pub(crate) fn line(text: impl Display) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    Ok(stdout.flush()?)
}

/// Writes `value` as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?)
}

/// Writes raw bytes of results.
pub(crate) fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    Ok(stdout.flush()?)
}

/// Writes a remark to standard error. That nobody reads it is no reason to fail.
pub(crate) fn remark(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// An empty table in the house style: no lines, columns two spaces apart.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().copied());
    table
}

/// Writes a table without trailing blanks.
pub(crate) fn print_table(table: &mut Table) -> anyhow::Result<()> {
    let columns = table.column_count();
    for index in 0..columns {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
        }
    }
    for row in table.lines() {
        line(row.trim_end())?;
    }
    Ok(())
}

/// Whether standard output wants colours.
pub(crate) fn stdout_has_colours() -> bool {
    colours(io::stdout().is_terminal())
}

/// Whether standard error is a terminal that can redraw a line.
pub(crate) fn stderr_is_interactive() -> bool {
    io::stderr().is_terminal() && std::env::var_os(environment::TERM).is_none_or(|term| term != "dumb")
}

fn colours(terminal: bool) -> bool {
    terminal
        && std::env::var_os(environment::NO_COLOR).is_none_or(|value| value.is_empty())
        && std::env::var_os(environment::TERM).is_none_or(|term| term != "dumb")
}

/// Asks a question on standard error, without ending the line.
fn prompt(question: &str) {
    let mut stderr = io::stderr().lock();
    let _ = write!(stderr, "{question}").and_then(|()| stderr.flush());
}

/// Asks a question that only `y` or `yes` answers with a yes; without a terminal nobody can.
pub(crate) fn confirm(question: &str) -> io::Result<bool> {
    if !io::stdin().is_terminal() {
        return Ok(false);
    }
    prompt(question);
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}
