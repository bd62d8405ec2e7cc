//! Frames of the guest agent: any bytes are read without panic, and what is read can be written again.
#![no_main]

use forkd_proto::frame::Frame;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Ok(frame) = Frame::read_from(&mut rest) {
        let wire = frame.encode();
        let again = Frame::read_from(&mut wire.as_slice()).expect("an encoded frame can be read");
        assert_eq!(again, frame);
    }
});
