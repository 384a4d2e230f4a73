"""Dumps and VM documents as front-ends send them, and a front-end that answers drivers."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping, Sequence
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
    extra: Mapping[str, object] | None = None,
    market: str = "",
) -> bytes:
    """The base64 of a DS_DRIVER_ACTION_DATA: IMAGE's elements over usual ones, its TEMPLATE's ATTRIBUTES, the
    datastore's TEMPLATE, and EXTRA beside both.  A value of None leaves an element out.  MARKET: the XML of the
    template of a marketplace."""
    values = {"ID": 42, "NAME": "image", "TYPE": 0, "REGTIME": REGTIME, "SOURCE": "", "PATH": "", "SIZE": 0}
    shown = {name: value for name, value in {**values, **(image or {})}.items() if value is not None}
    text = (
        f"<DS_DRIVER_ACTION_DATA><IMAGE>{_elements(shown)}<TEMPLATE>{_elements(attributes or {})}</TEMPLATE></IMAGE>"
        f"<DATASTORE><ID>1</ID><NAME>default</NAME><DS_MAD>fs</DS_MAD><TM_MAD>ssh</TM_MAD>"
        f"<BASE_PATH>{escape(str(base_path))}</BASE_PATH><TYPE>{type}</TYPE>"
        f"<TEMPLATE>{_elements(template or {})}</TEMPLATE></DATASTORE>{_elements(extra or {})}"
        f"<MARKETPLACE><TEMPLATE>{market}</TEMPLATE></MARKETPLACE></DS_DRIVER_ACTION_DATA>"
    )
    return base64.b64encode(text.encode())


def system_dump(location: str | Path, template: Mapping[str, object] | None = None, disks: bool = False) -> bytes:
    """What comes with `monitor` of a system datastore in the directory LOCATION; DISKS: with sizes of disks."""
    text = (
        f"<DS_DRIVER_ACTION_DATA><DATASTORE><ID>0</ID><NAME>system</NAME><DS_MAD>-</DS_MAD><TM_MAD>shared</TM_MAD>"
        f"<BASE_PATH>/nowhere/0</BASE_PATH><TYPE>1</TYPE><TEMPLATE>{_elements(template or {})}</TEMPLATE></DATASTORE>"
        f"<DATASTORE_LOCATION>{escape(str(location))}</DATASTORE_LOCATION>"
        f"{'<MONITOR_VM_DISKS>1</MONITOR_VM_DISKS>' if disks else ''}</DS_DRIVER_ACTION_DATA>"
    )
    return base64.b64encode(text.encode())


def vm_document(
    vm_id: int, disks: Mapping[int, Mapping[str, object]], lcm_state: int = 3, history: Sequence[int] = ()
) -> bytes:
    """A VM with DISKS (elements of each by its id) that was in the system datastores HISTORY, the last one now."""
    records = "".join(f"<HISTORY><SEQ>{seq}</SEQ><DS_ID>{ds}</DS_ID></HISTORY>" for seq, ds in enumerate(history))
    shown = "".join(f"<DISK>{_elements({'DISK_ID': number, **disk})}</DISK>" for number, disk in disks.items())
    return (
        f"<VM><ID>{vm_id}</ID><NAME>vm</NAME><STATE>3</STATE><LCM_STATE>{lcm_state}</LCM_STATE>"
        f"<TEMPLATE>{shown}</TEMPLATE><HISTORY_RECORDS>{records}</HISTORY_RECORDS></VM>"
    ).encode()


def datastore_document(ds_id: int, template: Mapping[str, object]) -> bytes:
    """A datastore with these attributes."""
    return f"<DATASTORE><ID>{ds_id}</ID><TEMPLATE>{_elements(template)}</TEMPLATE></DATASTORE>".encode()


@contextlib.contextmanager
def front_end(
    directory: Path, *documents: bytes, answers: Sequence[str] = ("vm", "datastore")
) -> Iterator[dict[str, str]]:
    """A front-end that knows these VMs and datastores; gives the variables that lead an action to it.

    ANSWERS: what it tells about; it refuses to talk about anything else.
    """
    known = {
        (
            document[1:].partition(b">")[0].decode().lower(),
            int(document.split(b"</ID>")[0].rpartition(b">")[2]),
        ): document
        for document in documents
    }

    def of(kind: str) -> rpc.Show:
        def show(ident: int | str) -> bytes:
            if (kind, int(ident)) not in known:
                raise NotFound(f"no {kind} {ident}")
            return known[kind, int(ident)]

        return show

    (directory / "one_auth").write_text("oneadmin:token\n")
    answering = rpc.Answering("token", {kind: of(kind) for kind in answers})
    try:
        yield {"ONE_XMLRPC": answering.url, "ONE_AUTH": str(directory / "one_auth")}
    finally:
        answering.close()
