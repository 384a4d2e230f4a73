"""Digests: of what a stream carries, and of a file block by block, so that two sides find what both have."""

import binascii
import os
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Generator, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

    Payload = Union[bytes, memoryview]

SIZE = 16
"""The bytes of a block's digest."""

_CHUNK = 1 << 20
_BLOCK = 64 << 10
_MOST = 1 << 18  # blocks of a file; of a larger one they are larger, so that no list of digests grows beyond 4 MiB
_NOTHING = bytes(SIZE)  # in the place of a digest: a hole
_SAME, _BARE, _OTHER = range(3)
_SAMPLES = 64
_THREADS = 2
_UNKNOWN = b"\xff" * SIZE  # of which nobody has asked


def strong() -> str:
    """The digest that is fast here, and that nobody can find another block for."""
    # 1.7 GB/s with the instructions for it, 0.4 without; BLAKE2b has 0.8 anywhere
    return "sha256" if "sha_ni" in _cpu() else "blake2b"


def _cpu() -> "Sequence[str]":
    """What the processor has."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split() for line in file if line.startswith("flags")), ())
    except OSError:
        return ()


def kinds() -> "List[str]":
    """The kinds of digests of blocks that can be made here, the fastest first."""
    from madrigal.onhost import gmac

    # 6 GB/s with the instructions for it, and not worth it without
    keyed = ["gmac"] if {"aes", "pclmulqdq"} <= set(_cpu()) and gmac.works() else []
    return [*keyed, *(("sha256", "blake2b") if strong() == "sha256" else ("blake2b", "sha256"))]


def chosen(there: "Sequence[str]") -> str:
    """The digest of blocks to be made where the other side can make those THERE: one of kinds(), GMAC with its key.

    That is secret: who writes a block must not know it.
    """
    first = next(kind for kind in kinds() if kind in there)
    return first + ":" + os.urandom(16).hex() if first == "gmac" else first


def _is_kind(text: str) -> bool:
    name, _, key = text.partition(":")
    return text in ("sha256", "blake2b") or (name == "gmac" and len(key) == 32 and set(key) <= set("0123456789abcdef"))


def check(kind: str) -> "Callable[[int, Payload], bytes]":
    """The function that makes the check of data and their offset; KIND: none, crc32, sha256 or blake2b."""
    if kind == "none":
        return lambda offset, data: b""
    if kind == "crc32":
        return lambda offset, data: zlib.crc32(data, (offset ^ offset >> 32) & 0xFFFFFFFF).to_bytes(4, "big")
    return lambda offset, data: _strong(kind, offset, data)


def _strong(kind: str, offset: int, data: "Payload") -> bytes:
    made = _maker(kind)()
    made.update(offset.to_bytes(8, "big"))
    made.update(data)
    return bytes(made.digest()[:SIZE])


def _maker(kind: str) -> "Callable[[], Any]":
    """What begins a digest of this kind; raises ValueError if there is none."""
    name, _, key = kind.partition(":")
    if name == "gmac":
        from madrigal.onhost import gmac

        return lambda: gmac.Gmac(binascii.unhexlify(key))
    import hashlib  # here, because most streams are checked without it

    return hashlib.sha256 if name == "sha256" else lambda: hashlib.blake2b(digest_size=SIZE)


def _text(digests: bytearray) -> str:
    return binascii.b2a_base64(digests, newline=False).decode()


def block_of(size: int) -> int:
    """The bytes of a block where there are SIZE in all."""
    block = _BLOCK
    while size > block * _MOST:
        block *= 2
    return block


def describe(fd: int, waiting: "Callable[[], None]", block: int, kind: str) -> "Dict[str, Any]":
    """{"block": bytes of one, "kind": of digest, "digests": of all blocks of the file FD that are no holes, in base64}.

    WAITING is called between blocks and may raise.  BLOCK: as block_of() has it.
    """
    from madrigal.onhost import stream

    size = os.fstat(fd).st_size
    found = bytearray(-(-size // block) * SIZE)

    def allocated() -> "Iterator[Tuple[int, int]]":
        done = 0
        for offset, length in stream.Extents(fd).within(0, size):
            start = max(offset // block * block, done)
            done = min(-(-(offset + length) // block) * block, size)
            if start < done:
                yield start, done

    for start, made in digests(fd, kind, block, allocated()):
        waiting()
        number = start // block
        found[number * SIZE : number * SIZE + len(made)] = made
    return {"block": block, "kind": kind, "digests": _text(found)}


def digests(
    fd: int, kind: str, block: int, ranges: "Iterable[Tuple[int, int]]"
) -> "Generator[Tuple[int, bytes], None, None]":
    """(start, the digests of its blocks one after the other) of each (start, end) in RANGES of the file FD.

    A range starts where a block does, and is one block or within 1 MiB.  Where the disk is fast, digesting takes longer
    than all else that is done with an older copy, so two threads work ahead; but for GMAC, of which a block takes so
    little that they would mostly wait for each other's interpreter: there one reads ahead.
    """
    import itertools
    from concurrent.futures import ThreadPoolExecutor

    is_quick = kind.startswith("gmac") and block <= _CHUNK
    count = 1 if is_quick else _THREADS
    readers = [Reader(fd) for _ in range(count + 2)]

    def work(start: int, end: int) -> "Tuple[int, int, Reader, bytes]":
        reader = readers.pop()
        if is_quick:
            return start, len(reader.read(start, end - start)), reader, b""
        return start, 0, reader, reader.digests(kind, block, start, end)

    left = iter(ranges)
    with ThreadPoolExecutor(count) as threads:
        ahead = [threads.submit(work, *wanted) for wanted in itertools.islice(left, count + 2)]
        while ahead:
            start, length, reader, made = ahead.pop(0).result()
            yield start, reader.made(kind, block, length) if is_quick else made
            readers.append(reader)
            ahead.extend(threads.submit(work, *wanted) for wanted in itertools.islice(left, 1))


class Notes:
    """What describe() would say of the file FD, made while all data of it are read in order, and kept in WHERE."""

    def __init__(self, fd: int, where: str) -> None:
        self._fd, self._where = fd, where
        self._about, size = identity(fd), os.fstat(fd).st_size
        self._kind, self._block = chosen(kinds()), block_of(size)
        self._digests = bytearray(-(-size // self._block) * SIZE)
        self._new = _maker(self._kind)
        self._size, self._at, self._made = size, 0, self._new()

    def see(self, offset: int, data: memoryview) -> None:
        """DATA were read at OFFSET; of a block that is not read whole nothing is noted."""
        end = offset + len(data)
        for start in range(offset // self._block * self._block, end, self._block):
            number, stop = start // self._block, min(start + self._block, self._size)
            if offset <= start:
                self._at, self._made = start, self._new()
            if self._at == max(start, offset):
                self._made.update(data[self._at - offset : min(stop, end) - offset])
                self._at = min(stop, end)
            digest = self._made.digest()[:SIZE] if self._at == stop else _UNKNOWN
            self._digests[number * SIZE : (number + 1) * SIZE] = digest

    def keep(self) -> None:
        """The file was read to its end; nothing is kept if it was changed meanwhile."""
        if identity(self._fd) != self._about:
            return
        import json

        digests = _text(self._digests)
        described = {"block": self._block, "kind": self._kind, "digests": digests}
        temporary = "{}.{}".format(self._where, os.getpid())
        with open(temporary, "w", opener=lambda path, flags: os.open(path, flags | os.O_CLOEXEC, 0o600)) as file:
            json.dump({"of": self._about, "described": described}, file)
        os.rename(temporary, self._where)


def noted(fd: int, where: str) -> "Optional[Dict[str, Any]]":
    """What Notes has kept in WHERE of the file FD, None if that was changed since, or is nothing of the kind."""
    import json

    try:
        with open(where) as file:
            kept = json.load(file)
        if kept["of"] != identity(fd):
            return None
        found = dict(kept["described"])
        Known(found)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found


def identity(fd: int) -> "List[int]":
    """Another when the file FD has been changed, or is another one."""
    found = os.fstat(fd)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def describe_all(top: str, waiting: "Callable[[], None]", block: int, kind: str) -> "Dict[str, Any]":
    """describe() of the file TOP ("") or of all files in the directory TOP, by path; {} if it is not there.

    BLOCK 0: as it is for all of them together.
    """
    found = {}
    paths = [os.path.join(base, name) for base, _, names in os.walk(top) for name in names] or [top]
    paths = [path for path in paths if os.path.isfile(path) and not os.path.islink(path)]
    block = block or block_of(sum(os.path.getsize(path) for path in paths))
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found["" if path == top else os.path.relpath(path, top)] = describe(fd, waiting, block, kind)
        finally:
            os.close(fd)
    return found


def sample(path: str, size: int = 0) -> "Dict[str, Any]":
    """{"path", "size", "allocated", "blocks": checks of some blocks evenly over SIZE bytes} of the file PATH.

    SIZE 0 is its own.  The check of zeros, and of what is beyond the end, is 0.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found, reader, checks = os.fstat(fd), Reader(fd), []
        size = size or found.st_size
        for start in range(0, size, max(size // _SAMPLES // _BLOCK, 1) * _BLOCK):
            data = reader.read(start, min(_BLOCK, size - start))
            checks.append(zlib.crc32(data) if bytes(data).strip(b"\0") else 0)
    finally:
        os.close(fd)
    return {"path": path, "size": found.st_size, "allocated": found.st_blocks * 512, "blocks": checks}


def alike(ours: "List[int]", theirs: "List[int]") -> float:
    """Which share of what we have is the same there, by the checks of sample()."""
    same = [mine == other for mine, other in zip(ours, theirs) if mine]  # noqa: B905
    return sum(same) / len(same) if same else 0.0


class Known:
    """What describe() says of a file, to be compared with another, or to be completed by one."""

    def __init__(self, described: "Dict[str, Any]") -> None:
        self.block: int = described["block"]
        self.kind: str = described["kind"]
        self._digests = binascii.a2b_base64(described["digests"])
        if type(self.block) is not int or self.block < _BLOCK or self.block % _BLOCK or not _is_kind(self.kind):
            raise ValueError("these are not digests of blocks")

    def spans(self, start: int, end: int, fd: int) -> "Iterator[Tuple[int, int, bool]]":
        """(from, to, whether there is nothing on the other side) of what is not the same as in the open file FD.

        START is where a block begins.  Now and then a span of nothing comes while all is the same.
        """
        window = max(self.block, _CHUNK)

        def windows() -> "Iterator[Tuple[int, int]]":
            return ((offset, min(offset + window, end)) for offset in range(start, end, window))

        made = digests(fd, self.kind, self.block, (wanted for wanted in windows() if self._has(*wanted)))
        begun, state = start, _SAME
        try:
            for offset, stop in windows():
                own = next(made)[1] if self._has(offset, stop) else b""
                for at, found in self._compared(offset, stop, own):
                    if found != state:
                        if state != _SAME:
                            yield begun, at, state == _BARE
                        begun, state = at, found
                if state == _SAME:
                    yield stop, stop, True
        finally:
            made.close()
        if state != _SAME:
            yield begun, end, state == _BARE

    def filled_with(self, described: "Dict[str, Any]") -> "Dict[str, Any]":
        """What describe() would say if what it lacks were taken from a file DESCRIBED in blocks of the same size."""
        others = bytearray(binascii.a2b_base64(described["digests"]))
        others.extend(bytes(max(len(self._digests) - len(others), 0)))
        for start in range(0, len(self._digests), SIZE):
            if self._digests[start : start + SIZE] != _NOTHING:
                others[start : start + SIZE] = self._digests[start : start + SIZE]
        return {"block": self.block, "kind": self.kind, "digests": _text(others)}

    def lacking(self, start: int, end: int) -> "Iterator[Tuple[int, int]]":
        """(from, to) of what is in blocks between START and END of which it has nothing."""
        while start < end:
            number = start // self.block
            stop = min((number + 1) * self.block, end)
            if (self._digests[number * SIZE : (number + 1) * SIZE] or _NOTHING) == _NOTHING:
                yield start, stop
            start = stop

    def _has(self, start: int, end: int) -> bool:
        """Whether there is something between START and END."""
        found = self._digests[start // self.block * SIZE : -(-end // self.block) * SIZE]
        return found.count(0) < len(found)

    def _compared(self, start: int, end: int, own: bytes) -> "Iterator[Tuple[int, int]]":
        first = start // self.block
        for number in range(first, -(-end // self.block)):
            theirs = self._digests[number * SIZE : (number + 1) * SIZE] or _NOTHING
            ours = own[(number - first) * SIZE : (number - first + 1) * SIZE]
            yield number * self.block, _BARE if theirs == _NOTHING else _SAME if theirs == ours else _OTHER


def _read(fd: int, view: memoryview, offset: int) -> int:
    """As os.preadv, which Python 3.6 does not have."""
    data = os.pread(fd, len(view), offset)
    view[: len(data)] = data
    return len(data)


_preadv = getattr(os, "preadv", None)


class Reader:
    """Reads an open file into a buffer, always the same.  Others may read the file at the same time."""

    def __init__(self, fd: int) -> None:
        self.buffer = bytearray(_CHUNK)
        self._view, self._fd = memoryview(self.buffer), fd

    def read(self, offset: int, length: int) -> memoryview:
        """LENGTH bytes (at most 1 MiB) at OFFSET, fewer at the end of the file; good until the next read."""
        done = 0
        while done < length:
            view = self._view[done:length]
            count = _preadv(self._fd, [view], offset + done) if _preadv else _read(self._fd, view, offset + done)
            if not count:
                break
            done += count
        return self._view[:done]

    def made(self, kind: str, block: int, length: int) -> bytes:
        """The digest of each BLOCK of the LENGTH bytes that were read."""
        found, new = bytearray(), _maker(kind)
        for offset in range(0, length, block):
            one = new()
            one.update(self._view[offset : min(offset + block, length)])
            found += one.digest()[:SIZE]
        return bytes(found)

    def digests(self, kind: str, block: int, start: int, end: int) -> bytes:
        """The digest of each BLOCK from START, where one begins, to END: of one, or of those of at most 1 MiB."""
        if end - start <= _CHUNK:
            return self.made(kind, block, len(self.read(start, end - start)))
        made = _maker(kind)()
        for at in range(start, end, _CHUNK):
            made.update(self.read(at, min(_CHUNK, end - at)))
        return bytes(made.digest()[:SIZE])
