//! Networks of sandboxes: every guest has the same address, reaches what it may and is reached in its own namespace.

use anyhow::{Context, Result, ensure};
use forkd_testkit::{Body, Daemon, Host, on_real_guests};
use forkd_types::rest::{ExecResponse, SandboxInfo, SpawnReport};
use serde_json::{Value, json};

/// Asks the agent at 10.42.0.2:8888 from inside a namespace. Arguments: the namespace, the request.
const ASK: &str = r#"
use IO::Socket::INET;
for (1 .. 100) {
    my $socket = IO::Socket::INET->new(PeerAddr => '10.42.0.2:8888', Timeout => 5);
    if ($socket) { print $socket "$ARGV[0]\n"; print while <$socket>; exit 0 }
    select undef, undef, undef, 0.1;
}
die "nobody listens: $!\n";
"#;

/// In a guest: sends an echo request to the gateway and waits for the answer.
const PING: &str = r"
import socket, struct
body = struct.pack('!BBHHH', 8, 0, 0, 7, 1) + b'forkd!'
total = sum(struct.unpack('!7H', body))
total = (total >> 16) + (total & 0xffff)
body = body[:2] + struct.pack('!H', ~(total + (total >> 16)) & 0xffff) + body[4:]
ping = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
ping.settimeout(10)
ping.sendto(body, ('10.42.0.1', 0))
while True:
    answer = ping.recv(2048)
    if answer[20] == 0:
        print('answered', answer[28:34].decode())
        break
";

/// In a guest: tells which of the given addresses can be connected to.
const TRY: &str = r"
import socket, sys, threading
def attempt(address):
    host, port = address.rsplit(':', 1)
    try:
        socket.create_connection((host, int(port)), 3).close()
        print('reached', address, flush=True)
    except OSError as error:
        pass
threads = [threading.Thread(target=attempt, args=(address,)) for address in sys.argv[1:]]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print('tried', len(threads))
";

fn call(daemon: &Daemon<'_>, method: &str, target: &str, body: &Value) -> Result<forkd_testkit::Answer> {
    daemon.call(method, target, Body::Text(&body.to_string()))
}

fn exec(daemon: &Daemon<'_>, sandbox: &SandboxInfo, args: &[&str]) -> Result<String> {
    let target = format!("/v1/sandboxes/{}/exec", sandbox.id);
    let done: ExecResponse = call(daemon, "POST", &target, &json!({ "args": args, "timeout_secs": 60 }))?.json(200)?;
    ensure!(done.exit_code == 0, "{args:?} in {}: {done:?}", sandbox.id);
    Ok(done.stdout)
}

fn netns(sandbox: &SandboxInfo) -> Result<&str> {
    sandbox.netns.as_deref().with_context(|| format!("{} has no namespace", sandbox.id))
}

/// What the agent that is at the usual address in `netns` answers.
fn ask(host: &Host, netns: &str, request: &Value) -> Result<Value> {
    let command = ["ip", "netns", "exec", netns, "perl", "-e", ASK, &request.to_string()];
    Ok(serde_json::from_str(&host.on_daemon_host(&command)?.success()?)?)
}

fn mark_of(host: &Host, netns: &str) -> Result<String> {
    let answer = ask(host, netns, &json!({ "action": "exec", "args": ["cat", "/tmp/mark"] }))?;
    Ok(answer["stdout"].as_str().unwrap_or_default().to_owned())
}

fn first_line(host: &Host, script: &str) -> Result<String> {
    let text = host.on_daemon_host(&["sh", "-c", script])?.success()?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// The slots that a daemon has leased, as the host's files say.
fn leases(host: &Host, daemon: &Daemon<'_>) -> Result<usize> {
    let script = format!(
        "cd /run/forkd/networks && for lease in $(find . -name '*.lease'); do grep -l '^{}$' ${{lease%.lease}}; done | wc -l",
        daemon.directory()
    );
    Ok(first_line(host, &script)?.parse()?)
}

#[test]
fn guests_share_an_address_and_nothing_else() -> Result<()> {
    on_real_guests(|host| {
        let numpy = host.numpy()?;
        let daemon =
            Daemon::start_beside_with(host, numpy, "--network required --network-pool 2 --child-deadline 240")?;
        let request = json!({ "snapshot_tag": numpy.tag, "n": 2, "per_child_netns": true });
        let report: SpawnReport = call(&daemon, "POST", "/v1/sandboxes?detail=true", &request)?.json(201)?;
        ensure!(report.sandboxes.len() == 2, "{:?}", report.failures);
        ensure!(report.timings.iter().all(|timings| timings.stages.get("network").is_some()), "{:?}", report.timings);
        let [one, other] = &report.sandboxes[..] else { unreachable!("two were counted") };
        ensure!(
            netns(one)? != netns(other)? && one.guest_addr == "10.42.0.2:8888" && other.guest_addr == one.guest_addr
        );

        // Each is at the same address, in its own namespace.
        for sandbox in [one, other] {
            exec(&daemon, sandbox, &["sh", "-c", &format!("echo {} > /tmp/mark", sandbox.id)])?;
        }
        for sandbox in [one, other] {
            ensure!(ask(host, netns(sandbox)?, &json!({ "action": "ping" }))?["pong"] == true);
            ensure!(mark_of(host, netns(sandbox)?)?.trim() == sandbox.id.as_str());
            ensure!(exec(&daemon, sandbox, &["python3", "-c", PING])? == "answered forkd!\n");
        }

        // What a guest must not reach: its sibling, this host's daemons, the metadata service.
        let theirs = first_line(
            host,
            &format!("ip -n {} -4 -o address show dev veth0 | sed 's/.*inet //; s,/.*,,'", netns(other)?),
        )?;
        let hosts = first_line(host, "ip route get 10.0.2.2 | sed 's/.*src //; s/ .*//'")?;
        let blocked = [
            format!("{theirs}:8888"),
            format!("{hosts}:8889"),
            "10.42.0.1:8889".to_owned(),
            "169.254.169.254:80".to_owned(),
        ];
        let mut command = vec!["python3", "-c", TRY];
        command.extend(blocked.iter().map(String::as_str));
        ensure!(exec(&daemon, one, &command)? == "tried 4\n", "something that must not be reached was");

        // A branch has a network of its own, and its source keeps its.
        let forked: SpawnReport =
            call(&daemon, "POST", &format!("/v1/sandboxes/{}/fork?detail=true", one.id), &json!({}))?.json(201)?;
        let branch = forked.sandboxes.first().with_context(|| format!("{:?}", forked.failures))?;
        ensure!(![netns(one)?, netns(other)?].contains(&netns(branch)?));
        exec(&daemon, branch, &["sh", "-c", "echo branch > /tmp/mark"])?;
        ensure!(mark_of(host, netns(branch)?)? == "branch\n");
        ensure!(mark_of(host, netns(one)?)?.trim() == one.id.as_str());
        ensure!(exec(&daemon, branch, &["python3", "-c", PING])? == "answered forkd!\n");

        // A restarted daemon finds them as they were.
        daemon.shoot(std::time::Duration::ZERO, "GET", "/healthz", "")?;
        daemon.start_again()?;
        let found: Vec<SandboxInfo> = call(&daemon, "GET", "/v1/sandboxes", &json!({}))?.json(200)?;
        for sandbox in [one, other, branch] {
            let again = found.iter().find(|info| info.id == sandbox.id).context("it is listed")?;
            ensure!(again.netns == sandbox.netns, "{again:?}");
        }
        ensure!(mark_of(host, netns(one)?)?.trim() == one.id.as_str());
        ensure!(leases(host, &daemon)? == 3);

        // None is left of those that end.
        for sandbox in [one, other, branch] {
            call(&daemon, "DELETE", &format!("/v1/sandboxes/{}", sandbox.id), &json!({}))?.expect(204)?;
        }
        host.wait_until("no network is leased", || Ok(leases(host, &daemon)? == 0))?;
        daemon.is_well_and_tidy()
    })
}
