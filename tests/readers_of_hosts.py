"""The parsers of readers.py that read what other hosts, their libvirt, and the disks of VMs have."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

from readers import MOST, file_of, nothing, ours, refuse

from madrigal import command
from madrigal.errors import MadrigalError
from madrigal.host import Host, program, remote
from madrigal.host.channel import Channel
from madrigal.onhost import blocks, chain, guest, layout, monitor_ds, receiver, stream, survey, worker
from madrigal.onhost.undo import Undo
from madrigal.source import resume, schemes
from madrigal.source.scheme import ssh

# -- from other hosts --------------------------------------------------------------------------------------------


class Pipe(Channel):
    """A command on a host that says DATA, and ends."""

    def __init__(self, data: bytes) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._file.write(data)
        self._file.seek(0)
        given, taken = os.pipe()
        os.close(given)
        super().__init__("host", taken, os.dup(self._file.fileno()))

    def _poll(self) -> int:
        return 0

    def _end(self) -> None:
        pass

    def stderr(self) -> bytes:
        return b""

    def write(self, timeout: float, *data: bytes | memoryview) -> None:
        pass


def on_host(data: bytes) -> Any:
    return mock.patch.object(Host, "start", lambda *_, **__: Pipe(data))


def read_answer_of_host(data: bytes) -> None:
    """What a worker answers to a question, and the frames that it sends."""
    for what in ("call", "send"):
        with on_host(program.MARKER.encode() + b"\n" + data), ours():
            session = remote.RemoteSession(Host("host.example"), False)
            if what == "call":
                session.call("exists", path="/")
            else:
                for kind, offset, payload in session.send("/x"):
                    assert len(kind) == 1 and offset >= 0 and len(payload) <= stream.CHUNK


def read_file_of_host(data: bytes) -> None:
    """What a host says of a file that is imported from it, and the file."""
    with on_host(program.MARKER.encode() + b"\n" + data), ours():
        with mock.patch.object(resume, "PAUSE", 0.0), mock.patch.object(resume, "LONGEST", 0.0):
            with ssh.open("ssh://host.example:/x", schemes.Terms(refuse), 1.0) as source:
                assert source.size is not None
                read = 0
                while piece := source.read(1 << 20):
                    read += len(piece)
                    if read > MOST:
                        return
                assert read == source.size


def read_frames(data: bytes) -> None:
    """What arrives to become a file or a directory, which nothing of it may lead out of."""
    with tempfile.TemporaryDirectory() as work:
        os.mkdir(f"{work}/there")
        undo = Undo()
        taker = receiver.Receiver(undo, f"{work}/there", "disk.0")
        try:
            for frame in worker._frames(io.BytesIO(data)):
                taker.take(*frame)
            taker.finish()
        finally:
            undo.unwind()
            assert os.listdir(work) == ["there"] and not os.path.lexists(f"{work}/there/disk.0")


def framed(*frames: tuple[bytes, int, bytes]) -> bytes:
    """FRAMES with right headers."""
    return b"".join(stream.header(kind, offset, len(payload)) + payload for kind, offset, payload in frames)


def read_described(data: bytes) -> None:
    """Digests of blocks, noted earlier or told by another host."""
    with tempfile.TemporaryFile() as file, file_of(data) as where:
        file.write(bytes(200_000))
        described = blocks.noted(file.fileno(), where)
        assert described is None or isinstance(described, dict)
        with contextlib.suppress(ValueError, RecursionError):
            about = json.loads(data)
            if isinstance(about, dict):
                about["of"] = blocks.identity(file.fileno())
                with open(where, "w") as again:
                    json.dump(about, again)
                blocks.noted(file.fileno(), where)


# -- from libvirt, and the file system ---------------------------------------------------------------------------


def read_virsh(data: bytes) -> None:
    """What virsh answers to everything."""

    def answer(argv: list[str], *_: object, **__: object) -> command.Result:
        return command.Result(0, data, b"")

    with mock.patch.object(command, "run", answer):
        vm = guest.Guest("test:///", "one-17", 1.0, 1.0, nothing)
        vm.is_running()
        for ask in (
            lambda: vm.device_of("/nowhere/disk.0"),
            lambda: vm.files("vda"),
            vm.check_names,
            lambda: vm.capacity("vda"),
            lambda: vm.end_job("vda"),
            lambda: vm._is_ready("vda"),
        ):
            with on_disk():
                ask()


def read_snapshots(data: bytes) -> None:
    """A directory with a disk and snapshots, from a JSON list of [name, kind, what it holds or leads to]."""
    try:
        entries = [tuple(map(str, entry)) for entry in json.loads(data)]
        assert all(len(entry) == 3 for entry in entries)
    except (ValueError, TypeError, RecursionError, AssertionError):
        return
    with tempfile.TemporaryDirectory() as work:
        top = f"{work}/0/17"
        os.makedirs(f"{top}/disk.0.snap")
        for name, kind, what in entries:
            with contextlib.suppress(OSError, ValueError):
                path = os.path.join(top, name)
                if not os.path.realpath(os.path.dirname(path)).startswith(work):
                    continue
                if kind == "link":
                    os.symlink(what, path)
                elif kind == "dir":
                    os.mkdir(path)
                elif kind == "fifo":
                    os.mkfifo(path)
                else:
                    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                        file.write(qcow2(what) if kind == "qcow2" else what.encode("utf-8", "surrogatepass"))
        _ask_of_disk(f"{top}/disk.0", f"{work}/0")


def qcow2(backing: str, format: str = "qcow2") -> bytes:
    """The header of an empty image of 1 MiB on BACKING."""
    name = backing.encode("utf-8", "surrogatepass")
    kind = format.encode()
    extension = b"\xe2\x79\x2a\xca" + len(kind).to_bytes(4, "big") + kind.ljust(-len(kind) % 8 + len(kind), b"\0")
    offset = 104 + len(extension) + 8
    head = b"QFI\xfb" + (3).to_bytes(4, "big") + (offset if name else 0).to_bytes(8, "big")
    head += len(name).to_bytes(4, "big") + (16).to_bytes(4, "big") + (1 << 20).to_bytes(8, "big") + bytes(68)
    return head + (104).to_bytes(4, "big") + extension + bytes(8) + name


def _ask_of_disk(disk: str, datastore: str) -> None:
    for line in monitor_ds.lines(datastore):
        assert line.startswith("VM = [ ID = ")
    for format in ("raw", "qcow2"):
        for snapshot in (-1, 0, 3):
            with on_disk():
                layout.state(disk, {"format": format, "snapshot": snapshot, "image": ""})
        with on_disk():
            place = layout.Place(disk, format)
            place.weight()
            place.contents()
    with on_disk():
        known = chain.Disk(disk)
        known.check_active()
        for steps in (known.chain.create, known.chain.revert, known.chain.delete, known.chain.flatten):
            with on_disk():
                steps(1)
    with on_disk():
        survey.survey(disk)


def on_disk() -> Any:
    """What is on disks may also fail in a system call, which an action explains."""
    return contextlib.suppress(MadrigalError, OSError)


READERS: dict[str, Callable[[bytes], None]] = {
    "answer-of-host": read_answer_of_host,
    "file-of-host": read_file_of_host,
    "frames": read_frames,
    "described": read_described,
    "virsh": read_virsh,
    "snapshots": read_snapshots,
}
