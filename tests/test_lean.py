"""What an action loads: a front-end starts thousands of these processes, and every module costs.

The lists are what an action of a kind may load beside what Python itself has loaded by then.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import TREE, Hosts
from dumps import dump, front_end, system_dump, vm_document

BASE = """
    __future__ _collections _functools _locale _operator _sre _weakrefset binascii contextlib copyreg collections
    collections.abc enum functools importlib importlib.machinery itertools keyword operator re re._casefix
    re._compiler re._constants re._parser reprlib signal types weakref errno select string warnings math zlib
    _struct struct fcntl
""".split()
SESSION = "json json.decoder json.encoder json.scanner _json".split()
SSH = "socket _socket array selectors".split()
RUNNING = """
    subprocess _posixsubprocess msvcrt selectors threading collections.abc locale contextlib signal _weakrefset
    shlex
""".split()
HASHES = "hashlib _hashlib _blake2".split()
NEVER = """
    click lxml paramiko rich boto3 logging inspect dataclasses pathlib typing urllib http xmlrpc asyncio unittest email
    ssl socketserver concurrent multiprocessing sqlite3 tomllib ast dis importlib.metadata importlib.resources
""".split()


def imported(*argv: str, env: dict[str, str], input: bytes = b"") -> set[str]:
    """The modules that a Python program loads; it must succeed."""
    python = ["/usr/bin/python3", "-X", "importtime", *argv]
    done = subprocess.run(python, input=input, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode()
    return set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", done.stderr.decode(), re.MULTILINE))


START = imported("-c", "pass", env={})
XML = sorted(imported("-c", "import xml.etree.ElementTree", env={}) - START)
"""What reading a dump costs."""


def loaded(env: dict[str, str], action: str, *arguments: str, input: bytes = b"") -> set[str]:
    return imported(f"{TREE}/{action}", *arguments, env=env, input=input) - START


def foreign(found: set[str]) -> set[str]:
    return {name for name in found if name.partition(".")[0] != "madrigal"}


def check(found: set[str], *allowed: list[str]) -> None:
    more = foreign(found) - set(BASE).union(*allowed)
    assert not more, f"it loads {' '.join(sorted(more))}"
    found = found - set().union(*allowed)
    planned = found & {"madrigal.transfer.plan", "madrigal.transfer.progress"}
    assert not planned, f"little data are not worth {planned}"
    assert not {name for name in found for never in NEVER if f"{name}.".startswith(f"{never}.")}


OLD = ["clone", "ln", "mv", "mvds", "cpds", "context", "mkimage", "mkswap", "delete"]


@pytest.mark.parametrize("action", [*OLD, "resize", "premigrate", "postmigrate", "failmigrate", "prebackup", "restore"])
def test_help_of_tm(action: str) -> None:
    check(loaded({}, f"tm/ssh/{action}", "--help"))


@pytest.mark.parametrize("action", ["cp", "mkfs", "rm", "clone", "stat", "monitor", "export"])
def test_help_of_datastore(action: str) -> None:
    check(loaded({}, f"datastore/fs/{action}", "--help"))


@pytest.fixture
def store(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "one/var").mkdir(parents=True)
    (tmp_path / "ds").mkdir()
    (tmp_path / "image").write_bytes(os.urandom(4096))
    return {"PATH": "/usr/bin:/bin", "ONE_LOCATION": str(tmp_path / "one"), "MADRIGAL_RUN_DIR": str(tmp_path / "run")}


def test_datastore(store: dict[str, str], tmp_path: Path) -> None:
    """cp looks into what it imports, mkfs runs qemu-img; the others have the dump to read."""
    image = {"PATH": tmp_path / "image", "FORMAT": "raw", "SIZE": 1, "FS": ""}

    def act(action: str, **more: object) -> set[str]:
        input = dump(tmp_path / "ds", {**image, **more}, None, {"SAFE_DIRS": "/"})
        return loaded(store, f"datastore/fs/{action}", "42", input=input)

    check(act("cp"), XML, HASHES, RUNNING, SESSION)
    (source,) = (tmp_path / "ds").iterdir()
    check(act("export", SOURCE=source), XML, HASHES, SESSION)
    for action in ("monitor", "rm"):
        check(act(action, SOURCE=source), XML)
    check(loaded(store, "tm/shared/monitor", "0", input=system_dump(tmp_path)), XML, ["base64"])
    check(act("stat"), XML, HASHES, RUNNING)
    check(act("mkfs"), XML, HASHES, RUNNING)


def connect(hosts: Hosts, vm: str) -> None:
    """Have the shared connections, whose making costs more once."""
    for host in ("host01", "host02"):
        loaded(hosts.env, "tm/ssh/delete", f"{host}:{vm}")


def test_tm(hosts: Hosts, datastore: str, tmp_path: Path) -> None:
    image, vm = tmp_path / "image", f"{datastore}/17"
    image.write_bytes(os.urandom(4096))

    def act(*arguments: str) -> set[str]:
        return loaded(hosts.env, *arguments)

    connect(hosts, vm)
    for action in (
        ("tm/ssh/clone", f"fe:{image}", f"host01:{vm}/disk.0"),
        ("tm/ssh/mkswap", "1", f"host01:{vm}/disk.1"),
        ("tm/ssh/mv", f"host01:{vm}", f"host02:{vm}"),
        ("tm/ssh/mvds", f"host02:{vm}/disk.0", f"fe:{image}"),
        ("tm/ssh/delete", f"host02:{vm}"),
    ):
        check(act(*action), SESSION, SSH)
    check(act("tm/ssh/context", str(image), f"host01:{vm}/disk.2"), SESSION, RUNNING, SSH)
    for action in (
        ("tm/dummy/clone", f"fe:{image}", f"host01:{vm}/disk.0"),
        ("tm/ssh/mv", f"host01:{vm}/disk.0", f"host02:{vm}/disk.0"),
    ):
        check(act(*action))


def test_today_s_tm(hosts: Hosts, datastore: str, tmp_path: Path) -> None:
    disk, vm = f"host01:{datastore}/0/17/disk.0", f"{datastore}/0/17"
    document = vm_document(17, {0: {"TM_MAD": "ssh"}}, history=(0, 0))
    connect(hosts, vm)
    with front_end(tmp_path, document) as asked:
        env = {**hosts.env, **asked}
        loaded(env, "tm/ssh/mkimage", "1", "raw", disk, "17", "0")
        check(loaded(env, "tm/ssh/resize", disk, "2", "17", "0"), SESSION, SSH, XML)
        for action in ("tm/ssh/premigrate", "tm/ssh/postmigrate"):
            found = loaded(env, action, "host01", "host02", vm, "17", "0", input=base64.b64encode(document))
            check(found, SESSION, SSH, XML)
            loaded(env, "tm/ssh/mkimage", "1", "raw", disk.replace("host01", "host02"), "17", "0")


def test_datastore_on_a_bridge(hosts: Hosts, datastore: str, tmp_path: Path) -> None:
    image = {"PATH": tmp_path / "image", "FORMAT": "raw", "SIZE": 1, "SOURCE": f"{datastore}/x"}
    (tmp_path / "image").write_bytes(os.urandom(4096))
    for action in ("cp", "monitor", "rm", "mkfs"):
        input = dump(datastore, image, None, {"BRIDGE_LIST": "host01"})
        check(loaded(hosts.env, f"datastore/fs/{action}", "42", input=input), XML, HASHES, SESSION, RUNNING, SSH)


def test_a_module_too_many_is_seen(tmp_path: Path) -> None:
    (tmp_path / "tree/tm/x").mkdir(parents=True)
    (tmp_path / "tree/lib").symlink_to(TREE / "lib")
    text = (TREE / "tm/dummy/mv").read_text().replace("import sys\n", "import sys\nimport logging\n")
    (tmp_path / "tree/tm/x/mv").write_text(text)
    with pytest.raises(AssertionError, match=r"it loads .*logging"):
        check(imported(str(tmp_path / "tree/tm/x/mv"), "--help", env={}) - START)
