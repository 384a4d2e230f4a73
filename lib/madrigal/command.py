"""Run a program: an argument list, no shell, no terminal, a deadline, and its whole process group ended with it.

Also runs on hosts: Python 3.6 syntax, standard library.
"""

import os
import signal
import time

from madrigal.errors import DeadlineExceeded, MadrigalError, MissingProgram

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Callable, Dict, Optional, Sequence

GRACE = 5.0  # seconds between asking a process group to end and ending it


class CommandFailed(MadrigalError):
    """A program ended with a status other than 0."""

    def __init__(self, text: str, result: "Result") -> None:
        super().__init__(text)
        self.result = result


class Result:
    """What a program left: `status` (as a shell counts: 128+n for signal n), `stdout` and `stderr` bytes."""

    def __init__(self, status: int, stdout: bytes, stderr: bytes) -> None:
        self.status = status
        self.stdout = stdout
        self.stderr = stderr

    def complaint(self) -> str:
        """The last line it wrote to stderr, which in most programs is the reason."""
        lines = self.stderr.decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def environment() -> "Dict[str, str]":
    """Ours with the C locale, so that messages can be read by a program, and where administrators' tools are."""
    env = dict(os.environ)
    path = env.get("PATH", "/usr/bin:/bin")
    env["PATH"] = path + "".join(":" + d for d in ("/usr/sbin", "/sbin") if d not in path.split(":"))
    env["LC_ALL"] = "C"
    return env


def run(
    argv: "Sequence[str]",
    timeout: float,
    input: "Optional[bytes]" = None,
    pass_fds: "Sequence[int]" = (),
    what: str = "",
    check: bool = True,
    waiting: "Optional[Callable[[], None]]" = None,
    patient: bool = False,
    errors: "Optional[int]" = None,
    output: "Optional[int]" = None,
) -> Result:
    """Run ARGV to its end within TIMEOUT seconds; if PATIENT, as long as it does not pause its I/O for so long.

    PASS_FDS: descriptors it inherits.  ERRORS: an open file that takes its stderr, while its stdout is dropped; nobody
    waits then for what it leaves running.  OUTPUT: an open file that takes its stdout.  WHAT: what the user reads that
    failed (default: the program's name).
    WAITING is called now and then and may raise.  Raises CommandFailed for a status other than 0 (unless
    CHECK is false), DeadlineExceeded, MissingProgram; whatever is raised, the process group is gone then.
    """
    import subprocess

    program = what or os.path.basename(argv[0])
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=output if output is not None else subprocess.PIPE if errors is None else subprocess.DEVNULL,
            stderr=subprocess.PIPE if errors is None else errors,
            env=environment(),
            pass_fds=pass_fds,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise MissingProgram("{} is not installed here; {} needs it".format(argv[0], program)) from None
    except OSError as error:
        raise MadrigalError("cannot run {}: {}".format(argv[0], error.strerror)) from None
    end, progress = time.monotonic() + timeout, b""
    try:
        while True:
            try:
                left = max(0.0, end - time.monotonic())
                stdout, stderr = process.communicate(input, timeout=min(left, 0.5) if waiting or patient else left)
                break
            except subprocess.TimeoutExpired:
                if waiting:
                    waiting()
                if patient and progress != _io(process.pid):
                    end, progress = time.monotonic() + timeout, _io(process.pid)
                if time.monotonic() >= end:
                    how = "did nothing for" if patient else "took longer than"
                    raise DeadlineExceeded("{} {} {:g} s".format(program, how, timeout)) from None
    except BaseException:
        end_group(process)
        raise
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    result = Result(status, stdout or b"", stderr or b"")
    if check and status:
        how = "was ended by signal {}".format(status - 128) if process.returncode < 0 else "failed ({})".format(status)
        raise CommandFailed("{} {}: {}".format(program, how, result.complaint() or "it gave no reason"), result)
    return result


def _io(pid: int) -> bytes:
    """What the process has read and written so far, as the kernel counts it."""
    try:
        with open("/proc/{}/io".format(pid), "rb") as file:
            return file.read()
    except OSError:
        return b""


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End PROCESS, the leader of its group, with all of the group: ask, wait a little, insist."""
    _kill_group(process.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    _kill_group(process.pid, signal.SIGKILL)  # also what the leader has started and left behind
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def _kill_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except OSError:
        pass  # nobody left in it
