//! Sends back what it gets over TCP.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

/// Serves every connection to a port of its own choice on loopback; the value is the port.
pub(super) fn serve() -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    std::thread::Builder::new().name("echo".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = std::thread::Builder::new().name("echo".into()).spawn(move || echo(stream));
        }
    })?;
    Ok(port)
}

/// Until the client ends it.
fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            got => stream.write_all(&buffer[..got])?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_get_back_what_they_sent() {
        let port = serve().expect("a port is free");
        let mut clients = [1, 2].map(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens"));
        for (number, client) in clients.iter_mut().enumerate() {
            client.write_all(&[number as u8; 8]).expect("it reads");
        }
        for (number, client) in clients.iter_mut().enumerate() {
            let mut got = [0; 8];
            client.read_exact(&mut got).expect("it answers");
            assert_eq!(got, [number as u8; 8]);
        }
    }
}
