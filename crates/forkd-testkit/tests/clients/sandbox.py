"""The published Sandbox with a spawn of its own, through the `forkd` program on PATH. Argument: a snapshot's tag."""

import sys
import time

from forkd import CommandResult, Sandbox

TAG = sys.argv[1]

with Sandbox(tag=TAG) as sandbox:
    pong = sandbox.ping()
    assert pong["pong"] is True and pong["pid"] == 1, pong
    result = sandbox.commands.run("echo out; echo err >&2; exit 3")
    assert result == CommandResult("out\n", "err\n", 3), result
    assert sandbox.commands.run(["printf", "%s|", "a b", "c"]).stdout == "a b|c|"
    missing = sandbox.commands.run(["no-such-program"])
    assert missing.exit_code == 1 and "no-such-program" in missing.stderr, missing
    assert sandbox.eval("numpy.zeros(5).tolist()") == "[0.0, 0.0, 0.0, 0.0, 0.0]"
    try:
        sandbox.eval("1 / 0")
        raise AssertionError("it did not raise")
    except RuntimeError as error:
        assert "ZeroDivisionError" in str(error), error

    attached = Sandbox(target=sandbox.target, spawn=False)
    assert attached.commands.run("cat /proc/sys/kernel/ostype").stdout == "Linux\n"
    attached.kill()
    assert sandbox.ping()["pong"] is True, "one that is attached does not end it"
    process = sandbox._fork_proc

assert process.poll() is not None, "the program that held the child has ended"
for _ in range(100):
    try:
        Sandbox(target=sandbox.target, spawn=False).ping()
    except OSError:
        break
    time.sleep(0.1)
else:
    raise AssertionError("the guest still answers after kill()")

# The same again, by the other name, and ended by hand.
again = Sandbox.create(TAG)
assert again.eval("1 + 1") == "2"
again.kill()

try:
    Sandbox(tag="no-such-snapshot")
    raise AssertionError("it did not raise")
except RuntimeError as error:
    assert "no-such-snapshot" in str(error), error

print("Sandbox worked")
