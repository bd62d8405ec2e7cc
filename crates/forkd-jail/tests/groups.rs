//! Real groups with real processes in them.
//!
//! They need root and a cgroup v2 hierarchy with the memory and pids controllers, as in `forkd machine`; elsewhere
//! they are skipped. The processes are this very program, told by its environment what to do.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use forkd_jail::cgroup::{Group, GroupLimits, Tree};
use forkd_types::ByteSize;
use libtest_mimic::{Arguments, Failed, Trial};

/// What this program does instead of testing.
const ROLE: &str = "FORKD_JAIL_ROLE";

type Outcome = Result<(), Failed>;
type Test = fn(&Tree) -> Outcome;

fn main() {
    if let Ok(role) = std::env::var(ROLE) {
        return play(&role);
    }
    let arguments = Arguments::from_args();
    let missing = Tree::prepare(&root("probe"), Path::new("/")).err();
    remove(&root("probe"));
    if let Some(reason) = &missing {
        let _ = writeln!(std::io::stderr(), "SKIPPED, every test of this file: {reason}");
    }
    let trials: [(&'static str, Test); 6] = [
        ("a_process_beyond_its_memory_is_ended_and_counted_and_others_are_not", memory),
        ("processes_and_threads_are_counted_together", processes),
        ("a_share_of_a_processor_is_what_is_had", processor),
        ("what_is_left_in_a_group_is_ended_with_it", stragglers),
        ("a_sweep_and_a_drop_leave_what_is_in_use", sweep),
        ("a_group_left_by_another_is_made_anew", leftovers),
    ];
    let trial = |(name, test): (&'static str, Test)| {
        let run = move || {
            let root = root(name);
            let tree = Tree::prepare(&root, Path::new("/"))?;
            let outcome = test(&tree);
            drop(tree);
            remove(&root);
            outcome
        };
        Trial::test(name, run).with_ignored_flag(missing.is_some())
    };
    libtest_mimic::run(&arguments, trials.into_iter().map(trial).collect()).exit();
}

fn root(name: &str) -> PathBuf {
    PathBuf::from(format!("/sys/fs/cgroup/forkd-jail-{}-{name}", std::process::id()))
}

fn remove(root: &Path) {
    for kind in ["sandboxes", "zygotes", "helpers", ""] {
        let _ = std::fs::remove_dir(root.join(kind));
    }
}

/// Waits for a line, does its part, says how far it came.
fn play(role: &str) {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("a line to begin");
    let done = match role {
        "eat" => {
            let eaten = vec![1_u8; 128 << 20];
            eaten.iter().step_by(4096).map(|byte| usize::from(*byte)).sum()
        }
        "multiply" => {
            let begun: Vec<_> =
                (0..64).map_while(|_| std::thread::Builder::new().spawn(std::thread::park).ok()).collect();
            begun.len()
        }
        "spin" => {
            let end = Instant::now() + Duration::from_secs(1);
            while Instant::now() < end {
                std::hint::spin_loop();
            }
            0
        }
        _ => loop {
            std::thread::park();
        },
    };
    let _ = writeln!(std::io::stdout(), "{done}");
    std::process::exit(0);
}

/// A process of `role` in `group`, which has not begun.
struct Player(Child);

impl Player {
    fn in_group(role: &str, group: &Group) -> Result<Self, Failed> {
        let program = std::env::current_exe()?;
        let child = Command::new(program).env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let player = Self(child);
        group.take_in(player.pid())?;
        Ok(player)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Lets it begin, and waits for its end.
    fn play(&mut self) -> Result<(ExitStatus, String), Failed> {
        self.0.stdin.take().ok_or("it plays once")?.write_all(b"\n")?;
        let mut line = String::new();
        BufReader::new(self.0.stdout.take().ok_or("it plays once")?).read_line(&mut line)?;
        Ok((self.0.wait()?, line.trim().to_owned()))
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn memory(tree: &Tree) -> Outcome {
    let limits = GroupLimits { memory_max: Some(ByteSize::mib(32)), swap_max: Some(ByteSize(0)), ..Default::default() };
    let (small, large) = (tree.sandbox("small", &limits)?, tree.sandbox("large", &GroupLimits::default())?);
    let mut bystander = Player::in_group("wait", &small)?;
    let (ended, _) = Player::in_group("eat", &small)?.play()?;
    assert_eq!(ended.signal(), Some(9), "{ended}");
    let events = small.memory_events();
    assert!(events.oom > 0 && events.oom_kill > 0, "{events:?}");
    assert_eq!(bystander.0.wait()?.signal(), Some(9), "the whole group ends");
    let (ended, _) = Player::in_group("eat", &large)?.play()?;
    assert!(ended.success(), "{ended}");
    assert_eq!(large.memory_events(), Default::default());
    Ok(())
}

fn processes(tree: &Tree) -> Outcome {
    let limits = GroupLimits { pids_max: Some(16), ..Default::default() };
    let group = tree.sandbox("few", &limits)?;
    let (_, threads) = Player::in_group("multiply", &group)?.play()?;
    assert_eq!(threads, "15", "and the one that began");
    Ok(())
}

fn processor(tree: &Tree) -> Outcome {
    let limits = GroupLimits { cpu_max_millis: Some(250), cpu_weight: Some(50), ..Default::default() };
    let group = tree.sandbox("slow", &limits)?;
    Player::in_group("spin", &group)?.play()?;
    let stat = std::fs::read_to_string(group.path().join("cpu.stat"))?;
    let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).ok_or("no usage")?;
    let used = Duration::from_micros(used.parse()?);
    assert!(used < Duration::from_millis(600), "{used:?} of a second");
    Ok(())
}

fn stragglers(tree: &Tree) -> Outcome {
    let group = tree.sandbox("left", &GroupLimits::default())?;
    let mut left = Player::in_group("wait", &group)?;
    let path = group.path().to_owned();
    group.dissolve()?;
    assert!(!path.exists());
    assert_eq!(left.0.wait()?.signal(), Some(9));
    Ok(())
}

fn sweep(tree: &Tree) -> Outcome {
    let group = tree.sandbox("used", &GroupLimits::default())?;
    let player = Player::in_group("wait", &group)?;
    let path = group.path().to_owned();
    drop(group);
    let empty = tree.zygote("empty")?.path().to_owned();
    std::fs::create_dir(&empty)?;
    tree.sweep();
    assert!(path.exists() && !empty.exists());
    let found = tree.group_of(player.pid()).ok_or("not found by its process")?;
    assert_eq!(found.path(), path);
    assert!(tree.remaining("used").is_some() && tree.remaining("other").is_none());
    drop(player);
    drop(found);
    assert!(!path.exists(), "nobody is in it any more");
    Ok(())
}

fn leftovers(tree: &Tree) -> Outcome {
    let limits = GroupLimits { pids_max: Some(16), ..Default::default() };
    std::mem::forget(tree.sandbox("again", &limits)?);
    let again = tree.sandbox("again", &GroupLimits::default())?;
    assert_eq!(std::fs::read_to_string(again.path().join("pids.max"))?.trim(), "max");
    Ok(())
}
