"""What OpenSSH's client configuration files say about a host, for a transport without the ssh program.

~/.ssh/config and then /etc/ssh/ssh_config are read, or the file that MADRIGAL_SSH_CONFIG names and no other; the first
value counts, as in ssh_config(5).  `Host`, `Match` (all, host, originalhost, user, localuser, final, canonical) and
`Include` work; so do the tokens %% %d %h %i %k %L %l %n %p %r %u, `~` and `${VARIABLE}`.  A keyword that applies to the
host is one of SUPPORTED, ONLY or IGNORED below, or is refused by its name: nobody is to believe that it is obeyed.
"""

from __future__ import annotations

import glob
import os
import pwd
import re
import stat

from madrigal.errors import ConfigError
from madrigal.host.known_hosts import fits
from madrigal.location import is_number

SUPPORTED = (
    "AddressFamily",
    "BindAddress",
    "GlobalKnownHostsFile",
    "HostKeyAlgorithms",
    "HostKeyAlias",
    "HostName",
    "IdentitiesOnly",
    "IdentityAgent",
    "IdentityFile",
    "KexAlgorithms",
    "MACs",
    "Port",
    "ProxyCommand",
    "ProxyJump",
    "PubkeyAcceptedAlgorithms",
    "PubkeyAcceptedKeyTypes",
    "RequiredRSASize",
    "SetEnv",
    "User",
    "UserKnownHostsFile",
)
"""Keywords that do what they do for ssh."""

ONLY = {
    "CanonicalizeHostname": "no",
    "KnownHostsCommand": "none",
    "PermitLocalCommand": "no",
    "PKCS11Provider": "none",
    "ProxyUseFdpass": "no",
    "PubkeyAuthentication": "yes",
    "RemoteCommand": "none",
    "SessionType": "default",
}
"""Keywords that may have this value, which is ssh's default, and no other."""

IGNORED = (
    # Madrigal decides, whatever a file says, and does so over OpenSSH too.
    *("BatchMode", "Ciphers", "ClearAllForwardings", "ConnectTimeout", "ConnectionAttempts", "ControlMaster"),
    *("ControlPath", "ControlPersist", "DynamicForward", "EnableEscapeCommandline", "EscapeChar"),
    *("ExitOnForwardFailure", "ForkAfterAuthentication", "ForwardAgent", "ForwardX11", "ForwardX11Timeout"),
    *("ForwardX11Trusted", "GatewayPorts", "LocalForward", "LogLevel", "LogVerbose", "PermitRemoteOpen"),
    *("RemoteForward", "RequestTTY", "ServerAliveCountMax", "ServerAliveInterval", "StdinNull"),
    *("StreamLocalBindMask", "StreamLocalBindUnlink", "SyslogFacility", "Tunnel", "TunnelDevice", "XAuthLocation"),
    # Keys alone let us in: nobody is there to be asked for a password, and paramiko has no tickets.
    *("AddKeysToAgent", "ChallengeResponseAuthentication", "EnableSSHKeysign", "GSSAPIAuthentication"),
    *("GSSAPIClientIdentity", "GSSAPIDelegateCredentials", "GSSAPIKexAlgorithms", "GSSAPIKeyExchange"),
    *("GSSAPIRenewalForcesRekey", "GSSAPIServerIdentity", "GSSAPITrustDNS", "HostbasedAcceptedAlgorithms"),
    *("HostbasedAuthentication", "HostbasedKeyTypes", "KbdInteractiveAuthentication", "KbdInteractiveDevices"),
    *("NumberOfPasswordPrompts", "PasswordAuthentication", "PreferredAuthentications", "SecurityKeyProvider"),
    # A host key has to be in a known_hosts file, whatever else would do for ssh, and none is ever written there.
    *("CASignatureAlgorithms", "CheckHostIP", "FingerprintHash", "HashKnownHosts", "NoHostAuthenticationForLocalhost"),
    *("StrictHostKeyChecking", "UpdateHostKeys", "VerifyHostKeyDNS", "VisualHostKey"),
    # They change how bytes travel and not which, or need another keyword to do anything.
    *("CanonicalDomains", "CanonicalizeFallbackLocal", "CanonicalizeMaxDots", "CanonicalizePermittedCNAMEs"),
    *("Compression", "IPQoS", "LocalCommand", "ObscureKeystrokeTiming", "RekeyLimit", "SendEnv", "TCPKeepAlive"),
)
"""Keywords that do not matter here."""

_LONGEST = 4096
_KEYS = ("id_rsa", "id_ecdsa", "id_ed25519")
_LINE = re.compile(r"\s*([^\s=\"]+)(?:\s*=\s*|\s+)(.*?)\s*\Z", re.DOTALL)
_WORD = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^\s"])+')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_JUMP = re.compile(r"(?:ssh://)?(?:([^@]+)@)?(\[[^]]+\]|[^:@/]+)(?::([0-9]{1,5}))?/?\Z")


class Target:
    """How to reach a host: what ssh would make of its NAME ([USER@]HOST, or as ProxyJump has it).

    Raises ConfigError, with file and line, for what it cannot obey.
    """

    def __init__(self, name: str) -> None:
        match = _JUMP.match(name)
        if not match:
            raise ConfigError(f"'{name}' is not [user@]host[:port]")
        self.name = match[2].strip("[]")
        reader = _Reader(self.name, match[1] or "")
        reader.read_all()
        self._values = reader.values
        self.hostname = reader.hostname()
        self.user = match[1] or self._word("User") or reader.local_user
        self.port = int(match[3] or self._number("Port", 22))
        self.alias = self._word("HostKeyAlias")
        self.required_rsa_size = self._number("RequiredRSASize", 0)
        self.address_family = self._word("AddressFamily") or "any"
        self.bind_address = self._word("BindAddress")
        self.identities_only = self._word("IdentitiesOnly").lower() in ("yes", "true")
        self.environment = dict(word.split("=", 1) for word in self._words("SetEnv") if "=" in word)
        self._tokens = {
            "%": "%",
            "d": reader.home,
            "h": self.hostname,
            "i": str(os.getuid()),
            "k": self.alias or self.name,
            "L": os.uname().nodename.split(".")[0],
            "l": os.uname().nodename,
            "n": self.name,
            "p": str(self.port),
            "r": self.user,
            "u": reader.local_user,
        }
        self._home = reader.home
        self.identity_files = [self._path(text, where) for text, where in reader.identity_files if text != "none"]
        if not reader.identity_files:
            self.identity_files = [f"{reader.home}/.ssh/{key}" for key in _KEYS]
        self.known_hosts = self._files("UserKnownHostsFile", [f"{reader.home}/.ssh/known_hosts", "2"])
        self.known_hosts += self._files("GlobalKnownHostsFile", ["/etc/ssh/ssh_known_hosts", "2"])
        agent = self._word("IdentityAgent") or "SSH_AUTH_SOCK"
        if agent == "none":
            agent = ""
        elif agent == "SSH_AUTH_SOCK" or agent.startswith("$"):
            agent = os.environ.get(agent.strip("${}"), "")
        else:
            agent = self._path(agent, self._where("IdentityAgent"))
        self.agent = agent
        """The socket of the agent, "" if there is none."""
        jumps = [jump.strip() for jump in self._expanded("ProxyJump").split(",") if jump.strip()]
        if jumps == ["none"] or (jumps and _host_of(jumps[-1]) == self.name):
            jumps = []  # `Host *` with a ProxyJump applies to the jump host too, and ssh overlooks that
        self.jumps = jumps
        command = self._expanded("ProxyCommand")
        self.proxy_command = "" if command.lower() == "none" else command

    def algorithms(self, keyword: str, known: list[str]) -> list[str]:
        """Those of KNOWN that KEYWORD, a list as ssh has it (`+`, `-`, `^` at its start), leaves, in its order."""
        text = self._word(keyword)
        if not text:
            return known
        how, names = (text[0], text[1:].split(",")) if text[0] in "+-^" else ("", text.split(","))
        given = [algorithm for name in names for algorithm in known if _matches([name], algorithm)]
        if how == "+":
            left = known
        elif how == "-":
            left = [algorithm for algorithm in known if algorithm not in given]
        elif how == "^":
            left = given + [algorithm for algorithm in known if algorithm not in given]
        else:
            left = given
        if not left:
            raise ConfigError(f"{self._where(keyword)}: {keyword} leaves nothing that paramiko knows for {self.name}")
        return left

    def _where(self, keyword: str) -> str:
        return self._values[keyword.lower()][1]

    def _words(self, keyword: str) -> list[str]:
        return _words(self._values.get(keyword.lower(), ("", ""))[0])

    def _word(self, keyword: str) -> str:
        return next(iter(self._words(keyword)), "")

    def _number(self, keyword: str, default: int) -> int:
        text = self._word(keyword)
        if text and not is_number(text):
            raise ConfigError(f"{self._where(keyword)}: {keyword} is '{text}', expected a number")
        return int(text) if text else default

    def _files(self, keyword: str, default: list[str]) -> list[str]:
        if keyword.lower() not in self._values:
            return [default[0], default[0] + default[1]]
        where = self._where(keyword)
        return [self._path(text, where) for text in self._words(keyword) if text != "none"]

    def _expanded(self, keyword: str) -> str:
        text, where = self._values.get(keyword.lower(), ("", ""))
        return _percent(text, self._tokens, where)

    def _path(self, text: str, where: str) -> str:
        def variable(match: re.Match[str]) -> str:
            if match[1] not in os.environ:
                raise ConfigError(f"{where}: the variable {match[1]} is not set")
            return os.environ[match[1]]

        text = re.sub(r"\$\{(\w+)\}", variable, _percent(text, self._tokens, where))
        return _tilde(text, self._home)


class _Reader:
    """What the files have for one host."""

    def __init__(self, name: str, user: str) -> None:
        own = pwd.getpwuid(os.getuid())  # as ssh does; HOME does not count
        self.home, self.local_user = own.pw_dir, own.pw_name
        self.values: dict[str, tuple[str, str]] = {}
        self.identity_files: list[tuple[str, str]] = []
        self._name, self._host, self._user = name, name, user
        self._is_final, self._wants_final = False, False

    def read_all(self) -> None:
        self._read_files()
        if self._wants_final:  # `Match final` sees the name that the first time has found
            self._is_final, self._host = True, self.hostname()
            self._read_files()
        accepted = {keyword.lower() for keyword in SUPPORTED}
        only = {keyword.lower(): value for keyword, value in ONLY.items()}
        for keyword, (text, where) in self.values.items():
            if keyword in accepted or _words(text.lower())[:1] == [only.get(keyword)]:
                continue
            shown = next((name for name in ONLY if name.lower() == keyword), keyword)
            but = f" other than {only[keyword]}" if keyword in only else ""
            raise ConfigError(
                f"{where}: {shown}{but} is not supported with MADRIGAL_TRANSPORT=paramiko and applies to {self._name}; "
                f"leave it out for this host or use OpenSSH"
            )

    def hostname(self) -> str:
        text, where = self.values.get("hostname", (self._name, ""))
        return _percent(next(iter(_words(text)), self._name), {"%": "%", "h": self._name, "n": self._name}, where)

    def _read_files(self) -> None:
        file = os.environ.get("MADRIGAL_SSH_CONFIG", "")
        if file:
            if file.lower() != "none":
                self._read(file, f"{self.home}/.ssh", must_exist=True)
            return
        self._read(f"{self.home}/.ssh/config", f"{self.home}/.ssh", checked=True)
        self._read("/etc/ssh/ssh_config", "/etc/ssh")

    def _read(self, path: str, directory: str, checked: bool = False, must_exist: bool = False, depth: int = 0) -> None:
        """Read one file; CHECKED: nobody but its owner may be able to write it, since it can name programs."""
        if depth > 16:
            raise ConfigError(f"{path} includes itself, or far too many files")
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                about = os.fstat(file.fileno())
                lines = file.read().splitlines()
        except FileNotFoundError:
            if must_exist:
                raise ConfigError(f"{path}, which MADRIGAL_SSH_CONFIG names, does not exist") from None
            return
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        if checked and (about.st_uid not in (0, os.getuid()) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            raise ConfigError(f"{path} must be owned by user {os.getuid()} and writable by nobody else")
        active = True
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            where = f"{path}, line {number}"
            match = _LINE.match(line)
            if not match:
                raise ConfigError(f"{where}: expected a keyword and a value, found '{line.strip()[:60]}'")
            keyword, text = match[1].lower(), match[2]
            if keyword == "host":
                active = _matches(_words(text), self._host)
            elif keyword == "match":
                active = self._match(_words(text), where)
            elif active and keyword == "include":
                for pattern in _words(text):
                    pattern = os.path.join(directory, _tilde(pattern, self.home))
                    if len(pattern) > _LONGEST:
                        raise ConfigError(f"{where}: no file has a name as long as that which is to be included")
                    for included in sorted(glob.glob(pattern)):
                        self._read(included, directory, checked, depth=depth + 1)
            elif active:
                self._set(match[1], text, where)

    def _match(self, words: list[str], where: str) -> bool:
        result, rest = True, iter(words)
        for word in rest:
            criterion, equals, value = word.partition("=")
            negated, criterion = criterion.startswith("!"), criterion.lstrip("!").lower()
            if criterion == "all":
                found = True
            elif criterion in ("final", "canonical"):
                self._wants_final |= criterion == "final"
                found = self._is_final
            elif criterion in ("host", "originalhost", "user", "localuser"):
                subject = {
                    "host": self.hostname() if "hostname" in self.values else self._host,
                    "originalhost": self._name,
                    "user": self._user or next(iter(_words(self.values.get("user", ("", ""))[0])), self.local_user),
                    "localuser": self.local_user,
                }[criterion]
                found = _matches((value if equals else next(rest, "")).split(","), subject)
            else:
                if not result:
                    return False  # whatever it says
                raise ConfigError(
                    f"{where}: Match {criterion} is not supported with MADRIGAL_TRANSPORT=paramiko; use OpenSSH"
                )
            result &= found != negated
        return result

    def _set(self, keyword: str, text: str, where: str) -> None:
        key = keyword.lower().replace("pubkeyacceptedkeytypes", "pubkeyacceptedalgorithms")  # its name before 8.5
        if key in _IGNORED:
            return
        if key == "identityfile":
            entry = (next(iter(_words(text)), ""), where)
            if entry not in self.identity_files:
                self.identity_files.append(entry)
        elif key not in ("proxyjump", "proxycommand") or not self.values.keys() & {"proxyjump", "proxycommand"}:
            known = key in _KNOWN
            self.values.setdefault(key if known else keyword, (text, where))


def _host_of(jump: str) -> str:
    match = _JUMP.match(jump)
    return match[2].strip("[]") if match else ""


_IGNORED = {keyword.lower() for keyword in IGNORED}
_KNOWN = {keyword.lower() for keyword in (*SUPPORTED, *ONLY)}


def _words(text: str) -> list[str]:
    """The arguments in TEXT, which may be in double quotes; a comment may follow them."""
    words = []
    for word in _WORD.findall(text):
        if word.startswith("#"):
            break
        words.append(_QUOTED.sub(lambda quoted: re.sub(r'\\(["\\])', r"\1", quoted[1]), word))
    return words


def _matches(patterns: list[str], text: str) -> bool:
    """Whether TEXT matches one of PATTERNS (`*`, `?`) and none of those that start with `!`."""
    found = False
    for pattern in patterns:
        if fits(pattern.lstrip("!").lower(), text.lower()):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _percent(text: str, tokens: dict[str, str], where: str) -> str:
    def token(match: re.Match[str]) -> str:
        if match[1] not in tokens:
            raise ConfigError(f"{where}: the token %{match[1]} is not supported with MADRIGAL_TRANSPORT=paramiko")
        return tokens[match[1]]

    return re.sub(r"%(.?)", token, text)


def _tilde(path: str, home: str) -> str:
    return home + path[1:] if path == "~" or path.startswith("~/") else os.path.expanduser(path)
