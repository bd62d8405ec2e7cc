//! A program on the daemon's host that speaks HTTP to a daemon's socket for as long as a test needs it. To start Perl
//! takes the translated machine longer than any request does, so one is started for many requests.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::patience::watched;
use crate::{Answer, Body, Host};

/// One exchange. Arguments: socket, method, target, `text` or `file`, and the body or its file.
pub(crate) const EXCHANGE: &str = r#"
use IO::Socket::UNIX;
$SIG{PIPE} = 'IGNORE';
sub exchange {
    my ($path, $method, $target, $kind, $body) = @_;
    my $socket = IO::Socket::UNIX->new(Peer => $path) or die "cannot connect to $path: $!\n";
    open my $in, '<', $kind eq 'file' ? $body : \$body or die "cannot read $body: $!\n";
    my $length = $kind eq 'file' ? -s $in : length $body;
    print $socket "$method $target HTTP/1.0\r\nHost: forkd\r\nContent-Type: application/json\r\nContent-Length: $length\r\n\r\n";
    while (read $in, my $piece, 65536) { print $socket $piece or last }
    local $/;
    return <$socket> // '';
}
"#;

/// Does what its standard input asks for: a line with method, target, kind and the length of the body, then that.
/// Answers with a line of `ok` or `failed` and a length, then as many bytes. Argument: the socket.
const SERVE: &str = r#"
binmode $_ for *STDIN, *STDOUT;
$| = 1;
while (defined(my $line = <STDIN>)) {
    my ($method, $target, $kind, $length) = split ' ', $line;
    my $body = '';
    $length == 0 or read(STDIN, $body, $length) == $length or last;
    my $answer = eval { exchange($ARGV[0], $method, $target, $kind, $body) };
    my $outcome = defined $answer ? 'ok' : 'failed';
    $answer //= $@;
    print $outcome, ' ', length $answer, "\n", $answer;
}
"#;

/// The relays of one daemon: as many as there were requests at a time.
#[derive(Debug)]
pub(crate) struct Relays {
    socket: String,
    idle: Mutex<Vec<Relay>>,
}

impl Relays {
    pub(crate) fn to(socket: String) -> Self {
        Self { socket, idle: Mutex::default() }
    }

    /// Sends a request and waits for the whole answer.
    pub(crate) fn call(&self, host: &Host, method: &str, target: &str, body: Body<'_>) -> Result<Answer> {
        let idle = self.idle().pop();
        let mut relay = idle.map_or_else(|| Relay::start(host, &self.socket), Ok)?;
        let told = relay.exchange(method, target, body).with_context(|| format!("{method} {target}"))?;
        // One that broke is not used again.
        self.idle().push(relay);
        let said = told.map_err(|error| anyhow::anyhow!("{method} {target}: {error}"))?;
        let (head, body) = said.split_once("\r\n\r\n").with_context(|| format!("{method} {target}: {said:?}"))?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok(Answer { status: status.with_context(|| format!("{method} {target}: {head}"))?, body: body.to_owned() })
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Relay>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Relay {
    program: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Relay {
    fn start(host: &Host, socket: &str) -> Result<Self> {
        let mut command = host.command_on_daemon_host(&["perl", "-e", EXCHANGE, "-e", SERVE, socket])?;
        let mut program = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let requests = program.stdin.take().context("it is piped")?;
        let answers = BufReader::new(program.stdout.take().context("it is piped")?);
        Ok(Self { program, requests, answers })
    }

    /// The answer, or why the daemon could not be asked.
    fn exchange(&mut self, method: &str, target: &str, body: Body<'_>) -> Result<Result<String, String>> {
        let (kind, body) = match body {
            Body::Text(text) => ("text", text),
            Body::File(path) => ("file", path),
        };
        let Self { program, requests, answers } = self;
        watched(program, || {
            requests.write_all(format!("{method} {target} {kind} {}\n{body}", body.len()).as_bytes())?;
            requests.flush()?;
            let mut line = String::new();
            if answers.read_line(&mut line)? == 0 {
                bail!("the way to the daemon was lost: the relay closed the connection");
            }
            let (outcome, length) = line.trim_end().split_once(' ').with_context(|| format!("{line:?}"))?;
            let mut said = vec![0; length.parse()?];
            answers.read_exact(&mut said).context("the way to the daemon was lost: the relay closed the connection")?;
            let said = String::from_utf8_lossy(&said).into_owned();
            Ok(if outcome == "ok" { Ok(said) } else { Err(said) })
        })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Its process is this test's; what it started in the machine ends with its input.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
