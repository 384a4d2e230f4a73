"""Faults that need no change in the driver: programs that fail, hang or lie at their n-th call, found first in PATH.

Each name in a machine's `bin` is one script, which counts its calls, does what the plan says, and else becomes the
program that it stands for.  Without a plan the directory is empty, so that nothing is slower.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter

from madrigal.conformance.machines import PATH, Machine

PROGRAMS = (
    *(
        "awk",
        "basename",
        "blkid",
        "cat",
        "chmod",
        "cp",
        "curl",
        "cut",
        "date",
        "dd",
        "df",
        "dirname",
        "du",
        "fallocate",
    ),
    *(
        "find",
        "flock",
        "genisoimage",
        "grep",
        "gunzip",
        "gzip",
        "head",
        "ln",
        "ls",
        "md5sum",
        "mkdir",
        "mkfs.ext4",
        "mkfs",
    ),
    *(
        "mkisofs",
        "mkswap",
        "mktemp",
        "mount",
        "mv",
        "qemu-img",
        "readlink",
        "realpath",
        "rm",
        "rsync",
        "ruby",
        "scp",
        "sed",
    ),
    *(
        "sha1sum",
        "sha256sum",
        "ssh",
        "stat",
        "sudo",
        "sync",
        "tar",
        "tee",
        "touch",
        "tr",
        "truncate",
        "virsh",
        "wget",
        "wc",
    ),
    *("xmllint", "xorrisofs", "xz", "zstd", "timeout", "python3"),
)
"""What drivers are known to start."""

_SCRIPT = """#!/bin/sh
name=${0##*/} real=
for d in "%(kept)s" /usr/local/bin /usr/bin /bin /usr/sbin /sbin; do
  [ ! -x "$d/$name" ] || { real=$d/$name; break; }
done
[ -n "$real" ] || { echo "$name: not found" >&2; exit 127; }
echo "$name" >>"%(state)s/calls"
read -r what at how <"%(state)s/plan" || exec "$real" "$@"
[ "$what" = "$name" ] || [ "$what" = "*" ] || exec "$real" "$@"
case $what in "*") n=$(/usr/bin/wc -l <"%(state)s/calls") ;; *) n=$(/usr/bin/grep -cx "$name" "%(state)s/calls") ;; esac
[ "$n" = "$at" ] || [ "$at" = all ] || exec "$real" "$@"
echo "$name" >>"%(state)s/reached"
case $how in
  fail) echo "$name: it fails because the check wants it to" >&2; exit 1 ;;
  lie) exit 0 ;;
  hang) exec /usr/bin/sleep 1000 ;;
  noise)
    /usr/bin/head -c 1048576 /dev/zero | /usr/bin/tr '\\0' x | /usr/bin/fold -w 200 >&2
    echo >&2
    exec "$real" "$@" ;;
esac
"""


class Fakes:
    """Those of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._state = f"{machine.state}/faults"
        shutil.rmtree(self._state, ignore_errors=True)
        os.makedirs(self._state)
        for directory in (machine.fakes, machine.kept):
            os.makedirs(directory, exist_ok=True)
        self._is_set = True
        self.clear()

    def clear(self) -> None:
        """Let all programs be what they are."""
        if not self._is_set:
            return
        self._is_set = False
        for name in os.listdir(self.machine.fakes):
            os.unlink(f"{self.machine.fakes}/{name}")
        for name in os.listdir(self.machine.kept):
            os.link(f"{self.machine.kept}/{name}", f"{self.machine.fakes}/{name}")
        for name in ("plan", "calls", "reached"):
            with open(f"{self._state}/{name}", "w"):
                pass

    def plan(self, how: str = "", program: str = "-", at: int | str = 1) -> None:
        """Let PROGRAM (`*`: whichever) do HOW at its call AT (`all`); without arguments, only count."""
        self.clear()
        self._is_set = True
        with open(f"{self._state}/plan", "w") as file:
            file.write(f"{program} {at} {how}\n")
        script = f"{self._state}/fake"
        with open(script, "w") as file:
            file.write(_SCRIPT % {"state": self._state, "kept": self.machine.kept})
        os.chmod(script, 0o755)
        for name in PROGRAMS:
            # the interpreter of the action itself is not a tool of it
            if shutil.which(name, path=f"{PATH}:/usr/sbin:/sbin") and (
                name != "python3" or self.machine.name.startswith("host")
            ):
                if os.path.exists(fake := f"{self.machine.fakes}/{name}"):
                    os.unlink(fake)
                os.link(script, fake)

    @property
    def calls(self) -> Counter[str]:
        """How often each program was called since the plan."""
        with open(f"{self._state}/calls") as file:
            return Counter(file.read().split())

    @property
    def reached(self) -> bool:
        with open(f"{self._state}/reached") as file:
            return bool(file.read())
