"""What is remembered between two commands: an SQLite file, and a lock for each VM and image that is acted on."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from typing import TypeVar

from madrigal.embedded.records import VM, Datastore, Host, Image, Record, load
from madrigal.errors import Busy, ConfigError, InUse, NotFound, UsageError

R = TypeVar("R", Host, Datastore, Image, VM)

KINDS: dict[type[Record], str] = {Host: "host", Datastore: "datastore", Image: "image", VM: "vm"}
VERSION = 1


def kind(record: Record | type[Record]) -> str:
    return KINDS[record if isinstance(record, type) else type(record)]


def title(record: Record) -> str:
    """How messages name RECORD: `VM 3`, `image 'ttylinux'`."""
    return f"VM {record.id}" if isinstance(record, VM) else f"{kind(record)} '{record.name}'"


class State:
    """The state in DIRECTORY, made on first use.  For one thread; another opens its own."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        file = f"{directory}/madrigal.db"
        try:
            os.makedirs(directory, exist_ok=True)
            if not os.path.exists(file) and os.listdir(directory):
                raise UsageError(f"{directory} is not empty and holds no madrigal.db: give a directory of its own")
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            os.makedirs(f"{directory}/locks", exist_ok=True)
            # Autocommit; transaction() groups.  The timeout is for another process's transaction, which lasts ms.
            self._db = sqlite3.connect(file, timeout=30, isolation_level=None)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._make()
            elif version != VERSION:
                raise ConfigError(f"{file} was written by another version of madrigal (format {version})")
        except OSError as error:
            raise ConfigError(f"cannot use the state directory {directory}: {error.strerror}") from None
        except sqlite3.Error as error:
            raise ConfigError(f"cannot use {file}: {error}") from None

    def _make(self) -> None:
        with self.transaction():  # two processes may be here at once: IF NOT EXISTS
            for table in KINDS.values():
                columns = "id INTEGER PRIMARY KEY, name TEXT NOT NULL, body TEXT NOT NULL"
                self._db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
            self._db.execute("CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is read and written inside happens at once or not at all, also for other processes."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def setting(self, name: str) -> str:
        row = self._db.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else ""

    def set(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (name, value))

    def number(self, sequence: str) -> int:
        """The next number of SEQUENCE, never given twice.  Call it inside a transaction."""
        number = int(self.setting("next " + sequence) or 0)
        self.set("next " + sequence, str(number + 1))
        return number

    def count(self, cls: type[Record]) -> int:
        return int(self._db.execute(f"SELECT count(*) FROM {kind(cls)}").fetchone()[0])

    def all(self, cls: type[R]) -> list[R]:
        rows = self._db.execute(f"SELECT body FROM {kind(cls)} ORDER BY id")
        return [load(cls, json.loads(body)) for (body,) in rows]

    def get(self, cls: type[R], ident: int) -> R:
        """The record with this id; raises NotFound."""
        query = f"SELECT body FROM {kind(cls)} WHERE id = ?"
        row = self._db.execute(query, (ident,)).fetchone() if ident < 1 << 63 else None
        if not row:
            raise NotFound(f"there is no {kind(cls)} {ident}: see 'madrigal {kind(cls)} list'")
        record: R = load(cls, json.loads(row[0]))
        return record

    def find(self, cls: type[R], given: str | int) -> R:
        """The record with this name or id (of VMs, one that is not done); raises NotFound."""
        if isinstance(given, int) or given.isdecimal():
            return self.get(cls, int(given))
        if found := self._named(cls, given):
            return found
        raise NotFound(f"there is no {kind(cls)} named {given!a}: see 'madrigal {kind(cls)} list'")

    def _named(self, cls: type[R], name: str) -> R | None:
        rows = self._db.execute(f"SELECT body FROM {kind(cls)} WHERE name = ? ORDER BY id DESC", (name,)).fetchall()
        records = [load(cls, json.loads(body)) for (body,) in rows]
        # The names of VMs that are done are free again, but can still be used to look at the last of them.
        live: list[R] = [r for r in records if not (isinstance(r, VM) and r.etime)]
        return next(iter(live or records), None)

    def check_free(self, cls: type[R], name: str) -> None:
        """Raise InUse if something of this kind has NAME already."""
        found = self._named(cls, name)
        if found and not (isinstance(found, VM) and found.etime):
            raise InUse(f"there is a {kind(cls)} named '{name}' already (id {found.id}): choose another name")

    def save(self, record: Record) -> None:
        body = json.dumps(dataclasses.asdict(record))
        self._db.execute(f"INSERT OR REPLACE INTO {kind(record)} VALUES (?, ?, ?)", (record.id, record.name, body))

    def remove(self, record: Record) -> None:
        self._db.execute(f"DELETE FROM {kind(record)} WHERE id = ?", (record.id,))

    @contextlib.contextmanager
    def lock(self, record: Record, doing: str) -> Iterator[None]:
        """Nobody else acts on RECORD inside; raises Busy at once if somebody does.

        The kernel drops the lock when its holder ends, however that happens.
        """
        fd = os.open(f"{self.directory}/locks/{kind(record)}-{record.id}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(fd, 200).decode("utf-8", "replace") or "another process"
                raise Busy(f"{title(record)} is being acted on ({holder}): try again when that is done") from None
            os.ftruncate(fd, 0)
            os.write(fd, f"{doing}, process {os.getpid()}".encode())
            yield
        finally:
            os.close(fd)
