"""A front-end for somebody without a cloud: it runs driver executables in the documented order, with SQLite for memory.

    with FrontEnd("/tmp/state", contract="current", observer=MyObserver()) as front_end:
        front_end.hosts.create("host01")
        front_end.datastores.create("default", tm_mad="ssh")
        image = front_end.images.create("ttylinux", "default", path="/srv/ttylinux.qcow2", persistent=True)
        vm = front_end.vms.create("vm01", [DiskRequest(image="ttylinux"), DiskRequest(type="swap", size=64)])
        front_end.vms.deploy(vm.id, "host01")

An Observer is told of every executable that starts and ends, with arguments, seconds, status and stderr.
"""

from madrigal.embedded.disks import DiskRequest
from madrigal.embedded.front_end import FrontEnd
from madrigal.embedded.run import ActionFailed, Call, Observer, Outcome

__all__ = ["ActionFailed", "Call", "DiskRequest", "FrontEnd", "Observer", "Outcome"]
