//! Warm runtimes of the interpreters on this machine. Both languages must be installed.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use forkd_proto::agent::{Eval, FailureCode, Request, Response};
use support::{Agent, eventually, process_exists};

/// Fails, and says why, where a test cannot do its work.
fn require(program: &str) {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap()).any(|dir| dir.join(program).is_file());
    assert!(found, "this test evaluates code in {program}, which is not in PATH: install it");
}

fn pong(agent: &Agent) -> forkd_proto::agent::Pong {
    match agent.request(&Request::Ping) {
        Response::Pong(pong) => pong,
        other => panic!("{other:?}"),
    }
}

#[test]
fn python_keeps_its_namespace_and_captures_output() {
    require("python3");
    let agent = Agent::start();
    assert!(pong(&agent).warm.is_empty());
    let python = |code: &str| agent.eval("python", code).unwrap();
    let first = python(
        "import os, sys\nx = [1, 2]\nprint('out'); print('err', file=sys.stderr)\nos.system('echo child')\nx + [3]",
    );
    assert_eq!(first.result.as_deref(), Some("[1, 2, 3]"));
    assert_eq!(first.stderr, "err\n");
    assert!(first.stdout.contains("out\n") && first.stdout.contains("child\n"));
    assert_eq!(python("x.append(9)").result.as_deref(), Some("None"));
    assert_eq!(python("y = x").result, None);
    assert_eq!(python("y").result.as_deref(), Some("[1, 2, 9]"));
    assert_eq!(python("sys.stdin.read()").result.as_deref(), Some("''"));
    assert_eq!(python("__name__, os.path.realpath('.')").result.as_deref(), Some("('__main__', '/')"));
    assert_eq!(
        python("'FORKD_RUNTIME_FDS' in os.environ, os.listdir('/proc/self/fd').__len__() < 12").result.as_deref(),
        Some("(False, True)")
    );
    assert_eq!(pong(&agent).warm, ["python"]);
}

#[test]
fn python_errors_come_as_tracebacks_of_the_code_alone() {
    require("python3");
    let agent = Agent::start();
    let python = |code: &str| agent.eval("python", code).unwrap();
    let failed = python("print('before')\ndef f():\n    return 1 / 0\nf()");
    let error = failed.error.unwrap();
    assert!(error.starts_with("Traceback") && error.ends_with("ZeroDivisionError: division by zero\n"), "{error}");
    assert!(error.contains("return 1 / 0"), "source lines are shown: {error}");
    assert!(!error.contains("_forkd_start"), "{error}");
    assert_eq!((failed.result, failed.stdout.as_str()), (None, "before\n"));
    assert!(python("def (").error.unwrap().contains("SyntaxError"));
    assert!(python("raise SystemExit(3)").error.unwrap().contains("SystemExit"));
    assert_eq!(
        python("import pickle\nclass C: pass\ntype(pickle.loads(pickle.dumps(C()))) is C").result.as_deref(),
        Some("True")
    );
    assert_eq!(python("import asyncio\nawait asyncio.sleep(0, 'slept')").result.as_deref(), Some("'slept'"));
}

#[test]
fn a_time_limit_ends_the_runtime_and_the_next_starts_fresh() {
    require("python3");
    let agent = Agent::start();
    assert_eq!(agent.eval("python", "x = 1\nx").unwrap().result.as_deref(), Some("1"));
    let started = Instant::now();
    let failure = agent.eval_for("python", "while True: print('flood')", Some(400)).unwrap_err();
    assert_eq!(failure.code, FailureCode::TimedOut);
    assert!(started.elapsed() < Duration::from_secs(5));
    let failure = agent.eval("python", "x").unwrap().error.unwrap();
    assert!(failure.contains("NameError"), "{failure}");
}

#[test]
fn a_runtime_that_dies_says_so_with_its_last_words() {
    require("python3");
    let agent = Agent::start();
    let failure = agent
        .eval("python", "import os, sys\nsys.stderr.write('goodbye'); sys.stderr.flush()\nos._exit(9)")
        .unwrap_err();
    assert_eq!(failure.code, FailureCode::Internal);
    assert!(failure.message.contains("exit code 9") && failure.message.contains("goodbye"), "{failure}");
    assert_eq!(agent.eval("python", "1 + 1").unwrap().result.as_deref(), Some("2"));
    agent
        .eval(
            "python",
            "import threading, time\nthreading.Timer(0.2, lambda: os._exit(1)).start() if 'os' in globals() else None",
        )
        .unwrap();
    let pid: u32 = agent.eval("python", "import os\nos.getpid()").unwrap().result.unwrap().parse().unwrap();
    agent.sh(&format!("kill -9 {pid}"));
    eventually("its end is noticed between evaluations", || pong(&agent).warm.is_empty() && !process_exists(pid));
}

#[test]
fn a_client_that_goes_interrupts_its_code_and_the_state_stays() {
    require("python3");
    let agent = Agent::start();
    agent.eval("python", "x = 'kept'").unwrap();
    let mut client = agent.connect();
    client.say(&Request::Eval(Eval {
        language: Some("python".into()),
        code: "while True: pass".into(),
        timeout_ms: None,
    }));
    std::thread::sleep(Duration::from_millis(300));
    drop(client);
    assert_eq!(agent.eval_for("python", "x", Some(10_000)).unwrap().result.as_deref(), Some("'kept'"));
}

#[test]
fn evaluations_of_one_language_take_turns() {
    require("python3");
    let agent = Agent::start();
    agent.eval("python", "import time\nbusy = 0\nworst = 0").unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                agent.eval("python", "busy += 1\nworst = max(worst, busy)\ntime.sleep(0.02)\nbusy -= 1").unwrap()
            });
        }
    });
    assert_eq!(agent.eval("python", "worst").unwrap().result.as_deref(), Some("1"));
}

#[test]
fn code_that_closes_its_streams_does_not_keep_the_agent_spinning() {
    require("python3");
    let agent = Agent::start();
    agent.eval("python", "import os\nos.close(1); os.close(2)").unwrap();
    let processor_time = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = processor_time();
    agent.eval("python", "import time\ntime.sleep(0.4)").unwrap();
    std::thread::sleep(Duration::from_millis(400));
    assert!(processor_time() - before < 20, "clock ticks of 10 ms");
}

#[test]
fn long_output_is_cut_to_what_an_answer_holds() {
    require("python3");
    let agent = Agent::start();
    let long = agent.eval("python", "print('x' * (20 << 20)); 'end'").unwrap();
    assert_eq!(long.result.as_deref(), Some("'end'"));
    assert!(long.stdout.len() > 500_000 && long.stdout.contains("bytes dropped"));
}

#[test]
fn an_identity_reseeds_python_even_while_it_is_busy() {
    require("python3");
    let agent = Agent::start();
    let python = |code: &str| agent.eval("python", code).unwrap().result;
    python("import random, tempfile, os\nrandom.seed(1)");
    let unseeded = python("random.Random(1).random() == random.random()");
    assert_eq!(unseeded.as_deref(), Some("True"));
    let mut drawn = Vec::new();
    for (id, seed) in [("sb-a", 1), ("sb-b", 2), ("sb-a", 1)] {
        agent.identify(id, seed);
        drawn.push(python("random.random()"));
        assert_eq!(python("os.environ['FORKD_SANDBOX_ID']"), Some(format!("'{id}'")));
    }
    assert_ne!(drawn[0], drawn[1]);
    assert_eq!(drawn[0], drawn[2], "the same seed gives the same numbers");
    assert_eq!(agent.sh("echo $FORKD_SANDBOX_ID").text(), "sb-a\n");
    assert_eq!(pong(&agent).sandbox_id, "sb-a");

    let mut client = agent.connect();
    let code = "import time\nrandom.seed(5)\nbefore = random.getstate()\nfor _ in range(100): time.sleep(0.01)\nrandom.getstate() != before";
    client.say(&Request::Eval(Eval { language: Some("python".into()), code: code.into(), timeout_ms: None }));
    std::thread::sleep(Duration::from_millis(400));
    agent.identify("sb-c", 3);
    assert!(matches!(client.response(), Response::Evaluated(done) if done.result.as_deref() == Some("True")));
}

#[test]
fn an_interpreter_that_does_nothing_is_left_alone_until_it_is_used() {
    require("python3");
    let agent = Agent::start();
    let python = |code: &str| agent.eval("python", code).unwrap().result;
    let pid: u32 = python("import os, random; random.seed(1); os.getpid()").unwrap().parse().unwrap();
    let switches = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let status = tasks.map(|task| std::fs::read_to_string(task.path().join("status")).unwrap());
        let count = |status: String| {
            let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
            lines.map(|line| line.split_whitespace().last().unwrap().parse::<u64>().unwrap()).sum::<u64>()
        };
        status.map(count).sum::<u64>()
    };
    std::thread::sleep(Duration::from_millis(200));
    let before = switches();
    agent.identify("sb-a", 1);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(switches(), before, "it ran for its new identity");
    assert_eq!(python("random.random() == random.Random(1).random()").as_deref(), Some("False"));

    // Code that goes on by itself draws numbers before anybody asks: it is told at once.
    let watch = "import threading, time\nrandom.seed(2)\nseen = [random.getstate()]\n\
                 def watch():\n    while True:\n        time.sleep(0.01)\n        state = random.getstate()\n        \
                 if state != seen[-1]: seen.append(state)\nthreading.Thread(target=watch, daemon=True).start()";
    python(watch);
    agent.identify("sb-b", 2);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(python("len(seen)").as_deref(), Some("2"));
}

#[test]
fn node_keeps_its_scope_and_awaits() {
    require("node");
    let agent = Agent::start();
    let node = |code: &str| agent.eval("node", code).unwrap();
    let first = node("const x = [1, 2]; console.log('out'); console.error('err'); ({ sum: x[0] + x[1] })");
    assert_eq!((first.result.as_deref(), first.error.as_deref()), (Some(r#"{"sum":3}"#), None));
    assert_eq!((first.stdout.as_str(), first.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(node("const x = 5; x").result.as_deref(), Some("5"), "a name may be declared again");
    assert_eq!(
        node("const later = await new Promise(r => setTimeout(r, 20, 'v')); later").result.as_deref(),
        Some("\"v\"")
    );
    assert_eq!(node("later + x").result.as_deref(), Some("\"v5\""));
    assert_eq!(node("let q = 1;").result, None);
    assert_eq!(node("10n").result.as_deref(), Some("\"10n\""));
    assert_eq!(node("require('path').join('a', 'b')").result.as_deref(), Some("\"a/b\""));
    assert_eq!(node("(await import('node:path')).join('a', 'b')").result.as_deref(), Some("\"a/b\""));
    let nested =
        "const p = 'import('; `a ${ (await import(`${'node'}:path`)).sep + `}${1}` } import('x')` + p // import('y')";
    assert_eq!(node(nested).result.as_deref(), Some("\"a /}1 import('x')import(\""));
    let error = node("function f() { throw new TypeError('bad') }\nf()").error.unwrap();
    assert!(error.contains("TypeError: bad") && error.contains("eval-"), "{error}");
    assert!(node("throw 5").error.unwrap().contains('5'));
    assert!(node("let (").error.unwrap().contains("SyntaxError"));
    assert!(node("await Promise.reject(new Error('late'))").error.unwrap().contains("late"));
    node("setTimeout(() => { throw new Error('in a callback') }, 1)");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(node("x").result.as_deref(), Some("5"), "the runtime survived");
}

#[test]
fn an_identity_reseeds_node_and_its_crypto_works() {
    require("node");
    let agent = Agent::start();
    let node = |code: &str| agent.eval("node", code).unwrap();
    let spread = node(
        "let s = 0, lo = 1, hi = 0; for (let i = 0; i < 1e5; i++) { const r = Math.random(); s += r; lo = Math.min(lo, r); hi = Math.max(hi, r) } [s / 1e5, lo, hi]",
    );
    let spread: [f64; 3] = serde_json::from_str(&spread.result.unwrap()).unwrap();
    assert!(
        (spread[0] - 0.5).abs() < 0.01 && spread[1] >= 0.0 && spread[1] < 0.001 && spread[2] < 1.0 && spread[2] > 0.999,
        "{spread:?}"
    );
    let mut drawn = Vec::new();
    for (id, seed) in [("sb-a", 1), ("sb-b", 2), ("sb-a", 1)] {
        agent.identify(id, seed);
        drawn.push(node("Math.random()").result.unwrap());
    }
    assert_ne!(drawn[0], drawn[1]);
    assert_eq!(drawn[0], drawn[2]);
    let checks = "const c = require('crypto');
        const filled = c.randomFillSync(new Uint32Array(4), 1);
        const late = await new Promise((r, j) => c.randomBytes(8, (e, b) => e ? j(e) : r(b.length)));
        const ints = Array.from({ length: 1000 }, () => c.randomInt(3, 6));
        [c.randomBytes(5).length, c.randomUUID().length, filled[0], filled[3] !== 0, late,
         Math.min(...ints), Math.max(...ints), crypto.getRandomValues(new Uint8Array(3)).length,
         c.createHash('sha256').update('x').digest().length]";
    let checked = node(checks);
    assert_eq!(checked.result.as_deref(), Some("[5,36,0,true,8,3,5,3,32]"), "{checked:?}");
    assert!(node("require('crypto').randomBytes(-1)").error.unwrap().contains("RangeError"));
}

#[test]
fn unknown_languages_are_named() {
    let agent = Agent::start();
    let failure = agent.eval("cobol", "1").unwrap_err();
    assert_eq!(failure.code, FailureCode::NotFound);
    assert!(failure.message.contains("cobol") && failure.message.contains("python"));
}
