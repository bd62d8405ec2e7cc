//! What the benchmarks of this program have in common: their options, what they need of the process, and how they
//! say what they measured.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

/// Something that the value of an option sets; an error says what is wrong with the value.
pub(super) trait Setting {
    /// Sets it to what `value` says.
    fn set(&mut self, value: &str) -> Result<(), String>;
}

impl Setting for u64 {
    fn set(&mut self, value: &str) -> Result<(), String> {
        *self = value.parse().map_err(|_| "not a whole number".to_owned())?;
        Ok(())
    }
}

impl Setting for usize {
    fn set(&mut self, value: &str) -> Result<(), String> {
        *self = value.parse().map_err(|_| "not a whole number".to_owned())?;
        Ok(())
    }
}

impl Setting for PathBuf {
    fn set(&mut self, value: &str) -> Result<(), String> {
        *self = value.into();
        Ok(())
    }
}

/// Sets what `arguments`, each `--NAME VALUE`, name; an error is a sentence for a person.
pub(super) fn read(
    mut arguments: impl Iterator<Item = String>,
    settings: &mut [(&str, &mut dyn Setting)],
) -> Result<(), String> {
    while let Some(name) = arguments.next() {
        let Some((_, setting)) = settings.iter_mut().find(|(known, _)| *known == name) else {
            let known: Vec<&str> = settings.iter().map(|(known, _)| *known).collect();
            return Err(format!("unknown option {name}; there are {}", known.join(" ")));
        };
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        setting.set(&value).map_err(|wrong| format!("{name} {value}: {wrong}"))?;
    }
    Ok(())
}

/// A thousand copies take more descriptors than a shell usually allows.
pub(super) fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Prints what was measured as one JSON object on a line of its own.
pub(super) fn print(measured: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(measured)?;
    line.push(b'\n');
    io::stdout().write_all(&line)
}

/// With a tenth of one.
pub(super) fn microseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e7).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<(u64, usize, PathBuf), String> {
        let (mut size, mut count, mut path) = (1, 2, PathBuf::from("/x"));
        let arguments = words.iter().map(|word| (*word).to_owned());
        super::read(arguments, &mut [("--size", &mut size), ("--count", &mut count), ("--path", &mut path)])?;
        Ok((size, count, path))
    }

    #[test]
    fn what_is_named_is_set_and_the_rest_stays() {
        assert_eq!(read(&[]), Ok((1, 2, "/x".into())));
        assert_eq!(read(&["--path", "/y", "--count", "7"]), Ok((1, 7, "/y".into())));
    }

    #[test]
    fn what_cannot_be_set_is_named() {
        let refused = |words: &[&str]| read(words).expect_err("refused");
        assert_eq!(refused(&["--n", "1"]), "unknown option --n; there are --size --count --path");
        assert_eq!(refused(&["--size"]), "--size needs a value");
        assert_eq!(refused(&["--count", "-1"]), "--count -1: not a whole number");
    }
}
