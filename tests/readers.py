"""All that parses what others have written, as functions of bytes: test_fuzz feeds them.

Where bytes come from a program, a server or another host, they come here as they would from there: from a file, a
socket or a pipe, as far as that costs little.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from dumps import dump, vm_document

from madrigal import backup, drivers, frontend, inspector, monitoring, tm
from madrigal.config import read_shell
from madrigal.dump import VM, Datastore, Dump
from madrigal.errors import Forbidden, MadrigalError
from madrigal.host import Host, known_hosts, ssh_config
from madrigal.location import Location, arg_host, arg_path, fix_dir_slashes
from madrigal.onhost import chain, consume, image
from madrigal.onhost.part import Nameless
from madrigal.onhost.undo import Undo
from madrigal.source import packed, resume, schemes, sigv4, size, web
from madrigal.source.scheme import s3, ssh
from madrigal.source.stream import Unpacked

RIGHT = dump("/ds/1", {"PATH": "/x", "FORMAT": "raw", "FS": "ext4", "SIZE": 5}, {"MD5": "0" * 32}, {"SAFE_DIRS": "/x"})
RIGHT_VM = vm_document(17, {0: {"SIZE": 5, "FORMAT": "raw"}}, history=(0, 1))
MOST = 16 << 20
"""Bytes that anything may become when it is unpacked."""

ours = functools.partial(contextlib.suppress, MadrigalError)


def nothing(*_: object, **__: object) -> None:
    pass


@contextlib.contextmanager
def file_of(data: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file.name


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# -- from the front-end ------------------------------------------------------------------------------------------


def read_dump(data: bytes) -> None:
    """All that a recipe may ask of a dump."""
    read = Dump(data)
    for thing in (read.image, read.datastore):
        for name in vars(type(thing)):
            if isinstance(vars(type(thing))[name], property):
                with ours():
                    getattr(thing, name)
        thing.attribute("MD5")


def read_vm(data: bytes) -> None:
    vm = VM(data)
    for name in vars(VM):
        if isinstance(vars(VM)[name], property):
            with ours():
                getattr(vm, name)
    disk = vm.disk(0)
    assert disk is None or disk.format


def read_argument(data: bytes) -> None:
    text = text_of(data)
    arg_host(text), arg_path(text), fix_dir_slashes(text)
    for parse in (Location.parse, Location.of_image):
        with ours():
            found = parse(text).checked()
            assert ".." not in found.path.split("/") and not found.host.startswith("-")
            assert found.disk_id is None or found.disk_id >= 0
    with ours():
        assert tm.number(text, "VMID") >= 0
    words = text.split("\n")
    for name in backup.ACTIONS:
        with ours(), mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(RIGHT_VM))):
            assert backup.parse(name, words).vm_id >= 0


def read_credentials(data: bytes) -> None:
    """The file with what the front-end is asked with."""
    with file_of(data) as path, mock.patch.dict(os.environ, {"ONE_AUTH": path, "ONE_XMLRPC": ""}), ours():
        assert "\n" not in (frontend._auth() or "")
    with ours(), mock.patch("socket.create_connection", side_effect=OSError("not here")):
        frontend._post(text_of(data), b"")


def read_answer_of_front_end(data: bytes) -> None:
    """What comes back when a VM or a datastore is asked for."""
    with served(data) as port, file_of(b"oneadmin:x\n") as auth:
        known = {"ONE_AUTH": auth, "ONE_XMLRPC": f"http://127.0.0.1:{port}/RPC2", "PATH": "/nowhere"}
        with mock.patch.dict(os.environ, known):
            for ask in (frontend.vm, frontend.datastore):
                with ours():
                    assert isinstance(ask(1), VM | Datastore)


# -- configuration -----------------------------------------------------------------------------------------------


def read_configuration(data: bytes) -> None:
    with file_of(data) as path:
        read_shell(path)


def read_driver(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as tree:
        for kind in drivers.KINDS:
            os.makedirs(f"{tree}/{kind}/x")
            with open(f"{tree}/{kind}/x/driver.toml", "wb") as file:
                file.write(data)
            with ours():
                assert drivers.read(tree, kind, "x") is not None


def read_qcow2_options(data: bytes) -> None:
    text = text_of(data)
    for format in ("raw", "qcow2"):
        with ours():
            words = image._options(text, format)
            assert not words or (words[0] == "-o" and "backing" not in words[1] and "data_file" not in words[1])


def read_monitord(data: bytes) -> None:
    with file_of(data) as path, ours():
        found = monitoring._settings(path)
        assert found and 0 < int(found["PORT"]) < 65536


def read_ssh_config(data: bytes) -> None:
    with file_of(data) as path, mock.patch.dict(os.environ, {"MADRIGAL_SSH_CONFIG": path}), ours():
        target = ssh_config.Target("host.example")
        assert target.port >= 0 and target.hostname
        target.algorithms("KexAlgorithms", ["a", "b"])


def read_known_hosts(data: bytes) -> None:
    with file_of(data) as path:
        for port in (22, 2222):
            known_hosts.KnownKeys([path], "host.example", port, "").has(b"key")


# -- images ------------------------------------------------------------------------------------------------------


def read_image(data: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        found = inspector.check_import(file.fileno())
        assert found.format
        inspector.inspect_head(data, True)


def read_qcow2(data: bytes) -> None:
    """What an action reads of a disk's header by itself."""
    with file_of(data) as path:
        for ask in (image.virtual_size, image.is_overlay, image.backing, image.is_empty):
            with ours():
                ask(path)
        assert chain.File(path).backing is not None


def read_map(data: bytes) -> None:
    """What qemu-img says that an image is made of."""

    def answer(command: str, arguments: list[str], waiting: object, timeout: float, room: int) -> None:
        os.write(room, data)

    with tempfile.TemporaryDirectory() as directory, mock.patch.object(image, "_run", answer):
        undo = Undo()
        source = Nameless(undo, directory)
        try:
            disk = consume._mapped(source, "qcow2", directory, nothing, 1.0)
            if disk:
                cuts = consume._cuts(disk.pieces(), disk.data)
                assert 0 <= min(cuts) <= max(cuts) <= max(disk.size, 0)
        finally:
            undo.unwind()


# -- sources -----------------------------------------------------------------------------------------------------


class Memory(schemes.Source):
    """A source of these bytes."""

    def __init__(self, data: bytes, can_peek: bool) -> None:
        self.name, self.size, self._data, self._at, self._can_peek = "it", len(data), data, 0, can_peek

    def read(self, most: int) -> bytes:
        found = self._data[self._at : self._at + most]
        self._at += len(found)
        return found

    def peek(self, offset: int, length: int) -> bytes | None:
        return self._data[offset : offset + length] if self._can_peek else None

    def close(self) -> None:
        pass


def read_packed(data: bytes) -> None:
    """Unpacked to the end, and asked for its size: what is said without unpacking is right, if it can be unpacked."""
    with ours():
        total = 0
        for piece in Unpacked(Memory(data, False), True, nothing):
            assert piece and len(piece) <= 2 << 20
            total += len(piece)
            if total > MOST:
                return
    for can_peek in (True, False):
        stream = Unpacked(source := Memory(data, can_peek), True, nothing)
        if stream.kind:
            with ours():
                told = packed.length(source, stream.kind, b"", data, nothing)
                assert told is None or told >= 0
    with file_of(data) as path, ours():
        told = size.virtual_size(path, schemes.Terms(lambda path: os.open(path, os.O_RDONLY)))
        assert told >= 0


def refuse(path: str) -> int:
    raise Forbidden(f"{path} may not be read")


def read_url(data: bytes) -> None:
    """What of a URL is looked at before anybody is asked."""
    text = text_of(data)
    terms = schemes.Terms(refuse, market=lambda name: {"REGION": "eu-west-1"}.get(name, "x"))
    with ours():
        page = web.Page(text)
        assert page.target.isascii() and page.target.isprintable() and " " not in page.target
        assert page.place[0] in ("http", "https")
    with ours():
        place = s3._place(text, web.shown(text), terms)
        assert ".." not in place.split("/")
        headers = sigv4.Keys("key", "secret", "eu-west-1").sign(place, {})
        assert all("\n" not in value for value in headers.values())
    if not schemes._URL.match(text):
        with ours():
            schemes.open(text, terms).close()
    with ours(), mock.patch.object(Host, "start", side_effect=MadrigalError("not here")):
        ssh.open(text, terms, 1.0)


@contextlib.contextmanager
def served(*answers: bytes) -> Iterator[int]:
    """The port of a server that gives each connection the next of ANSWERS, the last one to all others."""
    listener = socket.create_server(("127.0.0.1", 0))
    left = list(answers)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                asked = b""
                while b"\r\n\r\n" not in asked and (more := connection.recv(65536)):
                    asked += more
                if not asked:
                    return  # it was us
                connection.sendall(left.pop(0) if len(left) > 1 else left[0])
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # a reset would swallow what was sent
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    try:
        yield port
    finally:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            pass
        listener.close()
        thread.join(10)


def read_http(data: bytes) -> None:
    """What a web server answers, to each of the requests the next of the parts between bytes 0x1e."""
    with (
        served(*data.split(b"\x1e")) as port,
        mock.patch.object(resume, "PAUSE", 0.0),
        mock.patch.object(resume, "LONGEST", 0.0),
        mock.patch.dict(os.environ, {"no_proxy": "*"}),
    ):
        here = f"http://127.0.0.1:{port}/image"
        with mock.patch.object(web.Page, "_connection", _only_to(port, web.Page._connection)), ours():
            with schemes.open(here, schemes.Terms(refuse), 2.0) as source:
                assert source.size is None or source.size >= 0
                with ours():
                    source.peek(1, 5)
                total = 0
                while piece := source.read(1 << 20):
                    total += len(piece)
                    assert total <= len(data) * 4
                assert source.size in (None, total)


def _only_to(port: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """Wherever a redirect leads, it is this server that is asked."""

    def connection(page: web.Page, seconds: float, verify: bool) -> Any:
        made = real(page, seconds, verify)
        made[0].host, made[0].port = "127.0.0.1", port
        if page.place[0] == "https":
            raise MadrigalError("no TLS here")
        return made

    return connection


READERS: dict[str, Callable[[bytes], None]] = {
    "dump": read_dump,
    "vm": read_vm,
    "argument": read_argument,
    "credentials": read_credentials,
    "answer-of-front-end": read_answer_of_front_end,
    "configuration": read_configuration,
    "driver": read_driver,
    "qcow2-options": read_qcow2_options,
    "monitord": read_monitord,
    "ssh-config": read_ssh_config,
    "known-hosts": read_known_hosts,
    "image": read_image,
    "qcow2": read_qcow2,
    "map": read_map,
    "packed": read_packed,
    "url": read_url,
    "http": read_http,
}
