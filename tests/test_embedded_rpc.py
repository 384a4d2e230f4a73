"""What drivers are told when they ask: the XML-RPC interface, and the commands for those that run commands."""

from __future__ import annotations

import os
import subprocess
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from embedded_fakes import Tree
from lxml import etree

from madrigal import frontend
from madrigal.embedded import DiskRequest, FrontEnd
from madrigal.errors import Forbidden, NotFound


@pytest.fixture
def front_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FrontEnd]:
    """One with a deployed VM, and the environment of its drivers."""
    tree = Tree(tmp_path / "tree")
    tree.say("datastore.fs.cp", stdout="/ds/a qcow2\n")
    with FrontEnd(str(tmp_path / "state"), tree=str(tree.path), with_shim=True) as front_end:
        front_end.hosts.create("host01")
        front_end.hosts.create("host02")
        front_end.datastores.create("default", tm_mad="shared", attrs={"SPARSE": "NO", "QCOW2_STANDALONE": "yes"})
        front_end.images.create("a", "default", path="/srv/a")
        front_end.images.create("p", "default", path="/srv/p", persistent=True)
        disks = [DiskRequest(image="a", size=20), DiskRequest(image="p")]
        disks += [DiskRequest(type="fs", size=5, fs="ext4"), DiskRequest(type="swap", size=6)]
        front_end.vms.create("vm", disks, {"A": "b ]] > <&"})
        front_end.vms.deploy("vm", "host01")
        front_end.vms.migrate("vm", "host02")
        (call,) = tree.calls("context")[-1:]
        for name in ("ONE_XMLRPC", "ONE_AUTH", "PATH"):
            monkeypatch.setenv(name, call["env"][name])
        yield front_end


def ask(method: str, *arguments: Any) -> list[Any]:
    proxy = xmlrpc.client.ServerProxy(os.environ["ONE_XMLRPC"])
    answer = getattr(proxy, method)(*arguments)
    assert isinstance(answer, list) and len(answer) == 3
    return answer


def session() -> str:
    return Path(os.environ["ONE_AUTH"]).read_text().strip()


def test_vm(front_end: FrontEnd) -> None:
    ok, text, code = ask("one.vm.info", session(), 0)
    assert (ok, code) == (True, 0)
    vm = etree.fromstring(text)
    assert (vm.findtext("STATE"), vm.findtext("LCM_STATE"), vm.findtext("DEPLOY_ID")) == ("3", "3", "one-0")
    history = [[stay.findtext(tag) for tag in ("SEQ", "HOSTNAME", "DS_ID", "TM_MAD")] for stay in vm.iter("HISTORY")]
    assert history == [["0", "host01", "0", "ssh"], ["1", "host02", "0", "ssh"]]
    disks = {
        disk.findtext("DISK_ID"): {child.tag: child.text for child in disk} for disk in vm.iterfind("TEMPLATE/DISK")
    }
    first = disks["0"]
    wanted = {"SIZE": "20", "ORIGINAL_SIZE": "10", "FORMAT": "qcow2", "CLONE": "YES", "SAVE": "NO", "SOURCE": "/ds/a"}
    wanted.update(TM_MAD="shared", TYPE="FILE", IMAGE_ID="0", IMAGE="a", DATASTORE_ID="1", SPARSE="NO", TARGET="vda")
    wanted.update(QCOW2_STANDALONE="yes", DATASTORE="default", TM_MAD_SYSTEM="ssh")
    assert {key: first.get(key) for key in wanted} == wanted
    assert (disks["1"]["PERSISTENT"], disks["1"]["SAVE"], disks["1"]["CLONE"]) == ("YES", "YES", "NO")
    assert (disks["2"]["FS"], disks["2"]["FORMAT"], disks["2"]["TYPE"], disks["2"]["TM_MAD"]) == (
        *("ext4", "raw", "fs", "ssh"),
    )
    assert "ORIGINAL_SIZE" not in disks["3"]
    assert len({disk["TARGET"] for disk in disks.values()}) == 4
    assert (vm.findtext("TEMPLATE/CONTEXT/DISK_ID"), vm.findtext("TEMPLATE/CONTEXT/A")) == ("4", "b ]] > <&")


def test_the_librarys_client(front_end: FrontEnd) -> None:
    disk = frontend.vm(0).disk(0)
    assert disk and (disk.size, disk.original_size, disk.format) == (20, 10, "qcow2")
    with pytest.raises(NotFound):
        frontend.vm(7)


def test_others(front_end: FrontEnd) -> None:
    texts = {kind: ask(f"one.{kind}.info", session(), 1)[1] for kind in ("datastore", "image", "host")}
    documents = {kind: etree.fromstring(text) for kind, text in texts.items()}
    assert documents["datastore"].findtext("TEMPLATE/SPARSE") == "NO"
    assert documents["datastore"].findtext("FREE_MB") == "60"
    assert [e.text for e in documents["image"].iterfind("VMS/ID")] == ["0"]
    assert documents["image"].findtext("STATE") == "8"
    assert documents["host"].findtext("NAME") == "host02"


def test_refusals(front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for wrong in ("oneadmin:", "oneadmin:wrong", "", session() + "x"):
        assert ask("one.vm.info", wrong, 0)[::2] == [False, 0x100]
    assert ask("one.vm.info")[::2] == [False, 0x100]
    assert ask("one.vm.info", 5, 0)[::2] == [False, 0x100]
    assert ask("one.vm.info", session(), 99)[::2] == [False, 0x400]
    assert ask("one.vm.info", session(), 1 << 30)[::2] == [False, 0x400]
    assert ask("one.vm.info", session())[0] is False
    for method in ("one.vm.action", "one.vm.allocate", "one.secret.info", "system.listMethods", "_dispatch", "close"):
        assert ask(method, session(), 0)[0] is False
    (tmp_path / "auth").write_text("oneadmin:wrong\n")
    monkeypatch.setenv("ONE_AUTH", str(tmp_path / "auth"))
    with pytest.raises(Forbidden):
        frontend.vm(0)


def test_nobody_answers_when_it_is_closed(front_end: FrontEnd) -> None:
    front_end.close()
    with pytest.raises(ConnectionRefusedError):
        ask("one.vm.info", session(), 0)


@pytest.mark.parametrize(
    ("words", "tag"),
    [
        (["onevm", "show", "-x", "0"], "VM"),
        (["onevm", "show", "0", "-x"], "VM"),
        (["onedatastore", "show", "-x", "1"], "DATASTORE"),
        (["oneimage", "show", "--xml", "0"], "IMAGE"),
        (["onehost", "show", "host02", "-x"], "HOST"),
    ],
)
def test_commands(front_end: FrontEnd, words: list[str], tag: str) -> None:
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    assert etree.fromstring(result.stdout).tag == tag


@pytest.mark.parametrize("words", [["onevm", "list", "-x"], ["onevm", "show", "0"], ["onevm", "show", "-x", "99"]])
def test_commands_that_fail(front_end: FrontEnd, words: list[str]) -> None:
    result = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert result.returncode == 255
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)


def test_a_driver_text_that_xml_cannot_carry(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "tree")
    with FrontEnd(str(tmp_path / "state"), tree=str(tree.path)) as front_end:
        front_end.hosts.create("host01")
        front_end.vms.create("vm", [DiskRequest(type="swap", size=1)])
        tree.say("tm.ssh.mkswap", status=1, stderr="bad \x01 ]]> \udcff\n".encode("utf-8", "replace").decode())
        with pytest.raises(Exception, match="bad"):
            front_end.vms.deploy("vm", "host01")
        vm = etree.fromstring(front_end._show("vm", 0))
        assert "bad ? ?" in (vm.findtext("USER_TEMPLATE/ERROR") or "")
