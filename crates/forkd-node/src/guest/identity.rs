//! Who a fresh copy is.

use std::io;

use forkd_proto::agent::Identity;
use forkd_types::SandboxId;

/// A fresh identity for the copy called `id`, of the present moment.
pub(crate) fn fresh_identity(id: &SandboxId) -> io::Result<Identity> {
    let mut machine_id: [u8; 16] = random()?;
    // The form of a random UUID, which systemd's own machine ids have.
    machine_id[6] = machine_id[6] & 0x0f | 0x40;
    machine_id[8] = machine_id[8] & 0x3f | 0x80;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(Identity {
        sandbox_id: id.to_string(),
        hostname: id.to_string(),
        machine_id: hex(&machine_id),
        seed: hex(&random::<64>()?),
        wall_clock_ns: now.as_nanos() as u64,
    })
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_fresh_and_well_formed() {
        let id = SandboxId::new(1, 2);
        let (one, two) = (fresh_identity(&id).expect("random"), fresh_identity(&id).expect("random"));
        assert_eq!((one.machine_id.len(), one.seed.len()), (32, 128));
        assert_eq!(&one.machine_id[12..13], "4");
        assert!(one.machine_id != two.machine_id && one.seed != two.seed);
    }
}
