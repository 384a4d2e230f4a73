"""Which NFS share is to be mounted where the files of a datastore are: its NFS_AUTO_* attributes."""

from __future__ import annotations

import re

from madrigal.config import Options
from madrigal.errors import ConfigError, MadrigalError, NotFound
from madrigal.location import fix_dir_slashes
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from madrigal.host import Host


def share(options: Options) -> tuple[str, str] | None:
    """(`host:/path`, options of mount), None if nothing is to be mounted; raises ConfigError."""
    if not options.yes("NFS_AUTO_ENABLE"):
        return None
    names = ("NFS_AUTO_HOST", "NFS_AUTO_PATH", "NFS_AUTO_OPTS")
    host, path, chosen = (options[name] for name in names)
    for name, value, pattern, what in (
        (names[0], host, r"[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\]", "the name or address of an NFS server"),
        (names[1], path, r"/[^\x00-\x20\\\x7f]*", "an absolute path"),
        (names[2], chosen, r"[A-Za-z0-9_][A-Za-z0-9_=.,:/@%+-]*", "mount options such as vers=4.2,soft"),
    ):
        if not re.fullmatch(pattern, value):
            raise ConfigError(f"{name} is '{value[:80]}', expected {what}")
    return f"{host}:{fix_dir_slashes(path)}", chosen


def mount(host: Host, root: str, ds_ids: Iterable[int]) -> None:
    """Have HOST mount those of the datastores DS_IDS at ROOT/<id> that are to be mounted by who works there.

    A front-end that does not tell is a WARN line: mounting is an extra, and without it nothing is made in the place
    of an image that is not there.  Raises InUse if something else is mounted there, and MadrigalError if it cannot be
    mounted.
    """
    from madrigal import dump, frontend

    wanted = []
    for ds_id in dict.fromkeys(ds_ids):
        try:
            known = frontend.datastore(ds_id)
        except NotFound:
            continue  # then nobody says that it is to be mounted
        except MadrigalError as error:
            log(f"whether datastore {ds_id} has NFS_AUTO_ENABLE is not known, so nothing is mounted: {error}", "WARN")
            break  # of another one it would not tell either
        mad = known.text("DS_MAD")
        found = share(Options("datastore", mad if dump.is_mad(mad) else "fs", datastore=known))
        if found:
            wanted.append({"path": f"{root}/{ds_id}", "server": found[0], "options": found[1]})
    if wanted:
        with host.session() as session:
            for about in wanted:
                session.tell("image", do="mount", **about)
