"""A hypervisor on the hosts: a `virsh` that tells of VMs as if they ran, lets them stand still and go on.

What such a VM does can be told from its disk: as long as it stands still, the block at PLACE has bytes STILL, when it
goes on GOING.  Whatever was copied of the disk in between has the first.
"""

from __future__ import annotations

import os

from madrigal.conformance.stage import MIB, Stage

PLACE = 2 * MIB
STILL, GOING = 0x41, 0x42

_VIRSH = r"""#!/bin/sh
PATH=/usr/bin:/bin
while :; do
  case $1 in -c | --connect) shift 2 ;; -*) shift ;; *) break ;; esac
done
word=$1 domain=$2
for about in %(location)s/*/.guests/"$domain"; do [ ! -e "$about" ] || break; done
[ -e "$about" ] || { echo "error: failed to get domain '$domain'" >&2; exit 1; }
read -r disk <"$about"
writes() {
  head -c 65536 /dev/zero | tr '\0' "$1" | dd of="$disk" bs=4096 seek=%(seek)d conv=notrunc status=none
}
case $word in
  domstate) if [ -e "$about.still" ]; then echo paused; else echo running; fi ;;
  suspend) : >"$about.still" && writes A ;;
  resume) writes B && rm "$about.still" ;;
  blockjob) ;;
  dumpxml)
    echo "<domain type='kvm'><name>$domain</name><devices><disk type='file' device='disk'><driver type='raw'/>"
    echo "<source file='$disk' index='1'/><backingStore/><target dev='vda'/></disk></devices></domain>" ;;
  domfsfreeze | domfsthaw) echo "error: argument unsupported: QEMU guest agent is not configured" >&2; exit 1 ;;
  *) echo "error: the check's virsh does not know '$word'" >&2; exit 1 ;;
esac
"""


def run(stage: Stage, disk: str) -> None:
    """Let the VM run on its host with the raw DISK."""
    machine = stage.machine(stage.host)
    stage.vm.history[-1].vm_mad = "kvm"
    script = _VIRSH % {"location": stage.machines.location, "seek": PLACE // 4096}
    machine.keep("virsh", script)
    about = f"{stage.system}/.guests/one-{stage.vm_id}"
    machine.write(about, f"{os.path.normpath(disk)}\n".encode())
    stage.notes.append(f"one-{stage.vm_id} runs on {stage.host} with {disk}: `virsh` there says so")


def stands_still(stage: Stage) -> bool:
    """Whether somebody has suspended it and not let it go on."""
    about = f"{stage.system}/.guests/one-{stage.vm_id}.still"
    return bool(stage.machine(stage.host).sh('if [ -e "$1" ]; then echo yes; fi', about))
