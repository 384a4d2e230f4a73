"""A file of a web server: http:// and https://.  What breaks off goes on where it was, if it is still the same file."""

from __future__ import annotations

import re

from madrigal import deadline
from madrigal.errors import SourceUnavailable
from madrigal.source import web
from madrigal.source.resume import Broken, Resuming

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from madrigal.source.schemes import Source, Terms

_RANGE = re.compile(r"bytes (?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19}|\*)\Z")
_ETAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"\Z')


def open(url: str, terms: Terms, stall: float) -> Source:
    return Download(url, terms, stall)


class Download(Resuming):
    """The page at URL.  SIGN: as for web.get().  NAME: what messages call it, if not by its URL."""

    def __init__(self, url: str, terms: Terms, stall: float, sign: web.Sign | None = None, name: str = "") -> None:
        super().__init__(name or web.Page(url).name, stall)
        self._url, self._terms, self._sign = url, terms, sign
        self._answer: web.Answer | None = None
        self._mark = ""
        """What If-Range takes: a name for exactly these bytes, "" if the server gives none."""
        self._seen = _Prefix()
        self.begin()

    def ask(self, offset: int) -> None:
        self.close()
        answer = self._get({"Range": f"bytes={offset}-", "If-Range": self._mark} if offset and self._mark else {})
        try:
            if not offset and answer.status == 200:
                self.size, self._mark = answer.length, _mark(answer)
            elif answer.status == 206 and offset and self._mark:
                self._check_range(answer, offset)
            elif answer.status == 200 and offset:
                self._skip(answer, offset)
            elif answer.status == 416 and offset and _total(answer) == offset and self.size is None:
                self.size = offset  # only the end of the body was missing
            else:
                raise self._changed() if answer.status == 416 and offset else answer.refused()
        except BaseException:
            answer.close()
            raise
        self._answer = answer

    def some(self, most: int) -> bytes:
        assert self._answer is not None
        try:
            data = self._answer.read(most)
        except Broken as broken:
            after = f"{self.name} broke off after {self.got}{self._of()} bytes"
            text = str(broken.error).replace(f"{self._answer.page.name} broke off", after, 1)
            raise Broken(type(broken.error)(text), broken.reached) from None
        if not data and self.size is not None:
            text = f"{self.name} broke off after {self.got}{self._of()} bytes: try again"
            raise Broken(SourceUnavailable(text), reached=True)
        if not self._mark:
            self._seen.add(data)
        return data

    def peek(self, offset: int, length: int) -> bytes | None:
        """By another request, if the server can do that and the file is the same."""
        if not self._mark:
            return None
        try:
            answer = self._get({"Range": f"bytes={offset}-{offset + length - 1}", "If-Range": self._mark})
        except Broken as broken:
            raise broken.error from None
        try:
            if answer.status != 206:
                return None
            self._check_range(answer, offset)
            found = b""
            while len(found) < length and (data := answer.read(length - len(found))):
                found += data
        except Broken as broken:
            raise broken.error from None
        finally:
            answer.close()
        return found if len(found) == length else None

    def close(self) -> None:
        if self._answer:
            self._answer.close()
        self._answer = None

    def _get(self, headers: dict[str, str]) -> web.Answer:
        seconds = deadline.connect() + self._stall
        return web.get(self._url, self._terms, headers, self.patience(), seconds, self._sign)

    def _check_range(self, answer: web.Answer, offset: int) -> None:
        """Raise SourceUnavailable unless ANSWER is the file that was begun, from OFFSET on."""
        match = _RANGE.match(answer.headers.get("Content-Range", ""))
        if not match or match[1] is None or int(match[1]) != offset:
            raise SourceUnavailable(f"{self.name} gives another part of the file than it was asked for (Content-Range)")
        if (match[3] != "*" and self.size not in (None, int(match[3]))) or self._same(answer) is False:
            raise self._changed()

    def _skip(self, answer: web.Answer, offset: int) -> None:
        """Read what has been read before: the server gives nothing but the whole file."""
        same = self._same(answer)
        if answer.length != self.size or same is False:
            raise self._changed()
        again = _Prefix()
        while again.length < offset:
            data = answer.read(min(offset - again.length, 1 << 20))
            if not data:
                text = f"{self.name} broke off after {again.length}{self._of()} bytes: try again"
                raise Broken(SourceUnavailable(text), reached=True)
            again.add(data)
            self.moved()
        if not same and not self._seen.equals(again):
            raise self._changed()

    def _same(self, answer: web.Answer) -> bool | None:
        """Whether ANSWER is of the file that was begun, as its headers say; None if they do not."""
        name = "ETag" if self._mark.startswith('"') else "Last-Modified"
        said = answer.headers.get(name, "").strip()
        return said == self._mark if self._mark and said else None

    def _changed(self) -> SourceUnavailable:
        return SourceUnavailable(f"{self.name} was changed while it was fetched: try again")

    def _of(self) -> str:
        return "" if self.size is None else f" of {self.size}"


class _Prefix:
    """What tells the beginning of one file from that of another, when the server gives it no name."""

    def __init__(self) -> None:
        import hashlib

        self._digest = hashlib.blake2b()
        self.length = 0

    def add(self, data: bytes) -> None:
        self._digest.update(data)
        self.length += len(data)

    def equals(self, other: _Prefix) -> bool:
        return (self.length, self._digest.digest()) == (other.length, other._digest.digest())


def _mark(answer: web.Answer) -> str:
    """What names exactly the bytes of ANSWER: a strong ETag, else a Last-Modified that is no longer of this second."""
    etag = answer.headers.get("ETag", "").strip()
    if _ETAG.match(etag):
        return str(etag)
    from email.utils import parsedate_to_datetime

    modified = str(answer.headers.get("Last-Modified", "")).strip()
    try:
        past = parsedate_to_datetime(answer.headers.get("Date", "")) - parsedate_to_datetime(modified)
    except (TypeError, ValueError, OverflowError):
        return ""
    return modified if past.total_seconds() >= 1 and modified.isascii() else ""


def _total(answer: web.Answer) -> int | None:
    """How long the file is, as the Content-Range of an answer says that has nothing of it."""
    match = _RANGE.match(answer.headers.get("Content-Range", ""))
    return int(match[3]) if match and match[1] is None and match[3] != "*" else None
