"""The order and the exact arguments of what the embedded front-end runs, for both contract forms.

The 3.4 expectations are the events of its storage document, line by line; today's were
recorded under a running front-end.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from embedded_fakes import Tree

from madrigal.embedded import ActionFailed, DiskRequest, FrontEnd
from madrigal.errors import InUse, MadrigalError, NotFound, NotSupported, UsageError


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree")


def open_(tree: Tree, contract: str, tm_mad: str = "shared", system: str = "sys", datastores: str = "") -> FrontEnd:
    """Two hosts, one datastore, a persistent and a non-persistent image."""
    state = str(tree.path.parent / "state")
    front_end = FrontEnd(state, contract=contract, tree=str(tree.path), hostname="fe", datastores=datastores)
    for host in ("host01", "host02"):
        front_end.hosts.create(host)
    front_end.datastores.update("system", tm_mad=system)
    front_end.datastores.create("default", tm_mad=tm_mad)
    tree.say("datastore.fs.cp", stdout="/ds/pers 10\n" if contract == "3.4" else "/ds/pers raw\n")
    front_end.images.create("pers", "default", path="/srv/a.img", persistent=True)
    tree.say("datastore.fs.cp", stdout="/ds/nonpers 10\n" if contract == "3.4" else "/ds/nonpers qcow2\n")
    front_end.images.create("nonpers", "default", path="/srv/b.img")
    tree.say("datastore.fs.cp")
    tree.calls()
    return front_end


def script(front_end: FrontEnd, name: str) -> list[str]:
    return Path(f"{front_end.directory}/var/{name}").read_text().splitlines()


# The 3.4 document: CREATE, STOP, RESUME, MIGRATE, SHUTDOWN of its example VM


@pytest.fixture
def old(tree: Tree) -> FrontEnd:
    return open_(tree, "3.4", datastores="/srv/hosts")


def test_3_4_document(tree: Tree, old: FrontEnd) -> None:
    ds, fe = "/srv/hosts/0/0", f"{old.directory}/var/datastores/0/0"
    vm = old.vms.create("vm01", [DiskRequest(image="nonpers"), DiskRequest(image="pers")])
    assert tree.lines() == []
    old.vms.deploy(vm.id, "host01")
    assert tree.lines() == [
        f"shared/clone fe:/ds/nonpers host01:{ds}/disk.0",
        f"shared/ln fe:/ds/pers host01:{ds}/disk.1",
    ]
    old.vms.stop(vm.id)
    assert tree.lines() == [
        f"shared/mv host01:{ds}/disk.0 fe:{fe}/disk.0",
        f"shared/mv host01:{ds}/disk.1 fe:{fe}/disk.1",
        f"sys/mv host01:{ds} fe:{fe}",
    ]
    old.vms.resume(vm.id, "host01")
    assert tree.lines() == [
        f"shared/mv fe:{fe}/disk.0 host01:{ds}/disk.0",
        f"shared/mv fe:{fe}/disk.1 host01:{ds}/disk.1",
        f"sys/mv fe:{fe} host01:{ds}",
    ]
    old.vms.migrate(vm.id, "host02")
    assert tree.lines() == [
        f"shared/mv host01:{ds}/disk.0 host02:{ds}/disk.0",
        f"shared/mv host01:{ds}/disk.1 host02:{ds}/disk.1",
        f"sys/mv host01:{ds} host02:{ds}",
    ]
    old.vms.shutdown(vm.id)
    assert tree.lines() == [
        f"shared/delete host02:{ds}/disk.0",
        f"shared/mvds host02:{ds}/disk.1 /ds/pers",
        f"sys/delete host02:{ds}",
    ]
    assert old.vms.get(vm.id).status == "done"
    assert script(old, "0/transfer.0.prolog") == [
        f"CLONE shared fe:/ds/nonpers host01:{ds}/disk.0",
        f"LN shared fe:/ds/pers host01:{ds}/disk.1",
    ]
    assert script(old, "0/transfer.2.migrate")[2] == f"MV sys host01:{ds} host02:{ds}"
    steps = sorted(path.name for path in Path(f"{old.directory}/var/0").glob("transfer.*"))
    assert steps == [
        "transfer.0.prolog",
        "transfer.0.stop",
        "transfer.1.resume",
        "transfer.2.epilog",
        "transfer.2.migrate",
    ]


def test_3_4_volatile_context_and_size(tree: Tree, old: FrontEnd, tmp_path: Path) -> None:
    ds, var = "/srv/hosts/0/0", f"{old.directory}/var"
    file = tmp_path / "init.sh"
    file.write_text("#!/bin/sh\n")
    disks = [
        DiskRequest(image="nonpers", size=20),
        DiskRequest(type="swap", size=64),
        DiskRequest(type="fs", fs="ext4", format="raw", size=32),
        DiskRequest(type="fs", size=8),
    ]
    vm = old.vms.create("vm", disks, {"HOSTNAME": "a'b", "ROOT": "x y"}, [str(file)])
    old.vms.deploy(vm.id, "host01")
    assert tree.lines() == [
        f"shared/clone fe:/ds/nonpers host01:{ds}/disk.0 20",
        f"sys/mkswap 64 host01:{ds}/disk.1",
        f"sys/mkimage 32 ext4 host01:{ds}/disk.2",
        f"sys/mkimage 8 raw host01:{ds}/disk.3",
        f"sys/context {var}/0/context.sh {file} host01:{ds}/disk.4",
    ]
    assert Path(f"{var}/0/context.sh").read_text().splitlines()[1:] == ['HOSTNAME="a\'b"', 'ROOT="x y"']
    # 3.4's volatile disks have no driver of their own after they are made.
    old.vms.migrate(vm.id, "host02")
    assert tree.lines() == [
        f"shared/mv host01:{ds}/disk.0 host02:{ds}/disk.0",
        f"sys/mv host01:{ds} host02:{ds}",
    ]
    old.vms.shutdown(vm.id)
    assert tree.lines() == [f"shared/delete host02:{ds}/disk.0", f"sys/delete host02:{ds}"]


def test_3_4_save_as(tree: Tree, old: FrontEnd) -> None:
    tree.say("datastore.fs.mkfs", stdout="/ds/saved 10\n")
    vm = old.vms.create("vm", [DiskRequest(image="nonpers", save_as="copy")])
    (call,) = tree.calls()
    assert (call["action"], call["argv"][1]) == ("mkfs", "2")
    assert old.images.get("copy").state == "LOCKED"
    with pytest.raises(InUse):
        old.images.delete("copy")
    with pytest.raises(InUse, match="LOCKED"):
        old.vms.create("other", [DiskRequest(image="copy")])
    old.vms.deploy(vm.id, "host01")
    old.vms.shutdown(vm.id)
    assert tree.lines()[1:] == [
        "shared/mvds host01:/srv/hosts/0/0/disk.0 /ds/saved",
        "sys/delete host01:/srv/hosts/0/0",
    ]
    assert (old.images.get("copy").state, old.images.get("copy").source) == ("READY", "/ds/saved")


def test_3_4_save_as_of_a_deleted_vm(tree: Tree, old: FrontEnd) -> None:
    vm = old.vms.create("vm", [DiskRequest(image="nonpers", save_as="copy")])
    old.vms.deploy(vm.id, "host01")
    old.vms.delete(vm.id)
    assert old.images.get("copy").state == "ERROR"
    tree.say("datastore.fs.mkfs", status=1)
    with pytest.raises(ActionFailed):
        old.vms.create("other", [DiskRequest(image="nonpers", save_as="copy2")])
    assert old.images.get("copy2").state == "ERROR"
    with pytest.raises(NotFound):
        old.vms.get("other")
    assert old.images.users(old.images.get("nonpers")) == []


def test_3_4_hosts_with_paths_of_their_own(tree: Tree, old: FrontEnd) -> None:
    old.hosts.create("host03", "/elsewhere")
    vm = old.vms.create("vm", [DiskRequest(image="nonpers")])
    old.vms.deploy(vm.id, "host03")
    old.vms.migrate(vm.id, "host01")
    assert tree.lines()[1:] == [
        "shared/mv host03:/elsewhere/0/0/disk.0 host01:/srv/hosts/0/0/disk.0",
        "sys/mv host03:/elsewhere/0/0 host01:/srv/hosts/0/0",
    ]
    assert Path(f"{old.directory}/var/config").read_text() == "DATASTORE_LOCATION=/srv/hosts\n"


@pytest.mark.parametrize("operation", ["terminate", "attach", "detach", "disk_saveas"])
def test_3_4_has_no(old: FrontEnd, operation: str) -> None:
    vm = old.vms.create("vm", [])
    arguments: dict[str, list[object]] = {
        "attach": [DiskRequest(type="swap", size=1)],
        "detach": [0],
        "disk_saveas": [0, "copy"],
    }
    with pytest.raises(NotSupported, match=r"3\.4"):
        getattr(old.vms, operation)(vm.id, *arguments.get(operation, []))


def test_3_4_delete(tree: Tree, old: FrontEnd) -> None:
    ds = "/srv/hosts/0/0"
    vm = old.vms.create("vm", [DiskRequest(image="pers"), DiskRequest(type="swap", size=1)])
    old.vms.deploy(vm.id, "host01")
    tree.calls()
    old.vms.delete(vm.id)
    assert tree.lines() == [f"shared/delete host01:{ds}/disk.0", f"sys/delete host01:{ds}"]
    assert script(old, "0/transfer.0.delete")[1] == f"DELETE sys host01:{ds}"
    assert old.images.users(old.images.get("pers")) == []


def test_a_source_with_a_colon_goes_without_front_end(tree: Tree, old: FrontEnd) -> None:
    iqn = "iqn.2012-02.org.opennebula:san.vg-one.lv-one-7"
    tree.say("datastore.fs.cp", stdout=f"{iqn} 10\n")
    old.images.create("iscsi", "default", path="/srv/c.img", persistent=True)
    vm = old.vms.create("vm", [DiskRequest(image="iscsi")])
    old.vms.deploy(vm.id, "host01")
    old.vms.shutdown(vm.id)
    assert tree.lines()[0] == f"shared/ln {iqn} host01:/srv/hosts/0/0/disk.0"


# Today's form


@pytest.fixture
def now(tree: Tree) -> FrontEnd:
    return open_(tree, "current")


def test_now_whole_life(tree: Tree, now: FrontEnd, tmp_path: Path) -> None:
    ds, fe = f"{now.directory}/var//datastores/0/0", f"fe:{now.directory}/var//datastores/0/0"
    context = f"{now.directory}/var/vms/0/context.sh"
    disks = [
        DiskRequest(image="nonpers"),
        DiskRequest(image="pers"),
        DiskRequest(type="swap", size=64),
        DiskRequest(type="fs", fs="ext4", format="raw", size=32),
    ]
    vm = now.vms.create("vm01", disks, {"A": "it's"})
    now.vms.deploy(vm.id, "host01")
    iso = f"sys/context {context} host01:{ds}/disk.4 0 0"
    assert tree.lines() == [
        f"shared/clone fe:/ds/nonpers host01:{ds}/disk.0 0 1",
        f"shared/ln fe:/ds/pers host01:{ds}/disk.1 0 1",
        f"sys/mkswap 64 host01:{ds}/disk.2 0 0",
        f"sys/mkimage 32 raw host01:{ds}/disk.3 0 0",
        iso,
    ]
    assert Path(context).read_text().splitlines()[1:] == ["A='it'\\''s'"]
    now.vms.stop(vm.id)
    assert tree.lines() == [
        f"shared/mv host01:{ds}/disk.0 {fe}/disk.0 0 1",
        f"shared/mv host01:{ds}/disk.1 {fe}/disk.1 0 1",
        f"sys/mv host01:{ds}/disk.2 {fe}/disk.2 0 0",
        f"sys/mv host01:{ds}/disk.3 {fe}/disk.3 0 0",
        f"sys/mv host01:{ds} {fe} 0 0",
    ]
    now.vms.resume(vm.id)
    assert tree.lines() == [
        f"shared/mv {fe}/disk.0 host01:{ds}/disk.0 0 1",
        f"shared/mv {fe}/disk.1 host01:{ds}/disk.1 0 1",
        f"sys/mv {fe}/disk.2 host01:{ds}/disk.2 0 0",
        f"sys/mv {fe}/disk.3 host01:{ds}/disk.3 0 0",
        f"sys/mv {fe} host01:{ds} 0 0",
        iso,
    ]
    now.vms.migrate(vm.id, "host02")
    assert tree.lines() == [
        f"shared/mv host01:{ds}/disk.0 host02:{ds}/disk.0 0 1",
        f"shared/mv host01:{ds}/disk.1 host02:{ds}/disk.1 0 1",
        f"sys/mv host01:{ds}/disk.2 host02:{ds}/disk.2 0 0",
        f"sys/mv host01:{ds}/disk.3 host02:{ds}/disk.3 0 0",
        f"sys/mv host01:{ds} host02:{ds} 0 0",
        iso.replace("host01", "host02"),
    ]
    now.vms.shutdown(vm.id)
    assert tree.lines() == [
        f"shared/delete host02:{ds}/disk.0 0 1",
        f"shared/mvds host02:{ds}/disk.1 /ds/pers 0 1",
        f"sys/delete host02:{ds}/disk.2 0 0",
        f"sys/delete host02:{ds}/disk.3 0 0",
        f"sys/delete host02:{ds} 0 0",
    ]
    # CONTEXT is run around the boot: it is in no transfer script.
    assert not any("CONTEXT" in file.read_text() for file in Path(f"{now.directory}/var/vms/0").glob("transfer.*"))
    assert script(now, "vms/0/transfer.2.epilog")[-1] == f"DELETE sys host02:{ds} 0 0"


def test_now_attach_detach(tree: Tree, now: FrontEnd) -> None:
    ds = f"{now.directory}/var//datastores/0/0"
    vm = now.vms.create("vm", [DiskRequest(image="nonpers")], {"A": "b"})
    now.vms.deploy(vm.id, "host01")
    tree.calls()
    now.vms.attach(vm.id, DiskRequest(image="pers"))
    # Disks that come later are marked with the system driver; there is no shared/ln.sys, so shared/ln is run.
    assert tree.lines() == [f"shared/ln fe:/ds/pers host01:{ds}/disk.2 0 1"]
    assert now.vms.get(vm.id).disk(2).tm_mad_system == "sys"
    now.vms.attach(vm.id, DiskRequest(type="swap", size=5))
    assert tree.lines() == [f"sys/mkswap 5 host01:{ds}/disk.3 0 0"]
    tree.add("tm/shared", "mvds.sys")
    now.vms.detach(vm.id, 2)
    now.vms.detach(vm.id, 3)
    assert tree.lines() == [
        f"shared/mvds.sys host01:{ds}/disk.2 /ds/pers 0 1",
        f"sys/delete host01:{ds}/disk.3 0 0",
    ]
    assert [disk.id for disk in now.vms.get(vm.id).disks] == [0]
    assert not list(Path(f"{now.directory}/var/vms/0").glob("transfer.*attach"))


def test_now_disk_saveas(tree: Tree, now: FrontEnd) -> None:
    ds = f"{now.directory}/var//datastores/0/0"
    vm = now.vms.create("vm", [DiskRequest(image="nonpers")])
    now.vms.deploy(vm.id, "host01")
    tree.calls()
    tree.say("datastore.fs.mkfs", stdout="/ds/saved\n")
    now.vms.disk_saveas(vm.id, 0, "copy")
    calls = tree.calls()
    assert [call["action"] for call in calls] == ["mkfs", "monitor", "cpds", "monitor"]
    assert calls[2]["argv"] == [f"host01:{ds}/disk.0", "/ds/saved", "-1", "0", "1"]
    copy = now.images.get("copy")
    assert (copy.state, copy.source, copy.format, copy.size) == ("READY", "/ds/saved", "qcow2", 10)
    assert now.vms.get(vm.id).status == "running"
    now.vms.stop(vm.id)
    tree.calls()
    now.vms.disk_saveas(vm.id, 0, "copy2")
    (line,) = tree.lines()
    assert line == f"shared/cpds fe:{ds}/disk.0 /ds/saved -1 0 1"
    assert now.vms.get(vm.id).status == "stopped"
    assert script(now, "vms/0/transfer.0.disk_saveas")[0].startswith("CPDS shared fe:")


def test_now_terminate(tree: Tree, now: FrontEnd) -> None:
    ds = f"{now.directory}/var//datastores/0/0"
    vm = now.vms.create("vm", [DiskRequest(image="pers")])
    now.vms.deploy(vm.id, "host01")
    now.vms.stop(vm.id)
    tree.calls()
    with pytest.raises(InUse):
        now.vms.shutdown(vm.id)
    now.vms.terminate(vm.id)
    assert tree.lines() == [f"shared/mvds fe:{ds}/disk.0 /ds/pers 0 1", f"sys/delete fe:{ds} 0 0"]
    pending = now.vms.create("pending", [DiskRequest(image="pers")])
    now.vms.terminate(pending.id)
    assert tree.lines() == []
    assert now.vms.get(pending.id).status == "done"


def test_now_terminate_hard_of_a_failed_vm(tree: Tree, now: FrontEnd) -> None:
    ds = f"{now.directory}/var//datastores/0/0"
    vm = now.vms.create("vm", [DiskRequest(image="pers")])
    tree.say("tm.shared.ln", status=1)
    with pytest.raises(ActionFailed):
        now.vms.deploy(vm.id, "host01")
    tree.calls()
    with pytest.raises(InUse, match="recover 0 --retry"):
        now.vms.terminate(vm.id)
    now.vms.terminate(vm.id, hard=True)
    assert tree.lines() == [f"shared/delete host01:{ds}/disk.0 0 1", f"sys/delete host01:{ds} 0 0"]


def test_now_cdrom_is_linked_and_never_saved(tree: Tree, now: FrontEnd) -> None:
    now.images.create("iso", "default", path="/srv/c.iso", type="cdrom")
    vm = now.vms.create("vm", [DiskRequest(image="iso")])
    now.vms.deploy(vm.id, "host01")
    now.vms.shutdown(vm.id)
    assert [line.split()[0] for line in tree.lines()] == ["shared/ln", "shared/delete", "sys/delete"]


def test_now_other_system_datastore(tree: Tree, now: FrontEnd) -> None:
    now.datastores.create("fast", tm_mad="ssh", type="system")
    vm = now.vms.create("vm", [DiskRequest(type="swap", size=1)], system_datastore="fast")
    now.vms.deploy(vm.id, "host01")
    assert tree.lines() == [f"ssh/mkswap 1 host01:{now.directory}/var//datastores/2/0/disk.0 0 2"]


def test_now_suffix_sticks_in_loops(tree: Tree) -> None:
    """A shared image datastore and an ssh system datastore: `clone.ssh` where it exists, else `clone`."""
    tree.add("tm/shared", "clone.ssh", "mv.ssh")
    tree.add("tm/ssh", "mv.ssh")
    now = open_(tree, "current", system="ssh")
    now.datastores.create("plain", tm_mad="sys")
    now.images.create("other", "plain", path="/srv/c.img")
    disks = [DiskRequest(image="nonpers"), DiskRequest(image="other"), DiskRequest(type="swap", size=1)]
    vm = now.vms.create("vm", disks)
    tree.calls()
    now.vms.deploy(vm.id, "host01")
    now.vms.migrate(vm.id, "host02")
    now.vms.shutdown(vm.id)
    assert [line.split()[0] for line in tree.lines()] == [
        *("shared/clone.ssh", "sys/clone", "ssh/mkswap"),
        # oned leaves the suffix on every later line of the loop
        *("shared/mv.ssh", "sys/mv", "ssh/mv.ssh", "ssh/mv"),
        *("shared/delete", "sys/delete", "ssh/delete", "ssh/delete"),
    ]
    verbs = [line.split()[0] for line in script(now, "vms/0/transfer.1.migrate")]
    assert verbs == ["MV.ssh", "MV.ssh", "MV.ssh", "MV"]
    verbs = [line.split()[0] for line in script(now, "vms/0/transfer.1.epilog")]
    assert verbs == ["DELETE.ssh", "DELETE", "DELETE", "DELETE"]


@pytest.mark.parametrize(
    ("request_", "contract", "error"),
    [
        (DiskRequest(), "current", "either image"),
        (DiskRequest(image="nonpers", type="swap"), "current", "either image"),
        (DiskRequest(image="nonpers", fs="ext4"), "current", "volatile"),
        (DiskRequest(type="swap"), "current", "needs a size"),
        (DiskRequest(type="swap", size=1, fs="ext4"), "current", "neither fs"),
        (DiskRequest(type="ram", size=1), "current", "'ram'"),
        (DiskRequest(type="fs", size=1, fs="ext4; id"), "current", "one word"),
        (DiskRequest(image="nonpers", size=1), "current", "has 10 MiB"),
        (DiskRequest(image="nonpers", save_as="x"), "current", "disk-saveas"),
        (DiskRequest(image="pers", save_as="x"), "3.4", "persistent"),
        (DiskRequest(type="swap", size=1, save_as="x"), "3.4", "save-as"),
        (DiskRequest(image="nothing"), "current", "no image named 'nothing'"),
        (DiskRequest(image=99), "current", "no image 99"),
    ],
)
def test_disks_that_cannot_be(tree: Tree, request_: DiskRequest, contract: str, error: str) -> None:
    front_end = open_(tree, contract)
    with pytest.raises(MadrigalError, match=error):
        front_end.vms.create("vm", [request_])
    assert front_end.vms.all() == []


@pytest.mark.parametrize(
    "text",
    ["", "image", "image=", "size=a,type=swap", "size=0,type=swap", "disk=1", "image=a,image=b", "type=swap,size=-1"],
)
def test_disks_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError):
        DiskRequest.parse(text)


def test_disk_text() -> None:
    assert DiskRequest.parse("image=a b,size=7,save-as=c") == DiskRequest(image="a b", size=7, save_as="c")
    assert DiskRequest.parse("type=fs,fs=ext4,format=raw,size=64") == DiskRequest(
        type="fs", fs="ext4", format="raw", size=64
    )
