//! One connection at a time: greeting, refusal, half-close, and ends of all kinds.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::{CID, Guest, PORT, TRANSMIT, read_to_end};
use crate::test_driver::{ALL_FEATURES, NO_EVENT_IDX};
use crate::vsock::{Operation, PacketHeader};

#[test]
fn bytes_flow_both_ways() {
    for mask in [ALL_FEATURES, NO_EVENT_IDX] {
        let mut guest = Guest::start(mask);
        let (mut client, connection) = guest.connect();
        client.write_all(b"to the guest").unwrap();
        let (header, data) = guest.next_packet();
        assert_eq!((header.operation, data.as_slice()), (Operation::Data as u16, &b"to the guest"[..]));
        guest.send(&connection, Operation::Data, 0, b"to the client");
        let mut answer = [0; 13];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"to the client");
        guest.assert_quiet();
    }
}

#[test]
fn what_a_client_sends_with_its_greeting_is_not_lost() {
    let mut guest = Guest::start(ALL_FEATURES);
    let mut client = UnixStream::connect(guest.path()).unwrap();
    client.write_all(b"CONN").unwrap();
    guest.assert_quiet();
    client.write_all(b"ECT 1024\nfirst bytes").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let request = guest.expect(Operation::Request);
    guest.assert_quiet();
    guest.send(&request, Operation::Response, 0, b"");
    let (_, data) = guest.next_packet();
    assert_eq!(data, b"first bytes");
    assert_eq!(guest.expect(Operation::Shutdown).flags, 2);
}

#[test]
fn a_port_that_nobody_listens_on_is_a_closed_socket() {
    let mut guest = Guest::start(ALL_FEATURES);
    let mut client = guest.client(7);
    let request = guest.expect(Operation::Request);
    guest.send(&request, Operation::Reset, 0, b"");
    assert_eq!(read_to_end(&mut client), b"");
    guest.assert_quiet();
}

#[test]
fn without_a_driver_clients_are_turned_away() {
    let mut guest = Guest::probe();
    let mut client = guest.client(PORT);
    while guest.driver.poll() {}
    assert_eq!(read_to_end(&mut client), b"");
    // One that has not greeted yet may wait for the driver.
    let mut early = UnixStream::connect(guest.path()).unwrap();
    while guest.driver.poll() {}
    guest.driver.set_up(ALL_FEATURES);
    guest.post_buffers();
    early.write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(guest.expect(Operation::Request).dst_port, 5);
}

#[test]
fn bad_greetings_are_closed() {
    let mut guest = Guest::start(ALL_FEATURES);
    for bad in ["GET / HTTP/1.1\r\n", "CONNECT x\n", "CONNECT 00000000000000000000000000000001\n"] {
        let mut client = UnixStream::connect(guest.path()).unwrap();
        client.write_all(bad.as_bytes()).unwrap();
        guest.assert_quiet();
        let mut answer = [0];
        assert!(!matches!(client.read(&mut answer), Ok(1..)), "{bad:?}");
    }
}

#[test]
fn either_side_may_end_its_direction_first() {
    let mut guest = Guest::start(ALL_FEATURES);
    let (mut client, connection) = guest.connect();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.next_packet().1, b"question");
    assert_eq!(guest.expect(Operation::Shutdown).flags, 2, "the client sends no more");
    guest.send(&connection, Operation::Data, 0, b"answer");
    guest.send(&connection, Operation::Shutdown, 3, b"");
    assert_eq!(read_to_end(&mut client), b"answer");
    guest.expect(Operation::Reset);

    let (mut client, connection) = guest.connect();
    guest.send(&connection, Operation::Data, 0, b"last words");
    guest.send(&connection, Operation::Shutdown, 2, b"");
    assert_eq!(read_to_end(&mut client), b"last words");
    client.write_all(b"heard").unwrap();
    assert_eq!(guest.next_packet().1, b"heard");
    drop(client);
    let last = guest.expect(Operation::Shutdown);
    assert_eq!(last.flags, 3);
    guest.send(&connection, Operation::Reset, 0, b"");
    guest.assert_quiet();
}

#[test]
fn a_client_that_goes_away_is_reported_after_its_last_bytes() {
    let mut guest = Guest::start(ALL_FEATURES);
    let (mut client, connection) = guest.connect();
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(guest.next_packet().1, b"bye");
    assert_eq!(guest.expect(Operation::Shutdown).flags, 3);
    // What the guest had under way is answered as for any connection that is not there.
    guest.send(&connection, Operation::Data, 0, b"late");
    guest.expect(Operation::Reset);

    // Before the guest has answered the request.
    let client = guest.client(PORT);
    let request = guest.expect(Operation::Request);
    drop(client);
    guest.expect(Operation::Reset);
    guest.send(&request, Operation::Response, 0, b"");
    guest.expect(Operation::Reset);

    // While the guest is sending.
    let (client, connection) = guest.connect();
    drop(client);
    guest.send(&connection, Operation::Data, 0, b"into the void");
    assert_eq!(guest.expect(Operation::Shutdown).flags, 3);
    guest.assert_quiet();
}

#[test]
fn a_guest_that_receives_no_more_stops_the_client() {
    let mut guest = Guest::start(ALL_FEATURES);
    let (mut client, connection) = guest.connect();
    guest.send(&connection, Operation::Shutdown, 1, b"");
    guest.turn();
    assert!(client.write_all(b"x").is_err());
    guest.send(&connection, Operation::Data, 0, b"still talking");
    let mut answer = [0; 13];
    client.read_exact(&mut answer).unwrap();
    drop(client);
    assert_eq!(guest.expect(Operation::Shutdown).flags, 3);
}

#[test]
fn connections_from_the_guest_are_refused() {
    let mut guest = Guest::start(ALL_FEATURES);
    let to = PacketHeader { dst_port: 99, src_port: 1, ..PacketHeader::default() };
    guest.send(&to, Operation::Request, 0, b"");
    let reset = guest.expect(Operation::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (1, 99));
    // A reset is never answered, nor is a packet for another host.
    guest.send(&to, Operation::Reset, 0, b"");
    let mut other = PacketHeader { src_cid: CID, dst_cid: 9, socket_type: 1, operation: 1, ..to };
    guest.queue_raw(&other.encode(), b"");
    other.dst_cid = 2;
    other.src_cid = CID + 1;
    guest.queue_raw(&other.encode(), b"");
    guest.queue_raw(&[0; 10], b"");
    guest.driver.kick(TRANSMIT);
    guest.assert_quiet();
    // Datagrams are refused as well.
    other.src_cid = CID;
    other.socket_type = 3;
    guest.queue_raw(&other.encode(), b"");
    guest.driver.kick(TRANSMIT);
    guest.expect(Operation::Reset);
}

#[test]
fn a_reset_closes_the_clients() {
    let mut guest = Guest::start(ALL_FEATURES);
    let (mut client, _) = guest.connect();
    guest.driver.set_up(ALL_FEATURES);
    assert_eq!(read_to_end(&mut client), b"");
    guest.buffers.clear();
    guest.events.clear();
    guest.post_buffers();
    guest.connect();
}
