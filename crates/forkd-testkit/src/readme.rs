//! The README's commands, for tests that run them literally.

use std::path::Path;

use anyhow::{Context, Result};

/// The commands of the first block of shell commands that follows `marker` in the project's README. The README speaks
/// of the programs that `make build` makes; the commands name those in `programs` in their place.
pub fn readme_commands(marker: &str, programs: &Path) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let readme = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let commands = commands_after(&readme, marker)?;
    Ok(commands.replace("$PWD/target/forkd", &programs.to_string_lossy()))
}

fn commands_after<'a>(readme: &'a str, marker: &str) -> Result<&'a str> {
    let (_, after) = readme.split_once(marker).with_context(|| format!("README.md does not have the line {marker}"))?;
    let block = after.split_once("```sh\n").and_then(|(_, block)| Some(&block[..=block.find("\n```")?]));
    block.with_context(|| format!("no block of sh follows the line {marker} of README.md"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_after_the_marker_is_taken_and_no_other() {
        let readme = "```sh\nbefore\n```\n<!-- one -->\ntext `sh`\n```sh\necho 1\necho `2`\n```\n```sh\nafter\n```\n";
        assert_eq!(commands_after(readme, "<!-- one -->").expect("there"), "echo 1\necho `2`\n");
        let error = commands_after(readme, "<!-- two -->").expect_err("no such marker").to_string();
        assert!(error.contains("<!-- two -->"), "{error}");
        assert!(commands_after("<!-- one -->\n```sh\nnever ends", "<!-- one -->").is_err());
    }

    #[test]
    fn the_readme_has_the_blocks_that_tests_run() {
        for test in ["readme", "sdk"] {
            let marker = format!("<!-- commands: run by crates/forkd-testkit/tests/{test}.rs -->");
            let commands = readme_commands(&marker, Path::new("/the/programs")).expect("there");
            assert!(commands.contains("/the/programs") && !commands.contains("$PWD/target/forkd"), "{commands}");
        }
    }
}
