//! Carries bytes between a client and a TCP port on the guest's loopback.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
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
            let told = connection.fail(failure::from_io(format_args!("cannot connect to 127.0.0.1:{port}"), &error));
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

/// A server may listen on either loopback address.
fn connect(port: u16) -> std::io::Result<TcpStream> {
    let limit = Duration::from_secs(10);
    let server =
        TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), limit).or_else(|error| {
            TcpStream::connect_timeout(&SocketAddr::from((Ipv6Addr::LOCALHOST, port)), limit).map_err(|_| error)
        })?;
    server.set_nodelay(true)?;
    Ok(server)
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
