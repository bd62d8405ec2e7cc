//! Errors as a person sees them: what went wrong, why, and the next command to type.

use std::error::Error;
use std::fmt;

use crate::interrupt::Interrupted;

/// An error together with what to do about it.
#[derive(Debug)]
struct Advised {
    error: anyhow::Error,
    next: String,
}

impl fmt::Display for Advised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl Error for Advised {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

/// Adds the next thing to type to an error.
pub(crate) trait Advise<T> {
    /// Says what to do about the error, should there be one.
    fn advise(self, next: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Advise<T> for Result<T, E> {
    fn advise(self, next: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|error| advised(error, next))
    }
}

/// `error` with the advice `next`.
pub(crate) fn advised(error: impl Into<anyhow::Error>, next: impl Into<String>) -> anyhow::Error {
    Advised { error: error.into(), next: next.into() }.into()
}

/// The command line is at fault; the program exits with 2, as for an unknown option.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// The exit code for `error`: 2 for a wrong command line, 130 or 143 after a signal, else 1.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    let signal = error.chain().find_map(|cause| cause.downcast_ref::<Interrupted>());
    match signal {
        Some(interrupted) => interrupted.exit_code(),
        None if error.chain().any(is_usage) => 2,
        None => 1,
    }
}

fn is_usage(cause: &(dyn Error + 'static)) -> bool {
    cause.is::<UsageError>() || cause.downcast_ref::<Advised>().is_some_and(|advised| advised.error.is::<UsageError>())
}

/// Whether `error` is only that the reader of our output has gone, as in `forkd ls | head -1`.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &(dyn Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    };
    error.chain().next().is_some_and(broken)
}

/// The text for standard error: the message, its causes, and the next thing to type.
pub(crate) fn render(error: &anyhow::Error) -> String {
    if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
        return format!("{interrupted}\n");
    }
    let mut text = format!("Error: {error}\n");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let message = cause.to_string();
        if !last.contains(&message) {
            text.push_str(&format!("  because: {}\n", message.replace('\n', "\n  ")));
            last = message;
        }
    }
    for advised in error.chain().filter_map(|cause| cause.downcast_ref::<Advised>()) {
        text.push_str(&format!("  try: {}\n", advised.next));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_advice_stands_last_and_no_message_twice() {
        let cause = std::io::Error::other("disk on fire");
        let error =
            Err::<(), _>(cause).advise("fire brigade").context("could not write /x").expect_err("an error was put in");
        assert_eq!(render(&error), "Error: could not write /x\n  because: disk on fire\n  try: fire brigade\n");
        assert_eq!(exit_code(&error), 1);
    }

    #[test]
    fn usage_errors_exit_with_two() {
        assert_eq!(exit_code(&UsageError("no sandbox given".into()).into()), 2);
        assert_eq!(exit_code(&advised(UsageError("no sandbox given".into()), "forkd ls")), 2);
    }
}
