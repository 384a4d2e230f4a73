"""How often an action waits for a host: at most twice besides the data that it reads from there, in one session."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Hosts

from madrigal import disks, migration, transfer
from madrigal.host import Host
from madrigal.host.bridge import BridgeSession
from madrigal.host.channel import Channel
from madrigal.location import Location
from madrigal.source.schemes import Terms
from madrigal.storage import files

MIB = 1 << 20


class Meter:
    """Counts what is read from a host after something was written to it: a wait for an answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: Counter[str] = Counter()
        self.sessions: Counter[str] = Counter()
        self._written: set[Channel] = set()
        for name in ("read", "readline", "read_into"):
            monkeypatch.setattr(Channel, name, self._reader(getattr(Channel, name)))
        write, start = Channel.write, Host.start

        def count_write(channel: Channel, timeout: float, *data: bytes) -> None:
            self._written.add(channel)
            write(channel, timeout, *data)

        def count_start(host: Host, *arguments: Any) -> Channel:
            self.sessions[host.name] += 1
            return start(host, *arguments)

        monkeypatch.setattr(Channel, "write", count_write)
        monkeypatch.setattr(Host, "start", count_start)

    def _reader(self, read: Callable[..., bytes]) -> Callable[..., bytes]:
        def count(channel: Channel, *arguments: Any) -> bytes:
            if channel in self._written:
                self._written.remove(channel)
                self.waits[channel.host] += 1
            return read(channel, *arguments)

        return count

    def of(self, function: Callable[..., object], *arguments: Any, **more: Any) -> dict[str, int]:
        """How often FUNCTION waits for each host."""
        self.waits.clear()
        self.sessions.clear()
        function(*arguments, **more)
        assert set(self.sessions.values()) == {1}, "more than one session"
        return dict(self.waits)


def test_round_trips(
    hosts: Hosts, env: dict[str, str], datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Meter(monkeypatch).of
    (tmp_path / "image").write_bytes(os.urandom(MIB))
    os.makedirs(datastore)
    image = Location("", str(tmp_path / "image"))
    here, there, vm = (Location(name, f"{datastore}/17") for name in ("", "host02", "host01"))
    one, two, three = (Location("host01", f"{datastore}/17/disk.{number}") for number in range(3))

    assert of(transfer.copy, image, one, ("raw", 2 * MIB), monitor="ssh") == {"host01": 2}
    assert of(disks.make, two, "raw", MIB, "swap") == {"host01": 2}
    with open(image.path, "rb") as file:
        assert of(transfer.copy_open, file.fileno(), three, second_name="iso") == {"host01": 2}
    # A third time for who gives data: it goes when it has arrived.
    assert of(transfer.move, vm, there, monitor="ssh") == {"host01": 3, "host02": 2}
    assert of(transfer.move, vm, there) == {"host01": 2, "host02": 2}  # again
    assert of(transfer.move, there, here) == {"host02": 3}
    assert of(transfer.move, here, vm) == {"host01": 2}
    state = {"format": "raw", "snapshot": -1, "image": ""}
    assert of(transfer.save, one, Location("", f"{datastore}/saved"), state) == {"host01": 3}
    assert of(transfer.copy_whole, image, two, state, monitor="ssh") == {"host01": 2}
    assert of(transfer.copy, image, two, monitor="ssh", near=True) == {"host01": 2}
    assert of(transfer.bring_back, two, image) == {"host01": 3}
    assert of(transfer.bring_back, two, image) == {"host01": 2}  # again
    (tmp_path / "qcow2").write_bytes(b"")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "qcow2", "1M"], check=True)
    qcow2 = Location("", str(tmp_path / "qcow2"))
    assert of(disks.overlay, qcow2, two, 0) == {"host01": 2}  # which has no datastores of its own there
    assert of(transfer.copy, qcow2, two, state={**state, "format": "qcow2"}, chain="number") == {"host01": 2}
    assert of(disks.link, Location("", one.path), two, relative=False) == {"host01": 2}
    assert of(transfer.copy, Location("host01", one.path), two) == {"host01": 2}
    assert of(transfer.move, vm, Location("host01", f"{datastore}/18")) == {"host01": 2}
    assert of(disks.resize, Location("host01", f"{datastore}/18/disk.0"), "raw", 2 * MIB, False) == {"host01": 2}
    old, new = Location("host01", f"{datastore}/18"), Location("host02", f"{datastore}/18")
    assert of(migration.make_room, new, old, "ssh") == {"host02": 2}
    os.makedirs(hosts.on("host02", new.path))
    assert of(migration.make_room, new, old, "ssh") == {"host01": 2, "host02": 2}
    os.makedirs(hosts.on("host02", new.path))
    assert of(migration.remove, new, old) == {"host01": 2, "host02": 2}
    assert of(disks.delete, Location("host01", f"{datastore}/18")) == {"host01": 2}


def test_round_trips_of_datastores(
    hosts: Hosts, env: dict[str, str], datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Meter(monkeypatch).of
    (tmp_path / "image").write_bytes(os.urandom(MIB))
    path, other = f"{datastore}/image", f"{datastore}/other"

    def on(names: list[str], act: Callable[[files.Store], object]) -> None:
        with BridgeSession(names, "BRIDGE_LIST") as session:
            act(files.Store(session, datastore))

    def add(driver: str) -> Callable[[files.Store], object]:
        terms = Terms(lambda name: os.open(name, os.O_RDONLY))
        return lambda store: store.add(path, str(tmp_path / "image"), terms, {}, True, True, driver)

    def across() -> None:
        with BridgeSession(["host01"], "SOURCE_BRIDGE_LIST") as given:
            on(["host02"], lambda store: store.clone(path, "raw", other, "", given))

    assert of(on, hosts.names, add("")) == {"host01": 2}
    assert of(on, hosts.names, add("")) == {"host01": 2}  # again
    assert of(on, hosts.names, lambda store: store.clone(path, "raw", other, "qcow2")) == {"host01": 2}
    assert of(across) == {"host01": 3, "host02": 2}  # a third time for who gives data
    for act in (
        lambda store: store.export(path, "raw"),
        lambda store: store.remove(path),
        lambda store: store.make(path, "raw", MIB, "", []),
        lambda store: store.capacity(),
        lambda store: store.remove(path),
    ):
        assert of(on, hosts.names, act) == {"host01": 2}
    assert of(on, hosts.names, add("qcow2")) == {"host01": 2}
