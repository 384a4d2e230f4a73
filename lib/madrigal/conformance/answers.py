"""The front-end that drivers ask, and what they expect to find below its ONE_LOCATION."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

from madrigal.conformance.machines import Machines
from madrigal.embedded import rpc, shim
from madrigal.errors import NotFound

if TYPE_CHECKING:
    from madrigal.conformance.stage import Stage

TOKEN = "token-Zq7vK2mX"
"""What must not be seen: the front-end's session."""


NONE_BY_NFS = """[ "$*" != "list --json" ] || { echo '{"DATASTORE_POOL": {"DATASTORE": []}}'; exit; }
"""
"""Some ask which datastores hosts are to mount, and understand this alone."""


class Answers:
    """The front-end that drivers ask, for all stages: its documents are those of the stage that is set."""

    def __init__(self) -> None:
        self.started = 0
        """How many actions were."""
        self.stages: dict[int, Stage] = {}
        self.stage: Stage | None = None
        kinds = {"vm": "vm_document", "datastore": "datastore_document", "host": "host_document"}
        self._answering = rpc.Answering(TOKEN, {kind: self._show(name) for kind, name in kinds.items()})
        self.url = self._answering.url

    def _show(self, name: str) -> rpc.Show:
        def show(ident: int | str) -> bytes:
            stage = self.stages.get(int(ident), self.stage) if name == "vm_document" else self.stage
            if stage is None:
                raise NotFound("no VM")
            document: bytes = getattr(stage, name)(int(ident))
            return document

        return show

    def close(self) -> None:
        self._answering.close()


def furnish(machines: Machines, tree: str) -> None:
    """What drivers expect to find below ONE_LOCATION, and the commands that ask the front-end."""
    work = machines.work
    os.makedirs(f"{work}/one/lib", exist_ok=True)
    for name, content, mode in (
        ("one/var/config", f"DATASTORE_LOCATION={machines.location}\n", 0o644),
        ("one_auth", f"oneadmin:{TOKEN}\n", 0o600),
    ):
        with open(os.open(f"{work}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
            file.write(content)
    for name in shim.KINDS:
        command = shlex.join([sys.executable, "-I", os.path.realpath(shim.__file__), name])
        with open(os.open(f"{work}/bin/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755), "w") as file:
            file.write(f'#!/bin/sh\n{NONE_BY_NFS if name == "onedatastore" else ""}exec {command} "$@"\n')
    point(machines, tree)


def point(machines: Machines, tree: str) -> None:
    """Let the front-end's tree of remotes be TREE."""
    remotes = f"{tree}/remotes" if os.path.isdir(f"{tree}/remotes/etc") else tree
    for target, link in ((remotes, f"{machines.work}/one/var/remotes"), (tree, f"{machines.work}/one/lib/sh")):
        if os.path.islink(link):
            os.unlink(link)
        os.symlink(target, link)
