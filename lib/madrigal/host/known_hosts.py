"""What known_hosts files say about the key that a host shows, as sshd(8) describes them.

Read here and not by paramiko, which knows neither patterns nor `@revoked` and stops at a line it cannot read.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class KnownKeys:
    """The keys that FILES have for HOST at PORT, or under ALIAS (HostKeyAlias) where there is one."""

    def __init__(self, files: Sequence[str], host: str, port: int, alias: str) -> None:
        self._good: list[tuple[str, bytes]] = []
        self._revoked: list[bytes] = []
        names = [alias or (host if port == 22 else f"[{host}]:{port}")]
        if not alias and port != 22:
            names.append(host)  # ssh takes it when there is no entry with the port
        lines = [entry for path in files for entry in _lines(path)]
        for name in names:
            for marker, hosts, kind, key in lines:
                if _is_for(hosts, name.lower()):
                    if marker == "@revoked":
                        self._revoked.append(key)
                    elif not marker:  # certificate authorities are for host certificates, which paramiko cannot check
                        self._good.append((kind, key))
            if self._good:
                break

    @property
    def kinds(self) -> list[str]:
        """The types of the known keys: `ssh-ed25519`, ..."""
        return [kind for kind, _ in self._good]

    def has(self, key: bytes) -> bool:
        """Whether KEY, in its wire format, is the host's."""
        return key not in self._revoked and any(key == good for _, good in self._good)


def _lines(path: str) -> Iterator[tuple[str, str, str, bytes]]:
    """(marker, hosts, type, key) of each line of a file, which need not exist."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return  # as ssh: no keys are known then, and that is refused
    for line in text.splitlines():
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) < 3 or words[0].startswith("#"):
            continue
        try:
            yield marker, words[0], words[1], base64.b64decode(words[2], validate=True)
        except ValueError:  # not base64, or not even ASCII
            continue


def fits(pattern: str, text: str) -> bool:
    """Whether TEXT is what PATTERN (`*`, `?`) says; in a time that no pattern makes long."""
    at = here = 0
    star, tried = -1, 0
    while here < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, tried = at, here
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", text[here]):
            at, here = at + 1, here + 1
        elif star >= 0:  # the star takes one more
            tried += 1
            at, here = star + 1, tried
        else:
            return False
    return not pattern[at:].strip("*")


def _is_for(hosts: str, name: str) -> bool:
    """Whether HOSTS (patterns with commas between them, or one hashed name) is about NAME."""
    if hosts.startswith("|1|"):
        try:
            salt, digest = (base64.b64decode(part, validate=True) for part in hosts[3:].split("|"))
        except ValueError:
            return False
        return hmac.compare_digest(hmac.new(salt, name.encode(), hashlib.sha1).digest(), digest)
    found = False
    for pattern in hosts.lower().split(","):
        if fits(pattern.lstrip("!"), name):
            if pattern.startswith("!"):
                return False
            found = True
    return found
