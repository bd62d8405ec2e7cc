//! Output of evaluations, kept within limits.

use forkd_proto::agent::Evaluated;
use forkd_proto::frame::MAX_PAYLOAD;

/// The most that is kept of one output stream of one evaluation.
const OUTPUT_LIMIT: usize = 16 << 20;

/// Collects one output stream.
#[derive(Debug, Default)]
pub(super) struct Captured {
    bytes: Vec<u8>,
    dropped: usize,
}

impl Captured {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let kept = bytes.len().min(OUTPUT_LIMIT - self.bytes.len());
        self.bytes.extend_from_slice(&bytes[..kept]);
        self.dropped += bytes.len() - kept;
    }

    /// The text, with a notice when some was dropped.
    pub(super) fn into_text(self) -> String {
        let mut text = String::from_utf8(self.bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        if self.dropped > 0 {
            text.push_str(&notice(self.dropped));
        }
        text
    }
}

fn notice(dropped: usize) -> String {
    format!("\n[{dropped} bytes dropped]\n")
}

/// Shortens the longest texts until the answer fits in one frame.
pub fn fit_in_a_frame(evaluated: Evaluated) -> Evaluated {
    let Evaluated { mut result, mut error, mut stdout, mut stderr } = evaluated;
    let mut dropped = [0; 4];
    loop {
        let texts: [Option<&mut String>; 4] = [result.as_mut(), error.as_mut(), Some(&mut stdout), Some(&mut stderr)];
        let sizes = texts.map(|text| text.map_or(0, |text| json_len(text)));
        // Field names, punctuation and the notices take less than this.
        let excess = (sizes.iter().sum::<usize>() + 1024).saturating_sub(MAX_PAYLOAD);
        if excess == 0 {
            break;
        }
        let longest = (0..4).max_by_key(|index| sizes[*index]).unwrap_or(0);
        let text = [result.as_mut(), error.as_mut(), Some(&mut stdout), Some(&mut stderr)][longest].take();
        let Some(text) = text else { break };
        // In proportion: escapes make some texts longer on the wire than in memory.
        let keep_encoded = sizes[longest].saturating_sub(excess).max(sizes[longest] / 4);
        let mut keep = (text.len() as u128 * keep_encoded as u128 / sizes[longest].max(1) as u128) as usize;
        keep = keep.min(text.len().saturating_sub(1));
        while !text.is_char_boundary(keep) {
            keep -= 1;
        }
        dropped[longest] += text.len() - keep;
        text.truncate(keep);
    }
    for (text, dropped) in
        [result.as_mut(), error.as_mut(), Some(&mut stdout), Some(&mut stderr)].into_iter().zip(dropped)
    {
        if let Some(text) = text
            && dropped > 0
        {
            text.push_str(&notice(dropped));
        }
    }
    Evaluated { result, error, stdout, stderr }
}

/// Bytes that `text` takes within a JSON string as serde writes it.
fn json_len(text: &str) -> usize {
    text.bytes()
        .map(|byte| match byte {
            b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 8 | 12 => 2,
            0..=31 => 6,
            _ => 1,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::agent::Response;
    use proptest::prelude::*;

    fn encoded(evaluated: &Evaluated) -> usize {
        serde_json::to_vec(&Response::Evaluated(evaluated.clone())).expect("plain data").len()
    }

    #[test]
    fn a_small_answer_stays_as_it_is() {
        let small = Evaluated { result: Some("1".into()), stdout: "hello\n".into(), ..Evaluated::default() };
        assert_eq!(fit_in_a_frame(small.clone()), small);
    }

    #[test]
    fn long_output_is_cut_and_says_so() {
        let long = Evaluated { result: Some("r".into()), stdout: "x".repeat(5 << 20), ..Evaluated::default() };
        let cut = fit_in_a_frame(long);
        assert!(encoded(&cut) <= MAX_PAYLOAD && cut.stdout.len() > MAX_PAYLOAD / 2);
        assert_eq!(cut.result.as_deref(), Some("r"), "the short text is whole");
        let kept = cut.stdout.bytes().take_while(|byte| *byte == b'x').count();
        assert!(cut.stdout.ends_with(&format!("[{} bytes dropped]\n", (5 << 20) - kept)));
    }

    proptest! {
        // Megabytes per case.
        #![proptest_config(ProptestConfig::with_cases(8))]

        #[test]
        fn every_answer_fits(
            piece in prop::sample::select(vec!["a", "\u{1}", "é", "\"", "日本", "\n"]),
            lengths: [u32; 4],
        ) {
            let text = |length: u32| piece.repeat(length as usize % 400_000);
            let [a, b, c, d] = lengths;
            let cut = fit_in_a_frame(Evaluated { result: Some(text(a)), error: Some(text(b)), stdout: text(c), stderr: text(d) });
            prop_assert!(encoded(&cut) <= MAX_PAYLOAD);
        }
    }

    proptest! {
        #[test]
        fn encoded_length_is_what_serde_writes(text in "\\PC*|[\u{0}-\u{7f}]*") {
            prop_assert_eq!(json_len(&text) + 2, serde_json::to_string(&text).expect("text").len());
        }
    }
}
