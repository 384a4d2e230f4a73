"""Reach a host with the OpenSSH client: all actions share one kept connection per host.

A new connection costs 300 ms and 75 ms of CPU, a command over a kept one 5 ms of CPU.  The user's ssh_config, agent,
known_hosts and ProxyJump apply; MADRIGAL_SSH_CONFIG names another configuration file.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
import zlib

from madrigal import command, config, deadline
from madrigal.errors import Busy, ConfigError, DeadlineExceeded, MissingProgram
from madrigal.host.channel import Channel, failure
from madrigal.onhost.ssh import ciphers, options

PERSIST = 600
"""Seconds a shared connection is kept without use."""


def _options() -> list[str]:
    file = os.environ.get("MADRIGAL_SSH_CONFIG", "")
    return (["-F", file] if file else []) + options(deadline.connect())


def start(name: str, remote_command: str, bulk: bool) -> SshChannel:
    """Start a shell command on host NAME; BULK over a connection of its own."""
    argv = ["ssh", *_options()]
    if bulk:
        argv += ["-o", "ControlPath=none", "-c", ciphers()]
    else:
        # where the shared connection has no session free, ssh falls back to one of its own
        shared = _shared(name)
        argv += ["-o", "ControlMaster=no", "-o", f"ControlPath={shared}"]
    return SshChannel(name, [*argv, "--", name, remote_command], "" if bulk else shared)


class SshChannel(Channel):
    """A command run by an ssh process."""

    def __init__(self, host: str, argv: list[str], shared: str) -> None:
        """SHARED: the socket of the connection that it takes, "" for its own."""
        self._shared = shared
        while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
            pass  # we were started without one of these: what is opened now would be in the way of ssh's own
        os.close(fd)
        self._errors = os.memfd_create("stderr")  # a file: nothing to drain, so nothing to dead-lock on
        self._status: int | None = None
        stdin, stdout = os.pipe(), os.pipe()
        try:
            # Not with subprocess: loading that costs more CPU than ssh does.
            self._pid = os.posix_spawnp(
                argv[0],
                argv,
                command.environment(),
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate((stdin[0], stdout[1], self._errors))],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM),
            )
        except FileNotFoundError:
            raise MissingProgram("ssh is not installed here: install the package openssh-client") from None
        finally:
            os.close(stdin[0])
            os.close(stdout[1])
        super().__init__(host, stdin[1], stdout[0])

    def _poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def _end(self) -> None:
        # It ends by itself when both pipes are closed and the other side hears of it; a dead host never does.
        try:
            self.wait(0.2)
        except DeadlineExceeded:
            os.kill(self._pid, signal.SIGTERM)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def abandon(self) -> bool:
        if not self._shared:
            return False
        # what still goes over it goes on; if the network has lost it, ssh itself sees that after a minute
        command.run(_control(self._shared, "stop"), deadline.connect(), check=False)
        return True

    def stderr(self) -> bytes:
        return os.pread(self._errors, 1 << 16, max(0, os.fstat(self._errors).st_size - (1 << 16)))


def _shared(name: str) -> str:
    """The control socket of the shared connection to NAME, which is up on return."""
    file = os.environ.get("MADRIGAL_SSH_CONFIG", "")
    base = f"{config.run_dir()}/{name}-{zlib.crc32(file.encode()):08x}"
    path = base + ".s"
    if len(path) > 80:  # a socket's name has 107 bytes at most, of which ssh needs some while it makes it
        raise ConfigError(f"{path} is too long for a socket: set MADRIGAL_RUN_DIR to a shorter directory")
    if not _answers(path):
        _start_shared(name, base, path)
    return path


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        try:
            client.connect(path)
        except OSError:
            return False
    return True


def _start_shared(name: str, base: str, path: str) -> None:
    began = time.time()
    lock = os.open(base + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _wait_for(lock, name)
        if _answers(path):
            return
        failed = os.pread(lock, 4096, 0).decode("utf-8", "replace").split("\n", 2)
        if len(failed) == 3 and float(failed[0]) > began:
            # somebody tried while we waited for him; no use in fifteen actions finding out one after the other
            raise failure(name, int(failed[1]), failed[2].encode())
        for attempt in range(1, 7):
            status, said = _master(name, path)
            if status == 0:
                return
            error = failure(name, status, said)
            if not getattr(error, "crowded", False):
                break
            time.sleep(0.3 * attempt)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{time.time()}\n{status}\n".encode() + said, 0)
        raise error
    finally:
        os.close(lock)


def _wait_for(lock: int, name: str) -> None:
    end = time.monotonic() + deadline.lock()
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise Busy(f"another process has been connecting to {name} for {deadline.lock():g} s") from None
            time.sleep(0.02)


def _master(name: str, path: str) -> tuple[int, bytes]:
    """Start the shared connection; returns ssh's status and what it said."""
    import subprocess

    if os.path.lexists(path):
        os.unlink(path)  # of one that was killed
    # It ends with us while it connects: the next one would start a second, and nobody could end the first any more.
    argv = ["setpriv", "--pdeathsig", "TERM", "ssh", *_options(), "-c", ciphers()]
    argv += ["-o", "ControlMaster=yes", "-o", f"ControlPath={path}"]
    argv += ["-o", f"ControlPersist={PERSIST}", "-N", "-f", "--", name]
    errors = os.memfd_create("stderr")
    try:
        # A session of its own: the front-end may end our process group, and this connection is everybody's.
        # It must not keep our pipes open either: a front-end drops the output it has when they stay so.
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=command.environment(),
            start_new_session=True,
            cwd="/",
        )
        try:
            status = process.wait(deadline.connect() + min(deadline.connect(), 10))
        except subprocess.TimeoutExpired:
            status = 255
            os.write(errors, b"Connection timed out\n")
            command.end_group(process)
        except BaseException:
            command.end_group(process)
            raise
        return status, os.pread(errors, 4096, max(0, os.fstat(errors).st_size - 4096))
    except FileNotFoundError:
        raise MissingProgram("ssh is not installed here: install the package openssh-client") from None
    finally:
        os.close(errors)


def disconnect() -> None:
    """End all shared connections of this user."""
    for name in os.listdir(config.run_dir()):
        if name.endswith(".s"):
            command.run(_control(f"{config.run_dir()}/{name}", "exit"), deadline.connect(), check=False)


def _control(path: str, what: str) -> list[str]:
    """The words that tell the shared connection with the socket PATH to do WHAT."""
    return ["ssh", "-F", "none", "-o", f"ControlPath={path}", "-O", what, "--", "any"]
