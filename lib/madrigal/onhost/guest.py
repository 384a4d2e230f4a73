"""Disks of a VM that runs: what libvirt on this host does to them, through virsh.

A live step begins with what the domain really uses, which libvirt says, and not with what a link in the VM directory
says: a run that was killed may have changed the one and not the other.  What would leave the guest standing still, or a
job at work, if this process were killed is begun by a small helper, which ends it when it is told or when nobody is
left to tell it anything.

Libvirt knows a file of a chain by the name under which it was opened first, and that may be a link which leads
elsewhere by now.  So a layer is named to libvirt by its number, and found by its place in the chain.
"""

import contextlib
import os
import re
import time

from madrigal import command
from madrigal.command import CommandFailed
from madrigal.errors import BadImage, DeadlineExceeded, InUse, MadrigalError, NotFound, NotSupported
from madrigal.onhost import copy, image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple
    from xml.etree.ElementTree import Element

    from madrigal.onhost.part import Part

# Beside the values everything is fixed text.  domfsfreeze that took too long may still happen: thaw then, too.
_FREEZE = """
uri=$1 domain=$2 seconds=$3
run() { timeout -k 5 "$seconds" virsh -q -c "$uri" "$1" "$domain" </dev/null >/dev/null; }
run domfsfreeze; frozen=$? suspended=1
if [ $frozen != 0 ]; then run suspend; suspended=$?; fi
if [ $frozen = 0 ] || [ $suspended = 0 ]; then echo begun; read -r word; fi
left=0
if [ $suspended = 0 ] || [ $suspended = 124 ]; then run resume || run resume || left=1; fi
if [ $frozen = 0 ] || [ $frozen = 124 ]; then run domfsthaw || run domfsthaw || [ $frozen = 124 ] || left=1; fi
exit $left
"""
_JOB = """
uri=$1 domain=$2 device=$3 seconds=$4; shift 4
run() { timeout -k 5 "$seconds" virsh -q -c "$uri" "$@" </dev/null >/dev/null; }
run "$@"; begun=$?
[ $begun = 0 ] || [ $begun = 124 ] || exit $begun
echo begun
read -r word
[ "$word" = done ] || run blockjob "$domain" "$device" --abort
"""

_SNAPSHOT = """
uri=$1 seconds=$2 link=$3 disk=$4; shift 4
timeout -k 5 "$seconds" virsh -q -c "$uri" "$@" </dev/null >/dev/null || exit
mv -fT -- "$link" "$disk" || exit 126
"""

_TOLD = 4096
"""Bytes at the end of what virsh complains that have its last line."""

_COUNT = re.compile(r"[0-9]{1,20}\Z")
_OURS = ("Block Copy", "Block Commit", "Block Pull")


class Guest:
    """The VM that libvirt at URI calls DOMAIN; TIMEOUT: seconds for one virsh command, STALL: for a job that pauses.

    WAITING is called now and then while something takes time and may raise.
    """

    def __init__(self, uri: str, domain: str, timeout: float, stall: float, waiting: "Callable[[], None]") -> None:
        self._uri, self._domain = uri, domain
        self._timeout, self._stall = timeout, stall
        self._waiting = waiting

    # -- asking ----------------------------------------------------------------------------------------------

    def is_running(self) -> bool:
        """Whether its processors run: a guest that is suspended writes nothing."""
        return self._virsh("domstate", self._domain) == "running"

    def device_of(self, path: str) -> str:
        """The device (vda, ...) of the disk whose file PATH leads to, on top or, if on top of none, below.

        Below it is when a run was killed after it had put an overlay on PATH.  Raises NotFound.
        """
        wanted, disks = os.path.realpath(path), self._disks()
        tops = [device for device, disk in disks.items() if os.path.realpath(_source(disk) or "/") == wanted]
        if len(tops) != 1:
            tops = [
                device for device, disk in disks.items() if wanted in [layer.path for layer in _layers(device, disk)]
            ]
        if len(tops) != 1:
            raise NotFound("{} is not the file of a disk that {} uses".format(path, self._domain))
        return tops[0]

    def files(self, device: str) -> "List[str]":
        """The files of a disk's chain, without links in their paths, the one that is written first; [] if not files."""
        return [layer.path for layer in _layers(device, self._disk(device))]

    def check_names(self) -> None:
        """Raise NotSupported if another libvirt could not open a disk by the names that this one knows."""
        for device, disk in self._disks().items():
            for layer in _layers(device, disk)[1:]:
                if not layer.is_named_well():
                    text = (
                        "{} cannot go to another host while it runs: libvirt knows the file {} of {} as {}, which "
                        "leads to {} by now; power the VM off to move it, or to start it by what the link leads to"
                    )
                    now = os.path.realpath(layer.name)
                    raise NotSupported(text.format(self._domain, layer.path, device, layer.name, now))

    def _disk(self, device: str) -> "Element":
        disks = self._disks()
        if device not in disks:
            raise NotFound("{} has no disk {} any more".format(self._domain, device))
        return disks[device]

    def _disks(self) -> "Dict[str, Element]":
        from xml.etree import ElementTree

        document = self._virsh("dumpxml", self._domain)
        if "<!DOCTYPE" in document:
            raise MadrigalError("libvirt describes {} with a document type declaration".format(self._domain))
        disks = {}
        try:
            root = ElementTree.fromstring(document)
        except ElementTree.ParseError as error:
            raise MadrigalError("libvirt describes {} with what is not XML: {}".format(self._domain, error)) from None
        for disk in root.findall("devices/disk"):
            target = disk.find("target")
            if target is not None and target.get("dev"):
                disks[str(target.get("dev"))] = disk
        return disks

    # -- standing still --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def frozen(self) -> "Iterator[None]":
        """Let the guest write nothing: its agent freezes the file systems, or else its processors stand still.

        Whatever happens, and be it that this process is killed, it goes on afterwards.
        """
        if not self.is_running():
            yield
            return
        helper = _Helper(_FREEZE, [self._uri, self._domain, str(self._timeout)])
        try:
            if not helper.begun(3 * self._timeout, self._waiting):
                raise MadrigalError(
                    "{} can neither be frozen nor suspended: {}".format(self._domain, helper.end("", self._timeout)[1])
                )
            yield
        finally:
            status, complaint = helper.end("", 4 * self._timeout + command.GRACE)
            if status:
                text = "{} may have been left standing still ({}); run: virsh -c {} resume {}, and domfsthaw too"
                raise MadrigalError(text.format(self._domain, complaint, self._uri, self._domain))

    # -- changing the chain ----------------------------------------------------------------------------------

    def snapshot(self, device: str, file: str, link: str, disk: str) -> None:
        """Have the guest write to the qcow2 image FILE from now on, whose backing file is what it writes now.

        At once LINK, which leads to FILE, gets the name DISK, and not before: qemu opens what it wrote so far anew, by
        that name.  Raises CommandFailed if nothing has happened.
        """
        self.end_job(device)
        words = ["snapshot-create-as", self._domain, "--disk-only", "--atomic", "--no-metadata", "--reuse-external"]
        for other in self._disks():
            spec = "file={},driver=qcow2".format(file.replace(",", ",,")) if other == device else "snapshot=no"
            words += ["--diskspec", "{},{}".format(other, spec)]
        helper = _Helper(_SNAPSHOT, [self._uri, str(self._timeout), link, disk] + words)
        try:
            helper.begun(2 * self._timeout, self._waiting)
        finally:
            status, complaint = helper.end("", 2 * self._timeout)
        if status:
            text = "virsh snapshot-create-as of {} failed ({}): {}".format(self._domain, status, complaint)
            # after a timeout it may still happen, and when the connection broke it may have
            if status < 124 and not self._may_write(device, file):
                raise CommandFailed(text, command.Result(status, b"", b""))
            raise MadrigalError("{}; the guest may write to {} by now, do this again".format(text, file))

    def _may_write(self, device: str, file: str) -> bool:
        try:
            return self.files(device)[:1] == [os.path.realpath(file)]
        except MadrigalError:
            return True  # nobody knows

    def commit(self, device: str, top: str, base: str) -> None:
        """Write what the file TOP of the chain has into BASE, the one below it; TOP is no part of the chain then."""
        layers = _layers(device, self._disk(device))
        files = [layer.path for layer in layers]
        wanted, below = os.path.realpath(top), os.path.realpath(base)
        if wanted not in files and below in files:
            return  # an earlier run was killed after it
        if below not in files or files.index(below) != files.index(wanted) + 1 or files.index(wanted) == 0:
            raise NotFound("{} does not lie on {} below another file of {}".format(wanted, below, self._domain))
        number = files.index(wanted)
        # qemu opens these two anew, by name, to write them: a name that leads to the top by now has it write there
        for layer in (layers[number - 1], layers[number + 1]):
            if not layer.is_named_well():
                raise NotSupported(
                    "{} cannot be written while {} runs, which knows it as {}, and that leads to another file by now; "
                    "power the VM off first".format(layer.path, self._domain, layer.name)
                )
        words = ["blockcommit", self._domain, device, "--top", layers[number].target]
        self._shorten(device, words, layers[number + 1], files[number - 1], wanted)

    def pull(self, device: str, base: "Optional[str]") -> None:
        """Write all between BASE (None: all there is) and the disk's own file into that, which lies on BASE then."""
        layers = _layers(device, self._disk(device))
        files = [layer.path for layer in layers]
        if base is not None and os.path.realpath(base) not in files[1:]:
            raise NotFound("{} is not below the file that {} of {} uses".format(base, device, self._domain))
        last = len(layers) if base is None else files.index(os.path.realpath(base))
        if last > 1:  # else an earlier run was killed after it
            words = ["blockpull", self._domain, device]
            self._shorten(device, words, layers[last] if base else None, files[0], files[1])

    def _shorten(self, device: str, words: "List[str]", base: "Optional[Layer]", above: str, gone: str) -> None:
        """Run a job down to BASE, which the file ABOVE lies on then; the file GONE is not in the chain any more."""
        self.end_job(device)
        # The name of the base goes into the header of what is above it, and the one that libvirt knows may be of a link
        # that leads back to there.  It can find a relative one, but only from relative ones.
        keeping = ["--keep-relative"] if base and not os.path.isabs(base.named) else []
        if base:
            words = words + ["--base", base.target]
            if not keeping and not base.is_named_well():
                text = "{} would be named {} in a header, which leads elsewhere by now; power the VM off first"
                raise NotSupported(text.format(base.path, base.name))
        try:
            self._run_job(device, words + keeping, False)
        except CommandFailed as error:
            if not (keeping and base and base.is_named_well() and "relative" in str(error)):
                raise
            self._run_job(device, words, False)
        if gone in self.files(device) or (base and os.path.realpath(_below(above)[1]) != base.path):
            raise MadrigalError("{} of {} did not do its work; see the log of libvirt".format(words[0], device))

    # -- copying ---------------------------------------------------------------------------------------------

    def capacity(self, device: str) -> int:
        """The bytes of the disk as the guest sees it."""
        said = re.search(r"^Capacity:\s+([0-9]{1,18})\b", self._virsh("domblkinfo", self._domain, device), re.MULTILINE)
        if said is None:
            raise MadrigalError("libvirt does not say how large {} of {} is".format(device, self._domain))
        return int(said.group(1))

    def copy(self, device: str, file: str, format: str) -> None:
        """Copy the disk into the existing image FILE of its capacity, as it is at one moment; the guest goes on."""
        self.end_job(device)
        words = ["blockcopy", self._domain, device, "--dest", file, "--format", format]
        self._run_job(device, words + ["--reuse-external", "--transient-job"], True)

    def save(self, path: str, format: str, made: "Part") -> str:
        """Write the disk PATH, as it is at one moment, into MADE in FORMAT, which is the disk's own; returns how."""
        device = self.device_of(path)
        image.create(made.path, format, self.capacity(device), "", self._waiting, self._stall)
        try:
            self.copy(device, made.path, format)
            return "blockcopy"
        except CommandFailed:
            pass  # this disk or this libvirt cannot
        with self.frozen():
            top = self.files(device)[0]
            if format != "raw":
                image.convert(top, format, made.path, format, self._waiting, self._stall, in_use=True)
                return "convert"
            os.ftruncate(made.fd, 0)
            fd = os.open(top, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return copy.copy_file(fd, made.fd, self._waiting)
            finally:
                os.close(fd)

    # -- jobs ------------------------------------------------------------------------------------------------

    def end_job(self, device: str) -> None:
        """End the job that a killed run has left on the device; raises InUse if it is none of ours."""
        job = self._job(device)
        if job is None:
            return
        if job[0] not in _OURS:
            raise InUse("{} of {} is busy ({}); try again when that has ended".format(device, self._domain, job[0]))
        self._virsh("blockjob", self._domain, device, "--abort")

    def _job(self, device: str) -> "Optional[Tuple[str, int, int]]":
        """(type, done, of) of the job on the device."""
        lines = self._virsh("blockjob", self._domain, device, "--raw").split("\n")
        said = {line.partition("=")[0].strip(): line.partition("=")[2].strip() for line in lines}
        if "type" not in said:
            return None
        done, whole = said.get("cur", "0"), said.get("end", "0")
        if not (_COUNT.match(done) and _COUNT.match(whole)):
            text = "libvirt says of the job on {} of {} that it has done {} of {}"
            raise MadrigalError(text.format(device, self._domain, done[:40], whole[:40]))
        return said["type"], int(done), int(whole)

    def _run_job(self, device: str, words: "List[str]", is_copy: bool) -> None:
        """Start a job, and wait until it is over; or, of a copy, until both are the same, and end it then."""
        helper = _Helper(_JOB, [self._uri, self._domain, device, str(self._timeout)] + words)
        what = "virsh {} of {} of {}".format(words[0], device, self._domain)
        word = ""
        try:
            if not helper.begun(2 * self._timeout, self._waiting):
                status, complaint = helper.end("", self._timeout)
                text = "{} failed ({}): {}".format(what, status, complaint or "it gave no reason")
                raise CommandFailed(text, command.Result(status, b"", complaint.encode()))
            self._watch(device, what, is_copy)
            word = "" if is_copy else "done"
        finally:
            status, complaint = helper.end(word, 2 * self._timeout + command.GRACE)
        if is_copy and status:
            raise MadrigalError("{} could not be ended at one moment: {}".format(what, complaint))
        if self._job(device) is not None:
            raise MadrigalError("{} did not end".format(what))

    def _watch(self, device: str, what: str, is_copy: bool) -> None:
        last: "Optional[Tuple[str, int, int]]" = None
        end, pause = time.monotonic() + self._stall, 0.02
        while True:
            job = self._job(device)
            if job is None:
                if is_copy:
                    raise MadrigalError("{} ended before it was whole; is there space for it?".format(what))
                return
            if is_copy and self._is_ready(device):
                return
            now = time.monotonic()
            if job != last:
                last, end = job, now + self._stall
            if now >= end:
                raise DeadlineExceeded("{} did nothing for {:g} s".format(what, self._stall))
            self._waiting()
            time.sleep(pause)
            pause = min(pause * 2, 0.5)

    def _is_ready(self, device: str) -> bool:
        mirror = self._disk(device).find("mirror")
        return mirror is not None and mirror.get("ready") == "yes"

    def _virsh(self, *words: str) -> str:
        """What virsh answers."""
        argv = ["virsh", "-q", "-c", self._uri] + list(words)
        what = "virsh {} of {}".format(words[0], self._domain)
        try:
            result = command.run(argv, self._timeout, what=what, waiting=self._waiting)
        except CommandFailed as error:
            if "failed to get domain" in str(error) or "Domain not found" in str(error):
                raise NotFound("libvirt does not run {}: {}".format(self._domain, error.result.complaint())) from None
            raise
        return result.stdout.decode("utf-8", "replace").strip()


class Layer:
    """A file of a chain: what libvirt calls it, the name it was opened by, how the file above names it, its path."""

    def __init__(self, target: str, name: str, named: str, path: str) -> None:
        self.target, self.name, self.named, self.path = target, name, named, path

    def is_named_well(self) -> bool:
        return os.path.realpath(self.name) == self.path


class _Helper:
    """A shell that begins something, and ends it when it is told or when we are gone."""

    def __init__(self, script: str, arguments: "Sequence[str]") -> None:
        import subprocess
        import tempfile

        # A file: nobody reads while it works, and a pipe that is full would hold it up.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        # A group of its own: what ends us must not end it.  It has none of our locks: a delete would end it for that.
        self._process = subprocess.Popen(
            ["sh", "-c", script, "sh"] + list(arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=command.environment(),
            start_new_session=True,
        )
        self._ended: "Optional[Tuple[int, str]]" = None

    def begun(self, seconds: float, waiting: "Callable[[], None]") -> bool:
        """Whether it has begun; False if it ended instead."""
        import select

        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        while not select.select([self._process.stdout], [], [], 0.2)[0]:
            waiting()
            if time.monotonic() > end:
                raise DeadlineExceeded("virsh took longer than {:g} s".format(seconds))
        return bool(os.read(self._process.stdout.fileno(), 64))

    def end(self, word: str, seconds: float) -> "Tuple[int, str]":
        """Tell it WORD and let it end; its status and the last line it complained in."""
        import subprocess

        if self._ended is None:
            try:
                self._process.communicate(word.encode(), timeout=seconds)
                self._said.seek(max(0, os.fstat(self._said.fileno()).st_size - _TOLD))
                result = command.Result(self._process.returncode, b"", self._said.read())
                self._ended = result.status, result.complaint()
            except subprocess.TimeoutExpired:
                self._ended = 124, "virsh took longer than {:g} s".format(seconds)
        return self._ended


def _source(disk: "Element") -> str:
    """The name of the file of a disk or of what it lies on; "" if there is none, or not in a file."""
    source = disk.find("source")
    return "" if source is None else source.get("file") or source.get("dev") or ""


def _layers(device: str, disk: "Element") -> "List[Layer]":
    found: "List[Layer]" = []
    element: "Optional[Element]" = disk
    while element is not None and _source(element):
        name = _source(element)
        # Only the first name is what libvirt uses now; what is below, the file says.
        named, path = _below(found[-1].path) if found else (name, os.path.realpath(name))
        layer = Layer("{}[{}]".format(device, element.get("index")), name, named, path)
        if not layer.is_named_well() and not os.path.islink(name):
            text = "{} lies on {}, and libvirt has {} there: find out which of them is right"
            raise BadImage(text.format(found[-1].path, path, name))
        found.append(layer)
        element = element.find("backingStore")
    return found


def _below(path: str) -> "Tuple[str, str]":
    """What the qcow2 image at PATH lies on: as it names it, and the file without links in its path."""
    found = image.backing(path)
    if found is None:
        raise BadImage("{} lies on nothing, and libvirt has something below it".format(path))
    return found[0], os.path.realpath(os.path.join(os.path.dirname(path), found[0]))
