"""Images: registered, made empty, deleted, by the datastore's driver."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from madrigal.embedded.datastores import attributes
from madrigal.embedded.records import VM, Datastore, Image, name, printable, text
from madrigal.embedded.run import ActionFailed, Outcome
from madrigal.embedded.snapshots import Snapshots
from madrigal.errors import InUse, NotSupported, UsageError

if TYPE_CHECKING:
    from madrigal.embedded.front_end import FrontEnd

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DIGESTS = {"MD5": 32, "SHA1": 40, "SHA256": 64}


class Images:
    def __init__(self, front_end: FrontEnd) -> None:
        self._front_end = front_end
        self._state = front_end.state
        self._old = front_end.layout.contract == "3.4"

    def create(
        self,
        image: str,
        datastore: str | int,
        path: str = "",
        size: int = 0,
        format: str = "",
        fs: str = "",
        type: str = "",
        persistent: bool = False,
        attrs: Mapping[str, str] | None = None,
    ) -> Image:
        """Import PATH (absolute, or a URL), or make an empty image of SIZE MiB with FORMAT (today) and file system FS.

        Today, SIZE with a PATH saves asking the driver for the size.

        TYPE is os, cdrom or datablock.  Digests are the attributes MD5, SHA1 and SHA256.  Raises ActionFailed if
        the driver fails; the image is then kept in the state ERROR with the reason, as oned does.
        """
        name(image, "image")
        store = self._state.find(Datastore, datastore)
        record = Image(-1, image, self._type(store, type, path), store.id, persistent)
        record.template = self._template(attrs or {})
        self._check_content(record, path, size, format, fs, store)
        with self._state.transaction():
            self._state.check_free(Image, image)
            request = self._state.number("request")
        if path and not size and not self._old:
            record.size = self._stat(record, store, request)
        with contextlib.ExitStack() as stack:
            with self._state.transaction():
                self._allocate(record)
                stack.enter_context(self._state.lock(record, "image create"))
            return self._fill(record, store)

    def reserve(self, image: str, like: Image, size: int, vm_id: int, disk_id: int) -> Image:
        """An image that a disk of a VM becomes: a name for now, not yet in the datastore.  Inside a transaction."""
        template = {"SAVED_DISK_ID": str(disk_id), "SAVED_VM_ID": str(vm_id)}
        record = Image(-1, name(image, "image"), like.type, like.datastore_id, size=size, template=template)
        if not self._old:
            record.format = like.format
        self._allocate(record)
        return record

    def make_reserved(self, record: Image) -> Image:
        """Have the driver name the place a reserved image will have.  It stays LOCKED until the disk is there."""
        return self._fill(record, self._state.get(Datastore, record.datastore_id), reserve=True)

    def finish(self, image_id: int, error: str = "") -> Image:
        """A reserved image has its content now, or never will (ERROR says why)."""
        with self._state.transaction():
            record = self._state.get(Image, image_id)
            record.state, record.error = ("ERROR", error) if error else ("READY", "")
            self._state.save(record)
        if not error:
            self._front_end.datastores.monitor(self._state.get(Datastore, record.datastore_id))
        return record

    def clone(self, image: str | int, name_: str, datastore: str | int = "") -> Image:
        """A copy of an image that is READY, in its own datastore or another; not persistent."""
        self._check_current("clone")
        original = self.get(image)
        store = self._state.find(Datastore, original.datastore_id if datastore == "" else datastore)
        if original.state != "READY" or store.type != "image":
            raise InUse(f"image '{original.name}', in the state {original.state}, cannot be cloned into '{store.name}'")
        record = Image(-1, name(name_, "image"), original.type, store.id, False, original.source, cloned=original.id)
        record.size, record.format, record.template = original.size, original.format, dict(original.template)
        with contextlib.ExitStack() as stack:
            with self._state.transaction():
                self._allocate(record)
                stack.enter_context(self._state.lock(record, "image clone"))
            return self._fill(record, store)

    def snapshot_revert(self, image: str | int, snapshot: int | str) -> Image:
        """Bring an image that no VM uses back to a snapshot (id or name)."""
        return self._snapshot("snap_revert", image, snapshot)

    def snapshot_delete(self, image: str | int, snapshot: int | str) -> Image:
        """Delete a snapshot of an image that no VM uses."""
        return self._snapshot("snap_delete", image, snapshot)

    def snapshot_flatten(self, image: str | int, snapshot: int | str) -> Image:
        """Make a snapshot the whole content of an image that no VM uses; all its snapshots are gone then."""
        return self._snapshot("snap_flatten", image, snapshot)

    def _snapshot(self, action: str, image: str | int, snapshot: int | str) -> Image:
        self._check_current("image snapshots")
        record = self.get(image)
        with self._state.lock(record, f"image {action}"):
            record = self.get(record.id)
            if record.state != "READY":
                raise InUse(f"image '{record.name}' is in the state {record.state}")
            if users := self.users(record):
                raise InUse(f"VM {users[0]} uses image '{record.name}': the snapshots are its disk's now")
            snapshots = record.snapshots or Snapshots()
            one = snapshots.get(snapshot)
            if action == "snap_delete":
                snapshots.check_deletable_of_image(one.id)
            if action == "snap_revert" and one.id == snapshots.active:
                raise InUse(f"snapshot {one.id} of image '{record.name}' is the active one already")
            store = self._state.get(Datastore, record.datastore_id)
            # READY is what is remembered, so that it can be done again after a kill; the driver sees LOCKED.
            record.state, record.error = "LOCKED", ""
            outcome = self._action(action, record, store, snapshot=one.id)
            record.state = "READY"
            if not outcome.ok:
                record.error = printable(outcome.reason)
                self._state.save(record)
                raise ActionFailed(f"{outcome.call.title} failed: {outcome.reason}")
            if action == "snap_delete":
                snapshots.remove(one.id)
            else:
                snapshots.activate(one.id, revert=True)
                record.size = one.size
            record.snapshots = snapshots if snapshots.all and action != "snap_flatten" else None
            self._state.save(record)
        self._front_end.datastores.monitor(store)
        return record

    def _check_current(self, operation: str) -> None:
        if self._old:
            raise NotSupported(f"the 3.4 contract has no {operation}")

    def _type(self, store: Datastore, given: str, path: str) -> str:
        if store.type == "system":
            raise UsageError(f"datastore '{store.name}' is a system datastore: images go into an image datastore")
        if store.type == "file":
            return "CONTEXT"
        kind = (given or ("os" if path else "datablock")).upper()
        if kind not in ("OS", "CDROM", "DATABLOCK"):
            raise UsageError(f"the type is '{given}', expected os, cdrom or datablock")
        return kind

    def _template(self, attrs: Mapping[str, str]) -> dict[str, str]:
        template = attributes(attrs)
        for key, length in _DIGESTS.items():
            if key in template and not re.fullmatch(f"[0-9A-Fa-f]{{{length}}}", template[key]):
                raise UsageError(f"{key} is {template[key][:80]!a}, expected {length} hexadecimal digits")
        template.setdefault("DEV_PREFIX", "hd" if self._old else "vd")
        return template

    def _check_content(self, record: Image, path: str, size: int, format: str, fs: str, store: Datastore) -> None:
        """Fill in what the image will be made from."""
        if not path and not size:
            raise UsageError("give either a path to import or a size in MiB for an empty image")
        if size < 0:
            raise UsageError(f"the size is {size}, expected a number of MiB")
        record.size = size
        if path:
            if size and self._old:
                raise UsageError("a size is for empty images: in 3.4 the driver tells that of an imported one")
            if format or fs:
                raise UsageError("a format or a file system is for empty images: an imported one has its own")
            if not path.startswith("/") and not _URL.match(path):
                raise UsageError(f"the path is {path[:200]!a}: give an absolute path or a URL")
            record.path = text(path, "the path")
            return
        if record.type not in (("DATABLOCK",) if self._old else ("DATABLOCK", "OS")):
            raise UsageError(f"an image of type {record.type.lower()} cannot be made empty: give a path to import")
        if self._old and format:
            raise UsageError("3.4 knows no image formats, only file systems: leave the format out")
        if not re.fullmatch(r"[a-z0-9_]*", fs) or format not in ("", "raw", "qcow2"):
            raise UsageError(f"format '{format}' with file system '{fs}': expected raw or qcow2, and a name as ext4")
        # 3.4 has one attribute, FSTYPE, for what is inside, also when that is nothing.
        record.fs = fs or ("raw" if self._old else "")
        record.format = "" if self._old else store.template.get("DRIVER") or format or "raw"

    def _allocate(self, record: Image) -> None:
        self._state.check_free(Image, record.name)
        record.id = self._state.number("image")
        record.regtime = int(time.time())
        self._state.save(record)

    def _action(
        self, action: str, record: Image, store: Datastore, reserve: bool = False, snapshot: int = -1
    ) -> Outcome:
        front_end = self._front_end
        document = front_end.image_document(record, self._state, reserve, snapshot)
        dump = front_end.documents.dump(document, front_end.datastore_document(store, self._state))
        source = record.path if action in ("cp", "clone") else record.source
        return front_end.datastore_action(action, record.id, dump, store, record.name, source)

    def _stat(self, record: Image, store: Datastore, request: int) -> int:
        front_end = self._front_end
        document = front_end.documents.stat(record)
        dump = front_end.documents.dump(document, front_end.datastore_document(store, self._state))
        outcome = front_end.datastore_action("stat", request, dump, store, record.name, record.path)
        if not outcome.ok:
            raise ActionFailed(f"Cannot parse image SIZE: {outcome.reason}")
        if not outcome.answer.strip().isdecimal():
            raise ActionFailed(f"Cannot parse image SIZE: {outcome.call.path} answered {outcome.stdout[:80]!a}")
        return int(outcome.answer)

    def _fill(self, record: Image, store: Datastore, reserve: bool = False) -> Image:
        action = "clone" if record.cloned >= 0 else "cp" if record.path else "mkfs"
        try:
            outcome = self._action(action, record, store, reserve)
            if not outcome.ok:
                where = "repository" if self._old else "datastore"
                prefix = {
                    "cp": f"Error copying image in the {where}",
                    "mkfs": "Error creating datablock",
                    "clone": f"Error cloning from Image {record.cloned}",
                }[action]
                raise ActionFailed(f"{prefix}: {outcome.reason}")
            self._answered(action, record, outcome)
        except BaseException as error:
            record.state = "ERROR"
            record.error = printable(str(error)) or "interrupted"
            self._state.save(record)
            raise
        if not reserve:
            record.state = "READY"
        self._state.save(record)
        self._front_end.datastores.monitor(store)
        return record

    def _answered(self, action: str, record: Image, outcome: Outcome) -> None:
        """Take what the driver answered into the record, or refuse it as oned would."""
        wrong = ActionFailed(f"{outcome.call.path} answered {outcome.stdout[:200]!a}, expected ")
        if action == "mkfs" and not self._old:  # the whole line is the source
            if not outcome.answer.strip():
                raise ActionFailed(f"{wrong}SOURCE")
            record.source = printable(outcome.answer)
            return
        words = outcome.answer.split()
        if self._old:
            if len(words) < 2 or not words[1].isdecimal():
                raise ActionFailed(f"{wrong}SOURCE SIZE_MB")
            record.source, record.size = printable(words[0]), int(words[1])
            return
        if action == "clone":  # a format that is not answered stays as it was
            if not words:
                raise ActionFailed(f"{wrong}SOURCE [FORMAT]")
            record.source, record.format = printable(words[0]), printable((words[1:] or [record.format])[0])
            return
        if len(words) < 2:
            raise ActionFailed("CP operation succeeded but image FORMAT was not returned.")
        record.source, record.format = printable(words[0]), printable(words[1])

    def all(self) -> list[Image]:
        return self._state.all(Image)

    def get(self, image: str | int) -> Image:
        """By name or id; raises NotFound."""
        return self._state.find(Image, image)

    def users(self, record: Image) -> list[int]:
        """Ids of the VMs that use it."""
        return [vm.id for vm in self._state.all(VM) if vm.uses(record.id)]

    def delete(self, image: str | int, force: bool = False) -> Image:
        """Delete an image; raises InUse while a VM uses it.

        If the driver's rm fails, 3.4 forgets the image all the same; today it is kept in ERROR unless FORCE.
        """
        record = self.get(image)
        with self._state.lock(record, "image delete"):
            with self._state.transaction():
                record = self.get(record.id)
                users = [vm.id for vm in self._state.all(VM) if vm.uses(record.id) or vm.saves(record.id)]
                if users:
                    raise InUse(f"VM {users[0]} uses image '{record.name}': shut it down or delete it first")
                record.state = "DELETE"
                self._state.save(record)
            store = self._state.get(Datastore, record.datastore_id)
            try:
                # Without SOURCE nothing was made: a driver that fails cleans up by itself.
                outcome = self._action("rm", record, store) if record.source else None
                if outcome and not outcome.ok:
                    raise ActionFailed(f"Error removing image from the datastore: {outcome.reason}")
            except BaseException as error:
                if isinstance(error, ActionFailed) and (force or self._old):
                    self._front_end.observer.warn(f"image '{record.name}' is forgotten, but: {error}")
                else:
                    record.state, record.error = "ERROR", printable(str(error)) or "interrupted"
                    self._state.save(record)
                    raise
            self._state.remove(record)
        self._front_end.datastores.monitor(store)
        return record
