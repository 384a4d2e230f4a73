"""A session for the files of another host: a worker there does the work (onhost/worker.py)."""

from __future__ import annotations

import contextlib
import json
import time

from madrigal import deadline, messages
from madrigal.errors import BY_NAME, DeadlineExceeded, HostUnreachable, MadrigalError
from madrigal.host.channel import Channel, failure
from madrigal.host.program import COMMAND, MARKER, program
from madrigal.onhost import stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Self

    from madrigal.host import Host
    from madrigal.host.local import LocalSession
    from madrigal.onhost.stream import Frame

_BEATS = 5
"""How often a worker hears something, at least, in the time after which it would take us for gone."""


class RemoteSession:
    """The files of another host, changed by a worker there (onhost/worker.py) that lives as long as the session.

    Requests are sent without waiting for the worker, or for the answer to one that was only told: a host may be far.
    """

    def __init__(self, host: Host, bulk: bool) -> None:
        self.host, self._bulk = host, bulk
        self._stall = deadline.stall()
        self._first = program()
        """What was sent before the worker was seen to have started, for another try."""
        self._is_ready = False
        self._owed = 0
        """Answers that have not been read."""
        self.heard: Callable[[int], None] = lambda sent: None
        """Is called now and then while the host works, with what it has SENT to another host so far; may raise."""
        self._channel: Channel | None = self._start()

    @property
    def name(self) -> str:
        """The host's name."""
        return self.host.name

    @property
    def is_over(self) -> bool:
        """Whether nothing can be asked of it any more."""
        return self._channel is None

    is_direct = False
    """Whether another host brings the data itself."""

    def another(self, origin: LocalSession | RemoteSession | None = None) -> RemoteSession:
        """One more on the same host, over a connection of its own, for what ORIGIN has."""
        return RemoteSession(self.host, bulk=True)

    def distance(self, origin: LocalSession | RemoteSession) -> float:
        """Seconds that what ORIGIN has takes to be here and acknowledged, if it is little."""
        return max(origin.rtt(), self.rtt())

    def rtt(self) -> float:
        """Seconds there and back."""
        self._settle()
        took = []
        for _ in range(3):  # a machine that is busy at the moment is not far away
            began = time.monotonic()
            self.call("exists", path="/")
            took.append(time.monotonic() - began)
        return min(took)

    def reopen(self) -> None:
        """Begin again over a connection of its own, for much data; what was made so far is taken back."""
        self.fail()
        self._bulk, self._first, self._is_ready, self._owed = True, program(), False, 0
        self._channel = self._start()

    def _start(self) -> Channel:
        channel = self.host.start(COMMAND, self._bulk)
        try:
            channel.write(deadline.connect(), self._first)
        except BrokenPipeError:
            pass  # it has ended already; why, _ready() finds
        except BaseException:
            channel.close()
            raise
        channel.beat(deadline.silence() / _BEATS)
        return channel

    def _ready(self) -> Channel:
        """The channel when the worker has started; a host that has too many at once is tried again."""
        attempt = 0
        while not self._is_ready:
            channel, attempt = self._open(), attempt + 1
            try:
                # what a login shell writes before is not ours, and a prompt or a title comes without a newline
                while line := channel.readline(deadline.connect()):
                    if line.rstrip().endswith(MARKER.encode()):
                        self._is_ready = True
                        return channel
                error = failure(self.host.name, channel.wait(5), channel.stderr())
            except DeadlineExceeded:
                error = HostUnreachable(f"{self.host.name} did not start a worker in {deadline.connect():g} s")
                # a network that failed may have left a connection that nobody is at the other end of
                error.crowded = channel.abandon() and attempt == 1  # type: ignore[attr-defined]
            channel.close()
            self._channel = None
            self.host.retried(error, attempt)
            self._channel = self._start()
        return self._open()

    def tell(self, method: str, **arguments: Any) -> None:
        """Have Session.METHOD done on the host; what it returns comes with done(), what it raises at the next wait."""
        data = json.dumps([method, arguments]).encode() + b"\n"
        if not self._is_ready:
            self._first += data
        self._owed += 1
        try:
            self._open().write(self._stall, data)
        except BrokenPipeError:
            pass  # _settle() finds out why

    def call(self, method: str, **arguments: Any) -> Any:
        """What Session.METHOD returns on the host; raises what it raises there."""
        self.tell(method, **arguments)
        return self._settle()[-1]

    def send(self, path: str, **state: Any) -> Iterator[Frame]:
        """The frames that Session.send has there; to be read to their end before anything else is asked."""
        self.tell("send", path=path, **state)
        self._owed -= 1
        self._settle()
        header, payload = memoryview(bytearray(stream.HEADER.size)), memoryview(bytearray(stream.CHUNK))
        while True:
            self._read(header[:1])
            if header[0] == ord("{"):
                self._line(b"{")  # it is making what it is to send, or failed before it had anything
                continue
            self._read(header[1:])
            kind, offset, length = stream.parse(header)
            self._read(payload[:length])
            if kind == b"X":
                self._answer()
                return
            yield kind, offset, payload[:length]

    def _read(self, view: memoryview) -> None:
        if self._open().read_into(view, self._stall) < len(view):
            raise self._broken()

    def receive(self, frames: Iterator[Frame], **arguments: Any) -> int:
        """Give FRAMES to Session.receive on the host; returns how many bytes of data they had.

        That they are safe there, done() says.
        """
        return self._give(frames, "receive", arguments)

    def lane(self, frames: Iterator[Frame], **arguments: Any) -> int:
        """The same with Session.lane, and they are written when this returns."""
        count = self._give(frames, "lane", arguments)
        self._settle()
        return count

    def _give(self, frames: Iterator[Frame], method: str, arguments: dict[str, Any]) -> int:
        channel = self._ready()  # frames cannot be sent a second time
        self.tell(method, **arguments)
        count = 0
        try:
            for kind, offset, payload in frames:
                channel.write(self._stall, stream.header(kind, offset, len(payload)), payload)
                count += len(payload) if kind in (b"D", b"P") else 0
            channel.write(self._stall, stream.header(b"X", 0, 0))
        except BrokenPipeError:
            self._settle()  # the worker has said why before it ended
            raise self._broken() from None
        except MadrigalError as error:
            if not error.is_interruption:
                self._refuse(error)
            raise
        return count

    def _refuse(self, error: MadrigalError) -> None:
        """Say in the stream that there is nothing to go on with."""
        payload = json.dumps([type(error).__name__, str(error)]).encode()[: stream.CHUNK]
        with contextlib.suppress(OSError, MadrigalError):
            self._open().write(self._stall, stream.header(b"E", 0, len(payload)), payload)

    def done(self) -> list[Any]:
        """Keep what was made, and let others at it; returns what was told and not answered before."""
        if self._channel is None:
            return []
        self._ready()
        self.tell("done")
        results = self._settle()
        self._channel.close()
        self._channel = None
        return results[:-1]

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

    def _settle(self) -> list[Any]:
        """The answers that are owed; raises what went wrong first."""
        self._ready()
        results = []
        while self._owed:
            results.append(self._answer())
            self._owed -= 1
        return results

    def _answer(self) -> Any:
        while "busy" in (answer := self._line()):
            self.heard(answer.get("bytes", 0))
        if "ok" not in answer:
            raise self._broken()
        return answer["ok"]

    def _line(self, begun: bytes = b"") -> dict[str, Any]:
        """What the worker says next, of which BEGUN has been read; raises what it says that was raised there."""
        channel = self._open()
        line = begun + channel.readline(self._stall)
        if not line.endswith(b"\n"):
            raise self._broken()
        try:
            answer = dict(json.loads(line).items())
            if "error" in answer:
                name, text, left = answer["error"]
                left = list(map(str, left))
        except (ValueError, TypeError, AttributeError, RecursionError):  # damaged on its way
            raise self._broken() from None
        if "error" in answer:
            for line in left:
                messages.log_error(f"{self.host.name}: {line}")
            channel.close()
            self._channel = None
            raise BY_NAME.get(str(name), MadrigalError)(f"{self.host.name}: {text}")
        return answer

    def _broken(self) -> MadrigalError:
        channel, self._channel = self._open(), None
        channel.close()
        said = channel.stderr().decode("utf-8", "replace").strip().split("\n")[-1]
        return HostUnreachable(f"the connection to {self.host.name} broke{': ' + said if said else ''}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.done() if kind is None else self.fail()
