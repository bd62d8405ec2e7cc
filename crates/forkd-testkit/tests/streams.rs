//! Streams into real guests: terminals, files, ports, changes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use forkd_testkit::{Host, Said, Sandbox, finish, on_real_guests};

/// A program under a terminal of this host, as Python's `pty` makes one, that types a command when it is prompted.
const TYPE_AT_A_TERMINAL: &str = r#"
import os, pty, select, struct, fcntl, termios, sys, time
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 132, 0, 0))
before = termios.tcgetattr(terminal)
seen, deadline = b'', time.time() + 240
def expect(text):
    global seen
    while text not in seen:
        assert time.time() < deadline, (text, seen)
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096)
expect(b'# ')
os.write(terminal, b'stty size; echo $((6 * 7))-answer\r')
expect(b'42-answer')
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 50, 99, 0, 0))
os.kill(pid, 28)
time.sleep(2)
os.write(terminal, b'stty size; exit 9\r')
status = None
while status is None:
    assert time.time() < deadline, seen
    try:
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 4096)
    except OSError:
        pass
    ended, code = os.waitpid(pid, os.WNOHANG)
    status = os.waitstatus_to_exitcode(code) if ended else None
assert b'50 99' in seen, seen
assert status == 9, (status, seen)
print('typed')
"#;

#[test]
fn a_shell_is_a_terminal_that_knows_its_size() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let shell = host.command(&["shell", sandbox.id().as_str()]);
        let mut terminal = std::process::Command::new("python3");
        terminal.args(["-c", TYPE_AT_A_TERMINAL]).arg(shell.get_program()).args(shell.get_args());
        let output = terminal.envs(host.environment()).env("TERM", "xterm").output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(said.contains("typed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    })
}

#[test]
fn fifty_mebibytes_go_in_and_out_unchanged() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let scratch = tempfile::tempdir()?;
        let (there, back) = (scratch.path().join("there"), scratch.path().join("back"));
        let content: Vec<u8> = (0..50u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        std::fs::write(&there, &content)?;
        let guest = format!("{}:/root/copied", sandbox.id());
        host.forkd(&["cp", &there.display().to_string(), &guest])?.success()?;
        let said = sandbox.exec(&["sha256sum", "/root/copied"])?;
        let digest = said.split(' ').next().unwrap_or_default();
        host.forkd(&["cp", &guest, &back.display().to_string()])?.success()?;
        ensure!(std::fs::read(&back)? == content, "the copy of the copy differs");
        let here = std::process::Command::new("sha256sum").arg(&there).output()?;
        String::from_utf8(here.stdout)?.says(&[digest])
    })
}

#[test]
fn trees_keep_their_links_and_modes() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let scratch = tempfile::tempdir()?;
        let tree = scratch.path().join("tree");
        std::fs::create_dir_all(tree.join("sub"))?;
        std::fs::write(tree.join("sub/run"), "#!/bin/sh\necho ran\n")?;
        std::fs::set_permissions(tree.join("sub/run"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        std::os::unix::fs::symlink("sub/run", tree.join("link"))?;
        let id = sandbox.id();
        // The directory is there, so the tree goes into it.
        host.forkd(&["cp", &tree.display().to_string(), &format!("{id}:/opt")])?.success()?;
        ensure!(sandbox.exec(&["/opt/tree/link"])? == "ran");
        let back = scratch.path().join("back");
        host.forkd(&["cp", &format!("{id}:/opt/tree"), &back.display().to_string()])?.success()?;
        ensure!(std::fs::read_link(back.join("link"))?.to_str() == Some("sub/run"));
        let listed = host.forkd(&["files", "ls", id.as_str(), "/opt/tree"])?.success()?;
        listed.says(&["link -> sub/run", "sub"])?;
        let missing = host.forkd(&["cp", &format!("{id}:/nowhere"), "/tmp/x"])?;
        ensure!(missing.code == 1, "{missing:?}");
        missing.stderr.says(&["there is no /nowhere"])
    })
}

/// A background `forkd` that ends with this value.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An HTTP server in the guest, and its port there.
fn serve_files(sandbox: &Sandbox<'_>) -> Result<u16> {
    sandbox.sh("mkdir -p /srv/www && echo 'hello from the guest' > /srv/www/page")?;
    sandbox.exec_with(&["--detach", "--cwd", "/srv/www"], &["python3", "-m", "http.server", "8000"])?.success()?;
    let script = "for i in $(seq 600); do python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 8000))' \
                  2>/dev/null && exit 0; sleep 0.2; done; exit 1";
    sandbox.exec_with(&["--timeout-secs", "300"], &["sh", "-c", script])?.success()?;
    Ok(8000)
}

/// What the scripts below begin with: connections to the daemon, over its unix socket or with a token over TCP.
const CONNECT: &str = r#"
import base64, http.client, json, os, socket, struct, sys
ADDRESS, TOKEN = sys.argv[1], sys.argv[2]
HEADERS = {'Authorization': 'Bearer ' + TOKEN} if TOKEN else {}
def connect():
    if TOKEN:
        name, port = ADDRESS.split(':')
        raw = socket.create_connection((name, int(port)))
    else:
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(ADDRESS)
    raw.settimeout(240)
    return raw
def ask(method, path, body=None):
    connection = http.client.HTTPConnection('localhost')
    connection.sock = connect()
    connection.request(method, path, body, dict(HEADERS, **{'Content-Type': 'application/json'}))
    return connection.getresponse()
"#;

/// Runs a Python script that speaks with the daemon; its arguments come after address and token.
fn speak(host: &Host, script: &str, arguments: &[&str]) -> Result<String> {
    let (address, token) = if host.in_machine()? {
        let status: serde_json::Value = host.forkd(&["machine", "status", "--json"])?.json()?;
        let api = status["api"].as_str().and_then(|api| api.strip_prefix("http://")).context("it runs")?.to_owned();
        let data = std::path::Path::new(host.environment()[0].1).join("forkd/machine/default/machine.json");
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(data)?)?;
        (api, record["api_token"].as_str().context("it has a token")?.to_owned())
    } else {
        (format!("{}/forkd.sock", host.store()?), String::new())
    };
    let script = format!("{CONNECT}\n{script}");
    let output =
        std::process::Command::new("python3").args(["-c", &script, &address, &token]).args(arguments).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// One exchange with the daemon.
fn call(host: &Host, method: &str, path: &str) -> Result<String> {
    let script = "answer = ask(sys.argv[3], sys.argv[4]); print(answer.status, answer.read().decode())";
    speak(host, script, &[method, path])
}

#[test]
fn a_server_in_the_guest_is_reached_through_the_daemon() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let port = serve_files(&sandbox)?;
        let mut forward = host
            .command(&["port-forward", sandbox.id().as_str(), &format!("0:{port}")])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let stdout = forward.stdout.take().context("it is piped")?;
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
        let _forward = Background(forward);
        let mut stream = TcpStream::connect(line.trim().parse::<SocketAddr>()?)?;
        stream.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        answer.says(&["200 OK", "hello from the guest"])?;
        call(host, "GET", &format!("/v1/sandboxes/{}/ports/{port}/page", sandbox.id()))?
            .says(&["200 hello from the guest"])?;
        call(host, "GET", &format!("/v1/sandboxes/{}/ports/9/", sandbox.id()))?
            .says(&["502", "nothing listens on port 9"])
    })
}

#[test]
fn fork_puts_the_agent_where_existing_clients_look_for_it() -> Result<()> {
    on_real_guests(|host| {
        // A snapshot of its own, by which its sandbox is known, and a port: other tests may use the usual one.
        const TAG: &str = "testkit-held";
        host.forkd(&["rmi", TAG])?;
        let source = host.spawn_one(host.numpy()?)?;
        host.forkd(&["snapshot", "--from-sandbox", source.id().as_str(), "--tag", TAG])?.success()?;
        let held = || {
            Ok::<_, anyhow::Error>(host.sandboxes()?.iter().filter(|info| info.snapshot_tag.as_str() == TAG).count())
        };
        let address: SocketAddr = "127.0.0.1:18888".parse()?;
        let child = host
            .command(&["fork", "--tag", TAG, "-n", "1", "--settle-secs", "3600", "--listen", "127.0.0.1:18888"])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut child = Background(child);
        let began = Instant::now();
        let mut stream = loop {
            match TcpStream::connect(address) {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > Duration::from_secs(240) => bail!("nobody listens: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        };
        // As the Python client does it: one line, half-closed, read to the end.
        stream.write_all(b"{\"action\":\"eval\",\"code\":\"numpy.zeros(2).tolist()\"}\n")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        answer.says(&["\"result\":\"[0.0, 0.0]\"", "\"exit_code\":0"])?;
        ensure!(held()? == 1, "it holds a sandbox");
        std::process::Command::new("kill").args(["-TERM", &child.0.id().to_string()]).status()?;
        let mut said = String::new();
        child.0.stdout.take().context("it is piped")?.read_to_string(&mut said)?;
        ensure!(said.lines().count() == 4 && said.ends_with("1 / 1 children alive\n"), "{said}");
        ensure!(child.0.wait()?.code() == Some(143));
        ensure!(TcpStream::connect(address).is_err(), "nobody listens any more");
        ensure!(held()? == 0, "its sandbox is gone");
        host.forkd(&["rmi", TAG])?.success()?;
        Ok(())
    })
}

#[test]
fn a_running_program_and_changing_files_are_followed_over_http() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let script = r#"
base = '/v1/sandboxes/' + sys.argv[3]
changes = ask('GET', base + '/files/watch?path=/tmp&recursive=true')
assert changes.status == 200, changes.status
body = json.dumps({'args': ['sh', '-c', 'echo one; sleep 1; mkdir -p /tmp/d; sleep 2; echo x > /tmp/d/f; exit 5']})
events = [json.loads(line) for line in ask('POST', base + '/exec/stream', body)]
assert events[0]['type'] == 'started', events
assert base64.b64decode(events[1]['data']) == b'one\n', events
assert events[-1] == {'type': 'exit', 'code': 5, 'timed_out': False}, events
seen = b''
while b'"/tmp/d/f"' not in seen or b'event: written' not in seen:
    seen += changes.readline()
assert b'event: created' in seen, seen

# A WebSocket by hand: handshake, one masked text frame, then frames until the end.
raw = connect()
raw.sendall(('GET %s/exec/stream HTTP/1.1\r\nHost: x\r\n%sConnection: Upgrade\r\nUpgrade: websocket\r\n'
    'Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n' % (base, ''.join('%s: %s\r\n' % pair for pair in HEADERS.items()), base64.b64encode(os.urandom(16)).decode())).encode())
stream = raw.makefile('rb')
assert b'101' in stream.readline()
while stream.readline().strip(): pass
def send(opcode, payload):
    mask = os.urandom(4)
    head = bytes([0x80 | opcode]) + (bytes([0x80 | len(payload)]) if len(payload) < 126 else bytes([0xfe]) + struct.pack('>H', len(payload)))
    raw.sendall(head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload)))
def receive():
    first, second = stream.read(2)
    size = second & 127
    if size == 126: size, = struct.unpack('>H', stream.read(2))
    if size == 127: size, = struct.unpack('>Q', stream.read(8))
    return first & 15, stream.read(size)
send(1, json.dumps({'args': ['cat'], 'stdin': True}).encode())
kind, payload = receive(); assert json.loads(payload)['type'] == 'started', payload
send(2, b'\0echoed'); kind, payload = receive(); assert (kind, payload) == (2, b'\1echoed'), payload
send(2, b'\0'); kind, payload = receive(); assert json.loads(payload) == {'type': 'exit', 'code': 0, 'timed_out': False}, payload
print('followed')
"#;
        speak(host, script, &[sandbox.id().as_str()])?.says(&["followed"])
    })
}

#[test]
fn logs_are_followed_until_the_sandbox_ends() -> Result<()> {
    on_real_guests(|host| {
        let sandbox = host.spawn_one(host.numpy()?)?;
        let mut logs = host.command(&["logs", "-f", sandbox.id().as_str()]).stdout(Stdio::piped()).spawn()?;
        let mut stdout = logs.stdout.take().context("it is piped")?;
        let reader = std::thread::spawn(move || {
            let mut said = String::new();
            stdout.read_to_string(&mut said).map(|_| said)
        });
        sandbox.sh("echo 'written to the console' > /dev/console")?;
        std::thread::sleep(Duration::from_secs(2));
        sandbox.kill()?.success()?;
        finish(logs, "forkd logs -f")?;
        reader.join().expect("reading does not panic")?.says(&["written to the console"])
    })
}
