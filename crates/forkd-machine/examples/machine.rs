//! Drives a machine by hand: `machine DATA start|status|stop|remove` and `machine DATA exec CMD…`.
//! `FORKD_PROGRAMS` names the directory of forkd's programs, `FORKD_SHARE` one that appears as `/share`.

use std::io::{stderr, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use forkd_machine::{Machine, MachineError, Progress, Share, StartOptions, Streams};
use forkd_proto::agent::Exec;

#[allow(clippy::print_stderr, clippy::print_stdout)]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [data, verb, rest @ ..] = arguments.as_slice() else {
        eprintln!("usage: machine DATA start|status|stop|remove|exec CMD…");
        return ExitCode::from(2);
    };
    match run(Path::new(data), verb, rest) {
        Ok(code) => ExitCode::from(code as u8),
        Err(error) => {
            eprintln!("error: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                eprintln!("  caused by: {cause}");
                source = cause.source();
            }
            ExitCode::from(if error.is_machine_death() { 75 } else { 1 })
        }
    }
}

#[allow(clippy::print_stderr, clippy::print_stdout)]
fn run(data: &Path, verb: &str, rest: &[String]) -> Result<i32, MachineError> {
    let machine = Machine::open(data, "default")?;
    let mut report = |news: Progress| {
        if let Progress::Step(step) = news {
            eprintln!("==> {step}");
        }
    };
    match verb {
        "start" => {
            let programs = std::env::var_os("FORKD_PROGRAMS").map(PathBuf::from);
            let keep_alive = vec!["/forkd/bin/examples/keep_alive".into()];
            let shares = std::env::var_os("FORKD_SHARE").into_iter().map(|host| Share {
                host: host.into(),
                guest: "/share".into(),
                writable: true,
            });
            let shares = shares.collect();
            let options = StartOptions { programs, keep_alive, shares, controller: false, ..StartOptions::default() };
            println!("{:?}", machine.start(&options, &mut report)?);
        }
        "status" => println!("{:?}", machine.status()?),
        "stop" => println!("{:?}", machine.stop(&mut report)?),
        "remove" => machine.remove(&mut report)?,
        _ => {
            let request = Exec { args: rest.to_vec(), ..Exec::default() };
            let (mut out, mut err) = (stdout(), stderr());
            let streams = Streams { stdin: None, stdout: &mut out, stderr: &mut err, control: None };
            return machine.exec(request, streams).map(|exited| exited.code);
        }
    }
    Ok(0)
}
