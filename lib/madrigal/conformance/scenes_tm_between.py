"""What is asked of transfer drivers when a VM goes to another datastore while it runs (docs/contract.md)."""

from __future__ import annotations

from madrigal.conformance import vms
from madrigal.conformance.calls import Run
from madrigal.conformance.scenes import Play, gone, holds, kept, scene
from madrigal.conformance.stage import DATASTORES, Stage


@scene("tm", "postmigrate", "from another datastore", forms=vms.TODAY, needs=vms.owned)
def postmigrate(stage: Stage, _: str) -> Play:
    """The host that it leaves has no directory of the VM in the datastore that it comes to: its own has to be found."""
    content, before = stage.content(), DATASTORES["image"][False]
    disk = vms.described(stage, "raw", stage.image(content))
    old = f"{stage.machines.location}/{before}/{stage.vm_id}"
    stage.put(stage.host, f"{old}/disk.0", content)
    stage.put(stage.other, disk, content)
    stage.vm.state, stage.vm.lcm_state = 3, 4
    last = stage.vm.history[-1]
    stage.vm.history[-1] = type(last)(0, 0, stage.host, last.datastores, before, last.tm_mad, last.stime)
    stage.vm.history.append(type(last)(1, 1, stage.other, last.datastores, last.system_ds, last.tm_mad, last.stime))
    digest = stage.digest(content)

    def verify(run: Run) -> None:
        holds(stage, stage.other, disk, "raw", digest, "the disk on its new host")
        gone(stage, stage.host, old)

    changes = [stage.at(stage.host, path) for path in (old, f"{old}/*", f"{stage.system}/.monitor")]
    changes.append(stage.at(stage.other, f"{stage.system}/.monitor"))
    safe = kept(stage, [(stage.other, disk)], "raw", digest)
    return Play(vms.migration(stage, "postmigrate"), verify, changes, safe=safe)
