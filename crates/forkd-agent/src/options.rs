//! What the agent is asked to be: by its arguments as an ordinary program, by the kernel's command
//! line as PID 1.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// Where a machine's token lies.
pub const MACHINE_TOKEN: &str = "/etc/forkd/machine-token";

/// What could not be understood.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OptionError {
    /// An argument that does not exist.
    #[error("unknown argument {0:?}\n{USAGE}")]
    Unknown(String),
    /// An argument that needs a value.
    #[error("{0} needs a value\n{USAGE}")]
    MissingValue(&'static str),
    /// A value of the wrong form.
    #[error("{name}={value:?} is not {expected}")]
    Malformed {
        /// Which option.
        name: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// Listening on TCP without a token is not offered.
    #[error("--tcp needs --token-file: the agent runs any program for whoever may connect")]
    NoToken,
    /// Nothing to do.
    #[error("nothing to listen on: give --tcp or --legacy\n{USAGE}")]
    NoListener,
}

const USAGE: &str = "usage: forkd-agent --no-init [--tcp ADDRESS:PORT --token-file FILE] [--legacy ADDRESS:PORT]\n       \
                     (as PID 1 the agent takes its options from the kernel's command line)";

/// Options of an ordinary program.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProgramOptions {
    /// Listen here for framed requests.
    pub tcp: Option<SocketAddr>,
    /// The token that TCP clients must show.
    pub token_file: Option<PathBuf>,
    /// Listen here for JSON lines.
    pub legacy: Option<SocketAddr>,
}

impl ProgramOptions {
    /// Reads arguments, without the program's name.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, OptionError> {
        let mut options = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let mut value = |name| arguments.next().ok_or(OptionError::MissingValue(name));
            match argument.as_str() {
                "--no-init" => {}
                "--tcp" => options.tcp = Some(socket_address("--tcp", &value("--tcp")?)?),
                "--legacy" => options.legacy = Some(socket_address("--legacy", &value("--legacy")?)?),
                "--token-file" => options.token_file = Some(value("--token-file")?.into()),
                _ => return Err(OptionError::Unknown(argument)),
            }
        }
        match (&options.tcp, &options.token_file, &options.legacy) {
            (Some(_), None, _) => Err(OptionError::NoToken),
            (None, _, None) => Err(OptionError::NoListener),
            _ => Ok(options),
        }
    }
}

/// The guest's address on its network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NetworkAddress {
    /// Address of `eth0`.
    pub address: Ipv4Addr,
    /// Bits of the network's prefix.
    pub prefix: u8,
    /// Where everything else is reached.
    pub gateway: Option<Ipv4Addr>,
}

/// A further disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Block device.
    pub device: PathBuf,
    /// Where it is mounted.
    pub path: PathBuf,
    /// Whether it cannot be written.
    pub read_only: bool,
}

/// Options of PID 1, from the kernel's command line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootOptions {
    /// `forkd.root=`: the root disk; the initramfs stays the root without it.
    pub root: Option<PathBuf>,
    /// `forkd.rootfstype=`, `ext4` when absent.
    pub root_type: String,
    /// `forkd.machine=1`: boot scripts, and TCP with a token instead of the JSON-line protocol.
    pub machine: bool,
    /// `forkd.listen=`: where a machine listens.
    pub listen: SocketAddr,
    /// `forkd.ip=ADDRESS/PREFIX[,GATEWAY]` or `none`.
    pub network: Option<NetworkAddress>,
    /// `forkd.mounts=vdb:/path[:ro],…`
    pub volumes: Vec<Volume>,
    /// `forkd.hostname=`
    pub hostname: String,
}

impl BootOptions {
    /// Reads the kernel's command line. What is malformed is reported and takes its default: a guest
    /// that comes up can say more than one that does not.
    pub fn parse(command_line: &str) -> (Self, Vec<OptionError>) {
        let value = |name: &str| {
            command_line.split_ascii_whitespace().rev().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let mut errors = Vec::new();
        let machine = value("forkd.machine") == Some("1");
        let guest_address =
            NetworkAddress { address: [10, 42, 0, 2].into(), prefix: 24, gateway: Some([10, 42, 0, 1].into()) };
        let default_network = (!machine).then_some(guest_address);
        let network = match value("forkd.ip") {
            None => default_network,
            Some("none") => None,
            Some(text) => noted(&mut errors, network_address(text)).or(default_network),
        };
        let listen = value("forkd.listen")
            .and_then(|text| noted(&mut errors, socket_address("forkd.listen", text)))
            .unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], forkd_proto::agent::AGENT_PORT as u16)));
        let volumes = value("forkd.mounts").and_then(|text| noted(&mut errors, volumes(text))).unwrap_or_default();
        let options = Self {
            root: value("forkd.root").map(PathBuf::from),
            root_type: value("forkd.rootfstype").unwrap_or("ext4").to_owned(),
            machine,
            listen,
            network,
            volumes,
            hostname: value("forkd.hostname").unwrap_or("forkd").to_owned(),
        };
        (options, errors)
    }
}

fn noted<T>(errors: &mut Vec<OptionError>, result: Result<T, OptionError>) -> Option<T> {
    result.map_err(|error| errors.push(error)).ok()
}

fn socket_address(name: &'static str, text: &str) -> Result<SocketAddr, OptionError> {
    text.parse().map_err(|_| OptionError::Malformed {
        name,
        value: text.to_owned(),
        expected: "a numeric address and port such as 127.0.0.1:1024",
    })
}

fn network_address(text: &str) -> Result<NetworkAddress, OptionError> {
    let parse = || {
        let (network, gateway) = match text.split_once(',') {
            Some((network, gateway)) => (network, Some(gateway.parse().ok()?)),
            None => (text, None),
        };
        let (address, prefix) = network.split_once('/')?;
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
        Some(NetworkAddress { address: address.parse().ok()?, prefix, gateway })
    };
    parse().ok_or_else(|| OptionError::Malformed {
        name: "forkd.ip",
        value: text.to_owned(),
        expected: "none, or an address, prefix and gateway such as 10.42.0.2/24,10.42.0.1",
    })
}

fn volumes(text: &str) -> Result<Vec<Volume>, OptionError> {
    let volume = |entry: &str| {
        let mut parts = entry.split(':');
        let (device, path) = (parts.next()?, parts.next()?);
        let read_only = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(_) => return None,
        };
        let plain = !device.is_empty() && path.starts_with('/') && parts.next().is_none();
        plain.then(|| Volume { device: PathBuf::from("/dev").join(device), path: path.into(), read_only })
    };
    text.split(',').filter(|entry| !entry.is_empty()).map(volume).collect::<Option<_>>().ok_or_else(|| {
        OptionError::Malformed {
            name: "forkd.mounts",
            value: text.to_owned(),
            expected: "a list of devices and places such as vdb:/data,vdc:/cache:ro",
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn arguments(line: &str) -> Result<ProgramOptions, OptionError> {
        ProgramOptions::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn a_program_listens_on_tcp_only_with_a_token() {
        let options = arguments("--no-init --tcp 127.0.0.1:0 --token-file /t").expect("complete");
        assert_eq!(options.token_file, Some("/t".into()));
        assert_eq!(arguments("--tcp 127.0.0.1:0"), Err(OptionError::NoToken));
        assert_eq!(arguments("--no-init"), Err(OptionError::NoListener));
        assert_eq!(arguments("--tcp"), Err(OptionError::MissingValue("--tcp")));
        assert!(matches!(arguments("--tcp localhost"), Err(OptionError::Malformed { .. })));
        assert!(matches!(arguments("--help"), Err(OptionError::Unknown(_))));
    }

    #[test]
    fn a_guest_has_its_network_by_default_and_a_machine_has_not() {
        let (guest, errors) = BootOptions::parse("console=ttyS0 forkd.root=/dev/vda quiet\n");
        assert_eq!(errors, []);
        assert_eq!((guest.root.as_deref(), guest.root_type.as_str()), (Some("/dev/vda".as_ref()), "ext4"));
        assert_eq!(guest.network.map(|network| network.address), Some([10, 42, 0, 2].into()));
        let (machine, _) = BootOptions::parse("forkd.machine=1 forkd.listen=0.0.0.0:99");
        assert_eq!((machine.network, machine.listen.port()), (None, 99));
    }

    #[test]
    fn malformed_boot_options_are_named_and_take_their_defaults() {
        let (options, errors) = BootOptions::parse("forkd.ip=10.0.0.1 forkd.mounts=vdb forkd.listen=x forkd.ip=10/8");
        assert_eq!(errors.len(), 3);
        assert!(errors.iter().all(|error| matches!(error, OptionError::Malformed { .. })));
        assert_eq!(options.network.map(|network| network.prefix), Some(24));
        let (options, errors) = BootOptions::parse("forkd.ip=10.0.0.9/8 forkd.mounts=vdb:/a,vdc:/b:ro");
        assert_eq!(errors, []);
        assert_eq!(options.network, Some(NetworkAddress { address: [10, 0, 0, 9].into(), prefix: 8, gateway: None }));
        assert_eq!(options.volumes[1], Volume { device: "/dev/vdc".into(), path: "/b".into(), read_only: true });
    }

    proptest! {
        #[test]
        fn any_command_line_is_read_without_panic(line in "(forkd\\.(ip|mounts|listen|root)=[0-9a-z:/.,]{0,20} ?){0,4}") {
            let _ = BootOptions::parse(&line);
        }
    }
}
