//! Carries bytes between a client and a TCP port of the guest.
//!
//! The port is looked for where servers listen: on the two loopback addresses, which every server that listens on
//! all addresses has too, then on the guest's own address, for one that listens there only.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use forkd_proto::agent::Response;
use forkd_proto::frame::{Frame, FrameError, Kind};

use crate::connection::Connection;
use crate::failure;

const CHUNK: usize = 64 << 10;

/// Connects to `port` and carries both directions until both have ended.
pub fn serve(connection: Connection, port: u16) -> Result<(), FrameError> {
    let server = match connect(port) {
        Ok(server) => server,
        Err(error) => {
            let told =
                connection.fail(failure::from_io(format_args!("cannot connect to port {port} of the guest"), &error));
            connection.close_gently();
            return told;
        }
    };
    connection.respond(&Response::Done)?;
    std::thread::scope(|scope| {
        let outward = std::thread::Builder::new()
            .name("tunnel".into())
            .stack_size(256 << 10)
            .spawn_scoped(scope, || send_to_client(&server, &connection));
        match outward {
            Ok(_) => send_to_server(&connection, &server),
            Err(_) => connection.cut(),
        }
    });
    connection.close_gently();
    Ok(())
}

/// Connects to the first address that has the port; the error is that of the first.
fn connect(port: u16) -> std::io::Result<TcpStream> {
    let limit = Duration::from_secs(10);
    let mut outcome = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), limit);
    if outcome.is_err() {
        let others = [IpAddr::V6(Ipv6Addr::LOCALHOST)].into_iter().chain(own_address());
        let found = others.filter_map(|address| TcpStream::connect_timeout(&(address, port).into(), limit).ok()).next();
        outcome = found.map_or(outcome, Ok);
    }
    let server = outcome?;
    server.set_nodelay(true)?;
    Ok(server)
}

/// The address that the guest would speak from to the outside, if it has a way there. Nothing is sent to find out.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // An address for documentation, which is routed like any other.
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_loopback() && !own.is_unspecified()).then_some(own)
}

/// Client to server, until the client half-closes. When either side is gone, so is the tunnel.
fn send_to_server(connection: &Connection, mut server: &TcpStream) {
    loop {
        match connection.receive() {
            Ok(frame) if frame.kind == Kind::Data && frame.payload.is_empty() => {
                let _ = server.shutdown(Shutdown::Write);
                return;
            }
            Ok(frame) if frame.kind == Kind::Data && server.write_all(&frame.payload).is_ok() => {}
            _ => {
                let _ = server.shutdown(Shutdown::Both);
                return;
            }
        }
    }
}

/// Server to client, until the server half-closes.
fn send_to_client(mut server: &TcpStream, connection: &Connection) {
    let mut frame = Frame::bytes(Kind::Data, Vec::new());
    loop {
        frame.payload.resize(CHUNK, 0);
        match server.read(&mut frame.payload) {
            Ok(got) => {
                frame.payload.truncate(got);
                if connection.send(&frame).is_err() {
                    let _ = server.shutdown(Shutdown::Both);
                    return;
                }
                if got == 0 {
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => {
                // Reset: tell the client, and stop waiting for what it would send.
                connection.cut();
                return;
            }
        }
    }
}
