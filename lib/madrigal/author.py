"""What driver authors know from scripts_common.sh, with the same meaning and the same exit statuses.

On failure each of them logs, tells the user and ends the driver (SystemExit, so that what is registered
for undoing is undone).  COMMAND and SCRIPT are the author's text; values come after the message, each a
whole word whatever is in it: exec_and_log("chmod g+w", "Cannot chmod " + path, path).
"""

from __future__ import annotations

import os
import signal
import sys

from madrigal import command, messages, scratch
from madrigal.errors import DeadlineExceeded, MadrigalError, MissingProgram
from madrigal.host import Host
from madrigal.location import is_host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_NO_LIMIT = 7 * 86400.0
"""Seconds: an author who wants a limit has timeout_exec_and_log; a host that is gone is noticed by ssh."""

_MOST = 1 << 16
"""Bytes of what a program said that are logged, the last ones."""


def exec_and_log(command_: str | Sequence[str], message: str | None = None, *values: str) -> None:
    """Run COMMAND (a string is split at blanks, nothing else is done to it) with VALUES as further arguments.

    Its stdout is dropped.  If it fails: the end of its stderr is logged, MESSAGE (or `Error executing ...`) is
    the error message, and the driver ends with its status.
    """
    _exec("exec_and_log", command_, message, values, _NO_LIMIT)


def timeout_exec_and_log(
    seconds: float | str, command_: str | Sequence[str], message: str | None = None, *values: str
) -> None:
    """As exec_and_log, but ended with all of its process group after SECONDS, with status 143."""
    try:
        limit = float(seconds)
    except ValueError:
        limit = 0
    if not 0 < limit < 1e9:
        _refuse(f"timeout_exec_and_log was given '{seconds}' as a number of seconds")
    _exec("timeout_exec_and_log", command_, message, values, min(limit, _NO_LIMIT))


def _exec(
    function: str, command_: str | Sequence[str], message: str | None, values: Sequence[str], seconds: float
) -> None:
    words = command_.split(None) if isinstance(command_, str) else list(command_)
    text = command_ if isinstance(command_, str) else " ".join(words)
    if not words:
        _refuse(f"{function} was given no command")
    _end_programs_with_us()
    with scratch.nameless() as errors:
        try:
            status = command.run([*words, *values], seconds, check=False, errors=errors).status
        except DeadlineExceeded as error:
            _give_up(str(error), message or f"Timeout executing {text}", 143)
        except MissingProgram as error:
            _give_up(str(error), message or f"Error executing {text}", 127)
        except MadrigalError as error:
            _give_up(str(error), message or f"Error executing {text}", 126)
        if status:
            size = os.fstat(errors).st_size
            said = _text(os.pread(errors, _MOST, max(0, size - _MOST)), size)
            _give_up(
                f"Command '{text}' failed (exit status {status}){said}", message or f"Error executing {text}", status
            )


def ssh_exec_and_log(host: str, script: str, message: str | None = None, *values: str) -> None:
    """Run the shell SCRIPT on HOST with VALUES as its "$1", "$2", ...; ends the driver if its last command fails.

    The status is that of the script, or 255 where ssh itself failed.
    """
    if not is_host(host):
        _refuse(f"'{host}' is not the name of a host")
    _end_programs_with_us()
    default = f"Error executing a script on {host}"
    try:
        result = Host(host).script(script, values, _NO_LIMIT)
    except MadrigalError as error:
        _give_up(str(error), message or default, 255)
    if result.status:
        said = _text(result.stderr[-_MOST:], len(result.stderr))
        _give_up(f"Script on {host} failed (exit status {result.status}){said}", message or default, result.status)


def _text(said: bytes, size: int) -> str:
    text = said.decode("utf-8", "replace").strip()
    left_out = f"[{size - len(said)} bytes before this are left out]\n" if size > len(said) else ""
    return f": {left_out}{text}" if text else ""


def _end_programs_with_us() -> None:
    """Outside of the action layer a signal would end this process alone, and leave running what it waits for."""
    for number, usual in (
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        if signal.getsignal(number) is usual:
            signal.signal(number, _end)


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _refuse(message: str) -> NoReturn:
    messages.error_message(message)
    sys.exit(2)


def _give_up(log: str, message: str, status: int) -> NoReturn:
    messages.log_error(log)
    messages.error_message(message)
    sys.exit(status)
