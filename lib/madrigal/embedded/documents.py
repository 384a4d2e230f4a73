"""The XML a front-end hands out: the dump of a datastore action and what one.*.info answers, in both contract forms.

The elements and their order are those of docs/contract.md, "The dump" and "What the front-end is asked".
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from lxml import etree

from madrigal.embedded.records import (
    DATASTORE_TYPES,
    IMAGE_STATES,
    IMAGE_TYPES,
    VM,
    Datastore,
    Disk,
    History,
    Host,
    Image,
)
from madrigal.embedded.snapshots import Snapshots

NO_VMM = "dummy"
"""VM_MAD of hosts where no hypervisor runs VMs."""

_RIGHTS = ("OWNER_U", "OWNER_M", "OWNER_A", "GROUP_U", "GROUP_M", "GROUP_A", "OTHER_U", "OTHER_M", "OTHER_A")
_IMAGE_DISKS = ("FILE", "CDROM")


def _put(parent: etree._Element, tag: str, value: object = "") -> etree._Element:
    element = etree.SubElement(parent, tag)
    element.text = str(value)
    return element


def _puts(parent: etree._Element, values: Mapping[str, object]) -> None:
    for tag, value in values.items():
        _put(parent, tag, value)


def _attributes(parent: etree._Element, tag: str, values: Mapping[str, object]) -> etree._Element:
    """A TEMPLATE or one of its vectors: sorted, each value in a CDATA section, as oned writes them."""
    template = etree.SubElement(parent, tag)
    for name, value in sorted(values.items()):
        etree.SubElement(template, name).text = etree.CDATA(str(value))
    return template


def _ids(parent: etree._Element, tag: str, ids: Sequence[int] = ()) -> None:
    element = _put(parent, tag)
    for ident in ids:
        _put(element, "ID", ident)


def _owner(parent: etree._Element, ident: int, name: str) -> None:
    """What every object begins with; everything here belongs to the front-end's own user."""
    _puts(parent, {"ID": ident, "UID": 0, "GID": 0, "UNAME": "oneadmin", "GNAME": "oneadmin", "NAME": name})
    rights = etree.SubElement(parent, "PERMISSIONS")
    for right in _RIGHTS:
        _put(rights, right, int(right in ("OWNER_U", "OWNER_M")))


def text(element: etree._Element) -> bytes:
    data: bytes = etree.tostring(element, encoding="utf-8", xml_declaration=False)
    return data


class Documents:
    """Builds documents in the form of CONTRACT."""

    def __init__(self, contract: str) -> None:
        self._old = contract == "3.4"

    def dump(
        self, image: etree._Element | None, datastore: etree._Element, more: Mapping[str, object] | None = None
    ) -> bytes:
        """The base64 of a DS_DRIVER_ACTION_DATA, on one line without an end; MORE: elements after these."""
        root = etree.Element("DS_DRIVER_ACTION_DATA")
        if image is not None:
            root.append(image)
        root.append(datastore)
        _puts(root, more or {})
        return base64.b64encode(text(root))

    def stat(self, image: Image) -> etree._Element:
        """The IMAGE of a `stat` dump: the image does not exist yet."""
        root = etree.Element("IMAGE")
        _puts(root, {"PATH": image.path, "SIZE": ""})
        return root

    def image(
        self, image: Image, datastore: Datastore, vms: Sequence[int], reserve: bool = False, snapshot: int = -1
    ) -> etree._Element:
        """VMS: ids of those that use it.  RESERVE: ask `mkfs` for a name only (save_as).  SNAPSHOT: to act on."""
        root = etree.Element("IMAGE")
        _owner(root, image.id, image.name)
        _put(root, "TYPE", IMAGE_TYPES[image.type])
        state = image.state if not vms or image.state != "READY" else self._used(image)
        common = {"PERSISTENT": int(image.persistent), "REGTIME": image.regtime}
        where = {"SOURCE": image.source, "PATH": image.path}
        of_datastore = {"DATASTORE_ID": datastore.id, "DATASTORE": datastore.name}
        form = "save_as" if reserve else image.format
        if self._old:
            _puts(root, {**common, **where, "FSTYPE": form or image.fs, "SIZE": image.size})
            _puts(root, {"STATE": IMAGE_STATES[state], "RUNNING_VMS": len(vms), **of_datastore})
            _attributes(root, "TEMPLATE", image.template)
            return root
        _put(root, "DISK_TYPE", 1 if image.type == "CDROM" else 0)
        _puts(root, {**common, "MODTIME": image.regtime, **where, "FORMAT": form, "FS": image.fs, "SIZE": image.size})
        _puts(root, {"STATE": IMAGE_STATES[state], "PREV_STATE": IMAGE_STATES[state], "RUNNING_VMS": len(vms)})
        _puts(root, {"CLONING_OPS": 0, "CLONING_ID": image.cloned, "TARGET_SNAPSHOT": snapshot, **of_datastore})
        for tag in ("VMS", "CLONES", "APP_CLONES"):
            _ids(root, tag, vms if tag == "VMS" else ())
        _attributes(root, "TEMPLATE", image.template)
        root.append(_snapshots(image.snapshots or Snapshots()))
        _puts(root, {"BACKUP_INCREMENTS": "", "BACKUP_DISK_IDS": ""})
        return root

    def _used(self, image: Image) -> str:
        return "USED_PERS" if image.persistent and not self._old else "USED"

    def datastore(self, datastore: Datastore, base_path: str, images: Sequence[int]) -> etree._Element:
        number, name = DATASTORE_TYPES[datastore.type]
        root = etree.Element("DATASTORE")
        _owner(root, datastore.id, datastore.name)
        _puts(root, {"DS_MAD": datastore.ds_mad, "TM_MAD": datastore.tm_mad, "BASE_PATH": base_path})
        mads = {"DS_MAD": datastore.ds_mad, "TM_MAD": datastore.tm_mad}
        if self._old:
            _puts(root, {"CLUSTER_ID": -1, "CLUSTER": ""})
            _ids(root, "IMAGES", images)
            _attributes(root, "TEMPLATE", {**mads, **datastore.template})
            return root
        _puts(root, {"TYPE": number, "DISK_TYPE": 0, "STATE": 0})
        _ids(root, "CLUSTERS", [0])
        _puts(root, {"TOTAL_MB": datastore.total_mb, "FREE_MB": datastore.free_mb, "USED_MB": datastore.used_mb})
        _ids(root, "IMAGES", images)
        if datastore.type == "system":
            del mads["DS_MAD"]
        _attributes(root, "TEMPLATE", {**mads, "TYPE": name, **datastore.template})
        return root

    def host(self, host: Host, vms: Sequence[int]) -> etree._Element:
        root = etree.Element("HOST")
        _puts(root, {"ID": host.id, "NAME": host.name, "STATE": 2, "PREV_STATE": 2, "IM_MAD": "dummy"})
        _puts(root, {"VM_MAD": host.vmm or NO_VMM, "CLUSTER_ID": 0, "CLUSTER": "default"})
        _put(_put(root, "HOST_SHARE"), "RUNNING_VMS", len(vms))
        _ids(root, "VMS", vms)
        _attributes(root, "TEMPLATE", {"DATASTORE_LOCATION": host.datastores})
        return root

    def vm(self, vm: VM, images: Mapping[int, Image], datastores: Mapping[int, Datastore]) -> etree._Element:
        root = etree.Element("VM")
        _owner(root, vm.id, vm.name)
        _puts(root, {"LAST_POLL": 0, "STATE": vm.state, "LCM_STATE": vm.lcm_state})
        _puts(root, {"PREV_STATE": vm.state, "PREV_LCM_STATE": vm.lcm_state, "RESCHED": 0})
        deploy_id = vm.deploy_id or f"one-{vm.id}" if vm.history else ""
        _puts(root, {"STIME": vm.stime, "ETIME": vm.etime, "DEPLOY_ID": deploy_id})
        monitoring = _put(root, "MONITORING")
        for disk in vm.disks:
            for name, size in sorted(disk.taken.items()):
                snapshot = name.partition("/")[2]
                ids = {"ID": snapshot, "DISK_ID": disk.id} if snapshot else {"ID": disk.id}
                _attributes(monitoring, "SNAPSHOT_SIZE" if snapshot else "DISK_SIZE", {**ids, "SIZE": size})
        template = etree.SubElement(root, "TEMPLATE")
        if vm.context_disk is not None:
            values: dict[str, object] = {**vm.context, "DISK_ID": vm.context_disk, "TARGET": "hda"}
            if vm.context_files:
                values["FILES"] = " ".join(vm.context_files)
            _attributes(template, "CONTEXT", values)
        system_tm = datastores[vm.system_ds].tm_mad
        for disk in vm.disks:
            image = images.get(disk.image_id) if disk.image_id is not None else None
            _attributes(template, "DISK", _disk(disk, image, datastores, system_tm))
        _attributes(template, "VMID", {}).text = str(vm.id)
        user = _put(root, "USER_TEMPLATE")
        if vm.error:
            etree.SubElement(user, "ERROR").text = etree.CDATA(vm.error)
        history = _put(root, "HISTORY_RECORDS")
        for stay in vm.history:
            history.append(_stay(vm, stay))
        for disk in vm.disks:
            if disk.snapshots:
                root.append(_snapshots(disk.snapshots, disk.id))
        backups = _put(root, "BACKUPS")
        _puts(backups, {"BACKUP_CONFIG": "", "BACKUP_IDS": ""})
        return root


def _disk(disk: Disk, image: Image | None, datastores: Mapping[int, Datastore], system_tm: str) -> dict[str, object]:
    values: dict[str, object] = {
        **disk.attributes,
        "DISK_ID": disk.id,
        "TYPE": disk.type,
        "SIZE": disk.size,
        "SIZE_PREV": "" if disk.previous_size is None else disk.previous_size,
        "FORMAT": disk.format,
        "FS": disk.fs,
        "TARGET": disk.target,
        "CLONE": "YES" if disk.clone else "NO",
        "SAVE": "YES" if disk.save else "NO",
        "TM_MAD": disk.tm_mad or system_tm,
        "ORIGINAL_SIZE": disk.original_size if disk.type in _IMAGE_DISKS else "",
        "TM_MAD_SYSTEM": disk.tm_mad_system,
        "SOURCE": disk.source,
    }
    if disk.datastore_id is not None:
        values.update(DATASTORE_ID=disk.datastore_id, DATASTORE=datastores[disk.datastore_id].name)
    if disk.image_id is not None:
        values["IMAGE_ID"] = disk.image_id
    if image:
        values["IMAGE"] = image.name
        values["PERSISTENT"] = "YES" if image.persistent else ""
    return {name: value for name, value in values.items() if value != ""}


def _snapshots(snapshots: Snapshots, disk_id: int | None = None) -> etree._Element:
    head = {"ALLOW_ORPHANS": snapshots.orphans, "CURRENT_BASE": snapshots.base, "NEXT_SNAPSHOT": snapshots.next}
    holder = etree.Element("parent")
    root = _attributes(holder, "SNAPSHOTS", head if disk_id is None else {**head, "DISK_ID": disk_id})
    for one in snapshots.all:
        values: dict[str, object] = {"ID": one.id, "PARENT": one.parent, "DATE": one.date, "SIZE": one.size}
        values["CHILDREN"] = ",".join(map(str, one.children))
        values["NAME"] = one.name
        values["ACTIVE"] = "YES" if one.id == snapshots.active else ""
        _attributes(root, "SNAPSHOT", {name: value for name, value in values.items() if value != ""})
    return root


def _stay(vm: VM, stay: History) -> etree._Element:
    root = etree.Element("HISTORY")
    _puts(root, {"OID": vm.id, "SEQ": stay.seq, "HOSTNAME": stay.host, "HID": stay.host_id, "CID": 0})
    _puts(root, {"STIME": stay.stime, "ETIME": stay.etime, "VM_MAD": stay.vm_mad or NO_VMM, "TM_MAD": stay.tm_mad})
    _puts(root, {"DS_ID": stay.system_ds, "ACTION": stay.action})
    return root
