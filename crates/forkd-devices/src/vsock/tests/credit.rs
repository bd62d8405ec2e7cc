//! Much data, many connections, slow readers: what is held stays bounded and nothing is lost.

use std::io::{Read, Write};

use super::{Guest, TRANSMIT, read_to_end};
use crate::test_driver::ALL_FEATURES;
use crate::vsock::connection::BUFFER_SIZE;
use crate::vsock::{Operation, PacketHeader};

#[test]
fn the_guest_is_sent_no_more_than_it_has_room_for() {
    let mut guest = Guest::start(ALL_FEATURES);
    guest.buf_alloc = 10;
    let (mut client, connection) = guest.connect();
    client.write_all(b"0123456789abcdefghij").unwrap();
    assert_eq!(guest.next_packet().1, b"0123456789");
    guest.expect(Operation::CreditRequest);
    guest.assert_quiet();
    guest.forwarded.insert(connection.src_port, 4);
    guest.send(&connection, Operation::CreditUpdate, 0, b"");
    assert_eq!(guest.next_packet().1, b"abcd");
    guest.expect(Operation::CreditRequest);
    guest.assert_quiet();
    guest.forwarded.insert(connection.src_port, 14);
    guest.send(&connection, Operation::CreditUpdate, 0, b"");
    assert_eq!(guest.next_packet().1, b"efghij");
    guest.send(&connection, Operation::CreditRequest, 0, b"");
    assert_eq!(guest.expect(Operation::CreditUpdate).buf_alloc, BUFFER_SIZE);
}

#[test]
fn a_slow_client_slows_the_guest_and_nothing_else() {
    let mut guest = Guest::start(ALL_FEATURES);
    let (mut slow, connection) = guest.connect();
    let (mut quick, other) = guest.connect();
    // Send as much as the credit allows.
    let packet = vec![0x5a; 16 << 10];
    let mut sent = 0_u64;
    let mut told = 0_u32;
    loop {
        while let Some((header, _)) = guest.inbox.pop_front() {
            assert_eq!((header.src_port, header.operation), (connection.src_port, Operation::CreditUpdate as u16));
            told = header.fwd_cnt;
        }
        if sent + packet.len() as u64 > u64::from(told) + u64::from(BUFFER_SIZE) {
            guest.turn();
            if guest.inbox.is_empty() {
                break;
            }
            continue;
        }
        guest.send(&connection, Operation::Data, 0, &packet);
        sent += packet.len() as u64;
        assert!(sent < 64 << 20, "the guest is never told to wait");
    }
    // The other connection is not held up.
    guest.send(&other, Operation::Data, 0, b"hello");
    let mut answer = [0; 5];
    quick.read_exact(&mut answer).unwrap();
    // The slow one loses nothing, once it reads.
    guest.send(&connection, Operation::Shutdown, 3, b"");
    let reader = std::thread::spawn(move || read_to_end(&mut slow));
    while !reader.is_finished() {
        guest.turn();
    }
    let bytes = reader.join().unwrap();
    assert_eq!(bytes.len() as u64, sent);
    assert!(bytes.iter().all(|&byte| byte == 0x5a));
}

#[test]
fn a_guest_that_ignores_its_credit_is_cut_off() {
    let mut guest = Guest::start(ALL_FEATURES);
    let (client, connection) = guest.connect();
    let packet = vec![1; 64 << 10];
    let mut answer = Operation::CreditUpdate as u16;
    for _ in 0..100 {
        guest.send(&connection, Operation::Data, 0, &packet);
        guest.turn();
        answer = guest.inbox.drain(..).next_back().map_or(answer, |(header, _)| header.operation);
        if answer != Operation::CreditUpdate as u16 {
            break;
        }
    }
    assert_eq!(answer, Operation::Reset as u16);
    drop(client);
}

#[test]
fn two_hundred_megabytes_arrive_unharmed_in_each_direction() {
    const TOTAL: usize = 200 << 20;
    const PERIOD: usize = 65_521;
    let pattern: Vec<u8> = (0..2 * PERIOD).map(|index| (index % PERIOD).wrapping_mul(167) as u8).collect();
    let at = |offset: usize, len: usize| &pattern[offset % PERIOD..][..len];

    let mut guest = Guest::start(ALL_FEATURES);
    let (mut client, connection) = guest.connect();
    let source = pattern.clone();
    let writer = std::thread::spawn(move || {
        let mut offset = 0;
        while offset < TOTAL {
            let len = (TOTAL - offset).min(PERIOD - offset % PERIOD);
            client.write_all(&source[offset % PERIOD..][..len]).unwrap();
            offset += len;
        }
        client
    });
    let mut received = 0;
    while received < TOTAL {
        let (header, data) = guest.next_packet();
        if header.operation == Operation::CreditRequest as u16 {
            guest.forwarded.insert(connection.src_port, received as u32);
            guest.send(&connection, Operation::CreditUpdate, 0, b"");
            continue;
        }
        assert_eq!(header.operation, Operation::Data as u16);
        assert!(data == at(received, data.len()), "wrong bytes at {received}");
        let before = received;
        received += data.len();
        if before / (128 << 10) != received / (128 << 10) {
            guest.forwarded.insert(connection.src_port, received as u32);
            guest.send(&connection, Operation::CreditUpdate, 0, b"");
        }
    }
    let mut client = writer.join().unwrap();

    let expected = pattern.clone();
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        let mut offset = 0;
        while offset < TOTAL {
            let count = client.read(&mut buffer).unwrap();
            assert!(count > 0, "the stream ended at {offset}");
            for part in buffer[..count].chunks(PERIOD) {
                assert!(*part == expected[offset % PERIOD..][..part.len()], "wrong bytes at {offset}");
                offset += part.len();
            }
        }
    });
    let mut sent = 0;
    let mut forwarded = 0_u32;
    while sent < TOTAL {
        guest.turn();
        for (header, _) in guest.inbox.drain(..) {
            // A request for credit may be left from the first direction; every header says what was forwarded.
            let expected = [Operation::CreditUpdate as u16, Operation::CreditRequest as u16];
            assert!(expected.contains(&header.operation), "{header:?}");
            forwarded = header.fwd_cnt;
        }
        let credit = BUFFER_SIZE - (sent as u32).wrapping_sub(forwarded);
        let len = (TOTAL - sent).min(credit as usize).min(60_000);
        if len > 0 {
            guest.send(&connection, Operation::Data, 0, at(sent, len));
            sent += len;
        }
    }
    while !reader.is_finished() {
        guest.turn();
    }
    reader.join().unwrap();
}

#[test]
fn hundreds_of_connections_at_once() {
    let mut guest = Guest::start(ALL_FEATURES);
    let mut open = Vec::new();
    for _ in 0..400 {
        open.push(guest.connect());
    }
    for (number, (client, _)) in open.iter_mut().enumerate() {
        client.write_all(format!("client {number}").as_bytes()).unwrap();
    }
    for _ in 0..400 {
        let (header, data) = guest.next_packet();
        guest.send(&header, Operation::Data, 0, &data);
    }
    for (number, (client, _)) in open.iter_mut().enumerate() {
        let expected = format!("client {number}");
        let mut answer = vec![0; expected.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, expected.as_bytes());
    }
}

#[test]
fn refusals_wait_for_buffers_without_piling_up() {
    let mut guest = Guest::probe();
    guest.driver.set_up(ALL_FEATURES);
    // No receive buffers yet: packets that need an answer are not all taken.
    let mut taken = 0;
    for port in 0..1000 {
        let to = PacketHeader { dst_port: port, src_port: 1, ..PacketHeader::default() };
        guest.queue(&to, Operation::Request, 0, b"");
        guest.driver.kick(TRANSMIT);
        while guest.driver.poll() {}
        let count = guest.driver.take_used(TRANSMIT).len();
        if count == 0 {
            break;
        }
        taken += count;
    }
    assert!((200..=300).contains(&taken), "{taken} packets were taken");
    guest.post_buffers();
    let refused_first = taken;
    let mut answers = 0;
    loop {
        guest.turn();
        let before = answers;
        answers += guest.inbox.drain(..).count();
        taken += guest.driver.take_used(TRANSMIT).len();
        if answers == before {
            break;
        }
    }
    assert_eq!(answers, taken, "every packet is answered in the end");
    assert_eq!(taken, refused_first + 1, "the packet that had to wait was taken as well");
}
