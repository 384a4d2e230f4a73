"""From a recipe's function to a driver that keeps its word: messages, exit status, undo, a clean end.

Floor 3, under `datastore` and `tm`, which know the arguments.  docs/contract.md, "Exit statuses".
"""

from __future__ import annotations

import os
import signal
import sys

from madrigal import messages
from madrigal.errors import Ended, MadrigalError, explain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from madrigal.host.local import LocalSession

NOTES = (
    "MADRIGAL_CONTRACT=3.4|current decides where both forms would fit; MADRIGAL_TRACE=1 shows tracebacks.",
    "exit status: 0 done, 1 other failure, 2 usage or contract, 10-19 try again, 20-29 configuration or permission,",
    "30-39 not there or in use, 40-41 data failed verification, 124 deadline, 128+n ended by signal n",
)
"""The end of what --help prints."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_here: LocalSession | None = None


def here() -> LocalSession:
    """The session for files of the front-end that ends with the action: what it made stays if the answer is out."""
    global _here
    if _here is None:
        from madrigal.host.local import LocalSession

        _here = LocalSession()
    return _here


def run(body: Callable[[], str | None], usage: Callable[[], str]) -> NoReturn:
    """Run an action and end the process.  BODY returns the answer for stdout; USAGE is what --help prints."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        try:
            print(usage(), flush=True)
        except OSError:
            pass  # read no further than to a reader's `head`
        _leave(0)
    for number in _SIGNALS:
        signal.signal(number, _end)
    messages.marks = False  # until the form is known
    try:
        answer = body()
        if answer is not None:
            sys.stdout.write(answer + "\n")
        sys.stdout.flush()
        if _here is not None:
            _here.done()
    except BaseException as error:
        _ignore_signals()
        _leave(_fail(error))
    _leave(0)


def _end(number: int, frame: object) -> None:
    _ignore_signals()  # once is enough: nothing may interrupt taking things back
    raise Ended(number)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _fail(error: BaseException) -> int:
    """Say what happened, take back what was made; returns the exit status."""
    if os.environ.get("MADRIGAL_TRACE"):
        import traceback

        messages.log_debug("".join(traceback.format_exception(error)))
    if _here is not None:
        try:
            _here.fail(error)
        except Exception as again:
            messages.log_error(f"cannot take back what was made: {again}")
    if isinstance(error, SystemExit):  # of exec_and_log and its like, which have said everything
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, OSError):
        error = explain(error)
    if isinstance(error, MadrigalError | Ended):
        text, status = str(error), error.status
    else:
        text, status = f"a bug in this driver ({type(error).__name__}: {error}); MADRIGAL_TRACE=1 shows where", 1
    messages.log_error(text)
    messages.error_message(text)
    return status


def _leave(status: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:
        status = status or 1
    os._exit(status)  # nothing is left to clean up, and the interpreter would take 3 ms to find that out
