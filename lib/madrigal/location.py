"""Where something lies: a host and a path, as `HOST:PATH` in a driver's arguments."""

from __future__ import annotations

import re

from madrigal.errors import UsageError

# What a host name may be made of.  A leading "-" would be an option to ssh.
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9_][A-Za-z0-9._-]*\Z")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_DISK = re.compile(r"disk\.([0-9]{1,18})\Z")


def arg_host(argument: str) -> str:
    """The part before the first colon; the whole argument if there is none."""
    return argument.split(":", 1)[0]


def arg_path(argument: str) -> str:
    """The part after the first colon, slashes tidied; the whole argument if there is none."""
    return fix_dir_slashes(argument.split(":", 1)[-1])


def fix_dir_slashes(path: str) -> str:
    """PATH without doubled and trailing slashes (front-ends write `/var/lib/one//datastores`)."""
    path = re.sub("/+", "/", path)
    return path[:-1] if len(path) > 1 and path.endswith("/") else path


def is_number(text: str) -> bool:
    """Whether TEXT is one of ASCII digits, and of so few that an int of them is no trouble."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def is_host(name: str) -> bool:
    """Whether NAME may be that of a host; a leading "-" would be an option to ssh."""
    return _HOST.match(name) is not None


class Location:
    """A path on a host.  `host` is "" where the argument names none: the front-end itself."""

    __slots__ = ("host", "path")

    def __init__(self, host: str, path: str) -> None:
        self.host = host
        self.path = path

    @classmethod
    def parse(cls, argument: str) -> Location:
        """Read `HOST:PATH`; raises UsageError unless that is a plausible name and an absolute path without `..`."""
        host, colon, path = argument.partition(":")
        if not colon:
            raise UsageError(f"'{argument}' is not HOST:PATH")
        if not _HOST.match(host):
            raise UsageError(f"'{host}' in the argument '{argument}' is not a host name")
        return cls(host, fix_dir_slashes(path)).checked()

    @classmethod
    def of_image(cls, argument: str) -> Location:
        """Read `[FE:]SOURCE`: what a datastore driver has answered, by itself or as the front-end's.

        A SOURCE with a colon of its own, a URL for one, comes as it is.  Whether a driver can use it, `checked` says.
        """
        host, colon, path = argument.partition(":")
        if _URL.match(argument) or not colon or not _HOST.match(host):
            return cls("", argument if _URL.match(argument) else fix_dir_slashes(argument))
        return cls("", fix_dir_slashes(path))

    def checked(self) -> Location:
        """This place; raises UsageError unless its path is absolute, without `..`."""
        path = self.path
        if not path.startswith("/") or path == "/" or "\0" in path or ".." in path.split("/"):
            raise UsageError(f"'{path}' is not an absolute path without '..'")
        return self

    @property
    def is_url(self) -> bool:
        return _URL.match(self.path) is not None

    @property
    def dir(self) -> str:
        """The directory it lies in: of a disk, the VM directory."""
        return self.path.rpartition("/")[0] or "/"

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def disk_id(self) -> int | None:
        """N of `.../disk.N`, None for anything else."""
        match = _DISK.match(self.name)
        return int(match[1]) if match else None

    def __str__(self) -> str:
        return f"{self.host}:{self.path}" if self.host else self.path

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and (self.host, self.path) == (other.host, other.path)

    def __hash__(self) -> int:
        return hash((self.host, self.path))
