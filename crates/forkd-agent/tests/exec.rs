//! Programs run by a real agent.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use std::time::{Duration, Instant};

use forkd_proto::agent::{Exec, ExecControl, FailureCode, Request, Response, TerminalSize};
use forkd_proto::frame::{Frame, Kind};
use support::{Agent, eventually, process_exists, sh};

fn args(words: &[&str]) -> Exec {
    Exec { args: words.iter().map(|word| (*word).to_owned()).collect(), ..Exec::default() }
}

#[test]
fn output_streams_and_exit_code_arrive() {
    let agent = Agent::start();
    let outcome = agent.sh("echo out; echo err >&2; exit 7");
    assert_eq!((outcome.stdout.as_slice(), outcome.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!((outcome.code, outcome.timed_out), (7, false));
    assert_eq!(agent.sh("kill -TERM $$").code, -15);
    assert_eq!(agent.exec(args(&["true"])).code, 0);
}

#[test]
fn a_program_leads_its_own_session_in_a_clean_place() {
    let agent = Agent::start();
    let outcome = agent.sh("ps -o pid=,pgid=,sid= -p $$ | tr -s ' '; pwd; cat; ls /proc/self/fd | wc -l");
    let mut lines = outcome.text().lines();
    let ids: Vec<u32> = lines.next().unwrap().split_whitespace().map(|id| id.parse().unwrap()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(lines.next(), Some("/"));
    // 0, 1, 2 and the directory that ls reads.
    assert_eq!(lines.next(), Some("4"), "no descriptor of the agent leaks");
}

#[test]
fn environment_directory_and_user_are_as_asked() {
    let agent = Agent::start();
    let outcome = agent.exec(Exec {
        env: vec![("GREETING".into(), "hello there".into()), ("HOME".into(), "/elsewhere".into())],
        cwd: Some("/usr/bin".into()),
        ..sh("echo $GREETING; pwd; echo $HOME")
    });
    assert_eq!(outcome.text(), "hello there\n/usr/bin\n/elsewhere\n");

    let outcome = agent.exec(Exec { user: Some("nobody".into()), ..sh("id -un; id -gn; echo $HOME $USER") });
    assert_eq!(outcome.text(), "nobody\nnogroup\n/nonexistent nobody\n");
    let outcome = agent.exec(Exec { user: Some("4321:8765".into()), ..sh("id -u; id -g; id -G") });
    assert_eq!(outcome.text(), "4321\n8765\n8765\n");
}

#[test]
fn what_cannot_run_says_why() {
    let agent = Agent::start();
    let fails = |exec: Exec| agent.try_exec(exec).expect_err("it cannot start");
    let missing = fails(args(&["no-such-program"]));
    assert_eq!(missing.code, FailureCode::NotFound);
    assert!(missing.message.contains("no-such-program") && missing.message.contains("PATH"), "{missing}");
    assert_eq!(fails(args(&["/etc/passwd"])).code, FailureCode::Denied);
    assert_eq!(fails(args(&["/nowhere/x"])).code, FailureCode::NotFound);
    assert_eq!(fails(Exec { cwd: Some("/nowhere".into()), ..args(&["true"]) }).code, FailureCode::NotFound);
    assert_eq!(fails(Exec { user: Some("nosuchuser".into()), ..args(&["true"]) }).code, FailureCode::NotFound);
    assert_eq!(fails(args(&[])).code, FailureCode::Invalid);
    assert_eq!(fails(Exec { env: vec![("A=B".into(), "c".into())], ..args(&["true"]) }).code, FailureCode::Invalid);

    let script = tempfile::tempdir().unwrap();
    let path = script.path().join("script");
    std::fs::write(&path, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let failure = fails(args(&[path.to_str().unwrap()]));
    assert!(failure.message.contains("interpreter"), "{failure}");
}

#[test]
fn standard_input_streams_and_ends() {
    let agent = Agent::start();
    let mut client = agent.start_exec(Exec { stdin: true, ..args(&["cat"]) }).unwrap();
    client.send(Kind::Stdin, b"first ");
    client.wait_for("first ");
    client.send(Kind::Stdin, b"second");
    client.send(Kind::Stdin, b"");
    let outcome = client.finish().unwrap();
    assert_eq!((outcome.text(), outcome.code), ("second", 0));
}

#[test]
fn megabytes_of_input_pass_while_output_comes_back() {
    let agent = Agent::start();
    let client = agent.start_exec(Exec { stdin: true, ..args(&["cat"]) }).unwrap();
    let mut sender = support::Client(client.0.try_clone().unwrap());
    let bytes: Vec<u8> = (0..20u32 << 20).map(|n| (n % 251) as u8).collect();
    let expected = bytes.clone();
    let sending = std::thread::spawn(move || {
        for piece in bytes.chunks(700_001) {
            sender.send(Kind::Stdin, piece);
        }
        sender.send(Kind::Stdin, b"");
    });
    let outcome = client.finish().unwrap();
    sending.join().unwrap();
    assert!(outcome.stdout == expected, "20 MiB came back as they were sent");
}

#[test]
fn input_for_a_program_that_does_not_read_is_dropped() {
    let agent = Agent::start();
    let mut client = agent.start_exec(Exec { stdin: true, ..sh("exec <&-; sleep 0.3; echo done") }).unwrap();
    client.send(Kind::Stdin, &vec![b'x'; 1 << 20]);
    client.send(Kind::Stdin, &vec![b'x'; 1 << 20]);
    assert_eq!(client.finish().unwrap().text(), "done\n");
}

#[test]
fn two_hundred_mebibytes_stream_with_bounded_memory() {
    let agent = Agent::start();
    let mut client = agent.start_exec(args(&["head", "-c", "209715200", "/dev/zero"])).unwrap();
    let started = Instant::now();
    let mut total = 0;
    let exited = loop {
        let frame = client.frame();
        match frame.kind {
            Kind::Stdout => total += frame.payload.len(),
            _ => break frame.parse::<Response>(Kind::Response).unwrap(),
        }
    };
    assert!(matches!(exited, Response::Exited(exited) if exited.code == 0));
    assert_eq!(total, 200 << 20);
    println!("200 MiB in {:?}", started.elapsed());
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: usize = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 32 << 10, "the agent's peak memory is {peak} KiB");
}

#[test]
fn a_client_that_does_not_read_stops_the_program_and_not_the_time_limit() {
    let agent = Agent::start();
    let mut client = agent.start_exec(Exec { timeout_ms: Some(700), ..sh("echo $$; exec cat /dev/zero") }).unwrap();
    let pid: u32 = client.wait_for("\n").lines().next().unwrap().parse().unwrap();
    let written = |pid| {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse::<u64>().unwrap()
    };
    std::thread::sleep(Duration::from_millis(300));
    assert!(written(pid) < 64 << 20, "nobody reads, so nothing piles up");
    eventually("the time limit ends it though the client does not read", || !process_exists(pid));
}

#[test]
fn a_terminal_is_a_terminal() {
    let agent = Agent::start();
    let exec = Exec {
        stdin: true,
        terminal: Some(TerminalSize { rows: 33, columns: 101 }),
        ..sh("tty >/dev/null && stty size; read line; echo got $line; stty size; cat")
    };
    let mut client = agent.start_exec(exec).unwrap();
    client.wait_for("33 101");
    client.control(&ExecControl::Resize(TerminalSize { rows: 44, columns: 55 }));
    client.send(Kind::Stdin, b"hello\n");
    client.wait_for("44 55");
    client.send(Kind::Stdin, b"");
    assert_eq!(client.finish().unwrap().code, 0, "an end of input ends cat on a terminal");
}

#[test]
fn control_c_on_a_terminal_interrupts() {
    let agent = Agent::start();
    // No shell: one that is about to start a program puts an interrupt off until that has ended.
    let terminal = Some(TerminalSize { rows: 24, columns: 80 });
    let exec = Exec { stdin: true, terminal, ..args(&["cat"]) };
    let mut client = agent.start_exec(exec).unwrap();
    client.send(Kind::Stdin, b"here\n");
    // Once from the terminal, and once from the program, which reads now.
    client.wait_for("here\r\nhere");
    client.send(Kind::Stdin, &[3]);
    assert_eq!(client.finish().unwrap().code, -2);
}

#[test]
fn programs_ignore_no_signal() {
    // As a shell starts what runs in the background; the agent inherits it from this thread's process.
    let ignoring = "trap '' INT QUIT TERM HUP; exec \"$0\" \"$@\"";
    let agent = Agent::start_by(&["sh", "-c", ignoring]);
    let outcome = agent.exec(sh("grep SigIgn /proc/self/status"));
    let ignored = outcome.text().trim_start_matches("SigIgn:").trim();
    // The C library keeps signals 32 and 33 to itself, whatever they were found to be.
    let ignored = u64::from_str_radix(ignored, 16).unwrap() & !(0b11 << 31);
    assert_eq!(ignored, 0, "{ignored:x}");
}

#[test]
fn signals_reach_the_whole_group() {
    let agent = Agent::start();
    let mut client =
        agent.start_exec(sh("sleep 60 & trap 'echo caught; wait; exit 5' USR1; echo ready; wait")).unwrap();
    client.wait_for("ready");
    client.control(&ExecControl::Signal { signal: 10 });
    let outcome = client.finish().unwrap();
    assert_eq!((outcome.text(), outcome.code), ("caught\n", 5), "sleep died of the signal, so wait returned");
}

#[test]
fn a_time_limit_kills_children_and_grandchildren() {
    let agent = Agent::start();
    let started = Instant::now();
    let outcome =
        agent.exec(Exec { timeout_ms: Some(300), ..sh("sh -c 'sleep 61 & echo $!; sleep 61' & echo $!; sleep 61") });
    assert!(outcome.timed_out && outcome.code == -9, "{outcome:?}");
    assert!(started.elapsed() < Duration::from_secs(5));
    let pids: Vec<u32> = outcome.text().lines().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 2);
    eventually("all are dead and reaped", || pids.iter().all(|pid| !process_exists(*pid)));
}

#[test]
fn a_client_that_goes_takes_its_program_along() {
    let agent = Agent::start();
    let mut client = agent.start_exec(sh("sleep 62 & echo $$ $!; wait")).unwrap();
    let pids: Vec<u32> = client.wait_for("\n").split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    drop(client);
    eventually("both are dead", || pids.iter().all(|pid| !process_exists(*pid)));
}

#[test]
fn a_detached_program_outlives_its_client() {
    let agent = Agent::start();
    let file = tempfile::NamedTempFile::new().unwrap();
    let script =
        format!("echo $$; for i in 1 2 3 4 5; do echo line; sleep 0.1; done; echo end > {}", file.path().display());
    let mut client = agent.start_exec(Exec { detach: true, ..sh(&script) }).unwrap();
    let pid: u32 = client.wait_for("\n").lines().next().unwrap().parse().unwrap();
    drop(client);
    std::thread::sleep(Duration::from_millis(200));
    assert!(process_exists(pid));
    eventually("it comes to its end", || std::fs::read_to_string(file.path()).unwrap() == "end\n");
    eventually("it is reaped", || !process_exists(pid));
}

#[test]
fn in_a_copy_of_the_machine_programs_go_on_though_their_connections_broke() {
    let agent = Agent::start();
    let start = || {
        let mut client = agent.start_exec(sh("echo $$; exec sleep 63")).unwrap();
        let pid: u32 = client.wait_for("\n").lines().next().unwrap().parse().unwrap();
        (client, pid)
    };
    let break_connection = |client: support::Client| {
        // Closing with nothing lingering sends a reset.
        rustix::net::sockopt::set_socket_linger(&client.0, Some(Duration::ZERO)).unwrap();
    };
    let (client, pid) = start();
    break_connection(client);
    std::thread::sleep(Duration::from_millis(200));
    assert!(process_exists(pid), "perhaps this machine is a copy");
    agent.identify("sb-copy", 1);
    std::thread::sleep(Duration::from_millis(300));
    assert!(process_exists(pid), "it is");
    agent.exec(args(&["kill", &pid.to_string()]));

    let (client, pid) = start();
    break_connection(client);
    let mut gone = false;
    for _ in 0..80 {
        std::thread::sleep(Duration::from_millis(100));
        gone |= !process_exists(pid);
    }
    assert!(gone, "without a new identity a broken connection is a client that went away");
}

#[test]
fn a_background_child_does_not_hold_the_answer_up_and_lives_on() {
    let agent = Agent::start();
    let started = Instant::now();
    let outcome = agent.sh("(while :; do echo noise; sleep 0.05; done) & echo $!; exit 3");
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(outcome.code, 3);
    // The child may be heard before the shell says its number.
    let pid: u32 = outcome.text().lines().find(|line| *line != "noise").unwrap().parse().unwrap();
    std::thread::sleep(Duration::from_millis(400));
    assert!(process_exists(pid), "its pipe is still read, so it does not die of writing");
    agent.exec(args(&["kill", &pid.to_string()]));
    eventually("it is gone", || !process_exists(pid));
}

#[test]
fn orphans_are_reaped() {
    let agent = Agent::start();
    let outcome = agent.sh("for i in 1 2 3 4 5 6 7 8; do sh -c 'sleep 0.2 >/dev/null 2>&1 & echo $!'; done");
    let pids: Vec<u32> = outcome.text().lines().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 8);
    eventually("no orphan is left as a zombie", || pids.iter().all(|pid| !process_exists(*pid)));
}

#[test]
fn a_hundred_programs_at_once_keep_their_own_ends() {
    let agent = Agent::start();
    std::thread::scope(|scope| {
        for n in 0..100 {
            let agent = &agent;
            scope.spawn(move || {
                let outcome = agent.sh(&format!("sleep 0.1; echo {n}; exit {}", n % 50));
                assert_eq!((outcome.text(), outcome.code), (format!("{n}\n").as_str(), n % 50));
            });
        }
    });
}

#[test]
fn short_programs_never_lose_their_exit_code() {
    let agent = Agent::start();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for n in 0..60 {
                    assert_eq!(agent.exec(args(&["sh", "-c", &format!("exit {n}")])).code, n);
                }
            });
        }
    });
}

#[test]
fn nothing_is_done_without_the_token() {
    let agent = Agent::start();
    for first in [Request::Hello { token: "wrong".into() }, Request::Ping] {
        let mut stream = std::net::TcpStream::connect(agent.tcp).unwrap();
        Frame::json(Kind::Request, &first).unwrap().write_to(&mut stream).unwrap();
        let answer: Response = Frame::read_from(&mut stream).unwrap().parse(Kind::Response).unwrap();
        assert!(matches!(answer, Response::Error(failure) if failure.code == FailureCode::Denied));
        assert!(Frame::read_from(&mut stream).is_err(), "and the connection is closed");
    }
    let mut client = agent.connect();
    client.send(Kind::Request, br#"{"op":"fly"}"#);
    assert!(matches!(client.response(), Response::Error(failure) if failure.code == FailureCode::Invalid));
}
