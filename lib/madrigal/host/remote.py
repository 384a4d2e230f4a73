"""A session for the files of another host: a worker there does the work (onhost/worker.py)."""

from __future__ import annotations

import json
import os

from madrigal import deadline, messages
from madrigal.errors import BY_NAME, DeadlineExceeded, HostUnreachable, MadrigalError
from madrigal.host import local
from madrigal.host.channel import Channel, failure
from madrigal.onhost import stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Self

    from madrigal.host import Host
    from madrigal.onhost.stream import Frame

HOST_PART = (
    "errors",
    "command",
    "onhost.undo",
    "onhost.lock",
    "onhost.part",
    "onhost.stream",
    "onhost.copy",
    "onhost.image",
    "onhost.filesystem",
    "onhost.session",
    "onhost.worker",
)
"""The modules that are sent to hosts, in the order they import one another: Python 3.6, standard library."""

_MARKER = "madrigal worker, ready"

# Read the program, of which the first line is its length, from stdin, and leave the rest of stdin to it.
_BOOT = 'import sys;i=sys.stdin.buffer;exec(compile(i.read(int(i.readline())),"madrigal","exec"))'
# Paths cross as UTF-8, whatever the locale there (3.6 does not know the option and does not mind it).
_COMMAND = f"exec python3 -I -S -X utf8 -c '{_BOOT}'"

_PROGRAM = """\
import sys, types
if sys.version_info < (3, 6):
    sys.stderr.write("python3 here is older than 3.6\\n")
    sys.exit(127)
def module(name, text):
    made = sys.modules[name] = types.ModuleType(name)
    if "." in name:
        above, _, last = name.rpartition(".")
        setattr(sys.modules[above], last, made)
    exec(compile(text, name, "exec"), made.__dict__)
"""


def program() -> bytes:
    """What is sent to a host: a Python program with the host part in it, its length in the first line."""
    umask = os.umask(0)
    os.umask(umask)
    library = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    lines = [_PROGRAM, "module('madrigal', '')\nmodule('madrigal.onhost', '')\n"]
    for name in HOST_PART:
        with open(f"{library}/{name.replace('.', '/')}.py", encoding="utf-8") as file:
            lines.append(f"module('madrigal.{name}', {file.read()!a})\n")
    lines.append(f"sys.modules['madrigal.onhost.worker'].main({_MARKER!r}, {local.timeouts()!r}, {umask})\n")
    text = "".join(lines).encode("ascii")
    return b"%d\n%s" % (len(text), text)


class RemoteSession:
    """The files of another host, changed by a worker there (onhost/worker.py) that lives as long as the session."""

    def __init__(self, host: Host, bulk: bool) -> None:
        self.host = host
        self._stall = deadline.stall()
        self._channel: Channel | None = self._start(bulk)

    def _start(self, bulk: bool) -> Channel:
        text, attempt = program(), 0
        while True:
            attempt += 1
            channel = self.host.start(_COMMAND, bulk)
            try:
                try:
                    channel.write(text, deadline.connect())
                except BrokenPipeError:
                    pass  # it has ended already; why is found below
                # what a login shell writes before is not ours
                while line := channel.readline(deadline.connect()):
                    if line.rstrip().endswith(_MARKER.encode()):  # a prompt or a title comes without a newline
                        return channel
                error = failure(self.host.name, channel.wait(5), channel.stderr())
            except DeadlineExceeded:
                error = HostUnreachable(f"{self.host.name} did not start a worker in {deadline.connect():g} s")
            except BaseException:
                channel.close()
                raise
            channel.close()
            self.host.retried(error, attempt)

    def call(self, method: str, **arguments: Any) -> Any:
        """What Session.METHOD returns on the host; raises what it raises there."""
        self._ask(method, arguments)
        return self._answer()

    def send(self, path: str) -> Iterator[Frame]:
        """The frames of PATH; to be read to their end before anything else is asked."""
        self._ask("send", {"path": path})
        channel = self._open()
        while True:
            header = channel.read_exactly(1, self._stall)
            if header == b"{" or not header:
                self._answer(header)  # it failed before it had anything to send
                raise self._broken()
            header += channel.read_exactly(stream.HEADER.size - 1, self._stall)
            if len(header) < stream.HEADER.size:
                raise self._broken()
            kind, offset, length = stream.HEADER.unpack(header)
            payload = channel.read_exactly(length, self._stall)
            if len(payload) < length:
                raise self._broken()
            if kind == b"X":
                self._answer()
                return
            yield kind, offset, payload

    def receive(self, frames: Iterator[Frame], **arguments: Any) -> Any:
        """Give FRAMES to Session.receive on the host and return what it returns."""
        self._ask("receive", arguments)
        channel = self._open()
        try:
            for kind, offset, payload in frames:
                channel.write(stream.HEADER.pack(kind, offset, len(payload)), self._stall)
                channel.write(payload, self._stall)
            channel.write(stream.HEADER.pack(b"X", 0, 0), self._stall)
        except BrokenPipeError:
            pass  # the worker has said why before it ended
        return self._answer()

    def done(self) -> None:
        """Keep what was made, and let others at it."""
        if self._channel is not None:
            self.call("done")
            self._channel.close()
            self._channel = None

    def fail(self) -> None:
        """The worker sees the end of its input and takes everything back; wait for that."""
        if self._channel is None:
            return
        try:
            self._channel.close_stdin()
            unread = 4 << 20  # what it was sending when we failed; it stops when nobody reads
            while unread > 0 and (data := self._channel.read(10)):
                unread -= len(data)
        except (OSError, DeadlineExceeded):
            messages.log_error(f"{self.host.name} did not confirm that it has taken back what was made")
        self._channel.close()
        self._channel = None

    def _open(self) -> Channel:
        if self._channel is None:
            raise AssertionError("the session is over")
        return self._channel

    def _ask(self, method: str, arguments: dict[str, Any]) -> None:
        try:
            self._open().write(json.dumps([method, arguments]).encode() + b"\n", self._stall)
        except BrokenPipeError:
            pass  # _answer() finds out why

    def _answer(self, begun: bytes = b"") -> Any:
        channel = self._open()
        while True:
            line = begun + channel.readline(self._stall)
            begun = b""
            if not line.endswith(b"\n"):
                raise self._broken()
            answer = json.loads(line)
            if "busy" not in answer:
                break
        if "error" in answer:
            name, text, left = answer["error"]
            for line in left:
                messages.log_error(f"{self.host.name}: {line}")
            channel.close()
            self._channel = None
            raise BY_NAME.get(name, MadrigalError)(f"{self.host.name}: {text}")
        return answer["ok"]

    def _broken(self) -> MadrigalError:
        channel, self._channel = self._open(), None
        channel.close()
        said = channel.stderr().decode("utf-8", "replace").strip().split("\n")[-1]
        return HostUnreachable(f"the connection to {self.host.name} broke{': ' + said if said else ''}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.done() if kind is None else self.fail()
