"""The contract of datastore actions: the dump and the id in both forms, and the answer each wants.

A recipe is a function named as the action that takes a Request and returns what it answers:

    @datastore.action
    def rm(request: datastore.Request) -> None: ...

docs/contract.md, "Datastore actions" and "Datastores on other machines".
"""

from __future__ import annotations

import contextlib
import os
import sys

from madrigal import action as action_layer
from madrigal import messages, nfs
from madrigal.errors import ConfigError, Forbidden, NotSupported, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

    from madrigal.dump import Datastore, Image
    from madrigal.host.local import LocalSession
    from madrigal.host.remote import RemoteSession
    from madrigal.source.schemes import Terms

    AnySession = LocalSession | RemoteSession

__all__ = ["Request", "action"]

MIB = 1 << 20
LONGEST = 4095
"""Bytes of a path, as the kernel has it."""

# Action: whether 3.4 has it, and what its id is.
ACTIONS = {
    "cp": (True, "image id"),
    "mkfs": (True, "image id"),
    "rm": (True, "image id"),
    "clone": (False, "image id"),
    "stat": (False, "request number"),
    "monitor": (False, "datastore id"),
    "snap_delete": (False, "image id"),
    "snap_revert": (False, "image id"),
    "snap_flatten": (False, "image id"),
    "export": (False, "app id"),
    "restore": (False, "request number"),
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
        self.mad = os.path.basename(os.path.dirname(os.path.abspath(sys.argv[0])))
        self.options = Options("datastore", self.mad, image=self.image, datastore=self.datastore)
        if not is_current:
            os.umask(self._umask())

    @property
    def base_path(self) -> str:
        """The directory of the datastore, without doubled slashes; raises UsageError if the dump has none."""
        return _directory("DATASTORE/BASE_PATH", self.datastore.base_path)

    @property
    def system_path(self) -> str:
        """The directory of the system datastore that is to be monitored."""
        place = self.dump.root.text("DATASTORE_LOCATION")
        return f"{_directory('DATASTORE_LOCATION', place)}/{self.id}" if place else self.base_path

    @property
    def monitors_disks(self) -> bool:
        """Whether monitoring the datastore is to tell the sizes of VMs' disks this time."""
        return self.dump.root.text("MONITOR_VM_DISKS") == "1"

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
    def target_snapshot(self) -> int:
        """IMAGE/TARGET_SNAPSHOT; -1, what the image holds now, for snap_flatten alone."""
        snapshot, least = self.image.int("TARGET_SNAPSHOT"), -1 if self.action == "snap_flatten" else 0
        if snapshot is None or snapshot < least:
            raise UsageError(
                f"IMAGE/TARGET_SNAPSHOT is '{snapshot}' in the dump; {self.action} needs one from {least} on"
            )
        return snapshot

    @property
    def original(self) -> str:
        """IMAGE/PATH as what `clone` copies: the SOURCE of another image."""
        from madrigal.location import Location

        return Location.of_image(self.needs("IMAGE/PATH")).checked().path

    @property
    def device(self) -> str:
        """IMAGE/PATH as what all hosts have by that name; raises UsageError for what an answer cannot hold."""
        path = self.original
        if not path.isprintable() or " " in path:
            raise UsageError(
                f"IMAGE/PATH is '{path}' in the dump: a device has no blank or control character in its name"
            )
        if len(path) > LONGEST:
            raise UsageError(f"IMAGE/PATH has {len(path)} characters in the dump: give the path of a device")
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
    def format(self) -> str:
        """IMAGE/FORMAT; raises UsageError unless it is a word, which it has to be in an answer."""
        format = self.needs("IMAGE/FORMAT")
        if not (format.isascii() and format.isalnum() and len(format) <= 16):
            raise UsageError(f"IMAGE/FORMAT is '{format[:40]}' in the dump, expected one word such as raw or qcow2")
        return format

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

    @property
    def terms(self) -> Terms:
        """What may be imported, and how."""
        from madrigal import config
        from madrigal.onhost import guard
        from madrigal.source.schemes import Terms

        safe, restricted = self.options["SAFE_DIRS"], self.options["RESTRICTED_DIRS"]
        always = [config.var_dir(), config.etc_dir()]

        def open_local(path: str) -> int:
            own = [*always, os.path.expanduser("~")]
            return guard.open_allowed(path, safe, restricted, own, directory=not self.is_current)

        verify, private = self.options.yes("TLS_VERIFY"), self.options.yes("PRIVATE_REDIRECTS")
        market = self.dump.root.one("MARKETPLACE/TEMPLATE").text
        return Terms(open_local, safe, restricted, always, verify, private, market)

    def unsupported(self) -> NoReturn:
        """Say that the driver cannot do this."""
        raise NotSupported(f"datastores of the driver {self.mad} have no {self.action}: use another datastore for that")

    @property
    def rate(self) -> int | None:
        """LIMIT_TRANSFER_BW in bytes a second."""
        from madrigal.source import pace

        return pace.parse(self.options["LIMIT_TRANSFER_BW"], "LIMIT_TRANSFER_BW")

    @property
    def allocate(self) -> bool:
        """Whether images have no holes: SPARSE is no."""
        return not self.options.yes("SPARSE")

    @property
    def staging(self) -> str:
        """The directory STAGING_DIR of a bridge, "" for the datastore's own."""
        path = self.options["STAGING_DIR"]
        if path and (not path.startswith("/") or ".." in path.split("/") or not path.isprintable()):
            raise ConfigError(f"STAGING_DIR is '{path}', expected an absolute path without '..'")
        return path

    @contextlib.contextmanager
    def session(self) -> Iterator[AnySession]:
        """A session on the machine that has the datastore's files, with them mounted.

        That is this one, where what is made stays once the answer is written, or one of BRIDGE_LIST.  Which of them
        goes by the id, and a host that is down makes the next be tried.  If the front-end is on the list it is taken:
        nothing has to be sent then.
        """
        names, mount = self._bridges(), nfs.share(self.options)
        if self.action == "clone" and (both := [name for name in names if name in self._bridges_of_original()]):
            names = both
        with self._reach(names, "BRIDGE_LIST") as session:
            if mount:
                session.tell("image", do="mount", path=self.base_path, server=mount[0], options=mount[1])
            yield session

    @contextlib.contextmanager
    def session_of_original(self, session: AnySession) -> Iterator[AnySession | None]:
        """A session on the machine that has the image to clone; None if that of SESSION has it."""
        from madrigal.host import is_local

        names = self._bridges_of_original()
        if not names or session.name in names or (not session.name and any(map(is_local, names))):
            yield None
            return
        with self._reach(names, "SOURCE_BRIDGE_LIST") as given:
            yield given

    @contextlib.contextmanager
    def _reach(self, names: list[str], attribute: str) -> Iterator[AnySession]:
        from madrigal.host import is_local

        if not names or any(map(is_local, names)):
            yield action_layer.here()
            return
        from madrigal.host.bridge import BridgeSession

        first = self.id % len(names)
        with BridgeSession(names[first:] + names[:first], attribute) as session:
            yield session

    def _bridges(self) -> list[str]:
        return _hosts(self.options["BRIDGE_LIST"], "BRIDGE_LIST")

    def _bridges_of_original(self) -> list[str]:
        return _hosts(self.dump.root.text("SOURCE_BRIDGE_LIST"), "SOURCE_BRIDGE_LIST")

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


def _directory(what: str, text: str) -> str:
    from madrigal.location import fix_dir_slashes

    path = fix_dir_slashes(text)
    if not path.startswith("/") or path == "/" or ".." in path.split("/"):
        raise UsageError(f"{what} is '{path}' in the dump, expected an absolute path")
    return path


def mib(size: int) -> int:
    """SIZE bytes in MiB, rounded up."""
    return (size + MIB - 1) // MIB


def compare_size(disk: int | None, size: int | None) -> None:
    """Say so if the DISK that was imported has more bytes than SIZE in MiB, which a packer may have made us say."""
    if size and disk is not None and disk > size * MIB:
        messages.log(f"the image has {mib(disk)} MiB, but its SIZE is {size}: quotas count less than it takes", "WARN")


def _hosts(text: str, attribute: str) -> list[str]:
    """The hosts that an attribute lists, each once."""
    from madrigal.location import is_host

    names = list(dict.fromkeys(text.split()))
    for name in names:
        if not is_host(name):
            raise ConfigError(f"{attribute} has '{name[:80]}', which is not the name of a host")
    return names


def import_info(exported: dict[str, Any], host: str, size: int, format: str) -> str:
    """The answer of `export`: what Images.export() (onhost/images.py) has said of an image of SIZE MiB, on HOST."""
    from madrigal.dump import document
    from madrigal.host import quote

    path = exported["path"]
    values = {
        "IMPORT_SOURCE": f"ssh://{host}:{path}" if host else path,
        "MD5": exported["md5"],
        "SIZE": str(size),
        "FORMAT": format,
        "DISPOSE": "YES" if exported["made"] else "NO",
    }
    if exported["made"]:
        command = f"rm -f -- {quote(path)}"
        values["DISPOSE_CMD"] = f"ssh {host} {quote(command)}" if host else command
    return document("IMPORT_INFO", values)


def action(recipe: Callable[[Request], str | None]) -> Callable[[], NoReturn]:
    """Make the executable's main function of RECIPE, which is named as its action.

    A recipe that has no action's name serves the one that it is called as.
    """
    own, called = recipe.__name__, messages.name().partition(".")[0]
    name = own if own in ACTIONS or called not in ACTIONS else called
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
    from madrigal.location import is_number

    if not is_number(text):
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
