"""The hosts the embedded front-end knows: names, and where datastores are on them.  It never connects to one itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from madrigal.embedded.records import VM, Host, name, path
from madrigal.errors import InUse, UsageError
from madrigal.location import Location

if TYPE_CHECKING:
    from madrigal.embedded.front_end import FrontEnd


class Hosts:
    def __init__(self, front_end: FrontEnd) -> None:
        self._front_end = front_end
        self._state = front_end.state

    def create(self, host: str, datastores: str = "", vmm: str = "") -> Host:
        """Add a host, by the name drivers reach it by.  DATASTORES: its DATASTORE_LOCATION, which in 3.4 may differ.

        VMM: VM_MAD of a hypervisor there that really runs the VMs, which somebody else starts (`kvm`).
        """
        Location.parse(f"{name(host, 'host')}:/x")
        layout = self._front_end.layout
        if datastores:
            datastores = path(datastores.rstrip("/"), "the host's datastore location")
            if layout.contract != "3.4" and datastores != layout.datastores:
                raise UsageError(
                    f"datastores are in {layout.datastores} on every machine in today's contract: "
                    "only --contract 3.4 has hosts that differ"
                )
        if vmm and (not re.fullmatch("[a-z0-9_]+", vmm) or layout.contract == "3.4"):
            raise UsageError(f"the VMM is {vmm[:60]!a}: expected one word as kvm, and today's contract")
        with self._state.transaction():
            self._state.check_free(Host, host)
            record = Host(self._state.number("host"), host, datastores or layout.datastores, vmm)
            self._state.save(record)
        return record

    def all(self) -> list[Host]:
        return self._state.all(Host)

    def get(self, host: str | int) -> Host:
        """By name or id; raises NotFound."""
        return self._state.find(Host, host)

    def delete(self, host: str | int) -> Host:
        """Forget a host; raises InUse while a VM is or has something there."""
        with self._state.transaction():
            record = self.get(host)
            users = [vm for vm in self._state.all(VM) if vm.on_host(record.id)]
            if users:
                raise InUse(f"VM {users[0].id} is on host '{record.name}': shut it down or delete it first")
            self._state.remove(record)
        return record
