"""A tree of fake drivers for the tests of the embedded front-end: they record their calls, and fail on request."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

LIB = Path(__file__).resolve().parent.parent / "lib"
if str(LIB) not in sys.path:
    sys.path.insert(0, str(LIB))

# Reads TREE/say/<kind>.<mad>.<action> (JSON: status, stdout, stderr, sleep, run) for what to do.
FAKE = """#!/usr/bin/python3 -IS
import json, os, sys, time
path = os.path.abspath(sys.argv[0])
mad, action = path.split("/")[-2:]
tree, kind = "/".join(path.split("/")[:-3]), path.split("/")[-3]
with open("/proc/self/stat") as file:
    stat = file.read().rpartition(")")[2].split()
umask = os.umask(0)
os.umask(umask)
call = {
    "path": path, "kind": kind, "mad": mad, "action": action, "argv": sys.argv[1:], "cwd": os.getcwd(),
    "stdin": sys.stdin.read(), "umask": umask, "nice": int(stat[16]), "env": dict(os.environ),
    "leader": os.getpgrp() == os.getpid(), "pid": os.getpid(),
}
with open(tree + "/calls", "a") as file:
    file.write(json.dumps(call) + "\\n")
say = {"fs.cp": "/ds/image raw", "fs.mkfs": "/ds/empty", "fs.stat": "10"}
if len(sys.argv) == 3:
    say = {"fs.cp": "/ds/image 10", "fs.mkfs": "/ds/empty 10"}
say["fs.clone"] = "/ds/clone"
say["fs.monitor"] = "TOTAL_MB=100\\nFREE_MB=60\\nUSED_MB=40"
plan = {"stdout": say[mad + "." + action] + "\\n"} if kind == "datastore" and mad + "." + action in say else {}
try:
    with open(f"{tree}/say/{kind}.{mad}.{action}") as file:
        plan.update(json.load(file))
except FileNotFoundError:
    pass
sys.stdout.write(plan.get("stdout", ""))
sys.stderr.write(plan.get("stderr", ""))
sys.stdout.flush()
sys.stderr.flush()
if "run" in plan:
    exec(plan["run"])
time.sleep(plan.get("sleep", 0))
sys.exit(plan.get("status", 0))
"""

TM_ACTIONS = (
    *("clone", "ln", "mv", "mvds", "cpds", "delete", "mkimage", "mkswap", "context", "resize", "monitor"),
    *("snap_create", "snap_create_live", "snap_revert", "snap_delete", "premigrate", "postmigrate", "failmigrate"),
)
DS_ACTIONS = ("cp", "mkfs", "rm", "stat", "monitor", "clone", "snap_revert", "snap_delete", "snap_flatten")


class Tree:
    """A directory with datastore/ and tm/ of fakes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = 0  # bytes of the list of calls that were asked for before
        (path / "say").mkdir(parents=True)
        (path / "fake").write_text(FAKE)
        (path / "fake").chmod(0o755)
        for mad in ("ssh", "shared", "sys"):
            self.add(f"tm/{mad}", *TM_ACTIONS)
        self.add("datastore/fs", *DS_ACTIONS)

    def add(self, driver: str, *actions: str) -> None:
        (self.path / driver).mkdir(parents=True, exist_ok=True)
        for action in actions:
            os.link(self.path / "fake", self.path / driver / action)

    def say(self, action: str, **plan: Any) -> None:
        """Have ACTION (`tm.ssh.clone`) answer so from now on; without a plan, as at first."""
        file = self.path / "say" / action
        if plan:
            file.write_text(json.dumps(plan))
        else:
            file.unlink()

    def calls(self, *actions: str) -> list[dict[str, Any]]:
        """What was called since the last question, perhaps of these actions only."""
        file = self.path / "calls"
        if not file.exists():
            return []
        with file.open("rb") as calls:
            calls.seek(self._told)
            new = calls.read()
        new = new[: new.rfind(b"\n") + 1]  # one may just be writing
        self._told += len(new)
        found = [json.loads(line) for line in new.splitlines()]
        return [call for call in found if not actions or call["action"] in actions]

    def lines(self) -> list[str]:
        """The transfer actions called since the last question as `driver/action argument...`."""
        return [" ".join([f"{c['mad']}/{c['action']}", *c["argv"]]) for c in self.calls() if c["kind"] == "tm"]
