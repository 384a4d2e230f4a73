"""Reach a host with paramiko (MADRIGAL_TRANSPORT=paramiko): no ssh program, one connection per host and process.

For machines without an OpenSSH client, and for a process that holds many hosts at once.  An action that runs for a
moment is better off with OpenSSH: importing paramiko takes 0.3 s and its connection ends with the process.

The user's ssh_config, agent, known_hosts and ProxyJump apply; host/ssh_config.py says which keywords do what they do
for ssh (SUPPORTED, ONLY), which do not matter here (IGNORED), and that every other one is refused by its name.  Host
keys are always checked and never learned.  Works with paramiko 2.12 (Debian 12) to 5.1.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

from madrigal.deadline import Deadline, connect
from madrigal.errors import DeadlineExceeded, HostUnreachable
from madrigal.host import ATTEMPTS
from madrigal.host.channel import Channel
from madrigal.host.paramiko_connection import Connection, explain, open_connection, paramiko

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PIECE = 1 << 15
"""Bytes at a time: paramiko's own packets are no larger, and it is quadratic in what is more than that."""

_KEPT = 1 << 16
"""Bytes of stderr that are kept, the last ones."""


def start(name: str, remote_command: str, bulk: bool) -> ParamikoChannel:
    """Start a shell command on host NAME; BULK over a connection of its own."""
    attempt = 0
    while True:
        attempt += 1
        try:
            session, own = _session(name, bulk)
            return ParamikoChannel(name, session, own, os.fsencode(remote_command))
        except HostUnreachable as error:
            if not getattr(error, "crowded", False) or attempt >= ATTEMPTS:
                raise
        time.sleep((0.2 + (os.getpid() % 16) / 16) * attempt)


def disconnect() -> None:
    """End all connections of this process."""
    with _lock:
        for shared in _hosts.values():
            while shared.connections:
                shared.connections.pop().close()


class ParamikoChannel(Channel):
    """A command run in a session of a paramiko connection, with threads that carry between it and the pipes."""

    def __init__(self, host: str, session: Any, own: Connection | None, remote_command: bytes) -> None:
        self._session, self._own = session, own
        self._errors = bytearray()
        stdin, stdout = os.pipe(), os.pipe()
        super().__init__(host, stdin[1], stdout[0])
        self._output = [
            threading.Thread(target=self._carry_stdout, args=(stdout[1],), daemon=True),
            threading.Thread(target=self._carry_stderr, daemon=True),
        ]
        threading.Thread(target=self._carry_stdin, args=(stdin[0], remote_command), daemon=True).start()
        for thread in self._output:
            thread.start()

    def _carry_stdin(self, fd: int, remote_command: bytes) -> None:
        try:
            self._session.exec_command(remote_command)  # here, because it waits for the host as long as that likes
            while data := os.read(fd, _PIECE):
                self._session.sendall(data)
            self._session.shutdown_write()
        except (OSError, EOFError, paramiko.SSHException):
            pass  # the command has ended, which its status tells
        finally:
            os.close(fd)

    def _carry_stdout(self, fd: int) -> None:
        try:
            while data := self._session.recv(_PIECE):
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
        except OSError:
            pass  # nobody reads it any more
        finally:
            os.close(fd)

    def _carry_stderr(self) -> None:
        try:
            while data := self._session.recv_stderr(_PIECE):
                self._errors += data
                del self._errors[:-_KEPT]
        except OSError:
            pass

    def _poll(self) -> int | None:
        if any(thread.is_alive() for thread in self._output) or not self._session.exit_status_ready():
            return None
        status: int = self._session.recv_exit_status()
        if status >= 0:
            return status
        if not self._session.transport.is_active() and not self._errors:
            self._errors += f"Connection to {self.host} closed by remote host.".encode()
        return 255  # ssh's, also for a command that a signal has ended

    def _end(self) -> None:
        end = time.monotonic() + 0.2
        while self._poll() is None and time.monotonic() < end:
            time.sleep(0.005)

    def close(self) -> None:
        super().close()
        if self._own:
            self._own.close()
        else:
            # elsewhere: it writes to the host, which may not read any more
            threading.Thread(target=self._close_session, daemon=True).start()

    def _close_session(self) -> None:
        with contextlib.suppress(EOFError, OSError, paramiko.SSHException):  # of a connection that is gone
            self._session.close()

    def stderr(self) -> bytes:
        return bytes(self._errors)


# -- the connections of this process ---------------------------------------------------------------------------


class _Shared:
    """The connections to one host that all its sessions share: a second one when sshd allows no more on the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connections: list[Connection] = []


class _Full(HostUnreachable):
    """The connection stands, but sshd allows no further session on it."""

    crowded = True


_lock = threading.Lock()
_hosts: dict[tuple[str, str], _Shared] = {}


def _session(name: str, bulk: bool) -> tuple[Any, Connection | None]:
    """A session on NAME, and for BULK its connection, which is to end with it."""
    limit = Deadline(connect(), f"connecting to {name}")
    if bulk:
        connection = open_connection(name, [], limit)
        return _open(name, connection, limit), connection
    with _lock:
        shared = _hosts.setdefault((os.environ.get("MADRIGAL_SSH_CONFIG", ""), name), _Shared())
    if not shared.lock.acquire(timeout=connect()):
        raise explain(name, DeadlineExceeded())
    try:
        for connection in list(shared.connections):
            try:
                return _open(name, connection, limit), None
            except _Full:
                continue
            except HostUnreachable:
                shared.connections.remove(connection)
                connection.close()
        shared.connections.append(open_connection(name, [], limit))
        return _open(name, shared.connections[-1], limit), None
    finally:
        shared.lock.release()


def _open(name: str, connection: Connection, limit: Deadline) -> Any:
    try:
        session = connection.transport.open_session(timeout=limit.left())
        for variable, value in connection.target.environment.items():
            session.set_environment_variable(variable, value)
        return session
    except paramiko.ChannelException as error:
        raise _Full(f"{name} cannot be reached: {error.text}") from None
    except (paramiko.SSHException, OSError, EOFError, DeadlineExceeded) as error:
        raise explain(name, error) from None
