//! The terminal that `exec --tty` lends to the sandbox.

use std::io;
use std::os::fd::AsFd;

use forkd_proto::agent::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::environment;

/// Standard input in raw mode until this is dropped.
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Makes the terminal on standard input raw; none when standard input is no terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !rustix::termios::isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // If the terminal has gone, so has the need to restore it.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// `env` with the kind of this terminal, unless it says one.
pub(crate) fn with_kind(mut env: Vec<(String, String)>) -> Vec<(String, String)> {
    if !env.iter().any(|(name, _)| name == environment::TERM) {
        let kind = std::env::var(environment::TERM).unwrap_or_else(|_| "xterm".to_owned());
        env.push((environment::TERM.to_owned(), kind));
    }
    env
}

/// The size of the terminal that this program shows on; 24 by 80 when there is none.
pub(crate) fn size() -> TerminalSize {
    let of = |fd: &dyn AsFd| tcgetwinsize(fd.as_fd()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
    let size = of(&io::stdout()).or_else(|| of(&io::stdin())).or_else(|| of(&io::stderr()));
    size.map_or(TerminalSize { rows: 24, columns: 80 }, |size| TerminalSize { rows: size.ws_row, columns: size.ws_col })
}
