"""One paramiko connection to a host: its configuration, jump hosts, its key checked, and we let in.

Every failure is one of errors.py, in the words that channel.failure() knows of ssh.
"""

from __future__ import annotations

import base64
import importlib
import logging
import os
import socket
import subprocess
import threading
import warnings

from madrigal import command
from madrigal.deadline import Deadline, connect
from madrigal.errors import ConfigError, DeadlineExceeded, MadrigalError, MissingProgram
from madrigal.host.channel import failure
from madrigal.host.known_hosts import KnownKeys
from madrigal.host.ssh_config import Target
from madrigal.onhost.ssh import ciphers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

try:
    with warnings.catch_warnings():  # paramiko 2.12 imports what newer cryptography is about to drop, and is told so
        warnings.simplefilter("ignore")
        paramiko: Any = importlib.import_module("paramiko")
except ImportError:
    text = "MADRIGAL_TRANSPORT is paramiko, which is not installed: install the package python3-paramiko"
    raise MissingProgram(text) from None

# What paramiko has to say it says with an exception; its log would become untagged lines on our stderr.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False


class Connection:
    """A paramiko transport to TARGET, and what it runs over."""

    def __init__(
        self, target: Target, transport: Any, via: Connection | None, proxy: subprocess.Popen[bytes] | None
    ) -> None:
        self.target, self.transport, self._via, self._proxy = target, transport, via, proxy

    def close(self) -> None:
        """End it, elsewhere: a host that does not answer any more would be waited for."""
        threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        self.transport.close()
        if self._via:
            self._via.close()
        if self._proxy:
            command.end_group(self._proxy)


def explain(name: str, error: Exception) -> MadrigalError:
    """ERROR in connecting to NAME in the words of ssh, which channel.failure() knows."""
    if isinstance(error, TimeoutError | DeadlineExceeded):
        said = "Connection timed out"
    elif isinstance(error, socket.gaierror):
        said = f"Could not resolve its name: {error.strerror}"
    elif isinstance(
        error, EOFError | ConnectionResetError | BrokenPipeError
    ) or "Error reading SSH protocol banner" in str(error):
        said = "Connection closed by the other side"
    elif isinstance(error, paramiko.ChannelException):
        said = error.text
    else:
        said = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
    return failure(name, 255, said.encode())


# -- a new connection ------------------------------------------------------------------------------------------


def open_connection(name: str, jumps: list[str], limit: Deadline, depth: int = 0) -> Connection:
    """A connection to NAME through JUMPS, or those that its configuration has; raises HostUnreachable and its like."""
    if depth > 8:
        raise ConfigError(f"ProxyJump leads from {name} round in a circle")
    target = Target(name)
    jumps = jumps or target.jumps
    via = proxy = None
    try:
        if jumps:
            via = open_connection(jumps[-1], jumps[:-1], limit, depth + 1)
            place = (target.hostname, target.port)
            sock = via.transport.open_channel("direct-tcpip", place, ("127.0.0.1", 0), timeout=limit.left())
        elif target.proxy_command:
            proxy, sock = _proxy(target.proxy_command)
        else:
            sock = _dial(target, limit)
        connection = Connection(target, paramiko.Transport(sock), via, proxy)
    except (paramiko.SSHException, OSError, EOFError, DeadlineExceeded) as error:
        if via:
            via.close()
        raise explain(name, error) from None
    try:
        accepted = _agree(name, connection, limit)
        _log_in(name, connection, accepted, limit)
    except (paramiko.SSHException, OSError, EOFError, DeadlineExceeded) as error:
        connection.close()
        raise explain(name, error) from None
    except BaseException:
        connection.close()
        raise
    connection.transport.set_keepalive(15)
    return connection


def _dial(target: Target, limit: Deadline) -> socket.socket:
    families = {"any": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}
    family = families.get(target.address_family.lower(), socket.AF_UNSPEC)
    error: OSError = socket.gaierror(socket.EAI_NONAME, "no address")
    for found, kind, protocol, _, address in socket.getaddrinfo(
        target.hostname, target.port, family, socket.SOCK_STREAM
    ):
        sock = socket.socket(found, kind, protocol)
        try:
            sock.settimeout(limit.left())
            if target.bind_address:
                sock.bind((target.bind_address, 0))
            sock.connect(address)
            return sock
        except OSError as this:
            sock.close()
            error = this
    raise error


def _proxy(text: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the administrator's ProxyCommand, as ssh does; returns its process and the socket to talk through."""
    ours, its = socket.socketpair()
    with its:
        process = subprocess.Popen(
            ["/bin/sh", "-c", "exec " + text],
            stdin=its.fileno(),
            stdout=its.fileno(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return process, ours


def _agree(name: str, connection: Connection, limit: Deadline) -> list[str]:
    """Exchange keys and check the host's; returns the signature algorithms that we may use to log in."""
    target, transport = connection.target, connection.transport
    known = KnownKeys(target.known_hosts, target.hostname, target.port, target.alias)
    options = transport.get_security_options()
    options.ciphers = [cipher for cipher in ciphers().split(",") if cipher in options.ciphers]
    options.kex = target.algorithms("KexAlgorithms", list(options.kex))
    options.digests = target.algorithms("MACs", list(options.digests))
    kinds = target.algorithms("HostKeyAlgorithms", list(options.key_types))
    # The host shows one of its keys: it is to be one we know.
    options.key_types = sorted(kinds, key=lambda kind: _key_type(kind) not in known.kinds)
    every = list(transport.preferred_pubkeys)
    accepted = target.algorithms("PubkeyAcceptedAlgorithms", every)
    transport.disabled_algorithms = {"pubkeys": [algorithm for algorithm in every if algorithm not in accepted]}
    # Ours is the deadline: paramiko tells time up from other failures only in its text.
    transport.banner_timeout = transport.handshake_timeout = connect() + 60
    agreed = threading.Event()
    transport.start_client(event=agreed)
    if not agreed.wait(limit.left()):
        raise DeadlineExceeded()
    if not transport.is_active():
        raise transport.get_exception() or EOFError()
    key = transport.get_remote_server_key()
    if not known.has(key.asbytes()):
        raise failure(name, 255, b"Host key verification failed.")
    if key.get_name() == "ssh-rsa" and key.get_bits() < target.required_rsa_size:
        raise failure(name, 255, f"its RSA key has fewer than {target.required_rsa_size} bits".encode())
    return accepted


def _key_type(algorithm: str) -> str:
    return "ssh-rsa" if algorithm.startswith("rsa-sha2-") else algorithm


def _log_in(name: str, connection: Connection, accepted: list[str], limit: Deadline) -> None:
    target, transport = connection.target, connection.transport
    usable = {_key_type(algorithm) for algorithm in accepted}
    tried = 0
    for key in _keys(target, limit):
        if key.get_name().partition("-cert-")[0] not in usable:
            continue
        tried += 1
        transport.auth_timeout = limit.left()
        try:
            transport.auth_publickey(target.user, key)
        except paramiko.AuthenticationException:
            limit.left()  # its time-out looks the same
        if transport.is_authenticated():
            return
        if not transport.is_active():
            break  # sshd's MaxAuthTries
    said = f"Permission denied for user {target.user} ({tried} keys tried)"
    raise failure(name, 255, said.encode())


def _keys(target: Target, limit: Deadline) -> Iterator[Any]:
    """The keys to try, in ssh's order: those of the agent that a file names, the agent's others, the files'."""
    wanted = [_public(path) for path in target.identity_files]
    held = _agent_keys(target.agent, limit)
    named = [key for key in held if key.asbytes() in wanted]
    yield from named
    if not target.identities_only:
        yield from (key for key in held if key not in named)
    had = {key.asbytes() for key in held}
    for path in target.identity_files:
        for key in _file_keys(path):
            if key.asbytes() not in had:
                had.add(key.asbytes())
                yield key


def _agent_keys(path: str, limit: Deadline) -> list[Any]:
    if not path:
        return []
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    agent = paramiko.agent.AgentSSH()
    try:
        sock.settimeout(limit.left())
        sock.connect(path)
        agent._connect(sock)  # its public way in knows SSH_AUTH_SOCK and no IdentityAgent
    except (OSError, paramiko.SSHException):
        return []
    return list(agent.get_keys())


def _public(path: str) -> bytes:
    """The public key that belongs to an IdentityFile, which may be the public one itself."""
    for name in (path + ".pub", path):
        try:
            with open(name, encoding="ascii", errors="replace") as file:
                words = file.read(1 << 16).split()
            return base64.b64decode(words[1], validate=True)
        except (OSError, IndexError, ValueError):
            continue
    return b""


def _file_keys(path: str) -> Iterator[Any]:
    """The private key in a file, as a certificate first if there is one; none that needs a passphrase."""
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            if os.path.exists(path + "-cert.pub"):
                certified = kind.from_private_key_file(path)
                certified.load_certificate(path + "-cert.pub")
                yield certified
            yield kind.from_private_key_file(path)
            return
        except Exception:  # of paramiko, of cryptography, of the file: ssh too tries the next key
            continue
