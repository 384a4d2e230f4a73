"""A session for the files of this machine: the same requests as for another host, without a process."""

from __future__ import annotations

from madrigal import deadline, messages
from madrigal.errors import explain
from madrigal.onhost.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Self

    from madrigal.host.remote import RemoteSession
    from madrigal.onhost.part import Part
    from madrigal.onhost.stream import Frame


def timeouts() -> dict[str, float]:
    """Seconds, as onhost/session.py and onhost/worker.py want them."""
    return {"lock": deadline.lock(), "work": deadline.stall(), "silence": deadline.silence()}


class LocalSession:
    """This machine's files."""

    name = ""
    """That of the machine: it is this one."""

    def __init__(self) -> None:
        self._session = Session(timeouts(), self._waiting)
        self._results: list[Any] = []
        self.heard: Callable[[int], None] = lambda copied: None
        """Is called now and then with the bytes that have been COPIED so far; may raise."""

    def _waiting(self, bytes: int = 0) -> None:
        self.heard(bytes)

    def call(self, method: str, **arguments: Any) -> Any:
        """What Session.METHOD returns; raises MadrigalError."""
        try:
            return getattr(self._session, method)(**arguments)
        except OSError as error:
            raise explain(error) from None

    def tell(self, method: str, **arguments: Any) -> None:
        """The same, and what it returns comes with done()."""
        self._results.append(self.call(method, **arguments))

    def send(self, path: str, **state: Any) -> Iterator[Frame]:
        """The frames of Session.send."""
        try:
            yield from self._session.send(path, **state)
        except OSError as error:
            raise explain(error) from None

    def receive(self, frames: Iterator[Frame], **arguments: Any) -> int:
        count: int = self.call("receive", frames=frames, **arguments)
        return count

    def another(self, origin: LocalSession | RemoteSession | None = None) -> LocalSession:
        """One more on this machine."""
        return LocalSession()

    def distance(self, origin: LocalSession | RemoteSession) -> float:
        """As a RemoteSession's."""
        return origin.rtt()

    is_direct = False

    def rtt(self) -> float:
        """Seconds there and back."""
        return 0

    def reopen(self) -> None:
        """Begin again; what was made so far is taken back."""
        self.fail()

    def part(self, path: str, tag: str, beside: Part | None = None) -> Part:
        """A file that is to become PATH, which this session holds."""
        return self._session.part(path, tag, beside)

    def publish(self, part: Part) -> None:
        """Give PART its name, with permissions as the umask has it."""
        self.call("publish", made=part)

    def done(self) -> list[Any]:
        """Keep what was made, and let others at it; returns what was told."""
        self._session.done()
        results, self._results = self._results, []
        return results

    def lane(self, frames: Iterator[Frame], **arguments: Any) -> int:
        count: int = self.call("lane", frames=frames, **arguments)
        return count

    def fail(self, error: BaseException | None = None) -> None:
        for left in self._session.fail(error):
            messages.log_error(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self.done() if kind is None else self.fail(error)
