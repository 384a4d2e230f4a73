"""What driver authors know from scripts_common.sh, with the same meaning and the same exit statuses.

On failure each of them logs, tells the user and ends the driver (SystemExit, so that what is registered
for undoing is undone).  COMMAND and SCRIPT are the author's text; values come after the message, each a
whole word whatever is in it: exec_and_log("chmod g+w", "Cannot chmod " + path, path).
"""

from __future__ import annotations

import sys

from madrigal import command, deadline, messages
from madrigal.errors import DeadlineExceeded, MadrigalError, MissingProgram
from madrigal.host import Host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def exec_and_log(command_: str | Sequence[str], message: str | None = None, *values: str) -> None:
    """Run COMMAND (a string is split at blanks, nothing else is done to it) with VALUES as further arguments.

    Its stdout is dropped.  If it fails: its stderr is logged, MESSAGE (or `Error executing ...`) is the
    error message, and the driver ends with its status.
    """
    _exec(command_, message, values, deadline.stall(), patient=True)


def timeout_exec_and_log(
    seconds: float, command_: str | Sequence[str], message: str | None = None, *values: str
) -> None:
    """As exec_and_log, but ended after SECONDS, with status 143."""
    _exec(command_, message, values, seconds, patient=False)


def _exec(
    command_: str | Sequence[str], message: str | None, values: Sequence[str], seconds: float, patient: bool
) -> None:
    words = command_.split() if isinstance(command_, str) else list(command_)
    text = command_ if isinstance(command_, str) else " ".join(words)
    try:
        result = command.run([*words, *values], seconds, check=False, patient=patient)
    except DeadlineExceeded as error:
        _give_up(str(error), message or f"Timeout executing {text}", 143)
    except MissingProgram as error:
        _give_up(str(error), message or f"Error executing {text}", 127)
    if result.status:
        said = result.stderr.decode("utf-8", "replace").strip()
        _give_up(f"Command '{text}' failed: {said}", message or f"Error executing {text}", result.status)


def ssh_exec_and_log(host: str, script: str, message: str | None = None, *values: str) -> None:
    """Run the shell SCRIPT on HOST with VALUES as its "$1", "$2", ...; ends the driver if its last command fails.

    The status is that of the script, or 255 where ssh itself failed.
    """
    try:
        result = Host(host).script(script, values, deadline.stall())
    except DeadlineExceeded as error:
        _give_up(str(error), message or f"Timeout executing a script on {host}", 143)
    except MadrigalError as error:
        _give_up(str(error), message or f"Error executing a script on {host}", 255)
    if result.status:
        said = result.stderr.decode("utf-8", "replace").strip()
        _give_up(f"Script on {host} failed: {said}", message or f"Error executing a script on {host}", result.status)


def _give_up(log: str, message: str, status: int) -> NoReturn:
    messages.log_error(log)
    messages.error_message(message)
    sys.exit(status)
