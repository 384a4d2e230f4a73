"""Tell the front-end's monitoring, by UDP, the room that the disks of a shared system datastore take.

The message is `MONITOR_VM SUCCESS -1 0 DATA`, DATA the base64 of deflated lines, one a VM, which are
encrypted before if monitord.conf has a public key.  docs/contract.md, "Sizes of disks".
"""

from __future__ import annotations

import base64
import re
import zlib

from madrigal import config
from madrigal.errors import ConfigError, MadrigalError, MissingProgram
from madrigal.location import is_number
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from madrigal.transfer.route import AnySession

MOST = 60_000
"""Bytes of a message: UDP takes 65,507."""

_SETTING = re.compile(r'\b(MONITOR_ADDRESS|PORT|PUBKEY)\s*=\s*"?([^",\]\s]*)')


def tell_sizes(session: AnySession, directory: str) -> None:
    """Send the sizes of the disks in DIRECTORY, as SESSION sees it; without a monitord.conf there is nobody to tell.

    A failure is only logged: the capacity, which this goes with, matters more.
    """
    try:
        settings = _settings(f"{config.etc_dir()}/monitord.conf")
        if settings is None:
            return
        lines = [line.replace(" = ", "=").replace("[ ", "[") for line in session.call("sizes", path=directory)]
        count = _send(settings, lines)
        log(f"told monitoring the sizes of {len(lines)} VMs, in {count} messages")
    except MadrigalError as error:
        log(f"monitoring was not told the sizes of disks: {error}", "ERROR")


def _settings(path: str) -> dict[str, str] | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = re.sub(r"^\s*#.*", "", file.read(), flags=re.MULTILINE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    settings = dict(_SETTING.findall(text))
    port = settings.get("PORT", "")
    if not is_number(port) or not 0 < int(port) < 65536:
        raise ConfigError(f"{path}: PORT is '{port}', expected a number")
    return settings


def _send(settings: dict[str, str], lines: Sequence[str]) -> int:
    import socket

    address = settings.get("MONITOR_ADDRESS", "")
    if address in ("", "auto"):
        address = "127.0.0.1"
    encrypted = _cipher(settings["PUBKEY"]) if settings.get("PUBKEY") else bytes
    count = 0
    try:
        found = socket.getaddrinfo(address, int(settings["PORT"]), type=socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], found[1]) as sender:
            for packed in _packed(lines, encrypted):
                sender.sendto(f"MONITOR_VM SUCCESS -1 0 {packed}\n".encode(), found[4])
                count += 1
    except OSError as error:
        raise MadrigalError(f"cannot send to {address}, port {settings['PORT']}: {error}") from None
    return count


def _packed(lines: Sequence[str], encrypted: Callable[[bytes], bytes]) -> Iterator[str]:
    """The DATA of as many messages as it takes."""
    data = "".join(line + "\n" for line in lines).encode()
    packed = base64.b64encode(zlib.compress(encrypted(data))).decode()
    if len(packed) <= MOST or len(lines) < 2:
        yield packed
    else:
        middle = len(lines) // 2
        yield from _packed(lines[:middle], encrypted)
        yield from _packed(lines[middle:], encrypted)


def _cipher(path: str) -> Callable[[bytes], bytes]:
    """What encrypts by the public key in the file PATH, in as many blocks as it takes; raises ConfigError."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        text = "PUBKEY of monitord.conf needs the Python package cryptography: install python3-cryptography"
        raise MissingProgram(text) from None
    try:
        with open(path, "rb") as file:
            key = load_pem_public_key(file.read())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"PUBKEY of monitord.conf, {path}, cannot be read: {error}") from None
    if not isinstance(key, RSAPublicKey):
        raise ConfigError(f"PUBKEY of monitord.conf, {path}, is not an RSA key")
    size = key.key_size // 8 - 11  # what the padding leaves of a block
    padding = PKCS1v15()
    return lambda data: b"".join(key.encrypt(data[at : at + size], padding) for at in range(0, len(data), size))
