"""What happens to the disks of a VM that runs, on a real libvirt: snapshots, their removal, copies; kills in between.

The VM has nothing to boot.  qemu writes to its disks when it is told to, as if a guest did.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import RIGS, TREE, Done, Hosts, check_stderr, eventually, run_action, start_action
from dumps import front_end, vm_document

from madrigal import dump, tm
from madrigal.command import CommandFailed
from madrigal.errors import ConfigError, DeadlineExceeded, InUse, MadrigalError, NotFound, NotSupported
from madrigal.onhost.guest import Guest

MIB = 1 << 20
HOST = "host03"

# Stands before virsh in PATH: keeps a list of what it is called for, and does what the files beside it say.
VIRSH = r"""#!/bin/bash
lab=$(dirname "$(dirname "$0")")
for word; do case $word in -*|qemu+unix*) ;; *) break;; esac; done
echo "$word" >>"$lab/asked"
if [ -e "$lab/$word" ]; then . "$lab/$word"; fi
case $word in blockcommit|blockpull|blockcopy) [ ! -e "$lab/slow" ] || set -- "$@" --bandwidth 1;; esac
exec /usr/bin/virsh "$@"
"""


class Lab:
    """A host with a libvirt, and a directory `top` that it has in common with this machine."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.top = Path(hosts.work, "lab")
        (self.top / "bin").mkdir(parents=True)
        (self.top / "bin/virsh").write_text(VIRSH)
        (self.top / "bin/virsh").chmod(0o755)
        home = f"{hosts.work}/hosts/{HOST}"
        hosts.add(HOST, "512m", f"SetEnv HOME={home} PATH={self.top}/bin:/usr/bin:/bin")
        self.state = f"{hosts.work}/lv"
        self.uri = hosts.run(HOST, [f"{RIGS}/libvirt-up", self.state]).decode().strip()

    def close(self) -> None:
        self.hosts.run(HOST, [f"{RIGS}/libvirt-down", self.state])
        self.hosts.end(HOST)
        shutil.rmtree(self.top)

    def virsh(self, *words: str) -> str:
        done = subprocess.run(["/usr/bin/virsh", "-q", "-c", self.uri, *words], capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def asked(self) -> list[str]:
        """What virsh was called for by others than this test."""
        path = self.top / "asked"
        return path.read_text().split() if path.exists() else []

    def when(self, word: str, script: str) -> None:
        """What virsh WORD does before the real one is called."""
        (self.top / word).write_text(script)


class Domain:
    """A VM that runs.  Its disk vda is written in blocks of 64 KiB, block n at n MiB."""

    def __init__(self, lab: Lab, name: str, *disks: str) -> None:
        self.lab, self.name = lab, name
        lab.hosts.run(HOST, [f"{RIGS}/libvirt-up", lab.state, "vm", name, *disks])

    def write(self, block: int, value: int, count: int = 65536) -> None:
        self._io(f"write -P {value} {block * MIB} {count}")

    def blocks(self, count: int) -> list[int]:
        """blocks() of what vda holds now."""
        self.flush()
        return blocks(Path(self.sources()[0]), count)

    def flush(self) -> None:
        """Have what was written in the files, for who looks at them."""
        self._io("flush")

    def _io(self, command: str) -> None:
        words = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "{command}"'
        said = self.lab.virsh("qemu-monitor-command", "--hmp", self.name, words)
        assert "rror" not in said and "ailed" not in said, said

    def state(self) -> str:
        return self.lab.virsh("domstate", self.name)

    def job(self, device: str = "vda") -> str:
        return self.lab.virsh("blockjob", self.name, device, "--raw")

    def sources(self) -> list[str]:
        """The files of the disks as libvirt names them."""
        lines = self.lab.virsh("domblklist", self.name).split("\n")
        return [line.split(None, 1)[1] for line in lines]

    def files(self) -> list[int]:
        """The numbers of the files of vda's chain, the one that is written first; -1 is an image of a datastore."""
        found: list[int] = []
        disk = ElementTree.fromstring(self.lab.virsh("dumpxml", self.name)).find("devices/disk")
        while disk is not None and (source := disk.find("source")) is not None:
            name = os.path.basename(source.get("file", ""))
            # the name of the VM's start is disk.0
            found.append(int(name) if name.isdigit() else 0 if name == "disk.0" else -1)
            disk = disk.find("backingStore")
        return found

    def guest(self, timeout: float = 20) -> Guest:
        return Guest(self.lab.uri, self.name, timeout, 60, lambda: None)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Writes a growing number to block 30 and then to block 31, all the time."""
        over = threading.Event()

        def work() -> None:
            for number in itertools.cycle(range(1, 250)):
                if over.is_set():
                    return
                self.write(30, number)
                self.write(31, number)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def lab(hosts: Hosts) -> Iterator[Lab]:
    can = subprocess.run([f"{RIGS}/libvirt-up", "-", "can"], capture_output=True, text=True)
    if can.returncode:
        pytest.skip(f"a libvirt of its own cannot be had: {can.stdout.strip()}")
    made = Lab(hosts)
    yield made
    made.close()


@pytest.fixture
def clean(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv("PATH", f"{lab.top}/bin:{os.environ['PATH']}")
    yield lab
    for name in lab.virsh("list", "--name").split():
        lab.virsh("destroy", name)
    for path in lab.top.iterdir():
        if path.name != "bin":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def chain(clean: Lab) -> tuple[Domain, Guest, Path]:
    """A VM with a qcow2 disk as a driver lays it out, four live snapshots of it, a block of its own in each file."""
    vm = clean.top / "17"
    snap = vm / "disk.0.snap"
    snap.mkdir(parents=True)
    (snap / "disk.0.snap").symlink_to(".")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", f"{snap}/0", "64M"], check=True)
    (vm / "disk.0").symlink_to("disk.0.snap/0")
    plain = vm / "disk.1, plain"
    plain.write_bytes(bytes(MIB))
    domain = Domain(clean, "one-17", f"qcow2={vm}/disk.0", f"raw={plain}")
    guest = domain.guest()
    domain.write(0, 1)
    for number in range(1, 5):
        add(domain, vm, number)
        domain.write(number, number + 1)
    return domain, guest, vm


def add(domain: Domain, vm: Path, number: int, name: str = "") -> None:
    """An external snapshot: the guest writes to the file NUMBER or NAME from now on."""
    file = f"{vm}/disk.0.snap/{name or number}"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"disk.0.snap/{number - 1}", file]
    subprocess.run(command, check=True)
    (vm / "new").symlink_to(f"disk.0.snap/{name or number}")
    domain.guest().snapshot("vda", file, f"{vm}/new", f"{vm}/disk.0")


def blocks(path: Path, count: int, format: str = "qcow2") -> list[int]:
    """The first byte of each block of an image, which all its bytes have."""
    raw = path.parent / "as raw"
    subprocess.run(["qemu-img", "convert", "-U", "-f", format, "-O", "raw", path, raw], check=True)
    found = []
    with open(raw, "rb") as file:
        for block in range(count):
            file.seek(block * MIB)
            data = file.read(65536)
            assert data == data[:1] * 65536
            found.append(data[0])
    raw.unlink()
    return found


def numbers(files: list[str]) -> list[int]:
    return [int(os.path.basename(file)) for file in files]


# -- what the domain uses --------------------------------------------------------------------------------------


def test_a_disk_is_found_whatever_it_is_called(chain: tuple[Domain, Guest, Path]) -> None:
    domain, guest, vm = chain
    assert guest.device_of(f"{vm}/disk.0") == guest.device_of(f"{vm}/disk.0.snap/disk.0.snap/4") == "vda"
    assert guest.device_of(f"{vm}/disk.1, plain") == "vdb"
    assert numbers(guest.files("vda")) == [4, 3, 2, 1, 0]
    (vm / "new").symlink_to("disk.0.snap/3")  # as if killed between an external snapshot and the link
    (vm / "new").rename(vm / "disk.0")
    assert guest.device_of(f"{vm}/disk.0") == "vda"
    assert numbers(guest.files("vda"))[0] == 4
    with pytest.raises(NotFound, match=r"disk\.7 is not the file of a disk that one-17 uses"):
        guest.device_of(f"{vm}/disk.7")
    with pytest.raises(NotFound, match="libvirt does not run one-18"):
        Guest(domain.lab.uri, "one-18", 20, 60, lambda: None).is_running()


def test_snapshot_is_of_one_disk(chain: tuple[Domain, Guest, Path]) -> None:
    domain, _, vm = chain
    assert domain.sources() == [f"{vm}/disk.0.snap/4", f"{vm}/disk.1, plain", "-"]
    add(domain, vm, 5, "5,snapshot=no")  # virsh takes a comma for the end of a word
    assert domain.sources() == [f"{vm}/disk.0.snap/5,snapshot=no", f"{vm}/disk.1, plain", "-"]
    assert os.readlink(vm / "disk.0") == "disk.0.snap/5,snapshot=no"


def test_snapshot_that_libvirt_refuses_leaves_the_link(chain: tuple[Domain, Guest, Path]) -> None:
    domain, guest, vm = chain
    (vm / "new").symlink_to("disk.0.snap/5")
    with pytest.raises(CommandFailed, match=r"virsh snapshot-create-as of one-17 failed \(1\): .*snap/5.*"):
        guest.snapshot("vda", f"{vm}/disk.0.snap/5", f"{vm}/new", f"{vm}/disk.0")
    assert os.readlink(vm / "disk.0") == "disk.0.snap/4" == os.path.relpath(domain.sources()[0], vm)
    # what was not refused may have happened: nobody may take back the file then
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "disk.0.snap/4", f"{vm}/disk.0.snap/5"],
        check=True,
    )
    with pytest.raises(MadrigalError, match="the guest may write to") as failure:
        guest.snapshot("vda", f"{vm}/disk.0.snap/5", f"{vm}/new", f"{vm}/no/such/disk.0")
    assert not isinstance(failure.value, CommandFailed)
    assert domain.sources()[0] == f"{vm}/disk.0.snap/5"


# -- removing from a chain -------------------------------------------------------------------------------------


def test_pull_keeps_the_names_of_the_files(chain: tuple[Domain, Guest, Path]) -> None:
    """Libvirt would write the name by which the VM was started, the link to the disk, into the disk's own header."""
    domain, guest, vm = chain
    for base, left in ((2, [4, 2, 1, 0]), (0, [4, 0])):
        for _ in range(2):
            guest.pull("vda", f"{vm}/disk.0.snap/{base}")
            assert numbers(guest.files("vda")) == left
        said = subprocess.run(
            ["qemu-img", "info", "-U", "--output=json", f"{vm}/disk.0.snap/4"], check=True, capture_output=True
        )
        name = json.loads(said.stdout)["full-backing-filename"]
        assert os.path.realpath(name) == f"{vm}/disk.0.snap/{base}"
        assert domain.blocks(5) == [1, 2, 3, 4, 5]
    guest.pull("vda", None)
    for number in range(4):
        (vm / f"disk.0.snap/{number}").unlink()
    assert domain.blocks(5) == [1, 2, 3, 4, 5]


def test_commit_into_a_file_with_a_good_name(chain: tuple[Domain, Guest, Path]) -> None:
    domain, guest, vm = chain
    for _ in range(2):
        guest.commit("vda", f"{vm}/disk.0.snap/2", f"{vm}/disk.0.snap/1")
        assert numbers(guest.files("vda")) == [4, 3, 1, 0]
    (vm / "disk.0.snap/2").unlink()
    domain.write(5, 9)
    assert domain.blocks(6) == [1, 2, 3, 4, 5, 9]
    assert blocks(vm / "disk.0.snap/1", 5) == [1, 2, 3, 0, 0]
    with pytest.raises(NotFound, match=r"snap/3 does not lie on .*snap/0 below another file of one-17"):
        guest.commit("vda", f"{vm}/disk.0.snap/3", f"{vm}/disk.0.snap/0")
    with pytest.raises(NotFound, match=r"snap/4 does not lie on"):
        guest.commit("vda", f"{vm}/disk.0.snap/4", f"{vm}/disk.0.snap/3")


def test_commit_never_writes_through_a_link_that_leads_elsewhere_by_now(chain: tuple[Domain, Guest, Path]) -> None:
    """qemu would open it by that name, and have the file that is written as the one at the bottom of its own chain."""
    domain, guest, vm = chain
    for top, base in ((1, 0), (2, 1), (2, 1)):
        if (top, base) == (2, 1):
            guest.commit("vda", f"{vm}/disk.0.snap/2", f"{vm}/disk.0.snap/1")
            continue
        with pytest.raises(NotSupported, match=r"snap/0 cannot be written while one-17 runs.*power the VM off first"):
            guest.commit("vda", f"{vm}/disk.0.snap/{top}", f"{vm}/disk.0.snap/{base}")
    assert domain.blocks(5) == [1, 2, 3, 4, 5]
    assert blocks(vm / "disk.0.snap/0", 2) == [1, 0]


def test_job_of_a_killed_run_is_ended_and_one_of_others_is_left_alone(chain: tuple[Domain, Guest, Path]) -> None:
    domain, guest, vm = chain
    domain.write(8, 7, count=8 * MIB)
    domain.lab.virsh("blockcopy", "one-17", "vda", f"{vm}/stray", "--transient-job", "--bandwidth", "1")
    guest.pull("vda", f"{vm}/disk.0.snap/2")
    assert numbers(guest.files("vda")) == [4, 2, 1, 0] and domain.job() == ""
    domain.lab.virsh("blockcommit", "one-17", "vda", "--active", "--shallow", "--bandwidth", "1")
    with pytest.raises(InUse, match="vda of one-17 is busy"):
        guest.pull("vda", f"{vm}/disk.0.snap/1")
    assert "Active" in domain.job()
    domain.lab.virsh("blockjob", "one-17", "vda", "--abort")


def test_job_ends_with_the_action_that_waits_for_it(chain: tuple[Domain, Guest, Path]) -> None:
    domain, _, vm = chain
    (domain.lab.top / "slow").touch()
    domain.write(8, 7, count=16 * MIB)
    guest = domain.guest()
    add(domain, vm, 5)

    def waiting() -> None:
        if domain.job():
            raise MadrigalError("nobody waits any more")

    guest._waiting = waiting
    for work, top in ((guest.pull, ""), (guest.commit, f"{vm}/disk.0.snap/4")):
        with pytest.raises(MadrigalError, match="nobody waits any more"):
            work(*["vda", *([top] if top else []), f"{vm}/disk.0.snap/3"])
        assert domain.job() == "", "the job is still at work"
        assert numbers(guest.files("vda")) == [5, 4, 3, 2, 1, 0]
    assert domain.blocks(10) == [1, 2, 3, 4, 5, 0, 0, 0, 7, 7]


# -- standing still --------------------------------------------------------------------------------------------


def test_without_an_agent_the_guest_is_suspended_and_goes_on(chain: tuple[Domain, Guest, Path]) -> None:
    domain, guest, _ = chain
    with guest.frozen():
        assert domain.state() == "paused"
    assert domain.state() == "running"
    with pytest.raises(ZeroDivisionError), guest.frozen():
        _ = 1 // 0
    assert domain.state() == "running"
    domain.lab.virsh("suspend", "one-17")
    with guest.frozen():
        pass
    assert domain.state() == "paused", "who suspended it wants it so"


def test_a_virsh_that_says_very_much_holds_nobody_up(chain: tuple[Domain, Guest, Path], lab: Lab) -> None:
    """Nobody reads that meanwhile, and the guest would stand still until a deadline."""
    domain, guest, _ = chain
    for word in ("domfsfreeze", "suspend", "resume"):
        lab.when(word, "head -c 1048576 /dev/zero | tr '\\0' x >&2")
    began = time.monotonic()
    with guest.frozen():
        assert domain.state() == "paused"
    assert domain.state() == "running" and time.monotonic() - began < 10


def test_with_an_agent_the_guest_is_frozen_and_thawed(chain: tuple[Domain, Guest, Path]) -> None:
    domain, guest, _ = chain
    domain.lab.when("domfsfreeze", "exit 0")
    domain.lab.when("domfsthaw", "exit 0")
    with guest.frozen():
        assert domain.state() == "running" and domain.lab.asked()[-1] == "domfsfreeze"
    assert domain.lab.asked()[-1] == "domfsthaw" and "suspend" not in domain.lab.asked()
    domain.lab.when("domfsthaw", "echo error: the agent is gone >&2; exit 1")
    with pytest.raises(MadrigalError, match=r"one-17 may have been left standing still \(error: the agent is gone\)"):
        with guest.frozen():
            pass


def test_an_agent_that_hangs_costs_its_time_and_no_more(chain: tuple[Domain, Guest, Path]) -> None:
    domain, _, _ = chain
    domain.lab.when("domfsfreeze", "sleep 60")
    with domain.guest(timeout=1).frozen():
        assert domain.state() == "paused"
    assert domain.state() == "running"
    # what it was asked for may still come true
    assert domain.lab.asked()[-5:-1] == ["domfsfreeze", "suspend", "resume", "domfsthaw"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_guest_goes_on_when_who_suspended_it_is_killed(chain: tuple[Domain, Guest, Path], number: int) -> None:
    domain, _, _ = chain
    program = (
        "import sys, time; from madrigal.onhost.guest import Guest\n"
        "with Guest(*sys.argv[1:], 20, 60, lambda: None).frozen(): time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": f"{TREE}/lib"}
    with subprocess.Popen([sys.executable, "-c", program, domain.lab.uri, "one-17"], env=env) as process:
        try:
            assert eventually(lambda: domain.state() == "paused")
        finally:
            process.send_signal(number)
    assert eventually(lambda: domain.state() == "running")


# -- copying ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_copy_is_of_one_moment_while_the_guest_writes(chain: tuple[Domain, Guest, Path], format: str) -> None:
    domain, guest, vm = chain
    target = vm / "copy"
    with domain.busy():
        for _ in range(3):
            subprocess.run(["qemu-img", "create", "-q", "-f", format, target, str(guest.capacity("vda"))], check=True)
            guest.copy("vda", str(target), format)
            assert domain.job() == "" and domain.state() == "running"
            found = blocks(target, 32, format)
            assert found[:5] == [1, 2, 3, 4, 5]
            assert found[30] - found[31] in (0, 1), "the copy is of two moments"
    assert target.stat().st_blocks * 512 < 4 * MIB, "holes were filled"
    assert domain.sources()[0] == f"{vm}/disk.0.snap/4"


def test_copy_that_has_no_space_says_so(chain: tuple[Domain, Guest, Path]) -> None:
    domain, guest, vm = chain
    small = vm / "small"
    small.write_bytes(bytes(MIB))
    with pytest.raises(MadrigalError):
        guest.copy("vda", str(small), "raw")
    assert domain.job() == "" and domain.state() == "running"


def test_stalled_job_is_given_up(chain: tuple[Domain, Guest, Path]) -> None:
    domain, guest, vm = chain
    domain.write(8, 7, count=16 * MIB)
    guest._stall = 0.01
    (domain.lab.top / "slow").touch()
    with open(vm / "copy", "wb") as file:
        file.truncate(guest.capacity("vda"))
    with pytest.raises(DeadlineExceeded, match=r"virsh blockcopy of vda of one-17 did nothing for 0.01 s"):
        guest.copy("vda", f"{vm}/copy", "raw")
    assert domain.job() == ""


# -- actions ---------------------------------------------------------------------------------------------------

SAVING, MAKING, DELETING = 26, 57, 59


def document(state: int, hypervisor: str = "kvm") -> bytes:
    disks = {0: {"FORMAT": "qcow2", "CLONE": "YES"}, 1: {"FORMAT": "raw", "CLONE": "YES"}}
    history = f"<HISTORY><VM_MAD>dummy</VM_MAD></HISTORY><HISTORY><VM_MAD>{hypervisor}</VM_MAD></HISTORY>"
    more = f"<DEPLOY_ID>one-17</DEPLOY_ID><HISTORY_RECORDS>{history}</HISTORY_RECORDS><TEMPLATE>"
    return vm_document(17, disks, state).replace(b"<TEMPLATE>", more.encode())


class Cloud:
    """VM 17 with a qcow2 disk 0 and a raw disk 1, which runs on the host; actions for it."""

    def __init__(self, lab: Lab, work: Path) -> None:
        self.lab, self._work = lab, work
        self.path = f"{lab.hosts.datastores}/0/17"
        self.vm = lab.hosts.on(HOST, self.path)
        snap = self.vm / "disk.0.snap"
        snap.mkdir(parents=True)
        (snap / "disk.0.snap").symlink_to(".")
        self.image = f"{lab.hosts.datastores}/1/image"
        lab.hosts.on(HOST, self.image).parent.mkdir()
        self.on_host("create", "-q", "-f", "qcow2", self.image, "64M")
        self.on_host("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", self.image, f"{self.path}/disk.0.snap/0")
        (self.vm / "disk.0").symlink_to("disk.0.snap/0")
        (self.vm / "disk.1").write_bytes(b"\5" * MIB + bytes(7 * MIB))
        self.domain = Domain(lab, "one-17", f"qcow2={self.path}/disk.0", f"raw={self.path}/disk.1")
        self.domain.write(0, 1)

    def on_host(self, *words: str) -> bytes:
        return self.lab.hosts.run(HOST, ["qemu-img", *words])

    def start(self, asked: dict[str, str], action: str, *arguments: str) -> subprocess.Popen[bytes]:
        return start_action(action, *arguments, "17", "0", env={**self.lab.hosts.env, **asked})

    def front_end(self, state: int, hypervisor: str = "kvm") -> contextlib.AbstractContextManager[dict[str, str]]:
        return front_end(self._work, document(state, hypervisor))

    def run(self, state: int, action: str, *arguments: str, hypervisor: str = "kvm") -> Done:
        with self.front_end(state, hypervisor) as asked, self.start(asked, action, *arguments) as process:
            stdout, stderr = process.communicate(timeout=60)
        assert not self.lab.hosts.workers(HOST) or eventually(lambda: not self.lab.hosts.workers(HOST))
        assert self.domain.state() == "running" and self.domain.job() == self.domain.job("vdb") == ""
        return Done(process.returncode, stdout.decode(), stderr.decode())

    def ok(self, state: int, action: str, *arguments: str) -> None:
        done = self.run(state, action, *arguments)
        assert (done.status, done.stdout) == (0, ""), done.stderr
        check_stderr(done, action)

    def fails(self, status: int, text: str, state: int, action: str, *arguments: str, hypervisor: str = "kvm") -> None:
        done = self.run(state, action, *arguments, hypervisor=hypervisor)
        assert (done.status, text in check_stderr(done, action)) == (status, True), done

    def disk(self, number: int = 0) -> str:
        return f"{HOST}:{self.path}/disk.{number}"

    def blocks(self, name: str, count: int = 5) -> list[int]:
        """blocks() of a file of the VM directory as a program on the host finds it."""
        self.domain.flush()
        raw = f"{self.path}/as raw"
        self.on_host("convert", "-U", "-f", "qcow2", "-O", "raw", f"{self.path}/{name}", raw)
        with open(self.lab.hosts.on(HOST, raw), "rb") as file:
            found = []
            for block in range(count):
                file.seek(block * MIB)
                data = file.read(65536)
                assert data == data[:1] * 65536
                found.append(data[0])
        os.unlink(self.lab.hosts.on(HOST, raw))
        return found

    def left(self) -> list[str]:
        return sorted(str(path.relative_to(self.vm)) for path in self.vm.rglob("*"))


@pytest.fixture
def cloud(clean: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    rc = Path(clean.hosts.var, "remotes/etc/vmm/kvm/kvmrc")
    rc.parent.mkdir(parents=True)
    rc.write_text(f"# as stock\nexport LIBVIRT_URI={clean.uri}\nexport VIRSH_TIMEOUT=20\n")
    yield Cloud(clean, tmp_path)
    shutil.rmtree(Path(clean.hosts.var, "remotes"))
    for place in (Path(clean.hosts.datastores), clean.hosts.on(HOST)):
        subprocess.run(["rm", "-rf", *place.iterdir()], check=True)


@pytest.mark.parametrize("driver", ["ssh", "shared"])
def test_cpds_of_a_running_disk(cloud: Cloud, driver: str) -> None:
    """Under writes, and by a guest that has to stand still where the hypervisor cannot copy."""
    before, near = cloud.left(), driver == "shared"
    for number, name in enumerate(("first", "again", "other")):
        target = f"{cloud.lab.hosts.datastores}/1/{name}"
        image = Path(target) if not near else cloud.lab.hosts.on(HOST, target)
        image.parent.mkdir(exist_ok=True)
        if name == "other":
            cloud.lab.when("blockcopy", "echo error: cannot >&2; exit 1")
        cloud.domain.write(1, number)
        # what stands for the guest here writes through the monitor, and does not stand still when the guest does
        with cloud.domain.busy() if name != "other" else contextlib.nullcontext():
            cloud.ok(SAVING, f"tm/{driver}/cpds", cloud.disk(), target, "-1")
        found = blocks(image, 32)
        assert found[:2] == [1, number] and found[30] - found[31] in (0, 1)
        assert image.stat().st_mode & 0o777 == 0o644
        assert ("suspend" in cloud.lab.asked()) == (name == "other")
        cloud.ok(SAVING, f"tm/{driver}/cpds", cloud.disk(1), target, "-1")
        assert image.read_bytes() == b"\5" * MIB + bytes(7 * MIB)
    assert cloud.left() == before
    assert {path.name for path in image.parent.iterdir()} == {"again", "first", "other", *(["image"] if near else [])}


def test_cpds_of_a_running_disk_killed(cloud: Cloud) -> None:
    cloud.domain.write(8, 7, 16 * MIB)
    before, target = cloud.left(), f"{cloud.lab.hosts.datastores}/1/image"
    Path(target).parent.mkdir()
    slow = cloud.lab.top / "slow"
    slow.touch()
    for who in ("action", "worker"):
        with cloud.front_end(SAVING) as asked, cloud.start(asked, "tm/ssh/cpds", cloud.disk(), target, "-1") as process:
            assert eventually(cloud.domain.job)
            if who == "action":
                process.kill()
            else:
                for worker in cloud.lab.hosts.workers(HOST):
                    os.kill(worker, signal.SIGKILL)
            process.communicate()
        assert eventually(lambda: not cloud.domain.job()), f"the job is left when the {who} is killed"
        assert not os.path.exists(target)
    slow.unlink()
    cloud.ok(SAVING, "tm/ssh/cpds", cloud.disk(), target, "-1")
    assert blocks(Path(target), 10) == [1, 0, 0, 0, 0, 0, 0, 0, 7, 7]
    assert cloud.left() == before


def test_other_hypervisors_are_refused_by_name(cloud: Cloud) -> None:
    target = f"{cloud.lab.hosts.datastores}/1/image"
    text = "VM 17 is run by lxc: disks of a running VM can be worked on under kvm alone"
    cloud.fails(24, text, SAVING, "tm/ssh/cpds", cloud.disk(), target, "-1", hypervisor="lxc")
    cloud.fails(24, text, MAKING, "tm/shared/snap_create_live", cloud.disk(1), "0", hypervisor="lxc")
    cloud.fails(24, text, DELETING, "tm/shared/snap_delete", cloud.disk(), "0", hypervisor="lxc")
    assert cloud.run(DELETING, "tm/shared/snap_delete", cloud.disk(1), "0", hypervisor="lxc").status == 0, "a copy"


@pytest.mark.parametrize(
    ("kvmrc", "state", "expected"),
    [
        ("", 26, {"uri": "qemu:///system", "domain": "one-17", "timeout": 60}),
        ("export LIBVIRT_URI='qemu+unix:///s'\nVIRSH_TIMEOUT=5", 59, {"uri": "qemu+unix:///s", "timeout": 5}),
        ("", 53, None),
        ("", 8, None),
        ("VIRSH_TIMEOUT=soon", 57, "VIRSH_TIMEOUT of kvmrc is 'soon', expected a number of seconds"),
        ("VIRSH_TIMEOUT=0", 57, "VIRSH_TIMEOUT of kvmrc is '0'"),
    ],
)
def test_who_runs_a_vm(
    kvmrc: str, state: int, expected: dict[str, object] | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONE_LOCATION", str(tmp_path))
    rc = tmp_path / "var/remotes/etc/vmm/kvm/kvmrc"
    rc.parent.mkdir(parents=True)
    rc.write_text(kvmrc)
    vm = tm.VM(17, 0)
    vm._known = dump.VM(document(state))
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            vm.guest()
    else:
        found = vm.guest()
        assert found == ({"domain": "one-17", **expected} if expected else None)
    vm._known = dump.VM(document(state).replace(b"<DEPLOY_ID>one-17", b"<DEPLOY_ID>"))
    if expected is not None:
        with pytest.raises(NotFound, match="does not say what the hypervisor calls VM 17"):
            vm.guest()


# -- snapshots -------------------------------------------------------------------------------------------------


def test_snapshots_of_a_running_disk_come_and_go(cloud: Cloud) -> None:
    for number in range(4):
        for _ in range(2):
            cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), str(number))
        assert os.readlink(cloud.vm / "disk.0") == f"disk.0.snap/{number + 1}"
        assert cloud.domain.sources()[0] == f"{cloud.path}/disk.0.snap/{number + 1}"
        cloud.domain.write(number + 1, number + 2)
    for _ in range(2):  # what the disk lies on
        cloud.ok(DELETING, "tm/shared/snap_delete", cloud.disk(), "3")
    assert cloud.domain.files() == [4, 2, 1, 0, -1]
    for _ in range(2):  # in the middle
        cloud.ok(DELETING, "tm/shared/snap_delete", cloud.disk(), "1")
    assert cloud.domain.files() == [4, 1, 0, -1]
    assert cloud.blocks("disk.0") == [1, 2, 3, 4, 5]
    image = f"{cloud.lab.hosts.datastores}/1/saved"
    for snapshot, content in ((2, [1, 2, 3, 0, 0]), (0, [1, 0, 0, 0, 0])):
        cloud.ok(SAVING, "tm/shared/cpds", cloud.disk(), image, str(snapshot))
        assert blocks(cloud.lab.hosts.on(HOST, image), 5) == content
    left = cloud.left()
    text = "snap/0 cannot be written while one-17 runs"  # see test_commit_never_writes_through_a_link
    cloud.fails(24, text, DELETING, "tm/shared/snap_delete", cloud.disk(), "0")
    assert cloud.left() == left and cloud.blocks("disk.0") == [1, 2, 3, 4, 5]
    cloud.ok(DELETING, "tm/ssh/snap_delete", cloud.disk(), "2")
    cloud.ok(DELETING, "tm/shared/snap_delete", cloud.disk(), "0")
    assert cloud.domain.files() == [4, -1] and cloud.blocks("disk.0") == [1, 2, 3, 4, 5]
    assert cloud.left() == ["disk.0", "disk.0.snap", "disk.0.snap/4", "disk.0.snap/disk.0.snap", "disk.1"]


def test_files_that_name_one_another_by_number(cloud: Cloud) -> None:
    """On hosts' own storage; the hypervisor is given what the disk leads to, from where alone the names lead on."""
    cloud.lab.virsh("destroy", "one-17")
    snap, disks = cloud.vm / "disk.0.snap", f"raw={cloud.path}/disk.1"
    (snap / "disk.0.snap").unlink()
    (snap / "0").unlink()
    cloud.on_host("create", "-q", "-f", "qcow2", f"{cloud.path}/disk.0.snap/0", "64M")
    cloud.domain = Domain(cloud.lab, "one-17", f"qcow2={cloud.path}/disk.0.snap/0", disks)
    cloud.domain.write(0, 1)
    for number in range(4):
        cloud.ok(MAKING, "tm/local/snap_create_live", cloud.disk(), str(number))
        cloud.domain.write(number + 1, number + 2)
    assert not (snap / "disk.0.snap").exists()
    for snapshot, left in ((3, [4, 2, 1, 0]), (1, [4, 1, 0]), (0, [4, 0])):
        for _ in range(2):
            cloud.ok(DELETING, "tm/local/snap_delete", cloud.disk(), str(snapshot))
        assert cloud.domain.files() == left
        for file, below in itertools.zip_longest(left, left[1:]):
            about = json.loads(cloud.on_host("info", "-U", "--output=json", f"{cloud.path}/disk.0.snap/{file}"))
            assert about.get("backing-filename") == (None if below is None else str(below))
        assert cloud.blocks(os.readlink(cloud.vm / "disk.0")) == [1, 2, 3, 4, 5]
    image = f"{cloud.lab.hosts.datastores}/1/saved"
    cloud.ok(SAVING, "tm/shared/cpds", cloud.disk(), image, "2")
    assert blocks(cloud.lab.hosts.on(HOST, image), 5) == [1, 2, 3, 0, 0]
    cloud.lab.virsh("destroy", "one-17")
    cloud.domain = Domain(cloud.lab, "one-17", f"qcow2={cloud.path}/{os.readlink(cloud.vm / 'disk.0')}", disks)
    cloud.ok(MAKING, "tm/local/snap_create_live", cloud.disk(), "4")
    assert cloud.domain.files() == [5, 4, 0]
    assert cloud.blocks("disk.0.snap/5") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("driver", ["ssh", "shared"])
def test_copy_of_a_running_raw_disk(cloud: Cloud, driver: str) -> None:
    content = (cloud.vm / "disk.1").read_bytes()
    for _ in range(2):
        cloud.ok(MAKING, f"tm/{driver}/snap_create_live", cloud.disk(1), "0")
        assert (cloud.vm / "disk.1.snap/0").read_bytes() == content
    assert "suspend" in cloud.lab.asked()
    cloud.ok(DELETING, f"tm/{driver}/snap_delete", cloud.disk(1), "0")
    assert not (cloud.vm / "disk.1.snap/0").exists()


def test_snapshot_by_a_worker_that_is_killed_at_once(cloud: Cloud) -> None:
    """The disk leads to what the guest writes, whoever is killed; stock scripts leave it where it was."""
    worker = "pid=$PPID; for up in 1 2; do pid=$(cut -d ' ' -f 4 /proc/$pid/stat); done"  # timeout, sh, the worker
    cloud.lab.when("snapshot-create-as", f"{worker}; kill -9 $pid; sleep 1")
    done = cloud.run(MAKING, "tm/shared/snap_create_live", cloud.disk(), "0")
    assert done.status == 10, done.stderr
    (cloud.lab.top / "snapshot-create-as").unlink()
    assert eventually(lambda: cloud.domain.files() == [1, 0, -1])
    assert eventually(lambda: os.readlink(cloud.vm / "disk.0") == "disk.0.snap/1")
    cloud.domain.write(1, 2)
    cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), "0")
    cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), "1")
    assert cloud.domain.files() == [2, 1, 0, -1] and cloud.blocks("disk.0", 2) == [1, 2]


def premigrate(cloud: Cloud, driver: str, hypervisor: str = "kvm") -> Done:
    told = base64.b64encode(document(3, hypervisor))
    with cloud.front_end(3, hypervisor) as asked:
        argv = [f"tm/{driver}/premigrate", HOST, "host01", cloud.path, "17", "0"]
        return run_action(*argv, env={**cloud.lab.hosts.env, **asked}, input=told)


@pytest.mark.parametrize("driver", ["ssh", "shared"])
def test_a_vm_whose_names_lead_elsewhere_cannot_migrate(cloud: Cloud, driver: str) -> None:
    """It was started by the link disk.0, which leads to another file since the first live snapshot."""
    lab, there = cloud.lab, cloud.lab.hosts.on("host01", cloud.path)
    assert premigrate(cloud, driver).status == 0
    cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), "0")
    subprocess.run(["rm", "-rf", there.parent], check=True)
    done = premigrate(cloud, driver)
    assert done.status == 24, done
    message = check_stderr(done, "premigrate")
    assert (
        f"one-17 cannot go to another host while it runs: libvirt knows the file {cloud.path}/disk.0.snap/0" in message
    )
    assert f"as {cloud.path}/disk.0, which leads to {cloud.path}/disk.0.snap/1 by now" in message
    assert not there.parent.exists()  # nothing was prepared
    # who starts it as today's front-end does has no such names
    lab.virsh("destroy", "one-17")
    cloud.domain = Domain(lab, "one-17", f"qcow2={cloud.path}/disk.0.snap/1", f"raw={cloud.path}/disk.1")
    cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), "1")
    assert premigrate(cloud, driver).status == 0


def test_a_libvirt_that_does_not_answer_stops_no_migration(cloud: Cloud) -> None:
    """The hypervisor finds out itself; other hypervisors, and VMs without such disks, are not asked about."""
    cloud.lab.when("dumpxml", "echo 'error: failed to connect' >&2; exit 1")
    done = premigrate(cloud, "shared")
    assert done.status == 0 and "WARN: premigrate: not known whether the disks can be opened" in done.stderr, done
    assert premigrate(cloud, "shared", hypervisor="lxc").stderr == ""


def test_disk_leads_to_what_the_guest_writes_again(cloud: Cloud) -> None:
    """As after a power cut of the worker's process alone, between the hypervisor's step and the link."""
    cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), "0")
    cloud.domain.write(1, 2)
    (cloud.vm / "disk.0").unlink()
    (cloud.vm / "disk.0").symlink_to("disk.0.snap/0")
    cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), "0")
    assert os.readlink(cloud.vm / "disk.0") == "disk.0.snap/1" and cloud.domain.files() == [1, 0, -1]
    assert cloud.blocks("disk.0", 2) == [1, 2]


@pytest.mark.parametrize("snapshot", [1, 2])
def test_removal_killed_in_the_middle_of_its_job(cloud: Cloud, snapshot: int) -> None:
    for number in range(3):
        cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), str(number))
        cloud.domain.write(8 + 8 * number, number + 2, 8 * MIB)
    slow = cloud.lab.top / "slow"
    slow.touch()
    with cloud.front_end(DELETING) as asked:
        with cloud.start(asked, "tm/shared/snap_delete", cloud.disk(), str(snapshot)) as process:
            assert eventually(cloud.domain.job)
            for worker in cloud.lab.hosts.workers(HOST):
                os.kill(worker, signal.SIGKILL)
            process.communicate()
    assert eventually(lambda: not cloud.domain.job()), "the job is left"
    assert cloud.domain.files() == [3, 2, 1, 0, -1] and cloud.blocks("disk.0", 25)[::8] == [1, 2, 3, 4]
    slow.unlink()
    cloud.ok(DELETING, "tm/shared/snap_delete", cloud.disk(), str(snapshot))
    assert cloud.domain.files() == [3, 1, 0, -1]
    assert cloud.blocks("disk.0", 25)[::8] == [1, 2, 3, 4]


def test_no_file_of_a_fixed_name_in_tmp(cloud: Cloud) -> None:
    """Stock has /tmp/snapshot-<vm>-<disk>-<snapshot>, which anybody on the host can make beforehand."""
    planted = Path("/tmp/snapshot-17-0-0")
    planted.symlink_to(cloud.lab.top / "victim")
    try:
        cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), "0")
        assert planted.is_symlink() and not (cloud.lab.top / "victim").exists()
        assert {path.name for path in cloud.vm.iterdir()} == {"disk.0", "disk.0.snap", "disk.1"}
    finally:
        planted.unlink()


def test_persistent_disk_on_shared_storage(cloud: Cloud) -> None:
    """Its files are the image's, and the disk leads there."""
    cloud.lab.virsh("destroy", "one-17")
    snap = cloud.lab.hosts.on(HOST, f"{cloud.image}.snap")
    snap.mkdir()
    (snap / "image.snap").symlink_to(".")
    (snap / "0").symlink_to(cloud.image)
    (cloud.vm / "disk.0").unlink()
    (cloud.vm / "disk.0").symlink_to(f"{cloud.image}.snap/0")
    shutil.rmtree(cloud.vm / "disk.0.snap")
    cloud.domain = Domain(cloud.lab, "one-17", f"qcow2={cloud.path}/disk.0", f"raw={cloud.path}/disk.1")
    cloud.domain.write(0, 1)
    for number in range(2):
        for _ in range(2):
            cloud.ok(MAKING, "tm/shared/snap_create_live", cloud.disk(), str(number))
        assert os.readlink(cloud.vm / "disk.0") == f"{cloud.image}.snap/{number + 1}"
        cloud.domain.write(number + 1, number + 2)
    text = f"image would be named {cloud.path}/disk.0 in a header"  # where its own link is, a circle
    cloud.fails(24, text, DELETING, "tm/shared/snap_delete", cloud.disk(), "1")
    assert cloud.domain.files() == [2, 1, 0] and cloud.blocks("disk.0", 3) == [1, 2, 3]
