//! Randomness that a copy is given, and what is derived from it.

use sha2::{Digest, Sha512};

/// Length of a copy's seed in bytes.
pub const SEED_LEN: usize = 64;

/// Bytes for one use of `seed`; different uses get unrelated bytes.
pub fn derive(seed: &[u8], usage: &str) -> [u8; 64] {
    let mut hasher = Sha512::new();
    hasher.update(b"forkd ");
    hasher.update(usage.as_bytes());
    hasher.update([0]);
    hasher.update(seed);
    hasher.finalize().into()
}

/// A random (version 4) UUID from the first 16 of `bytes`.
pub fn uuid(bytes: &[u8; 64]) -> String {
    let mut raw = [0; 16];
    raw.copy_from_slice(&bytes[..16]);
    raw[6] = raw[6] & 0x0f | 0x40;
    raw[8] = raw[8] & 0x3f | 0x80;
    let hex = to_hex(&raw);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Lower-case hex digits of `bytes`.
pub fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| DIGITS[usize::from(digit)] as char).collect()
}

/// Bytes of hex digits, lower or upper case; `None` when they are not.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> =
        text.chars().map(|digit| digit.to_digit(16).map(|digit| digit as u8)).collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn uses_and_seeds_are_kept_apart() {
        assert_ne!(derive(b"seed", "python"), derive(b"seed", "node"));
        assert_ne!(derive(b"seed", "python"), derive(b"tree", "python"));
        assert_eq!(uuid(&[0xff; 64]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }

    proptest! {
        #[test]
        fn hex_round_trips(bytes: Vec<u8>) {
            prop_assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
        }

        #[test]
        fn what_is_not_hex_is_refused(text in ".{0,16}") {
            let is_hex = text.len() % 2 == 0 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            prop_assert_eq!(from_hex(&text).is_some(), is_hex);
        }
    }
}
