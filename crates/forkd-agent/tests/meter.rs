//! The agent's program as a meter.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use forkd_proto::meter::{Greeting, Order, Stretch, TICK_US, VERB};

fn start(mib: &str) -> (Child, BufReader<ChildStdout>) {
    let mut meter = Command::new(env!("CARGO_BIN_EXE_forkd-agent"))
        .args([VERB, mib])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(meter.stdout.take().unwrap());
    (meter, said)
}

fn next<T: serde::de::DeserializeOwned>(said: &mut impl BufRead) -> T {
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
}

#[test]
fn a_standstill_of_the_meter_is_what_it_measures() {
    let (mut meter, mut said) = start("8");
    let Greeting::Ready { echo_port } = next(&mut said) else { panic!("8 MiB are always there") };
    let mut input = meter.stdin.take().unwrap();
    let mut order = |order: Order| -> Stretch {
        writeln!(input, "{}", serde_json::to_string(&order).unwrap()).unwrap();
        next(&mut said)
    };
    order(Order::Dirty { pages_per_second: 100_000 });
    let pid = rustix::process::Pid::from_raw(meter.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    std::thread::sleep(Duration::from_millis(150));
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let stretch = order(Order::Mark);
    assert!(stretch.longest_gap_us >= 145_000 && stretch.us >= 200_000, "{stretch:?}");
    assert!(stretch.ticks > 0 && stretch.ticks * TICK_US <= stretch.us, "{stretch:?}");
    assert!(stretch.dirtied_pages > 0, "{stretch:?}");

    let mut peer = TcpStream::connect(("127.0.0.1", echo_port)).unwrap();
    peer.write_all(b"anyone?").unwrap();
    let mut got = [0; 7];
    peer.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"anyone?");

    // What a copy sees: it stays as large as it is, and does nothing.
    drop(input);
    let cpu = |meter: &Child| -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", meter.id())).unwrap();
        stat.split(' ').skip(13).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    };
    std::thread::sleep(Duration::from_millis(100));
    let (before, until) = (cpu(&meter), Instant::now() + Duration::from_millis(300));
    while Instant::now() < until {
        assert_eq!(meter.try_wait().unwrap(), None, "it ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(cpu(&meter) <= before + 1, "it works on");
    meter.kill().unwrap();
    meter.wait().unwrap();
}

#[test]
fn a_meter_that_cannot_have_its_memory_says_how_much_there_is() {
    let (mut meter, mut said) = start("1000000000");
    assert!(matches!(next(&mut said), Greeting::NoRoom { room_mib } if room_mib < 1_000_000_000));
    assert!(meter.wait().unwrap().success());
    let (mut meter, _) = start("much");
    assert_eq!(meter.wait().unwrap().code(), Some(2));
}
