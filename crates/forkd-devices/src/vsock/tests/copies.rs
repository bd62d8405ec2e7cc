//! What a forked machine's driver must learn before connections can be requested.

use super::{EVENT, EVENTS_AT, Guest, PORT, read_line};
use crate::test_driver::{ALL_FEATURES, NO_EVENT_IDX};
use crate::vsock::Operation;
use std::io::Read;

#[test]
fn a_copy_requests_connections_only_after_the_reset_was_handled() {
    for mask in [ALL_FEATURES, NO_EVENT_IDX] {
        let mut source = Guest::start(mask);
        let (mut old_client, old) = source.connect();
        let mut copy = source.copy();
        assert!(copy.driver.line.count() >= 1, "the event is signalled before the first vCPU runs");
        let mut client = copy.client(PORT);
        copy.assert_quiet();
        let events = copy.delivered_events();
        assert_eq!(events.len(), 1);
        copy.assert_quiet();
        copy.handle_event(events[0]);
        let request = copy.expect(Operation::Request);
        assert!(request.src_port > old.src_port, "host ports are not used again");
        copy.send(&request, Operation::Response, 0, b"");
        assert_eq!(read_line(&mut client), format!("OK {}\n", request.src_port));
        // The old connection is unknown in the copy and untouched in the source.
        copy.send(&old, Operation::Data, 0, b"?");
        copy.expect(Operation::Reset);
        source.send(&old, Operation::Data, 0, b"!");
        let mut answer = [0];
        old_client.read_exact(&mut answer).unwrap();
    }
}

#[test]
fn a_copy_of_a_copy_waits_for_every_event() {
    let source = Guest::start(ALL_FEATURES);
    let mut copy = source.copy();
    let first = copy.delivered_events();
    let mut grandchild = copy.copy();
    let second = grandchild.delivered_events();
    assert_eq!((first.len(), second.len()), (1, 1));
    let client = grandchild.client(PORT);
    grandchild.assert_quiet();
    grandchild.handle_event(first[0]);
    grandchild.assert_quiet();
    grandchild.handle_event(second[0]);
    grandchild.expect(Operation::Request);
    drop(client);
}

#[test]
fn a_reset_event_waits_for_a_buffer() {
    let mut source = Guest::probe();
    source.driver.set_up(ALL_FEATURES);
    source.post_receive(8);
    let mut copy = source.copy();
    let _client = copy.client(PORT);
    copy.assert_quiet();
    assert!(copy.delivered_events().is_empty());
    let head = copy.driver.add(EVENT, &[(EVENTS_AT, 4, true)]);
    copy.events.insert(head, EVENTS_AT);
    assert!(copy.driver.kick(EVENT));
    let events = copy.delivered_events();
    assert_eq!(events.len(), 1);
    copy.assert_quiet();
    copy.handle_event(events[0]);
    copy.expect(Operation::Request);
}

#[test]
fn a_copy_without_a_driver_has_nothing_to_reset() {
    let source = Guest::probe();
    let mut copy = source.copy();
    assert_eq!(copy.driver.line.count(), 0);
    copy.driver.set_up(ALL_FEATURES);
    copy.post_buffers();
    copy.connect();
}
