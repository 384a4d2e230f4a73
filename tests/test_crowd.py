"""Fifteen actions at a time, as a front-end's drivers run them, against sshd's default limits from a cold start.

MADRIGAL_CROWD_SECONDS: how long they go on (default 20).
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from pathlib import Path

import pytest
from conftest import Hosts, check_stderr, run_action
from dumps import dump

pytestmark = pytest.mark.long

MIB = 1 << 20
AT_ONCE = 15


class Crowd:
    def __init__(self, hosts: Hosts, env: dict[str, str], work: Path, seconds: float) -> None:
        self.hosts, self.env, self.work = hosts, env, work
        self.base = Path(hosts.datastores, "1")
        self.end = time.monotonic() + seconds
        self.wrong: list[str] = []
        self.lives = 0

    def action(self, action: str, *arguments: str, input: bytes = b"") -> str:
        done = run_action(action, *arguments, env=self.env, input=input)
        assert done.status == 0, (action, arguments, done)
        check_stderr(done, action)
        return done.stdout

    def life(self, number: int, rng: random.Random) -> None:
        """One image and one VM, from the import to the removal."""
        path = self.work / str(number)
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 3, 9]) * MIB))
        os.truncate(path, 12 * MIB)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        here, there = rng.sample(self.hosts.names, 2)
        vm = f"{self.hosts.datastores}/0/{number}"
        image = {"ID": number, "PATH": path}
        source = self.action("datastore/fs/cp", str(number), input=dump(self.base, image)).split()[0]
        self.action("tm/ssh/clone", f"fe:{source}", f"{here}:{vm}/disk.0")
        self.action("tm/ssh/ln", f"fe:{source}", f"{here}:{vm}/disk.1")
        self.action("tm/ssh/context", str(path), f"{here}:{vm}/disk.2")
        self.action("tm/ssh/mv", f"{here}:{vm}", f"{there}:{vm}")
        for disk in ("disk.0", "disk.1"):
            found = hashlib.sha256(self.hosts.on(there, f"{vm}/{disk}").read_bytes()).hexdigest()
            assert found == digest, f"{disk} of {number}"
        self.action("tm/ssh/mvds", f"{there}:{vm}/disk.1", source)
        assert hashlib.sha256(Path(source).read_bytes()).hexdigest() == digest, f"the image of {number}"
        self.action("tm/ssh/delete", f"{there}:{vm}/disk.0")
        self.action("tm/ssh/delete", f"{there}:{vm}")
        self.action("datastore/fs/rm", str(number), input=dump(self.base, {"ID": number, "SOURCE": source}))
        path.unlink()
        self.lives += 1

    def worker(self, first: int) -> None:
        rng = random.Random(first)
        number = first
        try:
            while time.monotonic() < self.end and not self.wrong:
                self.life(number, rng)
                number += AT_ONCE
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")


def test_fifteen_actions_at_a_time(hosts: Hosts, cold: dict[str, str], tmp_path: Path) -> None:
    crowd = Crowd(hosts, cold, tmp_path, float(os.environ.get("MADRIGAL_CROWD_SECONDS", "20")))
    workers = [threading.Thread(target=crowd.worker, args=(number,)) for number in range(1, AT_ONCE + 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not crowd.wrong, crowd.wrong
    assert crowd.lives >= AT_ONCE
    places = [Path(hosts.datastores), *(hosts.on(name) for name in hosts.names)]
    files = [str(path) for place in places for path in place.rglob("*") if not path.is_dir()]
    assert not files, "left behind"
    left = [path.name for path in Path(cold["MADRIGAL_RUN_DIR"]).iterdir() if path.name.endswith(".running")]
    assert not left
    assert not any(hosts.workers(name) for name in hosts.names)
    for place in places:
        for directory in place.iterdir():
            directory.rmdir()
