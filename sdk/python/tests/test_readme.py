"""The README's examples, run literally, one after the other. Needs a daemon and the snapshot "quickstart"."""

from __future__ import annotations

import os
import re
import unittest
from pathlib import Path
from typing import Any, Dict

README = Path(__file__).parent.parent / "README.md"


@unittest.skipUnless(os.environ.get("FORKD_URL"), "FORKD_URL names no daemon")
class Readme(unittest.TestCase):
    def test_the_examples_do_what_they_say(self) -> None:
        text = README.read_text()
        examples = [
            (match.start(), match.group(1)) for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
        ]
        self.assertGreater(len(examples), 10)
        scope: Dict[str, Any] = {"__name__": "readme"}
        for start, source in examples:
            # Lines are counted as in the README, for tracebacks.
            padding = "\n" * (text.count("\n", 0, start) + 1)
            exec(compile(padding + source, str(README), "exec"), scope)


if __name__ == "__main__":
    unittest.main()
