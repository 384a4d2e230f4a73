"""What today's front-end has done to the disks of a VM: the lines, their order, the states, and the documents."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from embedded_fakes import Tree
from lxml import etree

from madrigal.embedded import ActionFailed, DiskRequest, FrontEnd, Observer
from madrigal.embedded.records import VM
from madrigal.embedded.snapshots import Snapshots
from madrigal.errors import InUse, MadrigalError, NotFound, NotSupported, UsageError


class Cloud:
    """Two hosts without a hypervisor and one with; a VM with a cloned and a linked disk, swap and a context disk."""

    def __init__(self, tree: Tree, orphans: str = "FORMAT", system: str = "sys", link: str = "NONE") -> None:
        self.tree = tree
        self.front_end = FrontEnd(
            str(tree.path.parent / "state"), contract="current", tree=str(tree.path), hostname="fe"
        )
        self.vms, self.images = self.front_end.vms, self.front_end.images
        for host in ("host01", "host02"):
            self.front_end.hosts.create(host)
        self.front_end.hosts.create("kvm01", vmm="kvm")
        self.front_end.hosts.create("kvm02", vmm="kvm")
        self.front_end.datastores.update("system", tm_mad=system)
        attrs = {"ALLOW_ORPHANS": orphans, "LN_TARGET": link, "SPARSE": "NO", "QCOW2_STANDALONE": "yes"}
        self.front_end.datastores.create("default", tm_mad="shared", attrs=attrs)
        tree.say("datastore.fs.cp", stdout="/ds/pers qcow2\n")
        self.images.create("pers", "default", path="/srv/a.img", persistent=True)
        tree.say("datastore.fs.cp", stdout="/ds/nonpers raw\n")
        self.images.create("nonpers", "default", path="/srv/b.img")
        disks = [DiskRequest(image="nonpers"), DiskRequest(image="pers"), DiskRequest(type="swap", size=4)]
        self.id = self.vms.create("vm", disks, {"A": "b"}).id
        self.ds = f"{self.front_end.directory}/var//datastores/0/{self.id}"
        self.fe = f"fe:{self.ds}"

    @property
    def vm(self) -> VM:
        return self.vms.get(self.id)

    def deploy(self, host: str = "host01", off: bool = False) -> Cloud:
        self.vms.deploy(self.id, host)
        if off:
            self.vms.poweroff(self.id)
        self.tree.calls()
        return self

    def snapshots(self, disk_id: int = 0) -> Snapshots:
        found = self.vm.disk(disk_id).snapshots
        assert found is not None
        return found

    def scripts(self) -> dict[str, list[str]]:
        """The transfer scripts, without the sequence number's prefix: `0.prolog`."""
        directory = Path(f"{self.front_end.directory}/var/vms/{self.id}")
        found = sorted(directory.glob("transfer.*"))
        return {file.name.removeprefix("transfer."): file.read_text().splitlines() for file in found}

    def document(self) -> etree._Element:
        return etree.fromstring(self.front_end.vm_document(self.vm))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree")


@pytest.fixture
def cloud(tree: Tree) -> Cloud:
    return Cloud(tree)


def test_poweroff_and_start(cloud: Cloud, tree: Tree) -> None:
    cloud.deploy()
    assert cloud.vms.poweroff(cloud.id).status == "poweroff"
    assert tree.lines() == []
    assert cloud.vms.place(cloud.vm) == f"host01:{cloud.ds}"
    for refused in (cloud.vms.poweroff, cloud.vms.stop, cloud.vms.resume):
        with pytest.raises(InUse):
            refused(cloud.id)
    tree.say("tm.sys.context", status=1)
    with pytest.raises(ActionFailed, match="as before"):
        cloud.vms.start(cloud.id)
    assert (cloud.vm.status, cloud.vm.operation) == ("poweroff", None)
    tree.say("tm.sys.context")
    tree.calls()
    assert cloud.vms.start(cloud.id).status == "running"
    context = f"{cloud.front_end.directory}/var/vms/{cloud.id}/context.sh"
    assert tree.lines() == [f"sys/context {context} host01:{cloud.ds}/disk.3 {cloud.id} 0"]
    with pytest.raises(InUse):
        cloud.vms.start(cloud.id)


# (operation on a powered-off VM, its line, its script)
OFF: list[tuple[Callable[[Cloud], object], str, str]] = [
    (lambda c: c.vms.snapshot_create(c.id, 0, "first"), "SNAP_CREATE shared host01:DS/disk.0 0 0 1", "disk_snapshot"),
    (lambda c: c.vms.resize(c.id, 0, 20), "RESIZE shared host01:DS/disk.0 20 0 1", "disk_resize"),
    (lambda c: c.vms.resize(c.id, 2, 5), "RESIZE sys host01:DS/disk.2 5 0 0", "disk_resize"),
    (lambda c: c.vms.disk_saveas(c.id, 0, "copy"), "CPDS shared host01:DS/disk.0 /ds/empty -1 0 1", "disk_saveas"),
    (lambda c: c.vms.detach(c.id, 0), "DELETE shared host01:DS/disk.0 0 1", "epilog_detach"),
    (lambda c: c.vms.detach(c.id, 1), "MVDS shared host01:DS/disk.1 /ds/pers 0 1", "epilog_detach"),
    (
        lambda c: c.vms.attach(c.id, DiskRequest(image="nonpers")),
        "CLONE.sys shared fe:/ds/nonpers host01:DS/disk.4 0 1",
        "prolog_attach",
    ),
]


@pytest.mark.parametrize(("operation", "line", "script"), OFF)
def test_what_is_done_to_a_powered_off_vm_is_a_script(
    cloud: Cloud, operation: Callable[[Cloud], object], line: str, script: str
) -> None:
    cloud.deploy(off=True)
    operation(cloud)
    assert cloud.scripts()[f"0.{script}"] == [line.replace(":DS/", f":{cloud.ds}/")]
    assert cloud.vm.status == "poweroff"


def test_a_snapshot_s_life(cloud: Cloud, tree: Tree) -> None:
    """Ids are not used again, the size comes back with a revert, and drivers see what oned would show."""
    cloud.deploy(off=True)
    for name in ("a", "", "c"):
        cloud.vms.snapshot_create(cloud.id, 1, name)
    cloud.vms.resize(cloud.id, 1, 30)
    cloud.vms.snapshot_revert(cloud.id, 1, "a")
    assert cloud.vm.disk(1).size == 10
    cloud.vms.snapshot_create(cloud.id, 1)
    cloud.vms.snapshot_delete(cloud.id, 1, 2)
    cloud.vms.snapshot_create(cloud.id, 1)
    disk = f"host01:{cloud.ds}/disk.1"
    assert tree.lines() == [
        f"shared/snap_create {disk} 0 0 1",
        f"shared/snap_create {disk} 1 0 1",
        f"shared/snap_create {disk} 2 0 1",
        f"shared/resize {disk} 30 0 1",
        f"shared/snap_revert {disk} 0 0 1",
        f"shared/snap_create {disk} 3 0 1",
        f"shared/snap_delete {disk} 2 0 1",
        f"shared/snap_create {disk} 4 0 1",
    ]
    (shown,) = cloud.document().findall("SNAPSHOTS")
    head = {name: shown.findtext(name) for name in ("DISK_ID", "ALLOW_ORPHANS", "NEXT_SNAPSHOT")}
    assert head == {"DISK_ID": "1", "ALLOW_ORPHANS": "NO", "NEXT_SNAPSHOT": "5"}
    tree_ = [
        tuple(one.findtext(tag) for tag in ("ID", "PARENT", "CHILDREN", "ACTIVE", "NAME", "SIZE"))
        for one in shown.findall("SNAPSHOT")
    ]
    assert tree_ == [
        ("0", "-1", "1,3", None, "a", "10"),
        ("1", "0", None, None, None, "10"),
        ("3", "0", "4", None, None, "10"),
        ("4", "3", None, "YES", None, "10"),
    ]


def test_raw_snapshots_know_nothing_of_one_another(cloud: Cloud) -> None:
    cloud.deploy(off=True)
    for _ in range(3):
        cloud.vms.snapshot_create(cloud.id, 0)
    for ident in (2, 0, 1):
        cloud.vms.snapshot_delete(cloud.id, 0, ident)
    assert (cloud.snapshots().orphans, cloud.snapshots().all, cloud.snapshots().next) == ("YES", [], 3)
    cloud.vms.snapshot_create(cloud.id, 0)
    assert [one.id for one in cloud.snapshots().all] == [3]


def test_what_a_front_end_does_not_let_go(cloud: Cloud, tree: Tree) -> None:
    """The rules of oned for ALLOW_ORPHANS=NO; --force reaches the driver."""
    cloud.deploy(off=True)
    for _ in range(2):
        cloud.vms.snapshot_create(cloud.id, 1)
    cloud.vms.snapshot_revert(cloud.id, 1, 0)
    cloud.vms.snapshot_create(cloud.id, 1)  # 0 has the children 1 and 2, 2 is active
    tree.calls()
    with pytest.raises(InUse, match="snapshot 0 of a persistent disk"):
        cloud.vms.snapshot_delete(cloud.id, 1, 0)
    assert tree.lines() == []
    cloud.vms.snapshot_delete(cloud.id, 1, 0, force=True)
    assert tree.lines() == [f"shared/snap_delete host01:{cloud.ds}/disk.1 0 0 1"]
    with pytest.raises(NotFound, match="there are: 1, 2"):
        cloud.vms.snapshot_delete(cloud.id, 1, 0)
    with pytest.raises(NotFound):
        cloud.vms.snapshot_revert(cloud.id, 1, "nothing")


@pytest.mark.parametrize(
    ("steps", "ident", "error"),
    [
        ("c c r0 c", 0, "more than one child"),
        ("c c r0", 0, "active one and has a child"),
        ("c c c r1 c", 0, "has children"),
        ("c c c r1", 0, "has children"),
        ("c c r0 c c", 2, "parent of snapshot 2, 0, has other children"),
        ("c c c", 1, ""),
        ("c c c", 0, ""),
        ("c c", 1, ""),
        ("c c r0", 1, ""),
    ],
)
def test_chains(steps: str, ident: int, error: str) -> None:
    snapshots = Snapshots.of("FORMAT", "qcow2")
    for step in steps.split():
        if step == "c":
            snapshots.activate(snapshots.add("", 1).id, revert=False)
        else:
            snapshots.activate(int(step[1:]), revert=True)
    if error:
        with pytest.raises(InUse, match=error):
            snapshots.check_deletable(ident, persistent=False)
    else:
        snapshots.check_deletable(ident, persistent=False)
        snapshots.remove(ident)
        assert all(ident not in one.children for one in snapshots.all)


def test_mixed_snapshots_are_children_of_the_last_revert() -> None:
    snapshots = Snapshots.of("mixed", "raw")
    for _ in range(2):
        snapshots.activate(snapshots.add("", 1).id, revert=False)
    assert [(one.parent, snapshots.active) for one in snapshots.all] == [(-1, -1)] * 2
    snapshots.activate(0, revert=True)
    assert snapshots.add("", 1).parent == 0
    with pytest.raises(InUse, match="active"):
        snapshots.check_deletable(0, persistent=False)
    snapshots.check_deletable(1, persistent=False)


def test_no_snapshots_of(cloud: Cloud, tree: Tree) -> None:
    cloud.images.create("iso", "default", path="/srv/c.iso", type="cdrom")
    cloud.deploy()
    cloud.vms.attach(cloud.id, DiskRequest(image="iso"))
    tree.calls()
    for disk_id, error in ((2, "volatile"), (4, "read-only"), (9, "no disk 9")):
        with pytest.raises(UsageError, match=error):
            cloud.vms.snapshot_create(cloud.id, disk_id)
    with pytest.raises(UsageError, match="read as an id"):
        cloud.vms.snapshot_create(cloud.id, 0, "7")
    assert tree.lines() == []


@pytest.mark.parametrize(
    ("operation", "failing"),
    [
        (lambda c: c.vms.snapshot_create(c.id, 0), "snap_create"),
        (lambda c: c.vms.snapshot_revert(c.id, 0, 0), "snap_revert"),
        (lambda c: c.vms.snapshot_delete(c.id, 0, 0), "snap_delete"),
        (lambda c: c.vms.resize(c.id, 0, 20), "resize"),
    ],
)
def test_a_failure_leaves_the_vm_as_it_was(
    cloud: Cloud, tree: Tree, operation: Callable[[Cloud], object], failing: str
) -> None:
    cloud.deploy(off=True)
    for _ in range(2):
        cloud.vms.snapshot_create(cloud.id, 0)
    before = (cloud.vm.disks, cloud.vm.status, cloud.vm.operation)
    tree.say(f"tm.shared.{failing}", status=1, stderr="no\n")
    with pytest.raises(ActionFailed, match="no; VM 0 is as before"):
        operation(cloud)
    after = cloud.vm
    if failing == "snap_create":
        assert cloud.snapshots().next == 3  # an id is lost
        after.disk(0).snapshots.next = 2  # type: ignore[union-attr]
    assert (after.disks, after.status, after.operation) == before


def test_resize_is_only_upwards(cloud: Cloud) -> None:
    cloud.deploy()
    for size in (9, 10):
        with pytest.raises(UsageError, match="must be more"):
            cloud.vms.resize(cloud.id, 0, size)


def test_undeploy(cloud: Cloud, tree: Tree) -> None:
    cloud.deploy(off=True)
    cloud.vms.undeploy(cloud.id)
    assert (cloud.vm.status, cloud.vms.place(cloud.vm)) == ("undeployed", cloud.fe)
    assert [line.split()[0] for line in tree.lines()] == ["shared/mv", "shared/mv", "sys/mv", "sys/mv"]
    assert cloud.scripts()["0.stop"][-1] == f"MV sys host01:{cloud.ds} {cloud.fe} 0 0"
    cloud.vms.resize(cloud.id, 0, 20)
    cloud.vms.disk_saveas(cloud.id, 0, "copy")
    with pytest.raises(InUse, match="undeployed"):
        cloud.vms.snapshot_create(cloud.id, 0)
    assert tree.lines() == [
        f"shared/resize {cloud.fe}/disk.0 20 0 1",
        f"shared/cpds {cloud.fe}/disk.0 /ds/empty -1 0 1",
    ]
    cloud.vms.resume(cloud.id, "host02")
    assert cloud.vm.status == "running"
    assert cloud.scripts()["1.resume"][-1] == f"MV sys {cloud.fe} host02:{cloud.ds} 0 0"
    assert tree.lines()[-1].split()[0] == "sys/context"
    cloud.vms.undeploy(cloud.id)
    tree.calls()
    cloud.vms.terminate(cloud.id)
    assert tree.lines()[1] == f"shared/mvds {cloud.fe}/disk.1 /ds/pers 0 1"


def test_migration_of_a_powered_off_vm_boots_nothing(cloud: Cloud, tree: Tree) -> None:
    cloud.deploy(off=True)
    cloud.vms.migrate(cloud.id, "host02")
    assert [line.split()[0] for line in tree.lines()] == ["shared/mv", "shared/mv", "sys/mv", "sys/mv"]
    assert cloud.vm.status == "poweroff"
    tree.say("tm.sys.mv", status=1)
    with pytest.raises(ActionFailed):
        cloud.vms.migrate(cloud.id, "host01")
    assert cloud.vm.status == "prolog_migrate_poweroff_failure"
    tree.say("tm.sys.mv")
    assert cloud.vms.recover(cloud.id).status == "poweroff"


def test_migration_to_another_system_datastore(cloud: Cloud, tree: Tree) -> None:
    create = cloud.front_end.datastores.create
    create("fast", "sys", "system", attrs={"DS_MIGRATE": "YES", "DS_MIGRATE_SNAP": "NO"})
    create("slow", "sys", "system", attrs={"DS_MIGRATE": "NO"})
    create("other", "ssh", "system")
    cloud.deploy(off=True)
    for name, kind, error in (("other", UsageError, "driver ssh"), ("slow", NotSupported, "DS_MIGRATE")):
        with pytest.raises(kind, match=error):
            cloud.vms.migrate(cloud.id, "host01", system_datastore=name)
    cloud.vms.migrate(cloud.id, "host01", system_datastore="fast")
    new = cloud.ds.replace("/0/", "/2/")
    assert tree.lines() == [
        f"shared/mv host01:{cloud.ds}/disk.0 host01:{new}/disk.0 0 1",
        f"shared/mv host01:{cloud.ds}/disk.1 host01:{new}/disk.1 0 1",
        f"sys/mv host01:{cloud.ds}/disk.2 host01:{new}/disk.2 0 2",
        f"sys/mv host01:{cloud.ds} host01:{new} 0 2",
    ]
    stays = cloud.document().findall("HISTORY_RECORDS/HISTORY")
    assert [stay.findtext("DS_ID") for stay in stays] == ["0", "2"]
    assert cloud.vms.place(cloud.vm) == f"host01:{new}"
    with pytest.raises(UsageError, match="already"):
        cloud.vms.migrate(cloud.id, "host01", system_datastore="fast")
    cloud.vms.snapshot_create(cloud.id, 0)
    create("fast2", "sys", "system", attrs={"DS_MIGRATE": "YES", "DS_MIGRATE_SNAP": "NO"})
    with pytest.raises(NotSupported, match="DS_MIGRATE_SNAP"):
        cloud.vms.migrate(cloud.id, "host01", system_datastore="fast2")


@pytest.fixture
def hypervisor(tmp_path: Path) -> Path:
    """A program that only writes down how it was called."""
    program = tmp_path / "hypervisor"
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/moved\ngrep -q "<VM>" || exit 3\nexit $(cat {tmp_path}/status)\n'
    )
    program.chmod(0o755)
    (tmp_path / "status").write_text("0")
    return program


def test_live_migration(cloud: Cloud, tree: Tree, hypervisor: Path) -> None:
    """Only the driver of the system datastore is called; the document on stdin has the new host and the drivers."""
    cloud.deploy("kvm01")
    cloud.vms.migrate(cloud.id, "kvm02", live=True, hypervisor=str(hypervisor))
    assert (hypervisor.parent / "moved").read_text() == f"migrate kvm01 kvm02 {cloud.ds} 0\n"
    pre, post = (call for call in tree.calls() if call["kind"] == "tm")
    for call, action in ((pre, "premigrate"), (post, "postmigrate")):
        assert (call["mad"], call["action"]) == ("sys", action)
        assert call["argv"] == ["kvm01", "kvm02", cloud.ds, "0", "0"]
        document = etree.fromstring(base64.b64decode(call["stdin"], validate=True))
        assert document.findtext("LCM_STATE") == "4"
        assert [disk.findtext("TM_MAD") for disk in document.findall("TEMPLATE/DISK")] == ["shared", "shared", "sys"]
        assert document.findtext("HISTORY_RECORDS/HISTORY[last()]/HOSTNAME") == "kvm02"
        assert document.findtext("HISTORY_RECORDS/HISTORY[last()]/ACTION") == "2"
    assert (cloud.vm.status, cloud.vms.place(cloud.vm)) == ("running", f"kvm02:{cloud.ds}")


@pytest.mark.parametrize("failing", ["premigrate", "hypervisor"])
def test_a_live_migration_that_fails(cloud: Cloud, tree: Tree, hypervisor: Path, failing: str) -> None:
    cloud.deploy("kvm01")
    if failing == "hypervisor":
        (hypervisor.parent / "status").write_text("5")
    else:
        tree.say("tm.sys.premigrate", status=1, stderr="no\n")
    with pytest.raises(ActionFailed, match="VM 0 is as before"):
        cloud.vms.migrate(cloud.id, "kvm02", live=True, hypervisor=str(hypervisor))
    assert [call["action"] for call in tree.calls()] == ["premigrate", "failmigrate"]
    assert (cloud.vm.status, cloud.vms.place(cloud.vm)) == ("running", f"kvm01:{cloud.ds}")
    assert (len(cloud.vm.history), cloud.vm.history[-1].etime) == (1, 0)


def test_a_failed_postmigrate_is_only_reported(cloud: Cloud, tree: Tree) -> None:
    warnings: list[str] = []

    class Listening(Observer):
        def warn(self, text: str) -> None:
            warnings.append(text)

    cloud.front_end.observer = Listening()
    cloud.deploy("kvm01")
    tree.say("tm.sys.postmigrate", status=1, stderr="cannot clean up\n")
    cloud.vms.migrate(cloud.id, "kvm02", live=True)
    assert (cloud.vm.status, cloud.vm.history[-1].host) == ("running", "kvm02")
    assert ["cannot clean up" in warning for warning in warnings] == [True]


def test_live_migration_without_shared_storage_needs_a_hypervisor(tree: Tree) -> None:
    cloud = Cloud(tree, system="ssh").deploy("kvm01")
    with pytest.raises(UsageError, match="--hypervisor"):
        cloud.vms.migrate(cloud.id, "kvm02", live=True)
    assert tree.lines() == []


def test_a_live_migration_that_was_cut_off_counts_as_failed(cloud: Cloud, tree: Tree) -> None:
    """Nothing is prepared again at a place where the VM may run by now."""
    cloud.deploy("kvm01")
    tree.say("tm.sys.premigrate", run="import signal; os.kill(os.getppid(), signal.SIGKILL); time.sleep(0.2)")
    if (pid := os.fork()) == 0:
        cloud.vms.migrate(cloud.id, "kvm02", live=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert cloud.vm.status == "migrate"
    tree.calls()
    assert cloud.vms.recover(cloud.id).status == "running"
    assert tree.lines() == [f"sys/failmigrate kvm01 kvm02 {cloud.ds} 0 0"]
    assert cloud.vms.place(cloud.vm) == f"kvm01:{cloud.ds}"


# With a hypervisor: (operation, line, LCM_STATE)
LIVE: list[tuple[Callable[[Cloud], object], str, str]] = [
    (lambda c: c.vms.snapshot_create(c.id, 0), "shared/snap_create_live kvm01:DS/disk.0 1 0 1", "57"),
    (lambda c: c.vms.snapshot_delete(c.id, 0, 0), "shared/snap_delete kvm01:DS/disk.0 0 0 1", "59"),
    (lambda c: c.vms.resize(c.id, 0, 20), "shared/resize kvm01:DS/disk.0 20 0 1", "62"),
    (lambda c: c.vms.disk_saveas(c.id, 0, "copy", 0), "shared/cpds kvm01:DS/disk.0 /ds/empty 0 0 1", "26"),
]
ASK = """
import xmlrpc.client, re
auth = open(os.environ["ONE_AUTH"]).read().strip()
answer = xmlrpc.client.ServerProxy(os.environ["ONE_XMLRPC"]).one.vm.info(auth, 0)
open(tree + "/asked", "w").write(answer[1])
"""


@pytest.mark.parametrize(("operation", "line", "state"), LIVE)
def test_a_vm_that_a_hypervisor_runs(
    cloud: Cloud, tree: Tree, operation: Callable[[Cloud], object], line: str, state: str
) -> None:
    cloud.vms.deploy(cloud.id, "kvm01", deploy_id="the-domain")
    cloud.vms.snapshot_create(cloud.id, 0)
    tree.calls()
    for action in ("snap_create_live", "snap_delete", "resize", "cpds"):
        tree.say(f"tm.shared.{action}", run=ASK)
    operation(cloud)
    assert tree.lines() == [line.replace(":DS/", f":{cloud.ds}/")]
    document = etree.fromstring((tree.path / "asked").read_bytes())
    assert (document.findtext("LCM_STATE"), document.findtext("DEPLOY_ID")) == (state, "the-domain")
    assert document.findtext("HISTORY_RECORDS/HISTORY/VM_MAD") == "kvm"
    assert cloud.vm.status == "running"
    with pytest.raises(InUse, match="power it off"):
        cloud.vms.snapshot_revert(cloud.id, 0, 0)


def test_a_running_vm_of_a_driver_without_live_snapshots(tree: Tree) -> None:
    cloud = Cloud(tree)
    cloud.front_end.datastores.create("blocks", tm_mad="sys")
    cloud.images.create("block", "blocks", path="/srv/c.img")
    cloud.deploy("kvm01")
    cloud.vms.attach(cloud.id, DiskRequest(image="block"))
    tree.calls()
    with pytest.raises(NotSupported, match="kvm and sys"):
        cloud.vms.snapshot_create(cloud.id, 4)
    assert (tree.lines(), cloud.vm.status) == ([], "running")


def test_a_deployed_vm_without_hypervisor_is_as_good_as_powered_off(cloud: Cloud, tree: Tree) -> None:
    cloud.deploy("host01")
    cloud.vms.snapshot_create(cloud.id, 0)
    cloud.vms.snapshot_revert(cloud.id, 0, 0)
    assert [line.split()[0] for line in tree.lines()] == ["shared/snap_create", "shared/snap_revert"]
    assert cloud.vm.status == "running"


def test_suffixes_where_the_system_datastore_has_another_driver(tree: Tree) -> None:
    """`.ssh` where it exists; the action itself where it does not; attached disks carry it even if both are equal."""
    for action in ("snap_create", "resize", "cpds"):
        tree.add("tm/shared", f"{action}.ssh")
    tree.add("tm/shared", "snap_create_live.ssh")
    cloud = Cloud(tree, system="ssh")
    cloud.front_end.datastores.create("plain", tm_mad="ssh")
    cloud.images.create("own", "plain", path="/srv/c.img")
    cloud.deploy("kvm01")
    cloud.vms.snapshot_create(cloud.id, 0)
    cloud.vms.poweroff(cloud.id)
    cloud.vms.snapshot_create(cloud.id, 0)
    cloud.vms.snapshot_delete(cloud.id, 0, 0)
    cloud.vms.resize(cloud.id, 0, 20)
    cloud.vms.disk_saveas(cloud.id, 0, "copy")
    cloud.vms.attach(cloud.id, DiskRequest(image="own"))
    cloud.vms.snapshot_create(cloud.id, 4)
    assert [line.split()[0] for line in tree.lines()] == [
        *("shared/snap_create_live.ssh", "shared/snap_create.ssh", "shared/snap_delete", "shared/resize.ssh"),
        *("shared/cpds.ssh", "ssh/clone", "ssh/snap_create"),
    ]
    assert cloud.scripts()["0.disk_snapshot"][0].startswith("SNAP_CREATE.ssh ssh ")
    assert cloud.scripts()["0.prolog_attach"][0].startswith("CLONE.ssh ssh ")


def test_disks_inherit_from_their_datastore(cloud: Cloud) -> None:
    cloud.deploy()
    disk = cloud.document().find("TEMPLATE/DISK[DISK_ID='1']")
    assert disk is not None
    values = {name: disk.findtext(name) for name in ("SPARSE", "QCOW2_STANDALONE", "ALLOW_ORPHANS", "SAVE", "TARGET")}
    assert values == {
        "SPARSE": "NO",
        "QCOW2_STANDALONE": "yes",
        "ALLOW_ORPHANS": "FORMAT",
        "SAVE": "YES",
        "TARGET": "vdb",
    }


# Images


def saved(tree: Tree, link: str = "SYSTEM") -> Cloud:
    """Its persistent image has the snapshots 0, 1 and 2, of which 0 was reverted to, and 3 came after."""
    cloud = Cloud(tree, orphans="YES", link=link).deploy(off=True)
    for size in (11, 12, 13):
        cloud.vms.snapshot_create(cloud.id, 1)
        cloud.vms.resize(cloud.id, 1, size)
    cloud.vms.snapshot_revert(cloud.id, 1, 0)
    cloud.vms.terminate(cloud.id)
    tree.calls()
    return cloud


def test_a_persistent_disk_leaves_its_snapshots_in_the_image(tree: Tree) -> None:
    cloud = saved(tree)
    image = cloud.images.get("pers")
    assert image.snapshots is not None
    assert (image.size, [one.id for one in image.snapshots.all], image.snapshots.active) == (10, [0, 1, 2], 0)
    cloud.id = cloud.vms.create("next", [DiskRequest(image="pers")]).id
    cloud.vms.deploy(cloud.id, "host01")
    assert cloud.snapshots(0).next == 3
    cloud.vms.snapshot_create(cloud.id, 0)
    assert [one.id for one in cloud.snapshots(0).all] == [0, 1, 2, 3]
    with pytest.raises(InUse, match="uses image"):
        cloud.images.snapshot_delete("pers", 0)
    cloud.vms.delete(cloud.id)
    kept = cloud.images.get("pers").snapshots
    assert kept and [one.id for one in kept.all] == [0, 1, 2]  # what the VM had on its host is gone with it


def test_where_the_disk_is_the_image_its_snapshots_are_too(tree: Tree) -> None:
    cloud = Cloud(tree).deploy(off=True)
    cloud.vms.snapshot_create(cloud.id, 1)
    cloud.vms.delete(cloud.id)
    kept = cloud.images.get("pers").snapshots
    assert kept and [one.id for one in kept.all] == [0]


def test_snapshots_of_an_image(tree: Tree) -> None:
    cloud = saved(tree)
    with pytest.raises(InUse, match="active one already"):
        cloud.images.snapshot_revert("pers", 0)
    with pytest.raises(NotFound):
        cloud.images.snapshot_delete("pers", 7)
    reverted = cloud.images.snapshot_revert("pers", 2)
    assert (reverted.size, reverted.state) == (12, "READY")
    cloud.images.snapshot_delete("pers", 1)
    tree.say("datastore.fs.snap_flatten", status=1, stderr="no space\n")
    with pytest.raises(ActionFailed, match="no space"):
        cloud.images.snapshot_flatten("pers", 0)
    failed = cloud.images.get("pers")
    assert failed.snapshots and (failed.state, failed.error) == ("READY", "no space")
    tree.say("datastore.fs.snap_flatten")
    flat = cloud.images.snapshot_flatten("pers", 0)
    assert (flat.size, flat.snapshots, flat.error) == (10, None, "")
    calls = [call for call in tree.calls() if call["action"] != "monitor"]
    assert [(call["action"], call["argv"]) for call in calls] == [
        (action, ["0"]) for action in ("snap_revert", "snap_delete", "snap_flatten", "snap_flatten")
    ]
    dumps = [etree.fromstring(base64.b64decode(call["stdin"])) for call in calls]
    assert [dump.findtext("IMAGE/TARGET_SNAPSHOT") for dump in dumps] == ["2", "1", "0", "0"]
    assert {dump.findtext("IMAGE/STATE") for dump in dumps} == {"4"}
    listed = dumps[0].findall("IMAGE/SNAPSHOTS/SNAPSHOT")
    assert [(one.findtext("ID"), one.findtext("SIZE"), one.findtext("ACTIVE")) for one in listed] == [
        ("0", "10", "YES"),
        ("1", "11", None),
        ("2", "12", None),
    ]


def test_clone_of_an_image(cloud: Cloud, tree: Tree) -> None:
    copy = cloud.images.clone("nonpers", "copy")
    assert (copy.source, copy.format, copy.size, copy.state) == ("/ds/clone", "raw", 10, "READY")
    call = next(call for call in tree.calls() if call["action"] == "clone")
    dump = etree.fromstring(base64.b64decode(call["stdin"]))
    found = {name: dump.findtext(f"IMAGE/{name}") for name in ("PATH", "CLONING_ID", "FORMAT", "SOURCE")}
    assert found == {"PATH": "/ds/nonpers", "CLONING_ID": "1", "FORMAT": "raw", "SOURCE": ""}
    tree.say("datastore.fs.clone", stdout="/ds/other qcow2\n")
    assert cloud.images.clone("nonpers", "other").format == "qcow2"
    tree.say("datastore.fs.clone", status=1, stderr="no\n")
    with pytest.raises(MadrigalError, match="Error cloning from Image 1: no"):
        cloud.images.clone("nonpers", "third")
