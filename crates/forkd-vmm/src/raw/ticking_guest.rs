//! The guest that runs while it is branched, and tells what it noticed of that.
//!
//! It reads the processor's clock as fast as it can and keeps the longest time between two readings, its *gap*:
//! whatever keeps it from running, be it a branch, a page fault or the host's other programs, it sees as that. It
//! also writes to one page, as every program does to its stack; or to all of its private memory, [`TOUCHED`] pages
//! between two readings, so that all the faults on them are part of the gap.
//!
//! A [`Watch`] follows it from outside, through `/proc/PID/mem`: nothing but the guest's own instructions takes
//! part in what the guest measures. It asks for a new window by writing a number into the guest's page and reads
//! what the guest then says of the last one. The guest looks for such a number *before* it looks at its clock, so
//! a gap that lasts while the number is written belongs to the window that the number closes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use forkd_kvm::{Vcpu, kvm_regs};
use forkd_memory::{GuestMemory, MemoryLayout};
use forkd_types::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress};

use super::guest::Failure;
use super::waiting_guest::PRINT_NEWLINE;
use crate::address_map::{BOOT_STACK, HIGH_MEMORY};
use crate::boot::enter_protected_mode;

/// Where the code is.
const CODE: u64 = 0x1000;
/// The page that the guest and its watch share.
const SHARED: u64 = 0x3000;
/// Pages that a guest that writes to its memory writes to between two looks at the clock.
const TOUCHED: usize = 16;

/// Offsets in the shared page, of 4-byte words unless something else is said.
mod word {
    /// Readings so far.
    pub(super) const TICKS: u32 = 0x00;
    /// The longest gap of this window.
    pub(super) const LONGEST: u32 = 0x04;
    /// The clock at its end, 8 bytes.
    pub(super) const LONGEST_AT: u32 = 0x08;
    /// Number of the window that the watch wants, which alone writes here.
    pub(super) const WANTED: u32 = 0x10;
    /// Number of the window that the guest is in; written when the words below are those of the last.
    pub(super) const WINDOW: u32 = 0x14;
    /// What was at [`LONGEST`] and [`LONGEST_AT`], and the clock, 8 bytes, when the last window ended.
    pub(super) const CLOSED_LONGEST: u32 = 0x18;
    pub(super) const CLOSED_LONGEST_AT: u32 = 0x20;
    pub(super) const CLOSED_AT: u32 = 0x28;
    /// Readings until then.
    pub(super) const CLOSED_TICKS: u32 = 0x30;
    pub(super) const END: usize = 0x34;
}

/// 32-bit code. Of the registers, `edi:esi` hold the clock at the last reading, `ebp` the number of the window, `esp`
/// (there is no stack, and no interrupt that would need one) the number that is wanted, and `ecx` the page that is
/// written to next. `touched` is the memory that is written to.
fn program(touched: Option<std::ops::Range<u32>>) -> Vec<u8> {
    let at = |offset: u32| (SHARED as u32 + offset).to_le_bytes();
    // An instruction that names a word of the shared page.
    let with = |code: &[u8], offset: u32| [code, &at(offset)[..]].concat();
    let jump = |code: &[u8], from: usize, to: usize| {
        let distance = to as i32 - (from + code.len() + 4) as i32;
        [code, &distance.to_le_bytes()[..]].concat()
    };
    let copy = |from: u32, to: u32| [with(&[0xa1], from), with(&[0xa3], to)].concat(); // mov eax, [from]; mov [to], eax

    let mut code = PRINT_NEWLINE.to_vec();
    code.extend([0x0f, 0x31, 0x89, 0xc6, 0x89, 0xd7]); // rdtsc; mov esi, eax; mov edi, edx
    code.extend([0x31, 0xed]); //                         xor ebp, ebp: the watch may have written already
    if let Some(touched) = &touched {
        code.extend([&[0xb9][..], &touched.start.to_le_bytes()].concat()); // mov ecx, first page
    }
    let tick = code.len();
    if let Some(touched) = &touched {
        for _ in 0..TOUCHED {
            code.extend([0x89, 0x31]); // mov [ecx], esi
            code.extend([&[0x81, 0xc1][..], &(PAGE_SIZE as u32).to_le_bytes()].concat()); // add ecx, 4096
        }
        code.extend([&[0x81, 0xf9][..], &touched.end.to_le_bytes()].concat()); // cmp ecx, end
        code.extend([0x72, 5]); //                                                jb over the next
        code.extend([&[0xb9][..], &touched.start.to_le_bytes()].concat()); //     mov ecx, first page
    }
    code.extend(with(&[0xff, 0x05], word::TICKS)); // inc dword [TICKS]
    code.extend(with(&[0x8b, 0x25], word::WANTED)); // mov esp, [WANTED]
    code.extend([0x0f, 0x31]); //                     rdtsc
    code.extend([0x89, 0xc3, 0x29, 0xf3]); //         mov ebx, eax; sub ebx, esi
    code.extend([0x89, 0xc6, 0x89, 0xd0]); //         mov esi, eax; mov eax, edx
    code.extend([0x19, 0xf8, 0x89, 0xd7]); //         sbb eax, edi; mov edi, edx
    code.extend([0x74, 5]); //                        je over the next: the upper half of the gap is zero
    code.extend([0xbb, 0xff, 0xff, 0xff, 0xff]); //   mov ebx, the longest gap that can be written down
    code.extend(with(&[0x3b, 0x1d], word::LONGEST)); // cmp ebx, [LONGEST]
    let longer = [
        with(&[0x89, 0x1d], word::LONGEST),        // mov [LONGEST], ebx
        with(&[0x89, 0x35], word::LONGEST_AT),     // mov [LONGEST_AT], esi
        with(&[0x89, 0x3d], word::LONGEST_AT + 4), // mov [LONGEST_AT + 4], edi
    ]
    .concat();
    code.extend([0x76, longer.len() as u8]); // jbe over the next
    code.extend(longer);
    code.extend([0x39, 0xe5]); //                         cmp ebp, esp
    code.extend(jump(&[0x0f, 0x84], code.len(), tick)); // je tick
    code.extend(copy(word::LONGEST, word::CLOSED_LONGEST));
    code.extend(copy(word::LONGEST_AT, word::CLOSED_LONGEST_AT));
    code.extend(copy(word::LONGEST_AT + 4, word::CLOSED_LONGEST_AT + 4));
    code.extend(copy(word::TICKS, word::CLOSED_TICKS));
    code.extend(with(&[0x89, 0x35], word::CLOSED_AT)); //     mov [CLOSED_AT], esi
    code.extend(with(&[0x89, 0x3d], word::CLOSED_AT + 4)); // mov [CLOSED_AT + 4], edi
    code.extend([0x31, 0xc0]); //                             xor eax, eax
    code.extend(with(&[0xa3], word::LONGEST)); //             mov [LONGEST], eax
    code.extend([0x89, 0xe5]); //                             mov ebp, esp
    code.extend(with(&[0x89, 0x2d], word::WINDOW)); //        mov [WINDOW], ebp
    code.extend(jump(&[0xe9], code.len(), tick)); //          jmp tick
    code
}

/// Writes the guest into `memory` and points `vcpu`, which has not run yet, at it. It writes to the private memory
/// above 1 MiB, of which there is up to the offset `touched_bytes`, if that is asked for.
pub(super) fn load(
    memory: &GuestMemory,
    layout: MemoryLayout,
    vcpu: &Vcpu,
    touched_bytes: Option<u64>,
) -> Result<(), Failure> {
    // Whole strides, so that the last does not end behind the memory.
    let stride = TOUCHED as u64 * PAGE_SIZE;
    let low = layout.regions().next().map_or(0, |region| region.bytes);
    let touched = touched_bytes.map(|bytes| {
        let strides = bytes.min(low).saturating_sub(HIGH_MEMORY) / stride;
        HIGH_MEMORY as u32..(HIGH_MEMORY + strides.max(1) * stride) as u32
    });
    memory.write_slice(&program(touched), GuestAddress(CODE))?;
    enter_protected_mode(memory, vcpu)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: BOOT_STACK, rflags: 2, ..Default::default() })?;
    Ok(())
}

/// How long a guest may take to begin a new window.
const DEADLINE: Duration = Duration::from_secs(20);
/// How often is looked whether it has.
const LOOK: Duration = Duration::from_micros(200);
/// How long the guest's clock is compared with the host's.
const CALIBRATION: Duration = Duration::from_millis(200);
/// How far two such comparisons may be apart.
const STEADY: f64 = 0.02;

/// What the guest noticed in one window.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// The longest time between two looks at its clock.
    pub gap: Duration,
    /// When that ended, from the beginning of the window.
    pub gap_at: Duration,
    /// How long the window was.
    pub lasted: Duration,
    /// How often the guest looked at its clock.
    pub ticks: u32,
}

/// Follows a ticking guest from another process.
#[derive(Debug)]
pub struct Watch {
    /// The memory of the guest's monitor.
    memory: File,
    /// Where the shared page is in it.
    shared: u64,
    number: u32,
    /// The clock and the readings when this window began.
    began: (u64, u32),
    /// Ticks of the guest's clock a second.
    hertz: f64,
}

impl Watch {
    /// Follows the guest whose memory begins at `guest_memory` in the process `pid`. Finds out how fast the guest's
    /// clock goes, and that it is steady.
    pub(super) fn begin(pid: i32, guest_memory: u64) -> Result<Self, Failure> {
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        let (number, began, hertz) = (0, (0, 0), 1.0);
        let mut watch = Self { memory, shared: guest_memory + SHARED, number, began, hertz };
        let rates = [watch.rate()?, watch.rate()?];
        if (rates[0] / rates[1] - 1.0).abs() > STEADY {
            let [first, second] = rates.map(|rate| rate / 1e6);
            return Err(format!("the guest's clock is not steady: it went at {first:.1} and at {second:.1} MHz").into());
        }
        watch.hertz = (rates[0] + rates[1]) / 2.0;
        watch.mark()?;
        Ok(watch)
    }

    /// How fast the guest's clock goes, in Hz.
    pub fn hertz(&self) -> f64 {
        self.hertz
    }

    /// Begins a new window; what the guest noticed in the last.
    pub fn mark(&mut self) -> Result<Window, Failure> {
        self.number += 1;
        let write = self.memory.write_all_at(&self.number.to_le_bytes(), self.shared + u64::from(word::WANTED));
        write.map_err(|error| format!("cannot write to the guest's memory: {error}"))?;
        let until = Instant::now() + DEADLINE;
        let mut words = [0; word::END];
        loop {
            self.memory
                .read_exact_at(&mut words, self.shared)
                .map_err(|error| format!("cannot read the guest's memory: {error}"))?;
            if u32_at(&words, word::WINDOW) == self.number {
                break;
            }
            if Instant::now() > until {
                return Err(format!("the guest did not tick for {} s", DEADLINE.as_secs()).into());
            }
            std::thread::sleep(LOOK);
        }
        let (clock, ticks) = (u64_at(&words, word::CLOSED_AT), u32_at(&words, word::CLOSED_TICKS));
        let began = std::mem::replace(&mut self.began, (clock, ticks));
        let time = |clocks: u64| Duration::from_secs_f64(clocks as f64 / self.hertz);
        Ok(Window {
            gap: time(u32_at(&words, word::CLOSED_LONGEST).into()),
            gap_at: time(u64_at(&words, word::CLOSED_LONGEST_AT).wrapping_sub(began.0)),
            lasted: time(clock.wrapping_sub(began.0)),
            ticks: ticks.wrapping_sub(began.1),
        })
    }

    /// The rate of the guest's clock over a stretch, in Hz.
    fn rate(&mut self) -> Result<f64, Failure> {
        let first = self.moment()?;
        std::thread::sleep(CALIBRATION);
        let last = self.moment()?;
        Ok(last.0.wrapping_sub(first.0) as f64 / (last.1 - first.1).as_secs_f64())
    }

    /// The guest's clock, and the host's at the same moment: of some attempts the one that took the least time.
    fn moment(&mut self) -> Result<(u64, Instant), Failure> {
        let mut best: Option<(Duration, u64, Instant)> = None;
        for _ in 0..10 {
            let asked = Instant::now();
            self.mark()?;
            let took = asked.elapsed();
            if best.is_none_or(|(least, ..)| took < least) {
                best = Some((took, self.began.0, asked + took / 2));
            }
        }
        let (_, clock, moment) = best.expect("there was an attempt");
        Ok((clock, moment))
    }
}

fn u32_at(words: &[u8; word::END], offset: u32) -> u32 {
    let at = offset as usize;
    u32::from_le_bytes(words[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(words: &[u8; word::END], offset: u32) -> u64 {
    u64::from(u32_at(words, offset)) | u64::from(u32_at(words, offset + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_before_the_page_it_shares_and_jumps_back_to_its_loop() {
        for touched in [None, Some(0x10_0000..0x20_0000)] {
            let code = program(touched.clone());
            assert!(CODE + code.len() as u64 <= SHARED);
            // Both jumps go to the same place, which is that behind the last instruction before the loop.
            let end = code.len();
            let last = i32::from_le_bytes(code[end - 4..].try_into().expect("four bytes"));
            let target = (end as i32 + last) as usize;
            let je = code.windows(2).position(|pair| pair == [0x0f, 0x84]).expect("a conditional jump");
            let distance = i32::from_le_bytes(code[je + 2..je + 6].try_into().expect("four bytes"));
            assert_eq!((je as i32 + 6 + distance) as usize, target);
            let expected: &[u8] = if touched.is_some() { &[0x89, 0x31] } else { &[0xff, 0x05] };
            assert_eq!(&code[target..target + 2], expected);
        }
    }
}
