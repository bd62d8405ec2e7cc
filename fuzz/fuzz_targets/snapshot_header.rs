//! The files of a snapshot as a stranger may send them: machine state, layer header, description.
#![no_main]

use std::io::Write;

use forkd_memory::Layer;
use forkd_vmm::state::{CURRENT, MAGIC, MachineState};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = MachineState::decode(bytes);
    // A stranger can compute a digest too: what lies behind it must be as safe to read.
    let length = (bytes.len() as u32).to_le_bytes();
    let sealed = [&MAGIC, &CURRENT.to_le_bytes()[..], &length, blake3::hash(bytes).as_bytes(), bytes].concat();
    if let Ok(state) = MachineState::decode(&sealed) {
        let (again, _) = state.encode();
        assert_eq!(MachineState::decode(&again).expect("an encoded state can be read").config, state.config);
    }
    let file = rustix::fs::memfd_create(c"layer", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    let mut file = std::fs::File::from(file);
    file.write_all(bytes).expect("a memfd takes what it is given");
    if let Ok(layer) = Layer::open(file) {
        // An index that was accepted describes only pages that the layer has.
        assert!(layer.data().iter().chain(layer.zero()).all(|run| run.end() <= layer.pages().0));
    }
});
