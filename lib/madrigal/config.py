"""Where things are, and the one way an option gets its value.

An option is looked for in the VM's disk, the image, the datastore, the driver's configuration file
and the defaults, in this order (docs/contract.md, "Options").
"""

from __future__ import annotations

import os
import re
import stat
import sys

from madrigal.errors import ConfigError

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from madrigal.dump import Datastore, Disk, Image

_LINE = re.compile(
    r"""\s*(?:export\s+)?(?P<key>[A-Za-z_][A-Za-z0-9_]*)=
        (?:'(?P<single>[^']*)'|"(?P<double>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s'"\#;]*))\s*;?\s*(?:\#.*)?\Z""",
    re.VERBOSE,
)


def var_dir() -> str:
    """The front-end's state directory, `$VAR` of the documentation."""
    location = os.environ.get("ONE_LOCATION", "")
    return location.rstrip("/") + "/var" if location else "/var/lib/one"


def etc_dir() -> str:
    location = os.environ.get("ONE_LOCATION", "")
    return location.rstrip("/") + "/etc" if location else "/etc/one"


def run_dir() -> str:
    """This user's directory for what lives as long as connections and actions; raises ConfigError if others get in.

    MADRIGAL_RUN_DIR, else $XDG_RUNTIME_DIR/madrigal, else /tmp/madrigal-<uid>.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    path = os.environ.get("MADRIGAL_RUN_DIR") or (f"{runtime}/madrigal" if runtime else f"/tmp/madrigal-{os.getuid()}")
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"cannot make the directory {path}: {error.strerror}; set MADRIGAL_RUN_DIR") from None
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{path} must be a directory that only its owner, user {os.getuid()}, can enter")
    return path


def read_shell(path: str) -> dict[str, str]:
    """The `KEY=value` lines of a shell configuration file; {} if there is none.

    The file is read, never run: no expansion, and a line that is more than an assignment raises ConfigError.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    values = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if not match:
            raise ConfigError(f"{path}, line {number}: expected KEY=value, found '{line.strip()[:60]}'")
        double = match["double"]
        value = re.sub(r'\\(["\\$`])', r"\1", double) if double is not None else match["single"] or match["plain"] or ""
        values[match["key"]] = value
    return values


def tree() -> str:
    """The directory that has the running action's tm/ and datastore/ (a checkout, a remotes tree, share/madrigal)."""
    return os.path.realpath(os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "../.."))


def configuration(part: str) -> dict[str, str]:
    """The values of remotes/etc/PART: of the front-end's own tree, else of the tree the action was started from."""
    for path in (f"{var_dir()}/remotes/etc/{part}", f"{tree()}/etc/{part}", f"{tree()}/remotes/etc/{part}"):
        if os.path.exists(path):
            return read_shell(path)
    return {}


class Options:
    """The values of the options of driver MAD (KIND: `datastore` or `tm`) for one action.

    Only options that a driver.toml marks `user = true` are looked for in the disk and the image: those
    attributes are written by users, who must not widen what an administrator allowed.
    """

    def __init__(
        self,
        kind: str,
        mad: str,
        disk: Disk | None = None,
        image: Image | None = None,
        datastore: Datastore | None = None,
    ) -> None:
        self._kind, self._mad = kind, mad
        self._disk, self._image, self._datastore = disk, image, datastore
        self._files: dict[str, str] | None = None

    def __getitem__(self, name: str) -> str:
        """The value of option NAME, "" if it has none anywhere."""
        from madrigal import defaults

        if name in defaults.USER:
            if self._disk and (value := self._disk.text(name)):
                return value
            if self._image and (value := self._image.attribute(name)):
                return value
        if self._datastore and (value := self._datastore.attribute(name)):
            return value
        if self._files is None:
            self._files = configuration(f"{self._kind}/{self._kind}.conf")
            self._files.update(configuration(f"{self._kind}/{self._mad}/{self._mad}.conf"))
        return self._files.get(name) or defaults.OPTIONS[self._kind].get(name, "")

    def yes(self, name: str) -> bool:
        """Whether NAME is yes; raises ConfigError unless it is `yes`, `no` or empty, in any case."""
        value = self[name].lower()
        if value not in ("yes", "no", ""):
            raise ConfigError(f"{name} is '{self[name]}', expected yes or no")
        return value == "yes"
