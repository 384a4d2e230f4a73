"""The machines that a check needs: a front-end and hosts that it starts itself, or hosts that are there.

Its own are real sshd servers of this machine in mount and pid namespaces (rig/hosts-up), each with a /tmp and with
datastores of its own beside those that all share.  The front-end is such a machine too, so that what a driver leaves
there is seen, and so that it can have a full disk without anybody else noticing.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from madrigal.conformance import scan
from madrigal.errors import ConfigError, HostUnreachable, MadrigalError

HERE = os.path.dirname(os.path.realpath(__file__))
PATH = "/usr/local/bin:/usr/bin:/bin"
"""What a front-end gives."""
HOSTS = ("host01", "host02")
NEEDED = ("sshd", "ssh", "unshare", "nsenter")


class BrokenRig(MadrigalError):
    """A machine of the check does not do what it is told."""


class Machine:
    """One machine.  ENTER: the words before a command that runs there; OWN: whether the check may break it."""

    def __init__(self, name: str, enter: Sequence[str], own: bool, state: str = "") -> None:
        self.name, self.own, self.state = name, own, state
        self.space = ""
        self._enter = list(enter)

    @property
    def fakes(self) -> str:
        """The directory that comes first in PATH there."""
        return f"{self.state}/bin"

    @property
    def kept(self) -> str:
        """The directory of programs that are always there."""
        return f"{self.state}/kept"

    def argv(self, words: Sequence[str]) -> list[str]:
        if self._enter[:1] == ["ssh"]:
            return [*self._enter, shlex.join(words)]
        return [*self._enter, *words]

    def run(self, *words: str, stdin: bytes = b"", check: bool = True) -> bytes:
        """The output of a program there, which has to succeed if CHECK."""
        done = subprocess.run(self.argv(words), input=stdin, capture_output=True)
        if check and done.returncode:
            raise BrokenRig(f"{shlex.join(words)[:200]} on {self.name}: {done.stderr.decode('utf-8', 'replace')[:500]}")
        return done.stdout

    def sh(self, script: str, *words: str, stdin: bytes = b"", check: bool = True) -> bytes:
        """The output of a script of sh there with WORDS as $1, $2, ..."""
        return self.run("sh", "-c", f"PATH=$PATH:/usr/sbin:/sbin; {script}", "sh", *words, stdin=stdin, check=check)

    def write(self, path: str, content: bytes) -> None:
        self.sh('mkdir -p "$(dirname "$1")" && cat >"$1"', path, stdin=content)

    def scan(self, directories: Sequence[str], but: Sequence[str] = ()) -> dict[str, list[object]]:
        """What is below DIRECTORIES, BUT left out (scan.py)."""
        found: dict[str, list[object]] = self._ask("scan", list(directories), list(but))
        return found

    def content(self, path: str) -> str:
        """The SHA-256 of the file that PATH leads to there; "" if it leads to none."""
        return str(self._ask("content", path))

    def remove(self, path: str) -> None:
        """Remove a file or directory."""
        self._ask("remove", path)

    def empty(self, directories: Sequence[str], kept: Sequence[str] = ()) -> None:
        """Remove what is in DIRECTORIES and not named in KEPT."""
        self._ask("empty", list(directories), list(kept))

    def _ask(self, what: str, *arguments: object) -> Any:
        source = Path(scan.__file__).read_bytes()
        return json.loads(self.run("python3", "-IS", "-", what, json.dumps(arguments), stdin=source))

    def keep(self, name: str, script: str) -> None:
        """Have SCRIPT there as the program NAME, first in PATH, from now on."""
        for directory in (self.kept, self.fakes):
            os.makedirs(directory, exist_ok=True)
        with open(os.open(f"{self.kept}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755), "w") as file:
            file.write(script)
        if not os.path.exists(f"{self.fakes}/{name}"):
            os.link(f"{self.kept}/{name}", f"{self.fakes}/{name}")

    def pids(self) -> set[int]:
        """All processes of the machine; none where it is not the check's own."""
        return set()

    def close(self) -> None:
        """End it."""


class OwnMachine(Machine):
    """A machine of the rig, in namespaces."""

    def __init__(self, name: str, state: str) -> None:
        unshare = Path(state, "pid").read_text().strip()
        self.pid = int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])
        user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        super().__init__(name, ["nsenter", "--target", str(self.pid), *user, "--mount", "--pid", "--"], True, state)
        self.space = os.readlink(f"/proc/{self.pid}/ns/pid")

    def _ask(self, what: str, *arguments: object) -> Any:
        return getattr(scan, what)(*arguments, root=f"/proc/{self.pid}/root")

    def pids(self) -> set[int]:
        found = set()
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    if os.readlink(f"/proc/{name}/ns/pid") == self.space:
                        found.add(int(name))
                except OSError:
                    pass  # it has ended, or is somebody else's
        return found

    def signal(self, number: int, which: Callable[[list[str]], bool] = lambda argv: True) -> int:
        """Send a signal to those of its processes that WHICH says; returns to how many.

        The first is the machine itself, which like the server that new connections come to is never killed.
        """
        count = 0
        for pid in self.pids() - {self.pid}:
            words = command_line(pid)
            if not words:
                continue  # it has just ended
            is_server = "[listener]" in words[0] or words[0] == "/usr/sbin/sshd"
            if which(words) and not (is_server and number == signal.SIGKILL):
                try:
                    os.kill(pid, number)
                    count += 1
                except ProcessLookupError:
                    pass
        return count


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return []


class Machines:
    """The front-end `fe` and `hosts`, two or more.

    `location` is where all machines have their datastores: 0 and 1 are each machine's own, all share 100 to 102.
    """

    def __init__(self, given: Sequence[str], keep: Sequence[str]) -> None:
        """GIVEN: names of hosts that ssh reaches; none: the check starts its own.  KEEP: directories that they see."""
        self.work = os.path.realpath(tempfile.mkdtemp(prefix="mc", dir="/tmp"))  # short: names of sockets are limited
        self._state = f"{self.work}/hosts"
        self.location = f"{self.work}/one/var/datastores"
        self.owned = [f"{self.location}/{number}" for number in (0, 1)]
        self.shared = [f"{self.location}/{number}" for number in (100, 101, 102)]
        for directory in (*self.owned, *self.shared, f"{self.work}/home", f"{self.work}/bin"):
            os.makedirs(directory)
        self.kept = [self.work, *keep]
        self.is_own = not given
        self.imports = f"{'/tmp' if self.is_own else self.work}/import"
        """Where the front-end has files that are to become images."""
        self.machines: dict[str, Machine] = {}
        try:
            if given:
                self._reach(given)
            else:
                self._start()
        except BaseException:
            self.close()
            raise

    @property
    def fe(self) -> Machine:
        return next(iter(self.machines.values()))

    @property
    def hosts(self) -> list[Machine]:
        return list(self.machines.values())[1:]

    def _reach(self, given: Sequence[str]) -> None:
        if len(given) < 2:
            raise ConfigError("two hosts are needed: give --host twice, or not at all to let the check start its own")
        self.machines["fe"] = Machine(os.uname().nodename, ["env"], False, self.work)
        self.machines["fe"].space = os.readlink("/proc/self/ns/pid")
        file = os.environ.get("MADRIGAL_SSH_CONFIG", "")
        kept = ("ControlMaster=auto", f"ControlPath={self.work}/%n.s", "ControlPersist=60")
        enter = ["ssh", *(["-F", file] if file else []), "-o", "BatchMode=yes"]
        enter += [word for option in kept for word in ("-o", option)]
        for name in given:
            machine = Machine(name, [*enter, name], False)
            try:
                for directory in self.owned:
                    machine.run("mkdir", "-p", directory)
            except BrokenRig as error:
                raise HostUnreachable(f"{name} cannot be used for the check: {error}") from None
            self.machines[name] = machine

    def _start(self) -> None:
        searched = f"{PATH}:/usr/sbin:/sbin"
        if missing := [name for name in NEEDED if not shutil.which(name, path=searched)]:
            raise ConfigError(f"hosts of the check's own need {', '.join(missing)}, not installed here: give --host")
        if subprocess.run([f"{HERE}/rig/hosts-up", self._state, "can"], stdin=subprocess.DEVNULL).returncode:
            raise ConfigError("this machine forbids user namespaces, which hosts of the check's own need: give --host")
        self.up("-n", str(len(HOSTS)), "-s", "768m", "/tmp", *self.owned)
        self.add(os.uname().nodename, "768m")
        fe = self.machines.pop(os.uname().nodename)
        self.machines = {"fe": fe, **{name: OwnMachine(name, f"{self._state}/{name}") for name in HOSTS}}

    def up(self, *argv: str, **env: str) -> str:
        """What rig/hosts-up says."""
        env = {**os.environ, "HOSTS_KEEP": ":".join(self.kept), **env}
        rig = subprocess.run([f"{HERE}/rig/hosts-up", self._state, *argv], capture_output=True, env=env)
        if rig.returncode:
            raise BrokenRig(f"the hosts of the check do not start: {rig.stderr.decode()}")
        return rig.stdout.decode()

    def add(self, name: str, size: str = "64m") -> Machine:
        """One machine more."""
        self.up("add", name, "/tmp", *self.owned, HOSTS_SIZE=size)
        self.machines[name] = OwnMachine(name, f"{self._state}/{name}")
        return self.machines[name]

    def end(self, name: str) -> None:
        """As if its power were cut; its name stays known to ssh."""
        self.up("end", name)
        self.machines.pop(name, None)

    def close(self) -> None:
        if self.is_own:
            for machine in list(self.machines.values()):
                if isinstance(machine, OwnMachine):
                    machine.signal(signal.SIGCONT)
            subprocess.run([f"{HERE}/rig/hosts-down", self._state], stdout=subprocess.DEVNULL, check=False)
        else:
            for machine in self.hosts:
                machine.run("rm", "-rf", self.work, check=False)
                subprocess.run([*machine.argv([])[:-2], "-O", "exit", machine.name], capture_output=True, check=False)
        for _ in range(20):
            shutil.rmtree(self.work, ignore_errors=True)
            if not os.path.exists(self.work):
                return
            time.sleep(0.1)
        sys.stderr.write(f"madrigal: cannot remove {self.work}\n")
