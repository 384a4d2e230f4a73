"""Dumps and VM documents as front-ends send them, and a front-end that answers drivers."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from madrigal.embedded import rpc
from madrigal.errors import NotFound

REGTIME = 1335000000


def _elements(values: Mapping[str, object]) -> str:
    return "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in values.items())


def dump(
    base_path: str | Path,
    image: Mapping[str, object] | None = None,
    attributes: Mapping[str, object] | None = None,
    template: Mapping[str, object] | None = None,
    type: int = 0,
) -> bytes:
    """The base64 of a DS_DRIVER_ACTION_DATA: IMAGE's elements over usual ones, its TEMPLATE's ATTRIBUTES, the
    datastore's TEMPLATE.  A value of None leaves an element out."""
    values = {"ID": 42, "NAME": "image", "TYPE": 0, "REGTIME": REGTIME, "SOURCE": "", "PATH": "", "SIZE": 0}
    shown = {name: value for name, value in {**values, **(image or {})}.items() if value is not None}
    text = (
        f"<DS_DRIVER_ACTION_DATA><IMAGE>{_elements(shown)}<TEMPLATE>{_elements(attributes or {})}</TEMPLATE></IMAGE>"
        f"<DATASTORE><ID>1</ID><NAME>default</NAME><DS_MAD>fs</DS_MAD><TM_MAD>ssh</TM_MAD>"
        f"<BASE_PATH>{escape(str(base_path))}</BASE_PATH><TYPE>{type}</TYPE>"
        f"<TEMPLATE>{_elements(template or {})}</TEMPLATE></DATASTORE></DS_DRIVER_ACTION_DATA>"
    )
    return base64.b64encode(text.encode())


def vm_document(vm_id: int, disks: Mapping[int, Mapping[str, object]], lcm_state: int = 3) -> bytes:
    """A VM with DISKS (elements of each by its id)."""
    shown = "".join(f"<DISK>{_elements({'DISK_ID': number, **disk})}</DISK>" for number, disk in disks.items())
    return (
        f"<VM><ID>{vm_id}</ID><NAME>vm</NAME><STATE>3</STATE><LCM_STATE>{lcm_state}</LCM_STATE>"
        f"<TEMPLATE>{shown}</TEMPLATE></VM>"
    ).encode()


@contextlib.contextmanager
def front_end(directory: Path, *documents: bytes) -> Iterator[dict[str, str]]:
    """A front-end that knows these VMs; gives the variables that lead an action to it."""
    known = {int(document.split(b"</ID>")[0].rpartition(b">")[2]): document for document in documents}

    def show(ident: int | str) -> bytes:
        if int(ident) not in known:
            raise NotFound(f"no VM {ident}")
        return known[int(ident)]

    (directory / "one_auth").write_text("oneadmin:token\n")
    answering = rpc.Answering("token", {"vm": show})
    try:
        yield {"ONE_XMLRPC": answering.url, "ONE_AUTH": str(directory / "one_auth")}
    finally:
        answering.close()
