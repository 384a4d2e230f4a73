"""Failures a user is told about: what to say, and the exit status that says what kind it is.

The statuses are documented in docs/contract.md, "Exit statuses"; a caller may rely on them:
1 other, 2 usage or contract, 10-19 try again, 20-29 configuration or permission, 30-39 state,
40-41 data failed verification, 124 deadline, 128+n signal n.
"""

import errno


class MadrigalError(Exception):
    """Something went wrong; the text is one sentence that names the thing and what to do."""

    status = 1

    is_interruption = False
    """Whether another run may go on with what this one had brought so far."""


class UsageError(MadrigalError):
    """The arguments or the dump are not what the contract says."""

    status = 2


class HostUnreachable(MadrigalError):
    """A host does not answer, or the connection to it broke."""

    status = 10
    is_interruption = True


class Busy(MadrigalError):
    """Somebody else is changing the same object and did not finish in time."""

    status = 11


class NoSpace(MadrigalError):
    """A file system is full."""

    status = 12


class SourceUnavailable(MadrigalError):
    """An image source does not deliver."""

    status = 13


class ConfigError(MadrigalError):
    """A configuration file, attribute or variable has a value that cannot be used."""

    status = 20


class Forbidden(MadrigalError):
    """A rule or a permission says no."""

    status = 21


class HostKeyRefused(MadrigalError):
    """A host shows a key that is not the known one."""

    status = 22


class MissingProgram(MadrigalError):
    """A program that is needed is not installed."""

    status = 23


class NotSupported(MadrigalError):
    """The driver cannot do this."""

    status = 24


class NotFound(MadrigalError):
    """The thing to act on is not there."""

    status = 30


class InUse(MadrigalError):
    """The thing to act on, or the place to put it, is taken."""

    status = 31


class Deleted(MadrigalError):
    """The thing to act on was deleted while this action waited or worked."""

    status = 32


class DigestMismatch(MadrigalError):
    """The bytes that arrived are not the bytes that were promised."""

    status = 40
    is_interruption = True


class BadImage(MadrigalError):
    """The image is damaged, refers to another file, or is not of the format it claims."""

    status = 41


class DeadlineExceeded(MadrigalError):
    """Something took longer than it may."""

    status = 124
    is_interruption = True


class Ended(BaseException):
    """A signal asked this process to end.  Not an Exception: nothing but the action layer may catch it."""

    is_interruption = True

    def __init__(self, signum: int) -> None:
        super().__init__("ended by signal {}".format(signum))
        self.status = 128 + signum


# What crosses a host boundary is a class name; see onhost/worker.py.
BY_NAME = {cls.__name__: cls for cls in MadrigalError.__subclasses__()}


def explain(error: OSError) -> MadrigalError:
    """The failure of a system call as one of ours, with the file it was about."""
    reason = error.strerror or str(error)
    name = error.filename2 or error.filename
    text = "{}: {}".format(name, reason) if name else reason
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(text + "; free some space and try again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Forbidden(text)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(text)
    return MadrigalError(text)
