"""How much room there is in a system datastore, and how much the disks of VMs take there.

Of shared storage the driver's `monitor` answers the one and sends the other by UDP to where monitord.conf says.  Of
hosts' own storage a probe on each host asks, which runs the `monitor_ds` of the driver that `.monitor` there names.
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
import socket
import time
import zlib
from types import TracebackType

from madrigal import deadline
from madrigal.errors import ConfigError, MadrigalError
from madrigal.host import Host

PATIENCE = 1.0  # seconds for a datagram that was sent before its sender ended

# $1: the datastore's directory.  The first word is what its .monitor says, then come what df says of it.
_LOOK = """test -f "$1/.monitor" || exit 0
printf '%s\\n' "$(head -c 100 "$1/.monitor" | tr -d '[:space:]')"
df -B1M -P "$1" | tail -n 1 | awk '{ print $2, $3, $4 }'"""
# $2: the monitor_ds in base64.  It is run as a file of its own, as it is where probes have been installed.
_PROBE = """set -e
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
printf %s "$2" | base64 -d >"$dir/monitor_ds"; chmod +x "$dir/monitor_ds"
"$dir/monitor_ds" "$1\""""

_VM = re.compile(r'VM\s*=\s*\[\s*ID\s*=\s*(\d+)\s*,\s*MONITOR\s*=\s*"([A-Za-z0-9+/=]*)"\s*\]')
_SIZE = re.compile(r"(DISK_SIZE|SNAPSHOT_SIZE)\s*=\s*\[([^\]]*)\]")
_MESSAGE = re.compile(rb"MONITOR_VM SUCCESS -1 \d+ ([A-Za-z0-9+/=]+)\s*")

Sizes = dict[int, dict[str, int]]
"""Of each VM the MiB of `0`, its disk 0, and of `0/2`, snapshot 2 of that."""


def capacity(text: str) -> tuple[int, int, int] | None:
    """(total, free, used) MiB of what `monitor` answered; None if a number is missing."""
    values = dict(re.findall(r"\b(TOTAL_MB|FREE_MB|USED_MB)\s*=\s*(\d+)", text))
    if len(values) != 3:
        return None
    return int(values["TOTAL_MB"]), int(values["FREE_MB"]), int(values["USED_MB"])


def sizes(text: str) -> Sizes:
    """What the lines `VM = [ ID = 17, MONITOR = "base64"]` say."""
    found: Sizes = {}
    for vm, encoded in _VM.findall(text):
        known = found.setdefault(int(vm), {})
        for kind, inside in _SIZE.findall(base64.b64decode(encoded).decode("utf-8", "replace")):
            values = dict(re.findall(r"\b(ID|DISK_ID|SIZE)\s*=\s*(\d+)", inside))
            disk = values.get("ID", "") if kind == "DISK_SIZE" else f"{values.get('DISK_ID')}/{values.get('ID')}"
            known[disk] = int(values.get("SIZE", 0))
    return found


class Listener:
    """Hears what drivers tell the monitoring; they find its address in `etc/monitord.conf` of DIRECTORY.

    There is one at a time: another waits.
    """

    def __init__(self, directory: str) -> None:
        self._file = f"{directory}/etc/monitord.conf"
        self._lock = f"{directory}/locks/monitord"

    def __enter__(self) -> Listener:
        self._held = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        os.makedirs(os.path.dirname(self._file), exist_ok=True)
        # A line each, with blanks: stock drivers read it with grep and awk.
        lines = ["NETWORK = [", '    MONITOR_ADDRESS = "127.0.0.1",', f"    PORT = {self._socket.getsockname()[1]},"]
        with open(self._file, "w", encoding="utf-8") as file:
            file.write("\n".join([*lines, '    PUBKEY = ""', "]", ""]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.unlink(self._file)
        self._socket.close()
        os.close(self._held)

    def heard(self) -> Sizes:
        """What has been told; waits a little if nothing has."""
        found: Sizes = {}
        end = time.monotonic() + PATIENCE
        while (left := end - time.monotonic()) > 0:
            self._socket.settimeout(0.05 if found else left)
            try:
                message = _MESSAGE.fullmatch(self._socket.recv(1 << 16))
                if message:
                    found.update(sizes(zlib.decompress(base64.b64decode(message[1])).decode("utf-8", "replace")))
            except (TimeoutError, ValueError, zlib.error):
                if found:
                    break
        return found


def probe(host: str, directory: str, tree: str) -> tuple[tuple[int, int, int], Sizes] | None:
    """(total, free, used) and sizes of the system datastore DIRECTORY on HOST; None if it is not monitored there.

    TREE has the drivers' monitor_ds.  Raises MadrigalError.
    """
    looked = Host(host).script(_LOOK, [directory], deadline.control())
    words = looked.stdout.decode("utf-8", "replace").split()
    if looked.status or not words:
        if looked.status:
            raise MadrigalError(f"cannot look at {directory} on {host}: {looked.complaint()}")
        return None
    driver, room = words[0], words[1:]
    file = f"{tree}/tm/{driver}/monitor_ds"
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", driver) or not os.path.isfile(file) or len(room) != 3:
        raise ConfigError(f"{directory}/.monitor on {host} is {driver[:60]!a}: {file} would have to exist")
    with open(file, "rb") as script:
        text = base64.b64encode(script.read()).decode()
    done = Host(host).script(_PROBE, [directory, text], deadline.control())
    if done.status:
        raise MadrigalError(f"monitor_ds of {driver} failed on {host} ({done.status}): {done.complaint()}")
    total, used, free = (int(word) for word in room)
    return (total, free, used), sizes(done.stdout.decode("utf-8", "replace"))
