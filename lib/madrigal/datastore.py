"""The contract of datastore actions: the dump and the id in both forms, and the answer each wants.

A recipe is a function named as the action that takes a Request and returns what it answers:

    @datastore.action
    def rm(request: datastore.Request) -> None: ...

docs/contract.md, "Datastore actions".
"""

from __future__ import annotations

import os
import sys

from madrigal import action as action_layer
from madrigal import messages
from madrigal.errors import ConfigError, Forbidden, NotSupported, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from madrigal.dump import Datastore, Image
    from madrigal.host.local import LocalSession

__all__ = ["Request", "action"]

MIB = 1 << 20

# Action: whether 3.4 has it, and what its id is.
ACTIONS = {
    "cp": (True, "image id"),
    "mkfs": (True, "image id"),
    "rm": (True, "image id"),
    "clone": (False, "image id"),
    "stat": (False, "request number"),
    "monitor": (False, "datastore id"),
}


_IN_BETWEEN = "is of a front-end between 3.6 and 6.6, which is not supported; 3.4 and 6.8 or later are"


class Request:
    """What an action is asked: `id`, the `image` and the `datastore` of the dump, and the form it came in."""

    def __init__(self, action: str, id: int, encoded: bytes, is_current: bool) -> None:
        from madrigal.config import Options
        from madrigal.dump import Dump

        self.action = action
        self.id = id
        self.is_current = is_current
        self.dump = Dump(encoded)
        self.image: Image = self.dump.image
        self.datastore: Datastore = self.dump.datastore
        if not is_current and self.image.text("FORMAT"):
            raise UsageError(f"the dump in the arguments {_IN_BETWEEN}")
        mad = os.path.basename(os.path.dirname(os.path.abspath(sys.argv[0])))
        self.options = Options("datastore", mad, image=self.image, datastore=self.datastore)
        if not is_current:
            os.umask(self._umask())

    @property
    def base_path(self) -> str:
        """The directory of the datastore, without doubled slashes; raises UsageError if the dump has none."""
        from madrigal.location import fix_dir_slashes

        path = fix_dir_slashes(self.datastore.base_path)
        if not path.startswith("/") or path == "/" or ".." in path.split("/"):
            raise UsageError(f"DATASTORE/BASE_PATH is '{path}' in the dump, expected an absolute path")
        return path

    @property
    def regtime(self) -> int:
        """When the image was registered (seconds since 1970), which with its id names it."""
        time = self.image.regtime
        if time is None:
            raise UsageError("IMAGE/REGTIME is missing in the dump; an image is named after it")
        return time

    @property
    def source(self) -> str:
        """IMAGE/SOURCE; raises Forbidden unless it is directly in the datastore's directory."""
        from madrigal.location import fix_dir_slashes

        path = fix_dir_slashes(self.needs("IMAGE/SOURCE"))
        if os.path.dirname(path) != self.base_path or os.path.basename(path) in ("", ".", ".."):
            raise Forbidden(f"IMAGE/SOURCE is '{path}' in the dump, which is not a file in {self.base_path}")
        return path

    @property
    def is_disk(self) -> bool:
        """Whether the image becomes a disk, and not a kernel, a context file or the like."""
        return self.datastore.type != "FILE_DS"

    @property
    def decompress(self) -> bool:
        """Whether an import unpacks what is packed: unless NO_DECOMPRESS, which a file datastore says by itself."""
        text = self.options["NO_DECOMPRESS"].lower() or ("no" if self.is_disk else "yes")
        return text != "yes"

    @property
    def driver(self) -> str:
        """The format an import is converted to; "" to leave it as it is."""
        if not self.is_disk or self.image.type == "CDROM" or self.options["CONVERT"].lower() == "no":
            return ""
        return self.options["DRIVER"]

    @property
    def digests(self) -> dict[str, str]:
        """What the bytes of the source must have: MD5, SHA1, SHA256, "" where nothing is asked."""
        return {name: self.image.attribute(name) for name in ("MD5", "SHA1", "SHA256")}

    def empty_image(self) -> tuple[str, str]:
        """(format, file system) of an image to make, `save_as` as format for a name to reserve."""
        if not self.is_current:
            fs = self.image.fstype
            return ("save_as", "") if fs == "save_as" else ("raw", "" if fs == "raw" else fs)
        format = self.needs("IMAGE/FORMAT")
        return ("raw", "swap") if format == "swap" else (format, self.image.fs)

    def open_local(self, path: str) -> int:
        """Open a file of this machine for import; raises Forbidden unless the datastore allows it."""
        from madrigal import config, guard

        always = [config.var_dir(), config.etc_dir(), os.path.expanduser("~")]
        safe, restricted = self.options["SAFE_DIRS"], self.options["RESTRICTED_DIRS"]
        return guard.open_allowed(path, safe, restricted, always, directory=not self.is_current)

    def refuse(self, *attributes: str) -> None:
        """Raise NotSupported if the datastore has one of ATTRIBUTES, which this driver would have to ignore."""
        for name in attributes:
            if self.datastore.attribute(name):
                raise NotSupported(f"{name} of the datastore is not supported by this driver: remove it")

    def here(self) -> LocalSession:
        """The session for the datastore's files: what it makes stays once the answer is written."""
        return action_layer.here()

    def needs(self, path: str) -> str:
        """The text at PATH of the dump (`IMAGE/PATH`); raises UsageError if it is absent or empty."""
        text = self.dump.root.text(path)
        if not text:
            raise UsageError(f"{path} is missing in the dump; {self.action} needs it")
        return text

    def size(self) -> int:
        """IMAGE/SIZE in bytes (it is MiB in the dump); raises UsageError unless there is one."""
        size = self.image.size
        if size is None or not 0 < size < 1 << 43:  # a file has at most 8 EiB
            raise UsageError(f"IMAGE/SIZE is '{self.image.text('SIZE')[:40]}' in the dump, expected a number of MiB")
        return size * MIB

    def _umask(self) -> int:
        text = self.datastore.attribute("UMASK") or "0007"
        try:
            value = int(text, 8)
        except ValueError:
            value = -1
        if not 0 <= value <= 0o777:
            raise ConfigError(f"UMASK of the datastore is '{text}', expected an octal number such as 0007")
        return value


def mib(size: int) -> int:
    """SIZE bytes in MiB, rounded up."""
    return (size + MIB - 1) // MIB


def action(recipe: Callable[[Request], str | None]) -> Callable[[], NoReturn]:
    """Make the executable's main function of RECIPE, which is named as its action."""
    name = recipe.__name__
    return lambda: action_layer.run(lambda: recipe(parse(name, sys.argv[1:])), lambda: _usage(name))


def parse(name: str, argv: list[str]) -> Request:
    """The request of action NAME for whichever form the arguments have; raises UsageError.

    In the 3.4 form it also sets what goes with it: the umask and the marks around error messages.
    """
    if name not in ACTIONS:
        raise UsageError(f"'{name}' is not an action of a datastore driver")
    forms = {2: "3.4", 1: "current"}
    form = forms.get(len(argv))
    wanted = os.environ.get("MADRIGAL_CONTRACT", "")
    if wanted not in ("", "3.4", "current"):
        raise ConfigError(f"MADRIGAL_CONTRACT is '{wanted}', expected 3.4 or current")
    if form is None or wanted not in ("", form):
        raise UsageError(f"{len(argv)} arguments; usage: {' or '.join(_synopses(name))}")
    if form == "3.4":
        messages.marks = True
        if not ACTIONS[name][0]:
            raise UsageError(f"{name} with the dump as an argument {_IN_BETWEEN}")
        return Request(name, _id(name, argv[1]), argv[0].encode("utf-8", "surrogateescape"), is_current=False)
    id = _id(name, argv[0])
    from madrigal.dump import MAX_BYTES

    return Request(name, id, sys.stdin.buffer.read(MAX_BYTES + 1), is_current=True)


def _id(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"the {ACTIONS[name][1]} is '{text[:40]}', expected a number")
    return int(text)


def _synopses(name: str) -> list[str]:
    old, what = ACTIONS[name]
    id = what.upper().replace(" ", "_")
    return [f"{name} {id} < DUMP", *([f"{name} DUMP {id}"] if old else [])]


def _usage(name: str) -> str:
    about = (sys.modules["__main__"].__doc__ or "").strip()
    lines = [about, "", f"usage: {_synopses(name)[0]}"]
    lines += [f"       {old}   (3.4)" for old in _synopses(name)[1:]]
    lines += ["", "DUMP is the base64 of a DS_DRIVER_ACTION_DATA document.", *action_layer.NOTES]
    return "\n".join(lines)
