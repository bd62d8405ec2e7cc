//! The seal of a description: the digest that a text holds of itself.
//!
//! `snapshot.json` holds the digest of everything else in a snapshot, and its children hold its own. Its seal says
//! of the newest one, too, whether it is what was written: the BLAKE3 of the whole text, whatever fields it has,
//! with the digits of the seal itself taken for zeros.

use std::ops::Range;

/// How many hex digits a seal has.
const DIGITS: usize = 64;

/// A seal that [`close`] puts the right digits into.
pub(crate) const OPEN: &str = "blake3:0000000000000000000000000000000000000000000000000000000000000000";

/// Puts the right digits into the seal of a JSON text.
pub(crate) fn close(text: &mut [u8]) -> Result<(), String> {
    let place = place(text)?;
    let digits = digits(text, &place);
    text[place].copy_from_slice(digits.as_bytes());
    Ok(())
}

/// Fails when a JSON text is not what was sealed.
pub(crate) fn check(text: &[u8]) -> Result<(), String> {
    let place = place(text)?;
    let digits = digits(text, &place);
    if text[place] == *digits.as_bytes() {
        Ok(())
    } else {
        Err("it is not what was written: its seal differs".to_owned())
    }
}

/// Where the digits of the seal are: behind the last `"seal": "blake3:`.
fn place(text: &[u8]) -> Result<Range<usize>, String> {
    let missing = || "it has no seal".to_owned();
    const KEY: &[u8] = b"\"seal\"";
    const VALUE: &[u8] = b"\"blake3:";
    let key = text.windows(KEY.len()).rposition(|window| window == KEY).ok_or_else(missing)? + KEY.len();
    let between = text[key..].iter().take_while(|byte| **byte == b':' || byte.is_ascii_whitespace()).count();
    let start = key + between + VALUE.len();
    let fits = text[key + between..].starts_with(VALUE) && text.len() >= start + DIGITS;
    if fits { Ok(start..start + DIGITS) } else { Err(missing()) }
}

/// The digits that the seal at `place` should have.
fn digits(text: &[u8], place: &Range<usize>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&text[..place.start]).update(&[b'0'; DIGITS]).update(&text[place.end..]);
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sealed(before: &str, after: &str) -> Vec<u8> {
        let mut text = format!("{{{before} \"seal\" : \"{OPEN}\"{after}}}\n").into_bytes();
        close(&mut text).expect("it has a seal");
        text
    }

    proptest! {
        #[test]
        fn every_changed_byte_is_noticed(
            before in "[^\"]{0,50}", after in "[^\"]{0,50}", at: prop::sample::Index, bit in 0u8..8
        ) {
            let good = sealed(&before, &after);
            check(&good).expect("as sealed");
            let mut bad = good.clone();
            bad[at.index(good.len())] ^= 1 << bit;
            check(&bad).expect_err("changed");
            check(&good[..at.index(good.len())]).expect_err("cut");
        }

        #[test]
        fn any_bytes_are_checked_without_panic(text: Vec<u8>) {
            let _ = check(&text);
        }
    }

    #[test]
    fn a_text_without_a_seal_is_told_as_such() {
        for text in ["", "{}", r#"{"seal": 7}"#, r#"{"seal": "blake3:00"}"#, "\"seal\""] {
            assert_eq!(check(text.as_bytes()), Err("it has no seal".to_owned()), "{text}");
        }
    }
}
