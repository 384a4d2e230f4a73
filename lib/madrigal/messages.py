"""Log lines and the one message a failing driver shows (docs/contract.md, "What a driver says").

A front-end reads a driver's stderr line by line: `SEVERITY: name: text` is a log line, anything else
becomes part of the message that its user sees.  So every line written here is one or the other, whole.
"""

from __future__ import annotations

import os
import sys

# The 3.4 front-end looks for the message between two marks; today's shows the marks to the user.
# The action layer sets this when it has recognised the form; without it, the arguments say.
marks: bool | None = None

_ARGUMENTS_34 = {
    **dict.fromkeys(("cp", "mkfs", "rm", "mv", "mvds"), (2,)),
    **dict.fromkeys(("clone", "ln", "mkswap"), (2, 3)),
    "delete": (1,),
    "mkimage": (3, 4),
}


# What front-ends read as no message, a log line, a status or the end of the message.
_MISREAD = ("-", "ERROR:", "INFO:", "WARN:", "DEBUG:", "ExitCode:", "ERROR MESSAGE ")


LONGEST = 16384
"""Characters of a line: what a dump has in place of a name would fill the front-end's log."""


def name() -> str:
    """The name of the running action as log lines show it."""
    return os.path.basename(sys.argv[0] or "madrigal")


def _are_wanted() -> bool:
    """Whether this process was called in the 3.4 form (docs/contract.md, "Two forms"); where it cannot be told, no."""
    wanted = os.environ.get("MADRIGAL_CONTRACT")
    if wanted in ("3.4", "current"):
        return wanted == "3.4"
    action, last = name().partition(".")[0], sys.argv[-1]
    if action == "context":
        _, slash, number = last.partition(":")[2].rpartition("/disk.")
        return bool(slash) and number.isdigit()
    return len(sys.argv) - 1 in _ARGUMENTS_34.get(action, ())


def _write(text: str) -> None:
    # One write for all: lines of processes that share a stderr do not mix.
    try:
        os.write(2, text.encode("utf-8", "surrogateescape"))
    except OSError:
        pass  # nobody listens any more; the exit status still tells


def _short(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def log(text: str, severity: str = "INFO") -> None:
    """Write TEXT to the log of the object this action works on; each of its lines gets the tag."""
    tag = f"{severity}: {name()}: "
    lines = str(text).replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    _write("".join(tag + _short(line) + "\n" for line in lines))


def log_info(text: str) -> None:
    """The same as log()."""
    log(text)


def log_error(text: str) -> None:
    """Write TEXT as an error to the log."""
    log(text, "ERROR")


def log_debug(text: str) -> None:
    """Write TEXT as a debugging aid to the log."""
    log(text, "DEBUG")


def error_message(text: str) -> None:
    """Tell the user why the action failed.  Call it once, as the last thing before a non-zero exit.

    TEXT becomes exactly one line: a front-end of today glues lines together without a blank.
    """
    line = _short(str(text).replace("\n", " ").replace("\r", " ").strip(" ")) or "failed without a reason"
    if line.startswith(_MISREAD):
        line = f"{name()}: {line}"
    if _are_wanted() if marks is None else marks:
        _write(f"ERROR MESSAGE --8<------\n{line}\nERROR MESSAGE ------>8--\n")
    else:
        _write(line + "\n")
