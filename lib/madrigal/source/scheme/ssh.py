"""A file of a machine that is reached by ssh, `ssh://[USER@]HOST:/PATH`, if the datastore would allow it here."""

from __future__ import annotations

import json

from madrigal import deadline
from madrigal.errors import BY_NAME, DeadlineExceeded, HostUnreachable, MadrigalError, SourceUnavailable, UsageError
from madrigal.host import Host, program
from madrigal.host.channel import failure
from madrigal.location import is_host
from madrigal.onhost.reader import HEADER
from madrigal.source.resume import Broken, Resuming
from madrigal.source.schemes import Source, Terms

_ZEROS = 1 << 20
PARTS = ("errors", "onhost.guard", "onhost.reader")


def open(url: str, terms: Terms, stall: float) -> Source:
    name, colon, path = url.partition("://")[2].partition(":")
    if not colon or not is_host(name) or not path.startswith("/"):
        raise UsageError(f"'{url}' is not ssh://[USER@]HOST:/PATH: a port or a key is for ~/.ssh/config to say")
    host = Host(name)
    if host.local:
        from madrigal.source.scheme import file

        return file.open(path, terms, stall)
    return _File(url, host, path, terms, stall)


class _File(Resuming):
    def __init__(self, name: str, host: Host, path: str, terms: Terms, stall: float) -> None:
        super().__init__(name, stall)
        self._host, self._path, self._terms = host, path, terms
        self._stream: _Stream | None = None
        self._version: object = None
        self.begin()

    def ask(self, offset: int) -> None:
        self.close()
        self._stream = self._open(offset)
        self.size, self._version = self._stream.size, self._stream.version

    def some(self, most: int) -> bytes:
        assert self._stream is not None
        return self._stream.read(most)

    def end(self) -> None:
        assert self._stream is not None
        self._stream.read(1)

    def peek(self, offset: int, length: int) -> bytes | None:
        try:
            stream = self._open(offset)
            try:
                found = b""
                while len(found) < length and stream.at < stream.size:
                    found += stream.read(length - len(found))
            finally:
                stream.close()
        except Broken as broken:
            raise broken.error from None
        return found if len(found) == length else None

    def close(self) -> None:
        if self._stream:
            self._stream.close()
        self._stream = None

    def _open(self, offset: int) -> _Stream:
        stream = _Stream(self._host, self._path, self._terms, offset, self.patience())
        if self._version not in (None, stream.version):
            stream.close()
            raise SourceUnavailable(f"{self.name} was changed while it was fetched: try again")
        return stream


class _Stream:
    """The file PATH of HOST from OFFSET on, over a connection of its own: `size`, `version`; `at`: where it is."""

    def __init__(self, host: Host, path: str, terms: Terms, offset: int, patience: float) -> None:
        self._name, self._patience = host.name, patience
        self.at, self._next, self._left = offset, offset, 0
        try:
            self._channel = host.start(program.COMMAND, bulk=True)
        except HostUnreachable as error:
            raise Broken(error, reached=False) from None
        try:
            self.size, self.version = self._begin(path, terms)
        except BaseException:
            self._channel.close()
            raise

    def _begin(self, path: str, terms: Terms) -> tuple[int, object]:
        channel = self._channel
        call = f"reader.main({program.MARKER!r}, {path!a}, *{terms.directories!a}, {self.at})"
        try:
            channel.write(deadline.connect(), program.assembled(PARTS, f"from madrigal.onhost import reader\n{call}\n"))
        except BrokenPipeError:
            pass  # it has ended already; why, is found below
        try:
            while line := channel.readline(deadline.connect()):
                if line.rstrip().endswith(program.MARKER.encode()):
                    break
            answer = channel.readline(self._patience) if line else b""
            if not answer.endswith(b"\n"):
                raise _worth(failure(self._name, channel.wait(5), channel.stderr()))
        except DeadlineExceeded as error:
            raise Broken(error, reached=True) from None
        try:
            about = json.loads(answer)
            if "error" not in about:
                size, version = about["size"], about["version"]
                if type(size) is not int or not 0 <= size < 1 << 62:
                    raise ValueError
                return size, version
            name, text = map(str, about["error"])
        except (ValueError, KeyError, TypeError, RecursionError):  # damaged on its way
            raise Broken(self._broken(), reached=True) from None
        raise BY_NAME.get(name, MadrigalError)(f"{self._name}: {text}")

    def _exactly(self, length: int) -> bytes:
        data = bytearray(length)
        if self._channel.read_into(memoryview(data), self._patience) < length:
            raise Broken(self._broken(), reached=True)
        return bytes(data)

    def read(self, most: int) -> bytes:
        """Some bytes, at most MOST; raises Broken."""
        try:
            while not self._left and self.at == self._next:
                self._next, self._left = HEADER.unpack(self._exactly(HEADER.size))
                if not self.at <= self._next <= self._next + self._left <= self.size:
                    raise Broken(self._broken(), reached=True)
                if not self._left and self.at == self._next:
                    if self.at < self.size:
                        raise Broken(self._broken(), reached=True)
                    return b""
            if self.at < self._next:  # a hole
                data = bytes(min(most, self._next - self.at, _ZEROS))
            else:
                length = min(most, self._left)
                data = self._exactly(length)
                self._left -= length
                self._next += length
        except DeadlineExceeded as error:
            raise Broken(error, reached=True) from None
        self.at += len(data)
        return data

    def _broken(self) -> HostUnreachable:
        said = self._channel.stderr().decode("utf-8", "replace").strip().split("\n")[-1]
        text = f"the connection to {self._name} broke, or the file was changed, after {self.at} bytes"
        return HostUnreachable(f"{text}{': ' + said if said else ''}")

    def close(self) -> None:
        self._channel.close()


def _worth(error: MadrigalError) -> MadrigalError | Broken:
    return Broken(error, reached=False) if isinstance(error, HostUnreachable) else error
