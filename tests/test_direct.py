"""Data that go from host to host past the front-end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Hosts

from madrigal import transfer
from madrigal.location import Location

MIB = 1 << 20


def test_file(hosts: Hosts, cold: dict[str, str], datastore: str) -> None:
    seen = hosts.on("host01", datastore)
    seen.mkdir()
    (seen / "17").mkdir()
    with open(seen / "17/disk.0", "wb") as file:
        for n in range(150):
            file.seek(n * 2 * MIB)
            file.write(os.urandom(MIB))
    transfer.move(Location("host01", f"{datastore}/17"), Location("host02", f"{datastore}/17"))
    assert 0
