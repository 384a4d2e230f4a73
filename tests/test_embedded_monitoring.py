"""What system datastores and their disks take: told by a driver over UDP, or by a probe on real hosts."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Hosts
from embedded_fakes import Tree
from lxml import etree

from madrigal.embedded import ActionFailed, DiskRequest, FrontEnd
from madrigal.embedded.monitoring import capacity, sizes
from madrigal.errors import ConfigError, NotSupported

# What a driver sends, read as a stock one reads the configuration.
TELL = """
import base64, re, socket, zlib
conf = open(os.environ["ONE_LOCATION"] + "/etc/monitord.conf").read()
port = [line.split(",")[0].split()[2] for line in conf.splitlines() if "PORT" in line][0]
address = [line.split(",")[0].split()[2].strip('"') for line in conf.splitlines() if "MONITOR_ADDRESS" in line][0]
inner = base64.b64encode(b"DISK_SIZE = [ ID=0, SIZE=3]\\nSNAPSHOT_SIZE = [ ID=2, DISK_ID=0, SIZE=1]").decode()
data = base64.b64encode(zlib.compress(('VM=[ID=0, MONITOR="%s"]\\n' % inner).encode())).decode()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    for message in ("noise", "MONITOR_VM FAILURE -1 0 " + data, "MONITOR_VM SUCCESS -1 0 " + data + "\\n"):
        sender.sendto(message.encode(), (address, int(port)))
"""
PROBE = """#!/bin/sh
test $# = 1 || exit 2
cat "$1/says"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree")


def test_a_shared_system_datastore(tree: Tree) -> None:
    with FrontEnd(str(tree.path.parent / "state"), "current", str(tree.path), hostname="fe") as front_end:
        front_end.hosts.create("host01")
        front_end.datastores.update("system", tm_mad="sys")
        vm = front_end.vms.create("vm", [DiskRequest(type="swap", size=4), DiskRequest(type="swap", size=4)])
        front_end.vms.deploy(vm.id, "host01")
        tree.calls()
        tree.say("tm.sys.monitor", stdout="USED_MB=1 TOTAL_MB=10\nFREE_MB=9\n", run=TELL)
        record = front_end.datastores.ask("system")
        assert (record.total_mb, record.free_mb, record.used_mb) == (10, 9, 1)
        assert [disk.taken for disk in front_end.vms.get(vm.id).disks] == [{"0": 3, "0/2": 1}, {}]
        (call,) = tree.calls()
        dump = etree.fromstring(base64.b64decode(call["stdin"], validate=True))
        assert (call["mad"], call["action"], call["argv"]) == ("sys", "monitor", ["0"])
        found = [dump.findtext(name) for name in ("DATASTORE_LOCATION", "MONITOR_VM_DISKS", "DATASTORE/ID")]
        assert found == [front_end.layout.datastores, "1", "0"]
        shown = etree.fromstring(front_end.vm_document(front_end.vms.get(vm.id)))
        assert shown.findtext("MONITORING/DISK_SIZE[ID='0']/SIZE") == "3"
        assert shown.findtext("MONITORING/SNAPSHOT_SIZE[ID='2'][DISK_ID='0']/SIZE") == "1"
        tree.say("tm.sys.monitor", status=1, stderr="no\n")
        with pytest.raises(ActionFailed, match="no"):
            front_end.datastores.ask("system")
        assert not Path(front_end.directory, "etc/monitord.conf").exists()


@pytest.fixture
def cloud(hosts: Hosts, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Iterator[FrontEnd]:
    for name, value in hosts.env.items():
        if name not in ("PATH", "ONE_LOCATION"):
            monkeypatch.setenv(name, value)
    (tree.path / "tm/ssh/monitor_ds").write_text(PROBE)
    with FrontEnd(
        str(tree.path.parent / "state"), "current", str(tree.path), hosts.datastores, hostname="fe"
    ) as front_end:
        for host in hosts.names:
            front_end.hosts.create(host)
        yield front_end
    for host in hosts.names:
        shutil.rmtree(hosts.on(host, f"{hosts.datastores}/0"), ignore_errors=True)


def test_a_system_datastore_of_the_hosts_own(hosts: Hosts, cloud: FrontEnd) -> None:
    vm = cloud.vms.create("vm", [DiskRequest(type="swap", size=4)])
    cloud.vms.deploy(vm.id, "host02")
    assert cloud.datastores.ask("system").total_mb == 0  # no host has it yet
    inner = base64.b64encode(b"DISK_SIZE = [ ID=0, SIZE=7]").decode()
    for host in hosts.names:
        directory = hosts.on(host, f"{hosts.datastores}/0")
        directory.mkdir()
        (directory / ".monitor").write_text("ssh\n")
        (directory / "says").write_text(f'VM = [ ID = {vm.id}, MONITOR = "{inner}"]\n' if host == "host02" else "")
    record = cloud.datastores.ask("system")
    assert record.total_mb == 1024 <= record.free_mb + record.used_mb <= 1028  # rounded up, on two hosts
    assert cloud.vms.get(vm.id).disk(0).taken == {"0": 7}
    (directory / "says").unlink()
    with pytest.raises(Exception, match=r"monitor_ds of ssh failed on host02 \(1\).*says"):
        cloud.datastores.ask("system")
    (directory / ".monitor").write_text("../../../bin/sh\n")
    with pytest.raises(ConfigError, match="host02"):
        cloud.datastores.ask("system")


def test_old_front_ends_do_not_monitor(tree: Tree) -> None:
    with FrontEnd(str(tree.path.parent / "state"), "3.4", str(tree.path)) as front_end:
        with pytest.raises(NotSupported):
            front_end.datastores.ask("system")


@pytest.mark.parametrize("text", ["", "TOTAL_MB=1 FREE_MB=2", "TOTAL_MB=a FREE_MB=1 USED_MB=1"])
def test_no_capacity(text: str) -> None:
    assert capacity(text) is None


def test_what_is_no_size_is_passed_over() -> None:
    inner = base64.b64encode(
        b"DISK_SIZE = [ SIZE=3, ID=1 ] OTHER = [ ID=1 ] \xff SNAPSHOT_SIZE=[ID=0,DISK_ID=1,SIZE=2]"
    )
    text = f'noise\nVM = [ ID = 3, MONITOR = "{inner.decode()}"] VM=[ID=4, MONITOR=""]\nVM = [ ID = x, MONITOR = ""]'
    assert sizes(text) == {3: {"1": 3, "1/0": 2}, 4: {}}
