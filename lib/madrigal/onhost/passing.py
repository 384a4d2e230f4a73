"""What a session sends to other machines and makes of what they send, and the parts that become files."""

import os

from madrigal.errors import MadrigalError
from madrigal.onhost import part
from madrigal.onhost.holding import Holding
from madrigal.onhost.lock import locked_in
from madrigal.onhost.part import Part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, List, Optional, Union

    from madrigal.onhost.blocks import Known
    from madrigal.onhost.device import Device
    from madrigal.onhost.direct import Direct
    from madrigal.onhost.guest import Guest
    from madrigal.onhost.layout import Layout
    from madrigal.onhost.part import Nameless
    from madrigal.onhost.stream import Frame


class Passing(Holding):
    """The part of a session (onhost/session.py) that data pass through."""

    arrived: "Optional[Union[Part, Nameless]]" = None
    """What was received and has no name yet."""

    _direct: "Optional[Direct]" = None
    _basis: "Optional[Dict[str, int]]" = None
    """Which files of what is received next have something in common with which open ones, by path in the stream."""

    _compared: "Dict[int, List[int]]" = {}
    """What those were when they were compared (blocks.identity)."""

    _brought: "Dict[str, Known]" = {}
    """What an interrupted run has brought of those files."""

    _begun: "Optional[Part]" = None
    """What an interrupted run has left of what is received next."""

    _rate = 0
    """Bytes a second at most that are sent or copied; 0: any."""

    # -- for who works on this machine himself ------------------------------------------------------------

    def part(self, path: str, tag: str, beside: "Optional[Part]" = None) -> Part:
        """A file that is to become PATH, which this session holds."""
        directory, name = os.path.split(path)
        return Part(self._undo, directory, name, tag, beside=beside)

    def publish(
        self,
        made: Part,
        grow: "Optional[List[Any]]" = None,
        mode: "Optional[int]" = None,
        chain: str = "",
        preallocate: str = "",
    ) -> None:
        """Give the part its name, grown to GROW = [format, bytes], with MODE or as the umask has it.

        CHAIN: as the first of a chain with such names (onhost/layout.py).  PREALLOCATE: its format if it has all its
        room.
        """
        if (grow or preallocate) and not made.is_dir:
            made = self._layout().sized(made, grow, preallocate)
        if chain:
            self._layout().put_in_chain(made, chain)
            return
        made.publish((0o777 if made.is_dir else 0o666) & ~_umask() if mode is None else mode)

    def _layout(self) -> "Layout":
        from madrigal.onhost.layout import Layout

        return Layout(self._undo, self._waiting, self._timeouts["work"], _umask())

    def _guest(self, described: "Dict[str, Any]") -> "Guest":
        """Of a VM that runs on this machine, DESCRIBED by the front-end: its `uri`, `domain` and `timeout`."""
        from madrigal.onhost.guest import Guest

        args = described["uri"], described["domain"], described["timeout"]
        return Guest(*args, stall=self._timeouts["work"], waiting=self._waiting)

    def known(self, path: str, source: str, old: "Optional[Dict[str, List[str]]]" = None) -> "Dict[str, Any]":
        """What receive() could make PATH of besides what it is sent.  The caller holds PATH.

        {"how": part (an interrupted run has left one of the same SOURCE), stale (one of something else) or nothing,
        "old": blocks.sample() of the first file that is there of each list in OLD: by path within the stream, where an
        older copy of it may be}
        """
        from madrigal.onhost import blocks

        directory, name = os.path.split(path)
        tag = "stream" + source
        own = part.part_name(name, tag)
        if source and os.path.lexists(os.path.join(directory, own)):
            # held from now on: what is said of it must still be so when the frames come
            is_dir = os.path.isdir(os.path.join(directory, own))
            begun = Part(self._undo, directory, name, tag, is_dir, stays=True, resume=True)
            if begun.is_resumed:
                self._begun = begun
            else:
                begun.discard()
        prefix = part.part_name(name, "stream")[: -len(".part")]
        is_stale = any(entry.startswith(prefix) for entry in os.listdir(directory))
        firsts = {within: next(filter(os.path.isfile, paths), "") for within, paths in (old or {}).items()}
        # what a process has locked changes while it is compared
        sampled = {within: blocks.sample(file) for within, file in firsts.items() if file and not locked_in(file)}
        return {"how": "part" if self._begun else "stale" if is_stale else "", "old": sampled}

    def kinds(self) -> "List[str]":
        """blocks.kinds() of this machine."""
        from madrigal.onhost import blocks

        return blocks.kinds()

    def sample(self, files: "Dict[str, List[Any]]") -> "Dict[str, Any]":
        """blocks.sample() of those of FILES, [path, size] by name, that are regular files."""
        from madrigal.onhost import blocks

        return {name: blocks.sample(*about) for name, about in files.items() if os.path.isfile(about[0])}

    def compare(self, files: "Dict[str, str]", noted: "Dict[str, str]", kinds: "List[str]") -> "Dict[str, Any]":
        """Let receive() make what it gets next of FILES too, paths of older copies by path within the stream.

        Returns blocks.describe() of each, and of what an interrupted run has left: of a file that both have, of what is
        in the one where the other has nothing.  NOTED: where blocks.Notes may have kept the digests of a path.  KINDS:
        of digests that the other side can make.
        """
        from madrigal.onhost import blocks

        self._basis = {within: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for within, path in files.items()}
        self._compared = {fd: blocks.identity(fd) for fd in self._basis.values()}
        kept = {within: blocks.noted(fd, noted.get(files[within], "")) for within, fd in self._basis.items()}
        first = next((about for about in kept.values() if about and about["kind"].partition(":")[0] in kinds), None)
        kind = first["kind"] if first else blocks.chosen(kinds)
        block = first["block"] if first else blocks.block_of(sum(map(os.path.getsize, files.values())))
        found, self._brought = {}, {}
        if self._begun:
            found = blocks.describe_all(self._begun.path, self._waiting, block if files else 0, kind)
        for within, fd in self._basis.items():
            described = kept[within]
            if described is None or [described["kind"], described["block"]] != [kind, block]:
                described = blocks.describe(fd, self._waiting, block, kind)
            if within in found:
                self._brought[within] = blocks.Known(found[within])
                described = self._brought[within].filled_with(described)
            found[within] = described
        return found

    def limit(self, rate: int) -> None:
        """Let what is sent and copied from now on have RATE bytes a second at most."""
        self._rate = rate

    def send(
        self,
        path: str,
        state: "Optional[Dict[str, Any]]" = None,
        whole: bool = False,
        terms: "Optional[Dict[str, Any]]" = None,
    ) -> "Iterator[Frame]":
        """The frames of what PATH leads to, on TERMS (onhost/stream.py), without the last.

        With STATE, of one file that has this state of the disk or image (onhost/layout.py), or WHOLE, of it and all its
        snapshots.
        """
        from madrigal.onhost import stream

        if self._rate:
            lane = (terms or {}).get("lane") or (0, 1)
            terms = dict(terms or {}, rate=self._rate / lane[1])
        if state is None:
            return stream.give(path, terms=terms)
        if whole:
            from madrigal.onhost import layout

            return layout.give(path, state["format"], terms)
        return self._send_state(path, state, terms)

    def _send_state(self, path: str, state: "Dict[str, Any]", terms: "Optional[Dict[str, Any]]") -> "Iterator[Frame]":
        from madrigal.onhost import layout, stream

        made = None
        if state.get("guest"):
            self.hold(state["hold"])
            made = self.part(path, "live")
            self._guest(state["guest"]).save(path, state["format"], made)
            top = made.path
        else:
            top, lies_on_others = layout.state(path, state)
            if lies_on_others:
                self.hold(state["hold"])
                made = self.part(path, "flat")
                self._layout().flatten(top, made)
        try:
            for frame in stream.give(made.path if made else top, terms=terms):
                yield frame
        finally:
            if made:
                made.discard()

    def receive(
        self,
        frames: "Iterator[Frame]",
        path: str,
        grow: "Optional[List[Any]]" = None,
        keep_mode: bool = False,
        chain: str = "",
        preallocate: str = "",
        settle: "Optional[Dict[str, Any]]" = None,
        staging: "Optional[str]" = None,
        source: str = "",
        device: "Optional[Dict[str, Any]]" = None,
    ) -> int:
        """Make PATH of FRAMES, growing it to GROW = [format, bytes] first; returns how many bytes of data they had.

        It gets the permissions the umask allows, or with KEEP_MODE those of the original.  CHAIN and PREALLOCATE as
        for publish().  With SETTLE the frames have a disk and its snapshots (onhost/layout.py).  STAGING: a file is
        left to image(do="adopt"), until then as a part ("") or without a name in that directory.  SOURCE: what they are
        of, if this may be interrupted and gone on with; they leave out what known() has said then.  DEVICE: PATH leads
        to a block device, which is to hold them; its `reads_zeros` says that it holds nothing but zeros yet.
        """
        from madrigal.onhost.receiver import Receiver

        directory, name = os.path.split(path)
        (basis, begun), self._basis, self._begun = (self._basis, self._begun), None, None
        into = self._device(path, device) if device is not None else None
        receiver = Receiver(self._undo, directory, name, source, staging or "", basis, begun, into, self._brought)
        try:
            for frame in frames:
                receiver.take(*frame)
        finally:
            receiver.close()
        made = receiver.finish()
        for fd in (basis or {}).values():
            self._end_comparing(fd)
        if into:
            into.publish()
        elif settle and isinstance(made, Part):
            self._layout().settle(made, grow, settle)
        elif staging is not None and isinstance(made, (Part, part.Nameless)) and not made.is_dir:
            self.arrived = made
        elif isinstance(made, Part):
            self.publish(made, grow, receiver.about["mode"] if keep_mode else None, chain, preallocate)
        return receiver.bytes

    def _end_comparing(self, fd: int) -> None:
        from madrigal.onhost import blocks

        if blocks.identity(fd) != self._compared[fd]:
            text = "{} was changed while blocks were taken from it; try again when nobody uses it"
            raise MadrigalError(text.format(os.readlink("/proc/self/fd/{}".format(fd))))
        os.close(fd)

    def _within(self, frames: "Iterator[Frame]") -> "Iterator[Frame]":
        """FRAMES that leave no machine: nobody else says meanwhile that we live."""
        count = 0
        for frame in frames:
            self._waiting(bytes=count)
            count += len(frame[2]) if frame[0] == b"D" else 0
            yield frame

    def _device(self, path: str, about: "Dict[str, Any]") -> "Device":
        from madrigal.onhost.device import Device

        return Device(self._undo, path, about["reads_zeros"], self._waiting)

    def lane(self, frames: "Iterator[Frame]", path: str, source: str) -> int:
        """Write FRAMES, which have a share of what another session receives of SOURCE for PATH; returns as that."""
        from madrigal.onhost.receiver import Lane

        directory, name = os.path.split(path)
        where = os.path.join(directory, part.part_name(name, "stream" + source))
        lane = Lane(where, self._waiting, self._timeouts["work"])
        for frame in frames:
            lane.take(*frame)
        return lane.bytes

    # -- to or from another host -----------------------------------------------------------------------------

    def direct(self, do: str, **arguments: "Any") -> "Any":
        """What Direct.DO (onhost/direct.py) returns."""
        from madrigal.onhost.direct import Direct

        if self._direct is None:
            self._direct = Direct(self._undo, self._waiting, self._timeouts["work"])
        return getattr(self._direct, do)(**arguments)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
