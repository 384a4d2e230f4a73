"""What an action costs with nothing to move.

Every action of the fs datastore and of the file-based transfer drivers is run by the embedded front-end on two SSH
hosts, with images that hold no data, and its CPU time taken (of the action and all it starts here).  The medians are
compared with that of `python3 -I -c 'import lxml.etree, subprocess, base64'` and with the drivers of another remotes
tree, run in turn with ours.  Here a ratio is what ours cost / what the other costs: less than 1 is better.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict

from bench.cloud import RIGS, TREE
from bench.contest import Findings, Options
from madrigal.embedded import Call, DiskRequest, FrontEnd, Observer, Outcome
from madrigal.host.openssh import disconnect

BASELINE = ["-I", "-c", "import lxml.etree, subprocess, base64"]
RIG = f"{RIGS}/hosts"
FORMATS = {"ssh": "raw", "shared": "raw", "qcow2": "qcow2", "local": "raw"}
"""The transfer drivers, and the format of the images that each is measured with."""

# Brings a VM's files as a hypervisor that copies storage would: migrate SOURCE TARGET DIRECTORY VMID
HYPERVISOR = """#!/bin/sh
set -eu
cat >/dev/null
ssh="ssh -F $MADRIGAL_SSH_CONFIG"
$ssh "$2" "tar -C '$4' -cSf - ." </dev/null | $ssh "$3" "mkdir -p '$4'; tar -C '$4' -xSf -"
"""

Costs = dict[str, list[float]]


def cpu() -> float:
    """Seconds of CPU of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Meter(Observer):
    """Collects the CPU seconds of every action by its name, such as tm.ssh.clone."""

    def __init__(self) -> None:
        self.costs: Costs = defaultdict(list)
        self._before = 0.0

    def started(self, call: Call) -> None:
        self._before = cpu()

    def finished(self, outcome: Outcome) -> None:
        kind, mad, action = outcome.call.path.split("/")[-3:]
        if kind not in ("datastore", "tm"):
            return  # what stands for the hypervisor
        name = f"{kind}.{mad}.{action.partition('.')[0]}"
        if action == "mv" and not outcome.call.title.endswith("directory"):
            name += "_disk"  # where a file-based driver has nothing to do
        self.costs[name].append(cpu() - self._before)


def life(front_end: FrontEnd, empty: str, form: str, hypervisor: str, number: int) -> None:
    """Everything that can happen to a VM with disks that hold no data."""
    clonable = front_end.images.create(f"image{number}", "default", path=empty)
    persistent = front_end.images.create(f"data{number}", "default", path=empty, persistent=True)
    block = front_end.images.create(f"block{number}", "default", size=16, format="raw", fs="ext4")
    disks = [
        DiskRequest(image=clonable.name),
        DiskRequest(image=persistent.name),
        DiskRequest(type="swap", size=16),
        DiskRequest(type="fs", format=form, fs="ext4", size=16),
    ]
    vms = front_end.vms
    vm = vms.create(f"vm{number}", disks, {"A": "b"}, []).id
    vms.deploy(vm, "host01")
    vms.stop(vm)
    vms.resume(vm, "host01")
    vms.poweroff(vm)
    for disk in (0, 0, 0):
        vms.snapshot_create(vm, disk)
    vms.snapshot_revert(vm, 0, 1)
    vms.snapshot_delete(vm, 0, 2)
    vms.resize(vm, 0, 32)
    vms.migrate(vm, "host02")
    saved = f"saved{number}"
    vms.disk_saveas(vm, 0, saved)
    vms.start(vm)
    vms.migrate(vm, "host01", live=True, hypervisor=hypervisor)
    vms.terminate(vm)
    for image in (clonable.name, persistent.name, block.name, saved):
        front_end.images.delete(image)


def lives(trees: dict[str, str], tm_mad: str, rounds: int, work: str) -> dict[str, Costs]:
    """The costs of ROUNDS lives by tree name, after one that is not counted; the trees take turns."""
    datastores, empty, hypervisor = f"{work}/datastores", f"{work}/empty", f"{work}/hypervisor"
    os.mkdir(datastores)
    with open(empty, "wb") as file:
        file.truncate(16 << 20)
    shared = tm_mad in ("shared", "qcow2")
    with open(hypervisor, "w", opener=lambda path, flags: os.open(path, flags, 0o755)) as file:
        file.write(HYPERVISOR)
    if shared:
        hypervisor = ""
    rig = [f"{work}/hosts", "-n", "2", *([] if shared else [datastores])]
    subprocess.run([f"{RIG}-up", *rig], check=True)
    # Stock drivers reach the front-end by ssh too.
    subprocess.run([f"{RIG}-up", f"{work}/hosts", "add", os.uname().nodename], check=True)
    # Bash drivers call ssh by its name; connections are kept for both, as a front-end's packages have it.
    with open(f"{work}/ssh_config", "w") as file, open(f"{work}/hosts/ssh_config") as known:
        file.write(known.read() + f"  ControlMaster auto\n  ControlPath {work}/run/%C\n  ControlPersist 600\n")
    with open(f"{work}/bash_env", "w") as file:
        file.write(f'ssh() {{ /usr/bin/ssh -F {work}/ssh_config "$@"; }}\nexport -f ssh\n')
    if tm_mad == "local":  # whose stock drivers are in Ruby
        os.mkdir(f"{work}/bin")
        ssh = f"{work}/bin/ssh"
        with open(ssh, "w") as file:
            file.write(f'#!/bin/sh\nexec /usr/bin/ssh -F {work}/ssh_config "$@"\n')
        os.chmod(ssh, 0o755)
        os.environ.update(SSH=ssh, SSH_FWD=ssh, RSYNC_RSH=ssh)
        os.environ["PATH"] = f"{work}/bin:{os.environ['PATH']}"
    os.mkdir(f"{work}/run", 0o700)
    os.environ.update(MADRIGAL_RUN_DIR=f"{work}/run", MADRIGAL_SSH_CONFIG=f"{work}/hosts/ssh_config")
    os.environ["BASH_ENV"] = f"{work}/bash_env"
    os.environ["PATH"] += "".join(f":{tree}/bin" for tree in trees.values())
    # Without its libraries a stock `onevm` fails, its drivers do not mind, and look faster than they are.
    libraries = [f"{tree}/ruby{part}" for tree in trees.values() for part in ("", "/cli")]
    os.environ["RUBYLIB"] = ":".join(filter(os.path.isdir, [*os.environ.get("RUBYLIB", "").split(":"), *libraries]))
    try:
        meters = {name: Meter() for name in trees}
        with contextlib.ExitStack() as stack:
            front_ends = {}
            for name, tree in trees.items():
                arguments = (f"{work}/{name}", "current", tree, f"{datastores}/{name}")
                with_shim = not os.path.exists(f"{tree}/bin/onevm")
                front_end = FrontEnd(*arguments, with_shim=with_shim, observer=meters[name])
                front_ends[name] = stack.enter_context(front_end)
                for host in ("host01", "host02"):
                    front_end.hosts.create(host)
                front_end.datastores.update(0, tm_mad=tm_mad)
                form = FORMATS[tm_mad]
                front_end.datastores.create("default", tm_mad=tm_mad, attrs={"DRIVER": form})
                life(front_end, empty, form, hypervisor, 0)
                meters[name].costs.clear()
            for number in range(1, rounds + 1):
                for name, front_end in front_ends.items():
                    print(f"\r{tm_mad}: round {number} of {rounds}, {name} ", end="", file=sys.stderr, flush=True)
                    life(front_end, empty, form, hypervisor, number)
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
        return {name: dict(meter.costs) for name, meter in meters.items()}
    finally:
        disconnect()
        subprocess.run([f"{RIG}-down", f"{work}/hosts"], check=True)
        shutil.rmtree(datastores)
        shutil.rmtree(f"{work}/run")


def baseline(rounds: int) -> float:
    times = []
    for _ in range(max(rounds, 11)):
        before = cpu()
        subprocess.run([sys.executable, *BASELINE], check=True)
        times.append(cpu() - before)
    return statistics.median(times)


def measure(options: Options) -> Findings:
    found = Findings()
    trees = {"ours": TREE, **({"stock": options.stock} if options.stock else {})}
    python = found.seconds["overhead.python"] = round(baseline(options.rounds), 4)
    for tm_mad in options.drivers or FORMATS:
        work = tempfile.mkdtemp(prefix="madrigal-bench-")
        try:
            costs = lives(trees, tm_mad, options.rounds, work)
        finally:
            shutil.rmtree(work)
        for name in sorted(costs["ours"]):
            if f"overhead.{name}.ours" in found.seconds:
                continue  # the datastore's, which every transfer driver's lives have
            ours = statistics.median(costs["ours"][name])
            found.seconds[f"overhead.{name}.ours"] = round(ours, 4)
            found.ratios[f"overhead.{name}.vs_python"] = round(ours / python, 2)
            if stock := costs.get("stock", {}).get(name):
                other = statistics.median(stock)
                found.seconds[f"overhead.{name}.stock"] = round(other, 4)
                found.ratios[f"overhead.{name}.vs_stock"] = round(ours / other, 3)
    return found
