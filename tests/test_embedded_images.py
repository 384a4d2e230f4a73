"""Datastore actions under the embedded front-end: what their dumps say, and what becomes of their answers."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from embedded_fakes import Tree
from lxml import etree

from madrigal.dump import Dump
from madrigal.embedded import ActionFailed, DiskRequest, FrontEnd
from madrigal.errors import InUse, MadrigalError, UsageError


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree")


def open_(tree: Tree, contract: str, **datastore: Any) -> FrontEnd:
    front_end = FrontEnd(str(tree.path.parent / "state"), contract=contract, tree=str(tree.path))
    front_end.datastores.create("default", tm_mad="shared", **datastore)
    tree.calls()
    return front_end


def dump(call: dict[str, Any]) -> etree._Element:
    return etree.fromstring(base64.b64decode(call["stdin"] or call["argv"][0]))


def tags(root: etree._Element, path: str = ".") -> str:
    return " ".join(child.tag for child in root.iterfind(f"{path}/*"))


IMAGE_NOW = (
    "ID UID GID UNAME GNAME NAME PERMISSIONS TYPE DISK_TYPE PERSISTENT REGTIME MODTIME SOURCE PATH FORMAT FS SIZE "
    "STATE PREV_STATE RUNNING_VMS CLONING_OPS CLONING_ID TARGET_SNAPSHOT DATASTORE_ID DATASTORE VMS CLONES APP_CLONES "
    "TEMPLATE SNAPSHOTS BACKUP_INCREMENTS BACKUP_DISK_IDS"
)
IMAGE_3_4 = (
    "ID UID GID UNAME GNAME NAME PERMISSIONS TYPE PERSISTENT REGTIME SOURCE PATH FSTYPE SIZE STATE RUNNING_VMS "
    "DATASTORE_ID DATASTORE TEMPLATE"
)
DATASTORE_3_4 = "ID UID GID UNAME GNAME NAME PERMISSIONS DS_MAD TM_MAD BASE_PATH CLUSTER_ID CLUSTER IMAGES TEMPLATE"


def test_import_now(tree: Tree) -> None:
    front_end = open_(tree, "current")
    tree.say("datastore.fs.stat", stdout="77\n")
    tree.say("datastore.fs.cp", stdout="/ds/5f2c qcow2\n")
    attrs = {"md5": "0" * 32, "note": "a & <b>"}
    image = front_end.images.create("alma", "default", path="/srv/x y.img", persistent=True, attrs=attrs)
    stat, copy, monitor = tree.calls()
    assert [call["action"] for call in (stat, copy, monitor)] == ["stat", "cp", "monitor"]
    root = dump(stat)
    assert [(child.tag, child.text) for child in root.iterfind("IMAGE/*")] == [("PATH", "/srv/x y.img"), ("SIZE", None)]
    assert copy["argv"] == [str(image.id)]
    root = dump(copy)
    assert tags(root) == "IMAGE DATASTORE"
    assert tags(root, "IMAGE") == IMAGE_NOW
    values = {
        path: root.findtext(f"IMAGE/{path}") for path in ("NAME", "SIZE", "FORMAT", "SOURCE", "PERSISTENT", "STATE")
    }
    assert values == {"NAME": "alma", "SIZE": "77", "FORMAT": "", "SOURCE": "", "PERSISTENT": "1", "STATE": "4"}
    assert root.findtext("IMAGE/TEMPLATE/NOTE") == "a & <b>"
    assert root.findtext("DATASTORE/BASE_PATH") == f"{front_end.directory}/var//datastores/1"
    template = {child.tag: child.text for child in root.iterfind("DATASTORE/TEMPLATE/*")}
    assert (template["SAFE_DIRS"], template["RESTRICTED_DIRS"], template["TYPE"]) == ("/", "/", "IMAGE_DS")
    decoded = base64.b64decode(copy["stdin"])
    assert b"<NOTE><![CDATA[a & <b>]]></NOTE>" in decoded
    assert not decoded.startswith(b"<?xml") and b">\n" not in decoded
    assert Dump(copy["stdin"].encode()).image.path == "/srv/x y.img"
    assert (monitor["argv"], tags(dump(monitor))) == (["1"], "DATASTORE")
    assert (image.source, image.format, image.size, image.state) == ("/ds/5f2c", "qcow2", 77, "READY")
    assert front_end.datastores.get(1).free_mb == 60


def test_a_size_that_is_told_is_not_asked(tree: Tree) -> None:
    front_end = open_(tree, "current")
    assert front_end.images.create("alma", "default", path="http://x/y.gz", size=30).size == 30
    assert [call["action"] for call in tree.calls()] == ["cp", "monitor"]


def test_import_3_4(tree: Tree) -> None:
    front_end = open_(tree, "3.4")
    tree.say("datastore.fs.cp", stdout="/ds/5f2c 5120\n")
    image = front_end.images.create("ttylinux", "default", path="/srv/x.img")
    (copy,) = tree.calls()
    assert (copy["action"], copy["argv"][1], copy["stdin"]) == ("cp", "0", "")
    root = dump(copy)
    assert tags(root, "IMAGE") == IMAGE_3_4
    assert tags(root, "DATASTORE") == DATASTORE_3_4
    assert root.findtext("DATASTORE/BASE_PATH") == f"{front_end.directory}/var/datastores/1"
    assert root.findtext("IMAGE/SIZE") == "0"
    assert (image.source, image.size, image.format) == ("/ds/5f2c", 5120, "")


def test_empty_image(tree: Tree) -> None:
    front_end = open_(tree, "current")
    tree.say("datastore.fs.mkfs", stdout="/ds/77aa\n")
    image = front_end.images.create("data", "default", size=20, format="qcow2", fs="ext4")
    root = dump(tree.calls("mkfs")[0])
    assert [root.findtext(f"IMAGE/{tag}") for tag in ("TYPE", "FORMAT", "FS", "SIZE", "PATH")] == [
        *("2", "qcow2", "ext4", "20", "")
    ]
    assert (image.source, image.format) == ("/ds/77aa", "qcow2")
    front_end.datastores.update("default", attrs={"DRIVER": "raw"})
    assert front_end.images.create("forced", "default", size=20, format="qcow2").format == "raw"


def test_empty_image_3_4(tree: Tree) -> None:
    front_end = open_(tree, "3.4")
    front_end.images.create("data", "default", size=20, fs="ext3")
    front_end.images.create("plain", "default", size=20)
    assert [dump(call).findtext("IMAGE/FSTYPE") for call in tree.calls("mkfs")] == ["ext3", "raw"]


def test_reserved_names(tree: Tree) -> None:
    for contract, tag in (("3.4", "FSTYPE"), ("current", "FORMAT")):
        with FrontEnd(str(tree.path.parent / contract), contract=contract, tree=str(tree.path)) as front_end:
            front_end.hosts.create("host01")
            front_end.datastores.create("default", tm_mad="shared")
            front_end.images.create("a", "default", path="/srv/a")
            if contract == "3.4":
                front_end.vms.create("vm", [DiskRequest(image="a", save_as="b")])
            else:
                front_end.vms.create("vm", [DiskRequest(image="a")])
                front_end.vms.deploy("vm", "host01")
                front_end.vms.disk_saveas("vm", 0, "b")
            root = dump(tree.calls("mkfs")[0])
            assert root.findtext(f"IMAGE/{tag}") == "save_as"
            assert (root.findtext("IMAGE/TEMPLATE/SAVED_VM_ID"), root.findtext("IMAGE/SIZE")) == ("0", "10")


@pytest.mark.parametrize(
    ("contract", "plan", "error"),
    [
        (
            "current",
            {"stdout": "", "stderr": "no space\n", "status": 1},
            "Error copying image in the datastore: no space",
        ),
        ("current", {"stdout": "", "status": 7}, "exit status 7"),
        ("current", {"stdout": "/ds/only-source\n"}, "FORMAT was not returned"),
        ("current", {"stdout": ""}, "FORMAT was not returned"),
        ("3.4", {"stdout": "/ds/a raw\n"}, "expected SOURCE SIZE_MB"),
        ("3.4", {"stdout": "/ds/a\n"}, "expected SOURCE SIZE_MB"),
        (
            "3.4",
            {"stdout": "", "stderr": "ERROR MESSAGE --8<------\nfull\nERROR MESSAGE ------>8--\n", "status": 1},
            "Error copying image in the repository: full",
        ),
    ],
)
def test_a_failed_import_leaves_an_image_in_error(tree: Tree, contract: str, plan: dict[str, Any], error: str) -> None:
    front_end = open_(tree, contract)
    tree.say("datastore.fs.cp", **plan)
    with pytest.raises(ActionFailed, match=error):
        front_end.images.create("a", "default", path="/srv/a")
    image = front_end.images.get("a")
    assert (image.state, image.source) == ("ERROR", "")
    assert error in image.error
    with pytest.raises(InUse, match="ERROR"):
        front_end.vms.create("vm", [DiskRequest(image="a")])
    tree.calls()
    front_end.images.delete("a")
    assert tree.calls("rm") == []  # there is nothing to remove: the driver cleans up after itself
    assert front_end.images.all() == []


@pytest.mark.parametrize("plan", [{"stdout": "", "stderr": "no such file\n", "status": 1}, {"stdout": "much\n"}])
def test_a_failed_stat_leaves_nothing(tree: Tree, plan: dict[str, Any]) -> None:
    front_end = open_(tree, "current")
    tree.say("datastore.fs.stat", **plan)
    with pytest.raises(ActionFailed, match=r"Cannot parse image SIZE: .*(no such file|much)"):
        front_end.images.create("a", "default", path="/srv/a")
    assert front_end.images.all() == []


def test_failed_mkfs(tree: Tree) -> None:
    front_end = open_(tree, "current")
    tree.say("datastore.fs.mkfs", stdout="\n")
    with pytest.raises(ActionFailed, match="expected SOURCE"):
        front_end.images.create("a", "default", size=1)


def test_a_failed_monitor_is_a_warning(tree: Tree) -> None:
    front_end = open_(tree, "current")
    for plan in ({"stdout": "", "stderr": "df broke\n", "status": 1}, {"stdout": "TOTAL_MB=1\n"}):
        tree.say("datastore.fs.monitor", **plan)
        warnings: list[str] = []
        front_end.observer.warn = warnings.append  # type: ignore[assignment]
        front_end.datastores.monitor(front_end.datastores.get("default"))
        assert len(warnings) == 1 and ("df broke" in warnings[0] or "TOTAL_MB=1" in warnings[0])


def test_delete(tree: Tree) -> None:
    front_end = open_(tree, "current")
    front_end.images.create("a", "default", path="/srv/a")
    front_end.vms.create("vm", [DiskRequest(image="a")])
    with pytest.raises(InUse, match="VM 0"):
        front_end.images.delete("a")
    front_end.vms.delete("vm")
    tree.say("datastore.fs.rm", status=1, stderr="busy\n")
    tree.calls()
    with pytest.raises(ActionFailed, match="busy"):
        front_end.images.delete("a")
    assert dump(tree.calls("rm")[0]).findtext("IMAGE/SOURCE") == "/ds/image"
    assert front_end.images.get("a").state == "ERROR"
    front_end.images.delete("a", force=True)
    assert front_end.images.all() == []


def test_3_4_forgets_an_image_that_rm_leaves(tree: Tree) -> None:
    front_end = open_(tree, "3.4")
    front_end.images.create("a", "default", path="/srv/a")
    tree.say("datastore.fs.rm", status=1)
    front_end.images.delete("a")
    assert front_end.images.all() == []


@pytest.mark.parametrize(
    ("contract", "arguments", "error"),
    [
        ("current", {}, "either a path"),
        ("3.4", {"path": "/a", "size": 1}, "size is for empty"),
        ("current", {"path": "a"}, "absolute path"),
        ("current", {"path": "/a\0b"}, "control character"),
        ("current", {"path": "/a", "attrs": {"X": "]]>"}}, "]]>"),
        ("current", {"path": "/a", "attrs": {"A B": "x"}}, "name of an attribute"),
        ("current", {"path": "/a", "attrs": {"sha256": "x"}}, "64 hexadecimal"),
        ("current", {"path": "/a", "format": "raw"}, "for empty images"),
        ("current", {"path": "/a", "type": "tape"}, "'tape'"),
        ("current", {"size": -1}, "number of MiB"),
        ("current", {"size": 1, "type": "cdrom"}, "cannot be made empty"),
        ("current", {"size": 1, "fs": "ext4;id"}, "expected raw or qcow2"),
        ("current", {"size": 1, "format": "vmdk"}, "expected raw or qcow2"),
        ("3.4", {"size": 1, "format": "raw"}, "no image formats"),
        ("3.4", {"size": 1, "type": "os"}, "cannot be made empty"),
        ("current", {"path": "/a", "image": "12"}, "read as an id"),
        ("current", {"path": "/a", "image": ""}, "cannot name"),
        ("current", {"path": "/a", "image": "a\nb"}, "cannot name"),
        ("current", {"path": "/a", "image": "\udcff"}, "UTF-8"),
        ("current", {"path": "/a", "datastore": "system"}, "system datastore"),
        ("current", {"path": "/a", "datastore": "nowhere"}, "no datastore named"),
    ],
)
def test_images_that_cannot_be(tree: Tree, contract: str, arguments: dict[str, Any], error: str) -> None:
    front_end = open_(tree, contract)
    with pytest.raises(MadrigalError, match=error):
        front_end.images.create(**{"image": "a", "datastore": "default", **arguments})
    assert (front_end.images.all(), tree.calls()) == ([], [])


def test_a_name_is_taken_once(tree: Tree) -> None:
    front_end = open_(tree, "current")
    front_end.images.create("a", "default", path="/srv/a")
    tree.calls()
    with pytest.raises(InUse, match="already"):
        front_end.images.create("a", "default", path="/srv/a")
    assert tree.calls() == []


def test_persistent_images_have_one_vm(tree: Tree) -> None:
    front_end = open_(tree, "current")
    front_end.images.create("a", "default", path="/srv/a", persistent=True)
    with pytest.raises(InUse, match="persistent"):
        front_end.vms.create("vm", [DiskRequest(image="a"), DiskRequest(image="a")])
    front_end.vms.create("vm", [DiskRequest(image="a")])
    with pytest.raises(InUse, match="persistent"):
        front_end.vms.create("vm2", [DiskRequest(image="a")])


def test_datastores(tree: Tree) -> None:
    front_end = open_(tree, "current", attrs={"restricted_dirs": "/root", "driver": "qcow2"})
    template = front_end.datastores.get("default").template
    assert template["RESTRICTED_DIRS"] == "/root" and "SAFE_DIRS" not in template  # as oned: only if both are absent
    assert (template["DRIVER"], template["LN_TARGET"], template["TM_MAD_SYSTEM"]) == ("qcow2", "NONE", "ssh")
    assert front_end.datastores.get(0).name == "system"
    front_end.images.create("a", "default", path="/srv/a")
    with pytest.raises(InUse, match="image 'a'"):
        front_end.datastores.delete("default")
    with pytest.raises(InUse, match="system"):
        front_end.datastores.delete("system")
    front_end.vms.create("vm", [DiskRequest(image="a")])
    for datastore in ("system", "default"):
        with pytest.raises(InUse, match="VM 0"):
            front_end.datastores.update(datastore, tm_mad="dummy")
    for attrs in ({"TYPE": "x"}, {"TM_MAD": "x"}):
        with pytest.raises(UsageError, match="not set as an attribute"):
            front_end.datastores.update("default", attrs=attrs)
    with pytest.raises(UsageError, match="name of a driver"):
        front_end.datastores.create("other", tm_mad="../../x")
    front_end.datastores.create("files", tm_mad="ssh", type="file")
    front_end.images.create("kernel", "files", path="/srv/k")
    assert dump(tree.calls("cp")[-1]).findtext("DATASTORE/TYPE") == "2"
    with pytest.raises(UsageError, match="file datastore"):
        front_end.vms.create("vm2", [DiskRequest(image="kernel")])
    front_end.vms.delete("vm")
    front_end.images.delete("a")
    front_end.datastores.delete("default")
    with FrontEnd(str(tree.path.parent / "old"), contract="3.4", tree=str(tree.path)) as old:
        with pytest.raises(UsageError, match=r"3\.4"):
            old.datastores.create("more", tm_mad="ssh", type="system")
