"""A machine that disks lie on: run programs there, and change its files in a session.

This machine is a host too.  Another one is reached with OpenSSH (host/openssh.py) or, with
MADRIGAL_TRANSPORT=paramiko, with paramiko (host/paramiko_client.py); both pass the same tests.
"""

from __future__ import annotations

import os

from madrigal.errors import ConfigError, MadrigalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from madrigal import command
    from madrigal.host.channel import Channel
    from madrigal.host.local import LocalSession
    from madrigal.host.remote import RemoteSession

ATTEMPTS = 6
"""How often a connection that an sshd drops because it has too many at once is tried."""

_BEGUN = "madrigal command, begun"


def is_local(name: str) -> bool:
    """Whether NAME is this machine: none, localhost, its hostname, or one of the names in MADRIGAL_FRONTEND."""
    own = os.uname().nodename
    return name in ("", "localhost", "127.0.0.1", own) or name in os.environ.get("MADRIGAL_FRONTEND", "").split()


def quote(word: str) -> str:
    """WORD for a POSIX shell, always one word.  The only place where anything is quoted for a host."""
    return "'" + word.replace("'", "'\\''") + "'"


class Host:
    """A machine by its name in the front-end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.local = is_local(name)

    def run(self, argv: Sequence[str], timeout: float, input: bytes | None = None) -> command.Result:
        """Run a program there to its end; the result has its status (255 may also be ssh's own), stdout and stderr.

        What a login shell prints before is not in its stdout.  It is started once, also when the connection breaks.
        Raises HostUnreachable and its like if it could not be started, DeadlineExceeded after TIMEOUT seconds.
        """
        from madrigal import command

        if self.local:
            return command.run(argv, timeout, input=input, check=False)
        from madrigal.host.channel import failure

        attempt = 0
        while True:
            attempt += 1
            channel = self.start(f"echo {quote(_BEGUN)}; exec {' '.join(map(quote, argv))}")
            try:
                output = channel.communicate(input or b"", timeout)
                status = channel.wait(timeout)
            finally:
                channel.close()
            noise, begun, output = output.partition(_BEGUN.encode() + b"\n")
            if begun:
                return command.Result(status, output, channel.stderr())
            self.retried(failure(self.name, 255, channel.stderr() or noise), attempt)

    def script(self, text: str, values: Sequence[str], timeout: float) -> command.Result:
        """Run the shell script TEXT there (bash, C locale) with VALUES as its "$1", "$2", ...

        It is read whole before any of it runs, and what it starts finds nothing of it on stdin.
        """
        script = f"set -- {' '.join(map(quote, values))}\n{{ :\n{text}\n\n}}\n"
        argv = ["env", "LANG=C", "LC_ALL=C", "bash", "-s"]
        return self.run(argv, timeout, input=script.encode("utf-8", "surrogateescape"))

    def session(self, bulk: bool = False) -> LocalSession | RemoteSession:
        """Change its files (onhost/session.py has the requests).  BULK: over a connection of its own.

            with host.session() as session:
                session.tell("hold", path="/ds/0/17", make="all")
                session.receive(frames, path="/ds/0/17/disk.0")

        Leaving the block well keeps what was made; an exception takes it back, also on the host.
        """
        if self.local:
            from madrigal.host.local import LocalSession

            return LocalSession()
        from madrigal.host.remote import RemoteSession

        return RemoteSession(self, bulk)

    def start(self, remote_command: str, bulk: bool = False) -> Channel:
        """Start a shell command on the (other) host."""
        transport = os.environ.get("MADRIGAL_TRANSPORT") or "openssh"
        if transport == "openssh":
            from madrigal.host import openssh

            return openssh.start(self.name, remote_command, bulk)
        if transport == "paramiko":
            from madrigal.host import paramiko_client

            return paramiko_client.start(self.name, remote_command, bulk)
        raise ConfigError(f"MADRIGAL_TRANSPORT is '{transport}', expected openssh or paramiko")

    def retried(self, error: MadrigalError, attempt: int) -> None:
        """Wait before try number ATTEMPT + 1, or raise ERROR if it is not worth another."""
        if not getattr(error, "crowded", False) or attempt >= ATTEMPTS:
            raise error
        import time

        # every action of a burst has its own pace, or they would all come back at the same moment
        time.sleep((0.2 + (os.getpid() % 16) / 16) * attempt)
