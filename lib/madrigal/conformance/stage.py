"""Where a driver's actions are run: a VM, an image and their bystanders on the machines, and a front-end that answers.

Everything here is from outside: an action is a process, and what it did is read from the machines' disks.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from madrigal.conformance.answers import TOKEN, Answers
from madrigal.conformance.calls import Call, Run
from madrigal.conformance.machines import PATH, BrokenRig, Machine, Machines
from madrigal.conformance.subject import Subject
from madrigal.conformance.watch import Watch
from madrigal.conformance.web import Web
from madrigal.embedded.documents import Documents, text
from madrigal.embedded.records import VM, Datastore, Disk, History, Host, Image
from madrigal.embedded.snapshots import Snapshots
from madrigal.errors import NotFound

MIB = 1 << 20
LIMIT = 180.0
"""Seconds after which an action hangs."""
SECRET = "secret-Yw4tR9bN"
"""What must not be seen, as the front-end's session: an attribute of a datastore."""
DATASTORES = {"system": (0, 100), "image": (1, 101)}
"""Ids: with each machine's own storage, and shared."""
VM_ID, OTHER_VM, IMAGE_ID = 17, 18, 42
REGTIME = 1335000000
TIMEOUTS = {"CONNECT": 5, "CONTROL": 20, "STALL": 20, "SILENCE": 20, "LOCK": 60}
SOON = {f"MADRIGAL_{name}_TIMEOUT": "4" for name in ("CONNECT", "CONTROL", "STALL")}
"""For an action whose deadlines are waited for."""


class Stage:
    """One VM and one image for SUBJECT, whose places are the same in every check."""

    def __init__(
        self, machines: Machines, subject: Subject, answers: Answers, helper: Subject | None = None, number: int = 0
    ) -> None:
        """NUMBER tells stages from one another that are in use at the same time."""
        self.machines, self.subject, self.answers, self.number = machines, subject, answers, number
        self.vm_id, self.image_id = VM_ID + (10 * number), IMAGE_ID + (10 * number)
        self.helper = helper or subject
        self.image_ds = DATASTORES["image"][subject.is_shared]
        self.base = f"{machines.location}/{self.image_ds}"
        self.is_shared = subject.is_shared
        """Whether disks are on storage that front-end and hosts share."""
        self.fe = machines.fe.name
        self.host, self.other = (machine.name for machine in machines.hosts[:2])
        self.import_dir = machines.imports
        self.documents = Documents(subject.form)
        self.runs: list[Run] = []
        self.notes: list[str] = []
        self.template: dict[str, str] = {"RESTIC_PASSWORD": SECRET}
        self.vm = self._new_vm()
        self.web: Web | None = None
        self.is_big = False
        """Whether images take a while to move."""
        self.under: list[str] = []
        """Words that actions are started with."""

    def store_apart(self) -> None:
        """Have the VM in a system datastore of the hosts' own storage, whatever the image is on."""
        self.is_shared = False
        self.vm = self._new_vm()

    @property
    def system_id(self) -> int:
        return DATASTORES["system"][self.is_shared]

    @property
    def system(self) -> str:
        return f"{self.machines.location}/{self.system_id}"

    @property
    def vm_dir(self) -> str:
        return f"{self.system}/{self.vm_id}"

    @property
    def hash(self) -> str:
        """A name as images have."""
        return f"0123456789abcdef0123456789abcde{self.number}"

    # -- documents ---------------------------------------------------------------------------------------------

    def _new_vm(self) -> VM:
        stay = History(0, 0, self.host, self.machines.location, self.system_id, self.subject.name, REGTIME)
        vm = VM(self.vm_id, "vm", self.system_id, context={"PASSWORD": SECRET}, state=8, lcm_state=0, stime=REGTIME)
        vm.history.append(stay)
        return vm

    def datastore(self, system: bool = False, type: str = "") -> Datastore:
        ident = self.system_id if system else self.image_ds
        kind = type or ("system" if system else "image")
        tm = self.subject.name if self.subject.kind == "tm" else "ssh"
        ds = self.subject.name if self.subject.kind == "datastore" else "fs"
        return Datastore(ident, f"ds{ident}", kind, "-" if system else ds, tm, dict(self.template), 4096, 2048, 2048)

    def vm_document(self, ident: int) -> bytes:
        if ident != self.vm_id:
            raise NotFound(f"no VM {ident}")
        datastores = {one.id: one for one in (self.datastore(), self.datastore(system=True))}
        images = {
            disk.image_id: Image(
                disk.image_id, "image", "OS", self.image_ds, persistent=not disk.clone, source=disk.source
            )
            for disk in self.vm.disks
            if disk.image_id is not None
        }
        return text(self.documents.vm(self.vm, images, datastores))

    def datastore_document(self, ident: int) -> bytes:
        return text(
            self.documents.datastore(self.datastore(ident == self.system_id), f"{self.machines.location}/{ident}", [])
        )

    def host_document(self, ident: int) -> bytes:
        return text(self.documents.host(Host(ident, self.host, self.machines.location), [self.vm_id]))

    def disk(self, number: int = 0, **values: Any) -> Disk:
        """Give the VM a disk, or change one."""
        for known in self.vm.disks:
            if known.id == number:
                vars(known).update(values)
                return known
        made = Disk(number, "FILE", target=f"vd{chr(97 + number)}", size=3, original_size=3, format="raw")
        if self.subject.kind == "tm":
            made.tm_mad = self.subject.name
        made.datastore_id, made.image_id = self.image_ds, self.image_id + number
        vars(made).update(values)
        self.vm.disks.append(made)
        return made

    def snapshots(self, disk: int, number: int) -> None:
        """The front-end knows snapshot NUMBER of the disk."""
        known = self.disk(disk)
        known.snapshots = known.snapshots or Snapshots("NO")
        one = known.snapshots.add(f"s{number}", 3)
        known.snapshots.activate(one.id, revert=False)

    # -- what is on the machines -------------------------------------------------------------------------------

    def machine(self, name: str) -> Machine:
        for key, machine in self.machines.machines.items():
            if name in (key, machine.name):
                return machine
        raise BrokenRig(f"no machine {name}")

    def at(self, host: str, path: str) -> str:
        """How the World calls PATH of HOST."""
        is_shared = any(path.startswith(f"{one}/") or path == one for one in self.machines.shared)
        return f"{'fe' if is_shared or host in ('fe', self.fe) else host}:{path}"

    def content(self, size: int = 3, seed: object = "") -> bytes:
        """SIZE MiB that are not compressible but for their second MiB, which is zeros."""
        source = random.Random(f"{size}{seed}")
        return b"".join(bytes(MIB) if part == 1 else source.randbytes(MIB) for part in range(size))

    def put(self, host: str, path: str, content: bytes, format: str = "raw") -> str:
        """Write an image; returns PATH."""
        machine = self.machine(host)
        if format == "raw":
            machine.write(path, content)
        else:
            machine.sh(
                'mkdir -p "$(dirname "$2")" && t=$(mktemp) && cat >"$t" && '
                'qemu-img convert -f raw -O "$1" "$t" "$2" && rm "$t"',
                *(format, path),
                stdin=content,
            )
        self.notes.append(f"{self.at(host, path)} is an image of {len(content)} bytes in the format {format}")
        return path

    def image(self, content: bytes, format: str = "raw", name: str = "image") -> str:
        """An image in the image datastore."""
        return self.put("fe", f"{self.base}/{name}{self.number or ''}", content, format)

    def serve(self, name: str, content: bytes, cut: bool = False) -> str:
        """The URL of CONTENT."""
        assert self.web
        self.notes.append(
            f"a web server has {len(content)} bytes for {name}{', and stops in their middle' if cut else ''}"
        )
        # scenes that differ by their size keep their call, and each its content
        return self.web.put(f"{hashlib.md5(content, usedforsecurity=False).hexdigest()[:8]}/{name}", content, cut)

    def listed(self, directory: str, pattern: str) -> list[str]:
        """Paths in a directory of the front-end whose names match the regular expression."""
        names = self.machine("fe").sh('ls "$1" 2>/dev/null || :', directory).decode().split("\n")
        return [f"{directory}/{name}" for name in names if re.fullmatch(pattern, name)]

    def read(self, host: str, path: str, format: str = "raw") -> str:
        """The digest of what a guest would read from the disk or image PATH; "" if there is none.

        A hypervisor gets the target of a link.
        """
        machine = self.machine(host)
        if format == "raw":
            return machine.content(path)
        script = (
            'f=$(readlink "$2") || f=$2; case $f in /*) ;; *) f=$(dirname "$2")/$f ;; esac; [ -f "$f" ] || exit 0; '
            "t=$(mktemp) && "
            'if qemu-img convert -U -f "$1" -O raw "$f" "$t" 2>/dev/null; then echo "$t"; else rm "$t"; fi'
        )
        raw = machine.sh(script, format, path).decode().strip()
        if not raw:
            return ""
        digest = machine.content(raw)
        machine.remove(raw)
        return digest

    def guest_writes(self, host: str, path: str, format: str, byte: int = 0x5A, at: int = MIB + 4096) -> None:
        """64 KiB, as a guest would."""
        script = 'f=$(readlink -f "$2"); qemu-io -f "$1" -c "write -P $3 $4 65536" "$f" >/dev/null'
        self.machine(host).sh(script, format, path, str(byte), str(at))

    @staticmethod
    def written(content: bytes, byte: int = 0x5A, at: int = MIB + 4096) -> bytes:
        return content[:at] + bytes([byte]) * 65536 + content[at + 65536 :]

    @staticmethod
    def digest(content: bytes, size: int = 0) -> str:
        """Of CONTENT grown to SIZE MiB."""
        return hashlib.sha256(content + bytes(max(0, size * MIB - len(content)))).hexdigest()

    def bystanders(self) -> None:
        """What no action has a reason to touch."""
        for host in (self.host, self.other):
            self.machine(host).write(f"{self.system}/{OTHER_VM}/disk.0", b"another VM's")
        self.machine("fe").sh(
            'mkdir -p "$1" && for name in bystander bystander.snap; do echo "$name" >"$1/$name"; done; mkdir -p "$2"',
            *(self.base, f"{self.machines.work}/home"),
        )

    # -- running -----------------------------------------------------------------------------------------------

    def env(self, machine: Machine) -> dict[str, str]:
        work = self.machines.work
        env = {
            "PATH": f"{machine.fakes}:{work}/bin:{PATH}",
            "HOME": f"{work}/home",
            "ONE_LOCATION": f"{work}/one",
            "ONE_XMLRPC": self.answers.url,
            "ONE_AUTH": f"{work}/one_auth",
            "MADRIGAL_RUN_DIR": f"{work}/run",
            "PRIORITY": "19",
            **{f"MADRIGAL_{name}_TIMEOUT": str(value) for name, value in TIMEOUTS.items()},
        }
        if self.subject.is_old:
            env["MADRIGAL_CONTRACT"] = "3.4"
        for name in ("RUBYLIB", "LANG", *([] if self.machines.is_own else ["MADRIGAL_SSH_CONFIG"])):
            if name in os.environ:
                env[name] = os.environ[name]
        return env

    def start(self, call: Call, subject: Subject | None = None) -> subprocess.Popen[bytes]:
        machine = self.machine(call.on)
        self.answers.started += 1
        self.answers.stage = self.answers.stages[self.vm_id] = self
        executable = (subject or self.subject).executable(call.action)
        # entering a mount namespace leads to its root
        there = ["env", "-C", f"{self.machines.work}/one/var"] if machine.own else []
        words = self.under + machine.argv([*there, "nice", "-n", "19", executable, *call.arguments])
        env = {**os.environ, **self.env(machine), **call.env}
        for name in set(env) - set(self.env(machine)) - set(call.env):
            del env[name]
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd=f"{self.machines.work}/one/var",
            umask=0o022,
            start_new_session=True,
        )

    def feed(self, call: Call, process: subprocess.Popen[bytes]) -> None:
        """Give it its input at once, for those who will not wait for its end."""
        assert process.stdin
        try:
            process.stdin.write(call.stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass
        process.stdin = None

    def finish(
        self,
        call: Call,
        process: subprocess.Popen[bytes],
        since: float,
        limit: float = LIMIT,
        subject: Subject | None = None,
    ) -> Run:
        hung = False
        try:
            stdout, stderr = process.communicate(call.stdin if process.stdin else None, limit)
        except subprocess.TimeoutExpired:
            hung = True
            self.end(process)
            stdout, stderr = process.communicate()
        except BaseException:
            self.end(process)
            raise
        run = Run(
            (subject or self.subject).executable(call.action),
            call,
            process.returncode,
            stdout.decode("utf-8", "replace"),
            stderr.decode("utf-8", "replace"),
            time.monotonic() - since,
            hung,
            [],
        )
        self.runs.append(run)
        return run

    @staticmethod
    def end(process: subprocess.Popen[bytes]) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def run(self, call: Call, watch: bool = False, limit: float = LIMIT, subject: Subject | None = None) -> Run:
        """Run CALL to its end.  WATCH: look for secrets in the arguments of what it starts."""
        since = time.monotonic()
        process = self.start(call, subject)
        if not watch:
            return self.finish(call, process, since, limit, subject)
        action = [self.subject.executable(call.action), *call.arguments]
        with Watch(self.machines, (SECRET, TOKEN), action) as watching:
            run = self.finish(call, process, since, limit, subject)
        run.told = watching.found
        return run

    def prepare(self, call: Call) -> None:
        """Run an action that brings the scene about; it has to succeed."""
        run = self.run(call, subject=self.helper)
        if run.status:
            raise Unprepared(f"what goes before fails: {run.script()}")
        self.runs.remove(run)
        self.notes.append(f"{call.action} {' '.join(word[:100] for word in call.arguments)} was run before")

    # -- calls -------------------------------------------------------------------------------------------------

    def tm(self, action: str, *arguments: str, stdin: bytes = b"", ds: int | None = None) -> Call:
        ids = () if self.subject.is_old else (str(self.vm_id), str(self.system_id if ds is None else ds))
        return Call(action, (*arguments, *ids), stdin)

    def place(self, host: str, name: str = "") -> str:
        return f"{host}:{self.vm_dir}{'/' if name else ''}{name}"

    def ds(
        self,
        action: str,
        ident: int = 0,
        image: Mapping[str, object] | None = None,
        attributes: Mapping[str, str] | None = None,
        template: Mapping[str, str] | None = None,
        type: str = "",
        more: Mapping[str, object] | None = None,
        only_path: bool = False,
        tm: str = "",
    ) -> Call:
        """A datastore action; IMAGE: values of the image's record, or elements of the IMAGE in capitals."""
        ident = ident or self.image_id
        store = self.datastore(type=type)
        store.tm_mad = tm or store.tm_mad
        store.template.update(template or {})
        values = dict(image or {})
        elements = {name: values.pop(name) for name in list(values) if name.isupper()}
        reserve, snapshot = bool(values.pop("reserve", False)), values.pop("snapshot", -1)
        fields: dict[str, object] = {"name": "image", "type": "OS", "regtime": REGTIME, **values}
        record = Image(ident, datastore_id=store.id, template=dict(attributes or {}), **fields)  # type: ignore[arg-type]
        root = None
        if image is not None:
            root = (
                self.documents.stat(record)
                if only_path
                else self.documents.image(record, store, [], reserve, int(str(snapshot)))
            )
            for name, value in elements.items():
                found = root.find(name)
                if found is not None:
                    found.text = str(value)
        dump = self.documents.dump(root, self.documents.datastore(store, self.base, []), more)
        if self.subject.is_old:
            return Call(action, (dump.decode(), str(ident)))
        return Call(action, (str(ident),), dump)


class Unprepared(Exception):
    """The driver cannot bring about what a check begins with, which another check shows."""
