"""Every method of the published Controller, against a daemon named by the environment. Argument: a snapshot's tag."""

import sys
import time

from forkd import Controller, ControllerError

TAG = sys.argv[1]
BRANCH = "client-branch"

controller = Controller()


def refused(status, call, *args, **options):
    try:
        call(*args, **options)
    except ControllerError as error:
        assert error.status == status, (error.status, status, error.body)
        assert isinstance(error.body, dict) and error.body["error"], error.body
        return error.body["error"]
    raise AssertionError(f"{call.__name__}{args} was not refused")


def snapshot(tag):
    return next((one for one in controller.list_snapshots() if one["tag"] == tag), None)


known = snapshot(TAG)
assert known["status"] == "ready" and known["bootable"] is True, known
if snapshot(BRANCH):
    controller.delete_snapshot(BRANCH)

# Spawning, listing, describing.
first, second = controller.spawn_sandboxes(TAG, n=2, memory_limit_mib=1024, prewarm=True, live_fork=True, hugepages=True)
for info in (first, second):
    assert set(info) >= {"id", "snapshot_tag", "netns", "guest_addr", "created_at_unix", "pid", "memory_limit_mib"}, info
    assert (info["snapshot_tag"], info["guest_addr"], info["memory_limit_mib"]) == (TAG, "10.42.0.2:8888", 1024), info
listed = {info["id"] for info in controller.list_sandboxes()}
assert {first["id"], second["id"]} <= listed, listed
assert controller.get_sandbox(first["id"])["id"] == first["id"]

# Running things.
pong = controller.ping_sandbox(first["id"])
assert pong["pong"] is True and pong["pid"] == 1, pong
ran = controller.exec_command(first["id"], ["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_secs=60)
assert (ran["stdout"], ran["stderr"], ran["exit_code"]) == ("out\n", "err\n", 3), ran
evaluated = controller.eval_code(first["id"], "numpy.zeros(2).tolist()")
assert evaluated["result"] == "[0.0, 0.0]" and evaluated["error"] is None and evaluated["exit_code"] == 0, evaluated
raised = controller.eval_code(first["id"], "1 / 0")
assert "ZeroDivisionError" in raised["error"] and raised["exit_code"] == 1, raised

# Branches of every mode; the one that is kept can be spawned from.
controller.exec_command(first["id"], ["sh", "-c", "echo marked > /root/mark"], timeout_secs=60)
branch = controller.branch_sandbox(first["id"], tag=BRANCH)
assert branch["tag"] == BRANCH and branch["branched_from"] == first["id"] and branch["status"] == "ready", branch
assert isinstance(branch["pause_ms"], int), branch
refused(409, controller.branch_sandbox, first["id"], tag=BRANCH)
refused(400, controller.branch_sandbox, first["id"], diff=True, measure_diff=True)
diff = controller.branch_sandbox(first["id"], diff=True)
assert {"diff_ms", "diff_physical_bytes", "diff_logical_bytes"} <= set(diff), diff
controller.delete_snapshot(diff["tag"])
measured = controller.branch_sandbox(first["id"], measure_diff=True)
assert "diff_physical_bytes" in measured, measured
controller.delete_snapshot(measured["tag"])
live = controller.branch_sandbox(first["id"], mode="live", wait=False)
assert live["status"] in ("writing", "ready"), live
for _ in range(600):
    found = snapshot(live["tag"])
    if found["status"] != "writing":
        break
    time.sleep(0.1)
assert found["status"] == "ready", found
controller.delete_snapshot(live["tag"])
(grandchild,) = controller.spawn_sandboxes(BRANCH)
marked = controller.exec_command(grandchild["id"], ["cat", "/root/mark"], timeout_secs=60)
assert marked["stdout"] == "marked\n", marked

# Endings.
for info in (first, second, grandchild):
    assert controller.kill_sandbox(info["id"]) is None
    assert info["id"] in refused(404, controller.get_sandbox, info["id"])
controller.delete_snapshot(BRANCH)
assert snapshot(BRANCH) is None

# Refusals, as callers tell them apart.
refused(404, controller.kill_sandbox, "sb-0-0000")
refused(404, controller.delete_snapshot, "no-such-snapshot")
refused(404, controller.spawn_sandboxes, "no-such-snapshot")
refused(400, controller.spawn_sandboxes, TAG, n=0)
refused(400, controller.spawn_sandboxes, TAG, n=1001)
refused(400, controller.delete_snapshot, "bad%20tag")
if controller.token:
    refused(401, Controller(token="not-the-token").list_snapshots)

print("every method of Controller worked")
