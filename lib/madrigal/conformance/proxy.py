"""A proxy for connections: it stands between all machines and the sshd of a host, and cuts, hangs or loses what passes.

To kill an ssh or sshd is not the same: what is at the other end then sees an end at once, and in good order.
"""

from __future__ import annotations

import json
import signal
import subprocess

from madrigal.conformance.machines import HERE, Machines, OwnMachine


class Proxy:
    """rig/link in front of one host."""

    def __init__(self, machines: Machines, name: str) -> None:
        self.name = name
        argv = [f"{HERE}/rig/link", machines.up("own-port", name).strip()]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        machines.up("port", name, self._stdout.readline().strip())

    def tell(self, line: str) -> dict[str, int]:
        """What has passed since the last time: connections, forth, back, cuts.  LINE as rig/link says."""
        self._stdin.write(f"{line}\n")
        self._stdin.flush()
        said: dict[str, int] = json.loads(self._stdout.readline())
        return said

    def close(self) -> None:
        self._stdin.close()
        self._process.wait()
        self._stdout.close()


class Proxies:
    """One for each host, from entering to leaving, by which all connections go."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._all: list[Proxy] = []

    def __enter__(self) -> Proxies:
        try:
            for host in self._machines.hosts:
                self._all.append(Proxy(self._machines, host.name))
        except BaseException:
            self.__exit__()
            raise
        self._disconnect()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._all:
            self._machines.up("port", one.name)
            one.close()
        self._disconnect()

    def _disconnect(self) -> None:
        """End the connections that are kept, which lead past the proxies or end with them."""
        for machine in self._machines.machines.values():
            if isinstance(machine, OwnMachine):
                machine.signal(signal.SIGKILL, lambda words: words[0].startswith("ssh: ") or "-N" in words)

    def busiest(self) -> tuple[Proxy, int]:
        """The one by which most has passed since the last time, and how many bytes."""
        passed = {one: one.tell("count") for one in self._all}
        one = max(passed, key=lambda one: passed[one]["forth"] + passed[one]["back"])
        return one, passed[one]["forth"] + passed[one]["back"]

    def tell(self, line: str) -> None:
        for one in self._all:
            one.tell(line)
