"""One function in a thread of its own, a call at a time: what it computes goes on while the caller reads and writes."""

from __future__ import annotations

import threading

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable


class Beside:
    """FUNCTION, which must not wait for anything, in a thread from here to close()."""

    def __init__(self, function: Callable[..., bytes]) -> None:
        self._function = function
        self._asked, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._arguments: tuple[object, ...] | None = None
        self._result = b""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def begin(self, *arguments: object) -> None:
        """Call it with ARGUMENTS; what it returns is for result(), which is to be asked for first."""
        self._arguments = arguments
        self._asked.release()

    def result(self) -> bytes:
        """What it has returned; raises what it has raised."""
        self._done.acquire()
        if self._error:
            raise self._error
        return self._result

    def close(self) -> None:
        self._arguments = None
        self._asked.release()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            self._asked.acquire()
            if self._arguments is None:
                return
            try:
                self._result = self._function(*self._arguments)
            except BaseException as error:
                self._error = error
            self._done.release()
