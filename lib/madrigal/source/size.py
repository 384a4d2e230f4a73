"""How large an image will be, before it is imported: what the front-end asks with `stat`."""

from __future__ import annotations

from madrigal import deadline, inspector
from madrigal.errors import NotSupported
from madrigal.source import schemes
from madrigal.source.stream import Unpacked

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from madrigal.source.schemes import Terms

# A front-end gives up after 90 s.  A server may take 20 s to be reached and 20 s to begin or go on.
_LOCAL, _REMOTE, _STALL = 80.0, 60.0, 20.0
_MOST = 8 << 20  # bytes of a head; a VHDX image says its size within 4 MiB
_COUNTED = 256 << 20
"""The most bytes that are fetched to count what they unpack to, where nothing else tells."""


def virtual_size(url: str, terms: Terms, decompress: bool = True, rate: int | None = None) -> int:
    """The bytes that a VM would see of the image at URL, which is not imported.

    TERMS and RATE as for open().  DECOMPRESS: whether an import would unpack it.  Raises BadImage for what would not be
    imported, NotSupported where only an import can tell, DeadlineExceeded, and what open() raises.
    """
    with schemes.open(url, terms, min(_STALL, deadline.stall()), rate) as source:
        local = source.local_fd is not None
        time = deadline.Deadline(_LOCAL if local else _REMOTE, f"finding the size of {source.name}")
        begun = _Begun()

        def seen(data: bytes) -> None:
            time.left()
            begun.add(data)

        stream = Unpacked(source, decompress, seen)
        if source.local_fd is not None and not stream.packed:
            return inspector.check_import(source.local_fd).virtual_size
        head, enough, found = bytearray(), 64 << 10, None
        pieces = iter(stream)
        for piece in pieces:
            time.left()
            head += piece
            if len(head) >= enough:
                enough = 2 * len(head)
                found = inspector.inspect_head(bytes(head), whole=False)
            if found or len(head) >= _MOST:
                break
        else:
            return inspector.accept(_whole(head)).virtual_size
        if not found:
            raise NotSupported(f"the size of {source.name} is not in its first {_MOST >> 20} MiB: give SIZE")
        if inspector.accept(found).driver != "raw":
            return found.virtual_size
        if not stream.packed and source.size is not None:
            return source.size
        if stream.kind and not stream.archive:
            from madrigal.source import packed

            if (length := packed.length(source, stream.kind, bytes(head), begun.taken(), seen)) is not None:
                return length
        if not local and (source.size is None or source.size > _COUNTED):
            reason = "it is packed" if stream.packed else "its server does not say it"
            raise NotSupported(f"the size of {source.name} is not known without fetching it, as {reason}: give SIZE")
        size = len(head)
        for piece in pieces:
            time.left()
            size += len(piece)
        return size


class _Begun:
    """What has been read of a source, as long as it is little."""

    def __init__(self) -> None:
        self._data: bytearray | None = bytearray()

    def add(self, data: bytes) -> None:
        if self._data is not None:
            self._data += data
            if len(self._data) > 2 * _MOST:
                self._data = None

    def taken(self) -> bytes | None:
        """All of it, None if it was not little.  Nothing more is kept."""
        data, self._data = self._data, None
        return None if data is None else bytes(data)


def _whole(head: bytearray) -> inspector.Found:
    found = inspector.inspect_head(bytes(head), whole=True)
    assert found is not None
    return found
