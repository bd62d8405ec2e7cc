//! What an ordinary user could not give the files of a tree, set in the image instead, by debugfs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use crate::tool::Tool;
use crate::{ImageError, Result};

/// What one file should have and does not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Correction {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Kind and permission bits, where those may differ too.
    pub(super) mode: Option<u32>,
    /// Extended attributes.
    pub(super) attributes: Vec<(String, Vec<u8>)>,
}

/// Corrections by path, relative to the root.
#[derive(Default, Debug)]
pub(crate) struct Corrections(BTreeMap<PathBuf, Correction>);

impl Corrections {
    /// Notes what the file at `path` should have; the last word counts.
    pub(super) fn note(&mut self, path: &Path, correction: Correction) {
        self.0.insert(path.to_owned(), correction);
    }

    /// What is noted for one name of a file holds for another.
    pub(super) fn copy(&mut self, from: &Path, to: &Path) {
        if let Some(correction) = self.0.get(from).cloned() {
            self.0.insert(to.to_owned(), correction);
        }
    }

    /// Without those of files that were removed since.
    pub(super) fn of_what_is_in(mut self, root: &Path) -> Self {
        self.0.retain(|path, _| root.join(path).symlink_metadata().is_ok());
        self
    }
}

/// Makes the corrections in an image; `scratch` is for files that debugfs reads.
pub(super) fn apply(corrections: &Corrections, image: &Path, scratch: &Path) -> Result<()> {
    if corrections.0.is_empty() {
        return Ok(());
    }
    let values = scratch.join("attributes");
    fs::create_dir_all(&values).map_err(ImageError::io("create directory", &values))?;
    let mut script = String::new();
    let mut value_count = 0;
    for (path, correction) in &corrections.0 {
        let refuse = |what: &str| ImageError::Member {
            source_path: image.to_owned(),
            member: path.display().to_string(),
            reason: format!("has {what} that only root can put into an image; change it or run this with sudo"),
        };
        let name = quoted(path).ok_or_else(|| refuse("a name"))?;
        let mut field = |field: &str, value: String| {
            writeln!(script, "set_inode_field {name} {field} {value}").expect("a string takes all");
        };
        field("uid", correction.uid.to_string());
        field("gid", correction.gid.to_string());
        if let Some(mode) = correction.mode {
            field("mode", format!("0{mode:o}"));
        }
        for (key, value) in &correction.attributes {
            // One that is no plain word would be read as something else.
            if !key.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"') {
                return Err(refuse("an extended attribute"));
            }
            value_count += 1;
            let file = values.join(value_count.to_string());
            fs::write(&file, value).map_err(ImageError::io("write", &file))?;
            writeln!(script, "ea_set -f attributes/{value_count} {name} {key}").expect("a string takes all");
        }
    }
    let script_path = scratch.join("corrections");
    fs::write(&script_path, script).map_err(ImageError::io("write", &script_path))?;
    let image = image.canonicalize().map_err(ImageError::io("resolve", image))?;
    let mut complaint = None;
    let ended = Tool::new("debugfs", "e2fsprogs")
        .args(["-w", "-f", "corrections"])
        .arg(&image)
        .current_dir(scratch)
        .run_lines(|line| {
            // It succeeds whatever its commands did, but says nothing more than the commands when all is well.
            let expected = line.is_empty() || line.starts_with("debugfs");
            if !expected && complaint.is_none() {
                complaint = Some(line.to_owned());
            }
        })?;
    ended.succeeded()?;
    match complaint {
        None => Ok(()),
        Some(message) => {
            Err(ImageError::Tool { tool: "debugfs".to_owned(), status: "a command failed".to_owned(), message })
        }
    }
}

/// A path as debugfs reads it: in quotes, with quotes doubled. None when it cannot be written in a
/// script of lines.
fn quoted(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    let plain = !text.contains(['\n', '\r', '\0']);
    plain.then(|| format!("\"/{}\"", text.replace('"', "\"\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_or_refused() {
        assert_eq!(quoted(Path::new("a b/c\"d")).as_deref(), Some("\"/a b/c\"\"d\""));
        assert_eq!(quoted(Path::new("")).as_deref(), Some("\"/\""));
        assert_eq!(quoted(Path::new("a\nquit")), None);
    }
}
