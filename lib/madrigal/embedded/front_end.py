"""The embedded front-end: one directory that is a whole front-end, and the running of driver actions from it.

What it does with hosts, datastores, images and VMs is in the modules of these names.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shlex
import socket
import sys
from types import TracebackType

from lxml import etree

from madrigal.embedded import documents, rpc, shim
from madrigal.embedded.datastores import Datastores
from madrigal.embedded.hosts import Hosts
from madrigal.embedded.images import Images
from madrigal.embedded.lifecycle import Layout, Line
from madrigal.embedded.records import CONTRACTS, VM, Datastore, Host, Image, path, word
from madrigal.embedded.run import ActionFailed, Call, Observer, Outcome, run
from madrigal.embedded.state import KINDS, State
from madrigal.embedded.vms import VMs
from madrigal.errors import ConfigError, InUse, UsageError

SYSTEM_TM = "ssh"
_VM_DISK = re.compile(r"/(disk\.\d+)$")


def default_state() -> str:
    """$MADRIGAL_STATE, else madrigal/ in the user's data directory."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.environ.get("MADRIGAL_STATE") or f"{data}/madrigal"


def default_tree() -> str:
    """The directory with datastore/ and tm/ that belongs to this library: a checkout's, or PREFIX/share/madrigal."""
    directory = here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    while directory != "/":
        directory = os.path.dirname(directory)
        for tree in (directory, f"{directory}/share/madrigal"):
            if os.path.isdir(f"{tree}/tm") and os.path.isdir(f"{tree}/datastore"):
                return tree
    raise ConfigError(f"no datastore/ and tm/ belong to the library in {here}: name their directory with --tree")


class FrontEnd:
    """A front-end in the directory STATE, made on first use; a context manager.

    CONTRACT (3.4 or current), DATASTORES (DATASTORE_LOCATION) and HOSTNAME (the front-end's name in arguments) are
    remembered from their first use; the first two cannot be changed once there is something in it.
    TREE has datastore/ and tm/.  WITH_SHIM: drivers find onevm and its like in PATH.
    Errors are those of madrigal.errors; a failed driver action raises run.ActionFailed.
    """

    def __init__(
        self,
        state: str = "",
        contract: str = "",
        tree: str = "",
        datastores: str = "",
        hostname: str = "",
        with_shim: bool = False,
        observer: Observer | None = None,
    ) -> None:
        self.directory = path(os.path.abspath(state or default_state()), "the state directory")
        self.observer = observer or Observer()
        self.tree = os.path.abspath(tree) if tree else default_tree()
        if not os.path.isdir(f"{self.tree}/tm") or not os.path.isdir(f"{self.tree}/datastore"):
            raise ConfigError(f"{self.tree} has no datastore/ and tm/")
        self._with_shim = with_shim
        self._answering: rpc.Answering | None = None
        self.state = State(self.directory)
        try:
            with self.state.transaction():
                self.layout = self._settle(contract, datastores, hostname)
            self._furnish()
        except BaseException:
            self.state.close()
            raise
        self.documents = documents.Documents(self.layout.contract)
        self.hosts = Hosts(self)
        self.datastores = Datastores(self)
        self.datastores.complete()
        self.images = Images(self)
        self.vms = VMs(self)

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._answering:
            self._answering.close()
            self._answering = None
        self.state.close()

    def _settle(self, contract: str, datastores: str, hostname: str) -> Layout:
        if contract and contract not in CONTRACTS:
            raise UsageError(f"the contract is '{contract}', expected {' or '.join(CONTRACTS)}")
        state, var = self.state, f"{self.directory}/var"
        fresh = not any(map(state.count, (Host, Image, VM))) and state.count(Datastore) <= 1
        contract = self._remember("contract", contract, "current", fresh)
        # Today's front-ends write a double slash here, which a driver has to bear.
        default = f"{var}/datastores" if contract == "3.4" else f"{var}//datastores"
        given = path(os.path.normpath(datastores), "--datastores") if datastores else ""
        datastores = self._remember("datastores", given, default, fresh)
        if hostname:
            state.set("hostname", word(hostname, "the front-end's name"))
        if not state.setting("token"):
            state.set("token", secrets.token_hex(20))
        if not state.count(Datastore):
            state.save(Datastore(state.number("datastore"), "system", "system", "-", SYSTEM_TM))
        return Layout(contract, var, datastores, state.setting("hostname") or socket.gethostname())

    def _remember(self, name: str, value: str, default: str, fresh: bool) -> str:
        """The setting NAME, which is DEFAULT unless VALUE was given; raises InUse if it is too late to give another."""
        known = self.state.setting(name) or default
        if not value or os.path.normpath(value) == os.path.normpath(known):
            return known
        if not fresh:
            raise InUse(f"{self.directory} was made with {name} {known}: use another --state for {value}")
        self.state.set(name, value)
        return value

    def _furnish(self) -> None:
        """What drivers expect to find below ONE_LOCATION."""
        for directory in (self.layout.var, self.layout.base_path(0), f"{self.directory}/bin"):
            os.makedirs(directory, exist_ok=True)
        self._write(f"{self.layout.var}/config", f"DATASTORE_LOCATION={self.layout.datastores}\n")
        self._write(f"{self.directory}/one_auth", f"oneadmin:{self.state.setting('token')}\n", 0o600)
        for name in shim.KINDS:
            command = [sys.executable, "-I", os.path.realpath(shim.__file__), name]
            text = f'#!/bin/sh\nexec {" ".join(map(shlex.quote, command))} "$@"\n'
            self._write(f"{self.directory}/bin/{name}", text, 0o777)
        # Stock drivers source files of $ONE_LOCATION/var/remotes and $ONE_LOCATION/lib/sh.
        remotes = f"{self.tree}/remotes" if os.path.isdir(f"{self.tree}/remotes/etc") else self.tree
        self._link(remotes, f"{self.layout.var}/remotes")
        self._link(self.tree, f"{self.directory}/lib/sh")

    def _write(self, file: str, text: str, mode: int = 0o644) -> None:
        """Give FILE this text, unless it has it: others may be reading it."""
        try:
            with open(file, encoding="utf-8") as old:
                if old.read() == text:
                    return
        except FileNotFoundError:
            pass
        part = f"{file}.{os.getpid()}"
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as new:
            new.write(text)
        os.replace(part, file)

    def _link(self, target: str, link: str) -> None:
        if os.path.islink(link) and os.readlink(link) == target:
            return
        os.makedirs(os.path.dirname(link), exist_ok=True)
        part = f"{link}.{os.getpid()}"
        os.symlink(target, part)
        os.replace(part, link)

    # Running driver actions

    def transfer(self, line: Line, stdin: bytes = b"") -> Outcome:
        """Run one line of a transfer script as one_tm does; raises ActionFailed."""
        for argument in line.arguments:
            word(argument, f"an argument of {line.verb}")
        action, _, suffix = line.verb.lower().partition(".")
        directory = f"{self.tree}/tm/{line.tm_mad}"
        if not os.path.isdir(directory):
            raise ActionFailed(f"Transfer Driver '{line.tm_mad}' not available: {directory} does not exist")
        file = f"{directory}/{line.verb.lower()}"
        if suffix and not os.path.exists(file):
            file = f"{directory}/{action}"
        if not os.path.exists(file):
            raise ActionFailed(f"{file} does not exist: driver '{line.tm_mad}' cannot do '{action}'")
        return self._run(Call(file, line.arguments, _title(action, line), stdin, source=_source(action, line)))

    def monitor_system(self, datastore: Datastore, dump: bytes) -> Outcome:
        """Ask the driver of a shared system datastore, as one_datastore does; the outcome may be a failure."""
        file = f"{self.tree}/tm/{datastore.tm_mad}/monitor"
        if not os.path.exists(file):
            raise ActionFailed(f"{file} does not exist: driver '{datastore.tm_mad}' cannot monitor")
        return self._run(Call(file, (str(datastore.id),), f"monitor {datastore.name}", stdin=dump), check=False)

    def hypervisor(self, program: str, arguments: tuple[str, ...], stdin: bytes) -> Outcome:
        """Run what moves a running VM in place of a hypervisor; raises ActionFailed."""
        return self._run(Call(program, arguments, " ".join(("hypervisor", *arguments[:3])), stdin))

    def datastore_action(
        self, action: str, ident: int, dump: bytes, datastore: Datastore, what: str, source: str = ""
    ) -> Outcome:
        """Run a datastore driver's ACTION as one_datastore does; the outcome may be a failure."""
        directory = f"{self.tree}/datastore/{datastore.ds_mad}"
        if not os.path.isdir(directory):
            raise ActionFailed(f"Datastore driver '{datastore.ds_mad}' not available: {directory} does not exist")
        file = f"{directory}/{action}"
        if not os.path.exists(file):
            raise ActionFailed(f"{file} does not exist: driver '{datastore.ds_mad}' cannot do '{action}'")
        title = f"{action} {datastore.name} {what}".rstrip()
        if self.layout.contract == "3.4":
            call = Call(file, (dump.decode(), str(ident)), title, secret=dump, source=source)
        else:
            call = Call(file, (str(ident),), title, stdin=dump, source=source)
        return self._run(call, check=False)

    def _run(self, call: Call, check: bool = True) -> Outcome:
        outcome = run(call, self.layout.contract, self.layout.var, self._environment(), self.observer)
        if check and not outcome.ok:
            raise ActionFailed(f"{call.title} failed: {outcome.reason}")
        return outcome

    def _environment(self) -> dict[str, str]:
        if not self._answering:
            show = {kind: functools.partial(self._show, kind) for kind in KINDS.values()}
            self._answering = rpc.Answering(self.state.setting("token"), show)
        env = dict(os.environ)
        env.pop("MADRIGAL_CONTRACT", None)  # drivers recognise the form from their arguments
        env.update(ONE_LOCATION=self.directory, PRIORITY="19", ONE_MAD_DEBUG="")
        env.update(ONE_XMLRPC=self._answering.url, ONE_AUTH=f"{self.directory}/one_auth")
        if self.layout.front_end != socket.gethostname():
            env["MADRIGAL_FRONTEND"] = f"{env.get('MADRIGAL_FRONTEND', '')} {self.layout.front_end}".strip()
        if self._with_shim:
            env["PATH"] = f"{self.directory}/bin:{env.get('PATH', '/usr/bin:/bin')}"
        return env

    # Documents.  The answering threads ask for them with a State of their own.

    def image_document(self, image: Image, state: State, reserve: bool = False, snapshot: int = -1) -> etree._Element:
        datastore = state.get(Datastore, image.datastore_id)
        users = [vm.id for vm in state.all(VM) if vm.uses(image.id)]
        return self.documents.image(image, datastore, users, reserve, snapshot)

    def datastore_document(self, datastore: Datastore, state: State) -> etree._Element:
        images = [image.id for image in state.all(Image) if image.datastore_id == datastore.id]
        return self.documents.datastore(datastore, self.layout.base_path(datastore.id), images)

    def vm_document(self, vm: VM, state: State | None = None) -> bytes:
        state = state or self.state
        images = {image.id: image for image in state.all(Image)}
        datastores = {datastore.id: datastore for datastore in state.all(Datastore)}
        return documents.text(self.documents.vm(vm, images, datastores))

    def _show(self, kind: str, ident: str | int) -> bytes:
        with contextlib.closing(State(self.directory)) as state:
            if kind == "image":
                return documents.text(self.image_document(state.find(Image, ident), state))
            if kind == "datastore":
                return documents.text(self.datastore_document(state.find(Datastore, ident), state))
            if kind == "host":
                host = state.find(Host, ident)
                users = [vm.id for vm in state.all(VM) if vm.on_host(host.id)]
                return documents.text(self.documents.host(host, users))
            return self.vm_document(state.find(VM, ident), state)


def _place(argument: str) -> tuple[str, str]:
    host, _, directory = argument.rpartition(":")
    disk = _VM_DISK.search(directory)
    return host, disk[1] if disk else "directory"


def _title(action: str, line: Line) -> str:
    """`clone host01 disk.0`, `mv host01 host02 directory`, `premigrate host01 host02`."""
    if action.endswith("migrate"):
        return " ".join((action, *line.arguments[:2]))
    places = [argument for argument in line.arguments if argument.partition(":")[2].startswith("/")]
    if action == "mv":
        (origin, _), (target, what) = _place(places[0]), _place(places[1])
        return f"mv {origin} {target} {what}"
    at = next((place for place in places if _VM_DISK.search(place)), places[-1])
    return " ".join((action, *_place(at)))


def _source(action: str, line: Line) -> str:
    """The file on the front-end that a line reads or writes."""
    if action in ("clone", "ln"):
        return line.arguments[0].partition(":")[2]
    return line.arguments[1] if action in ("mvds", "cpds") else ""
