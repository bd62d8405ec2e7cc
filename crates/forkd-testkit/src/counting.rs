//! A loop in a guest that counts in memory, in a file with fsync and to a TCP peer outside, in this order.
//!
//! Whenever the guest is copied, this holds of the copy, `memory`, `file` and `answered` being what it has in its
//! memory, on its disk and as answered by the peer, and `received` what the peer had received at that instant:
//!
//! ```text
//! answered ≤ received ≤ file ≤ memory ≤ answered + 1
//! ```
//!
//! A copy goes on until it notices that its connection is gone, which it does in the step that was under way or,
//! if the peer's answer to that had arrived already, in the next one. So it ends with `memory = file =
//! answered + 1`. The instant itself is not known outside, but it is after the branch was asked for and before it
//! was answered: `received before ≤ file` and `answered ≤ received after`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::{Host, Sandbox};

/// The guest's port that the peer connects to.
const PORT: u16 = 7777;

/// How many steps the file remembers, each in a block of its own.
const SLOTS: u64 = 256;

/// The loop. A block is overwritten only after [`SLOTS`] steps, so that one which is missing on a copy's disk, or
/// there too early, is seen.
const LOOP: &str = r#"
import mmap, os, socket, sys
port, slots = int(sys.argv[1]), int(sys.argv[2])
steps = os.open('/run/steps', os.O_RDWR | os.O_CREAT | os.O_TRUNC)
os.ftruncate(steps, 4096)
memory = mmap.mmap(steps, 4096)
file = os.open('/root/steps', os.O_RDWR | os.O_CREAT | os.O_TRUNC)
os.pwrite(file, bytes(slots * 4096), 0)
os.fsync(file)
server = socket.create_server(('127.0.0.1', port))
open('/run/listening', 'w').close()
peer, _ = server.accept()
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
step = 0
try:
    while True:
        step += 1
        text = step.to_bytes(8, 'little')
        memory[0:8] = text
        os.pwrite(file, text, step % slots * 4096)
        os.fsync(file)
        peer.sendall(text)
        answer = peer.recv(8, socket.MSG_WAITALL)
        if answer != text:
            raise EOFError(f'{answer} came back for {step}')
        memory[8:16] = text
finally:
    open('/run/ended', 'w').close()
"#;

/// The loop in one sandbox, and its peer.
#[derive(Debug)]
pub struct CountingLoop<'a> {
    host: &'a Host,
    sandbox: &'a Sandbox<'a>,
    forwarding: Child,
    peer: Arc<Peer>,
}

/// The counter as the peer knows it.
#[derive(Debug, Default)]
struct Peer {
    received: AtomicU64,
    /// Why its connection is gone.
    broke: Mutex<Option<String>>,
}

/// What the peer had received before something was done and when it was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// The counter before.
    pub before: u64,
    /// The counter after.
    pub after: u64,
}

/// What a copy ended with.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Ended {
    memory: u64,
    answered: u64,
    /// The blocks of the file.
    slots: Vec<u64>,
}

impl<'a> CountingLoop<'a> {
    /// Starts the loop in `sandbox`, and its peer here.
    pub fn start(host: &'a Host, sandbox: &'a Sandbox<'a>) -> Result<Self> {
        ensure!(sandbox.exec(&["stat", "-f", "-c", "%T", "/run"])? == "tmpfs", "/run is not memory");
        let (port, slots) = (PORT.to_string(), SLOTS.to_string());
        sandbox.exec_with(&["--detach"], &["python3", "-c", LOOP, &port, &slots])?.success()?;
        host.wait_until("the loop listens", || Ok(sandbox.sh("ls /run")?.contains("listening")))?;
        let mut forwarding = host
            .command(&["port-forward", "-q", sandbox.id().as_str(), &format!("0:{PORT}")])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut address = String::new();
        let stdout = forwarding.stdout.take().context("its output is piped")?;
        let connected = BufReader::new(stdout)
            .read_line(&mut address)
            .map_err(anyhow::Error::from)
            .and_then(|_| TcpStream::connect(address.trim()).with_context(|| format!("cannot connect to {address:?}")));
        let peer = Arc::new(Peer::default());
        // From here on its end ends the forwarding.
        let counting = Self { host, sandbox, forwarding, peer: Arc::clone(&peer) };
        let stream = connected?;
        std::thread::spawn(move || {
            let error = peer.answer_for_ever(stream).err().map(|error| format!("{error:#}"));
            *peer.broke.lock().unwrap_or_else(PoisonError::into_inner) = error;
        });
        counting.goes_on()?;
        Ok(counting)
    }

    /// Does something at a random moment.
    pub fn around<T>(&self, action: impl FnOnce() -> Result<T>) -> Result<(T, Received)> {
        std::thread::sleep(Duration::from_millis(random()? % 300));
        let before = self.received();
        let done = action()?;
        Ok((done, Received { before, after: self.received() }))
    }

    /// Fails unless the loop goes on with the same connection.
    pub fn goes_on(&self) -> Result<()> {
        let before = self.received();
        self.host.wait_until("the loop goes on", || {
            if let Some(why) = self.broke() {
                // A guest that is lost is another matter, and says so here.
                self.sandbox.exec(&["true"])?;
                bail!("the loop lost its peer: {why}");
            }
            Ok(self.received() >= before + 3)
        })
    }

    /// Why the connection is gone, if it is.
    pub fn broke(&self) -> Option<String> {
        self.peer.broke.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Fails unless `copy`, made while the peer received what `received` says, agrees with itself and the peer.
    pub fn check(&self, copy: &Sandbox<'_>, received: Received) -> Result<()> {
        let ended = self.ended(copy)?;
        ended.agrees(received).with_context(|| format!("{} disagrees: {ended:?}, {received:?}", copy.id()))
    }

    /// What the loop in `copy` came to; waits for its end.
    fn ended(&self, copy: &Sandbox<'_>) -> Result<Ended> {
        self.host.wait_until("the copy's loop notices that its connection is gone", || {
            Ok(copy.sh("ls /run")?.contains("ended"))
        })?;
        // From the disk, not from the page cache that came with the memory.
        let memory = copy.sh("sync; echo 3 > /proc/sys/vm/drop_caches; od -An -v -tu8 -N16 /run/steps")?;
        let (memory, answered) = memory.trim().split_once(' ').context("two numbers")?;
        let slots = copy.eval(&format!(
            "(lambda os, n: [int.from_bytes(os.pread(n, 8, slot * 4096), 'little') for slot in range({SLOTS})])\
             (__import__('os'), __import__('os').open('/root/steps', 0))"
        ))?;
        let slots = serde_json::from_str(&slots).with_context(|| format!("a list of numbers: {slots}"))?;
        Ok(Ended { memory: memory.trim().parse()?, answered: answered.trim().parse()?, slots })
    }

    fn received(&self) -> u64 {
        self.peer.received.load(Ordering::SeqCst)
    }
}

impl Drop for CountingLoop<'_> {
    fn drop(&mut self) {
        let _ = self.forwarding.kill();
        let _ = self.forwarding.wait();
    }
}

impl Peer {
    /// Answers every step, each of which must follow the one before.
    fn answer_for_ever(&self, mut stream: TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        loop {
            let mut text = [0; 8];
            stream.read_exact(&mut text)?;
            let (step, expected) = (u64::from_le_bytes(text), self.received.load(Ordering::SeqCst) + 1);
            ensure!(step == expected, "step {step} came where {expected} was due");
            // Before it is answered: what is answered has been received.
            self.received.store(step, Ordering::SeqCst);
            stream.write_all(&text)?;
        }
    }
}

impl Ended {
    /// See the module.
    fn agrees(&self, received: Received) -> Result<()> {
        let Self { memory, answered, .. } = *self;
        ensure!(memory == answered + 1, "memory has {memory}, the peer had answered {answered}");
        let newest = |slot: u64| memory.saturating_sub((memory + SLOTS - slot) % SLOTS);
        for (slot, &found) in (0..).zip(&self.slots) {
            let expected = newest(slot);
            ensure!(found == expected, "memory has {memory}, but block {slot} of the file {found} and not {expected}");
        }
        ensure!(self.slots.len() as u64 == SLOTS, "the file has {} blocks", self.slots.len());
        let Received { before, after } = received;
        ensure!(before <= memory, "the peer had received {before}, and the file has only {memory}");
        ensure!(answered <= after, "{answered} was answered, and the peer has received only {after}");
        Ok(())
    }
}

fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A copy that ended as it should, in step `memory`.
    fn sound(memory: u64) -> Ended {
        let slots = (0..SLOTS).map(|slot| (0..=memory).rev().find(|step| step % SLOTS == slot).unwrap_or(0)).collect();
        Ended { memory, answered: memory - 1, slots }
    }

    #[test]
    fn every_disagreement_is_seen() {
        let received = Received { before: 598, after: 600 };
        for memory in [1, SLOTS - 1, SLOTS, SLOTS + 1, 3 * SLOTS + 7] {
            let received = Received { before: memory - 1, after: memory };
            sound(memory).agrees(received).unwrap_or_else(|error| panic!("{memory}: {error}"));
        }
        let wrong = |change: fn(&mut Ended)| {
            let mut ended = sound(600);
            change(&mut ended);
            ended.agrees(received).expect_err("it disagrees").to_string()
        };
        let slot = |step: u64| (step % SLOTS) as usize;
        assert!(slot(601) == 89 && slot(599) == 87);
        assert!(wrong(|ended| ended.slots[89] = 601).contains("block 89"), "the disk is of a later instant");
        assert!(wrong(|ended| ended.slots[87] = 599 - SLOTS).contains("block 87"), "a synced write is lost");
        assert!(wrong(|ended| ended.answered = 600).contains("answered 600"));
        assert!(wrong(|ended| ended.slots.truncate(9)).contains("9 blocks"));
        let late = |before, after| sound(600).agrees(Received { before, after }).expect_err("it disagrees").to_string();
        assert!(late(601, 603).contains("had received 601"), "what the peer had is not in the copy");
        assert!(late(590, 598).contains("only 598"), "the copy has what was never answered");
    }
}
