"""What may be read: a file that a user names is opened only where the datastore allows it, here or on a host.

SAFE_DIRS and RESTRICTED_DIRS hold for the opened file, not for a name that can be changed after it was looked at
(docs/contract.md, "What may be imported").
"""

import os
import stat

from madrigal.errors import ConfigError, Forbidden, NotFound, SourceUnavailable, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Sequence

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}
_KERNEL = ("/proc", "/sys")


def open_allowed(
    path: str, safe_dirs: str, restricted_dirs: str, always_restricted: "Sequence[str]", directory: bool = False
) -> int:
    """A descriptor to read the file PATH: a regular file, a block device or, if DIRECTORY, a directory.

    SAFE_DIRS and RESTRICTED_DIRS: directories with blanks between, as in the datastore's template.
    ALWAYS_RESTRICTED: what counts as restricted besides ($VAR, $ETC, $HOME).  What lies in a safe directory may be
    read, else what lies in a restricted one may not, else it may.  Links inside a directory are the caller's matter.

    Raises Forbidden, also for a file that is not there where it could not be read anyway; NotFound elsewhere.
    """
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        # With `..` whether `/secret/x/../../var/tmp/image` opens would tell whether /secret/x is there.
        raise UsageError(f"'{path}' is not an absolute path without '..'")
    try:
        # Nothing of the file itself is touched yet: a FIFO does not wait, a device does not notice.
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        _judge(path, os.path.realpath(path), safe_dirs, restricted_dirs, always_restricted)
        if isinstance(error, PermissionError):
            raise Forbidden(f"not allowed to read '{path}': {error.strerror}") from None
        raise NotFound(f"cannot find '{path}': {error.strerror}") from None
    try:
        itself = f"/proc/self/fd/{handle}"
        _judge(path, os.readlink(itself), safe_dirs, restricted_dirs, always_restricted)
        status = os.fstat(handle)
        kind = stat.S_IFMT(status.st_mode)
        if kind in _KINDS and not (directory and kind == stat.S_IFDIR):
            raise Forbidden(f"not allowed to read '{path}': it is {_KINDS[kind]}, not a file or a block device")
        if status.st_dev in [os.stat(d).st_dev for d in _KERNEL if os.path.isdir(d)]:
            raise Forbidden(f"not allowed to read '{path}': it is not a file but a view of the kernel")
        # O_NONBLOCK: a lease that somebody holds on the file must not stop us.
        opened = os.open(itself, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except BlockingIOError:
        raise SourceUnavailable(f"cannot read '{path}' now: another program keeps it to itself") from None
    except PermissionError as error:
        raise Forbidden(f"not allowed to read '{path}': {error.strerror}") from None
    except OSError as error:
        raise SourceUnavailable(f"cannot read '{path}': {error.strerror}") from None
    finally:
        os.close(handle)
    os.set_blocking(opened, True)
    return opened


def _judge(path: str, real: str, safe_dirs: str, restricted_dirs: str, always_restricted: "Sequence[str]") -> None:
    """Raise Forbidden unless what PATH leads to, REAL, may be read."""
    if _within(real, safe_dirs.split(), "SAFE_DIRS"):
        return
    restricted = _within(real, restricted_dirs.split(), "RESTRICTED_DIRS")
    always = _within(real, [d for d in always_restricted if d], "$VAR, $ETC or $HOME")
    if restricted:
        reason = f"RESTRICTED_DIRS has {restricted}"
    elif always:
        reason = f"{always} is always restricted"
    elif not real.startswith("/"):
        reason = "it is not in any directory"
    else:
        return
    raise Forbidden(f"not allowed to read '{path}': {reason}; check RESTRICTED_DIRS and SAFE_DIRS of the datastore")


def _within(real: str, directories: "Sequence[str]", attribute: str) -> str:
    """The first of DIRECTORIES that REAL is or lies in, "" if none; by component, links resolved."""
    for directory in directories:
        if not directory.startswith("/"):
            raise ConfigError(f"{attribute} has '{directory}', which is not an absolute directory name")
        resolved = os.path.realpath(directory)
        if real == resolved or real.startswith(resolved.rstrip("/") + "/"):
            return directory
    return ""
