"""One call of an action, how it went, and how a person can do the same."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """One action to run.  ON: the key of the machine where it is started."""

    action: str
    arguments: tuple[str, ...]
    stdin: bytes = b""
    on: str = "fe"
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """How an action went."""

    path: str
    call: Call
    status: int
    stdout: str
    stderr: str
    seconds: float
    hung: bool
    told: list[str]
    """Command lines of children with a secret in them."""
    vm: str = ""
    """What the front-end answered about the VM."""

    @property
    def message(self) -> str:
        """What a front-end would show: the lines without a tag."""
        tags = ("INFO: ", "ERROR: ", "DEBUG: ", "WARN: ", "ERROR MESSAGE ")
        return " ".join(line for line in self.stderr.splitlines() if not line.startswith(tags))

    def script(self) -> str:
        """What a person can paste to run it again."""
        words = [*(f"{name}={value}" for name, value in self.call.env.items()), self.path]
        lines = []
        if self.call.stdin:
            try:
                content = base64.b64decode(self.call.stdin, validate=True).decode()
            except ValueError:
                lines.append(f"# stdin: {self.call.stdin[:2000]!r}")
                content = ""
            if content and len(content) < 16384:
                lines.append(f"base64 -w0 >dump <<'END'\n{content}\nEND")
            elif content:
                lines.append(f"# dump: {len(content)} bytes, begins {content[:300]!r}, ends {content[-100:]!r}")
        arguments = []
        for argument in self.call.arguments:
            if len(argument) > 400 and argument.startswith("PERT"):
                decoded = base64.b64decode(argument).decode("utf-8", "replace")
                lines.append(f"base64 -w0 >dump <<'END'\n{decoded}\nEND")
                arguments.append('"$(cat dump)"')
            else:
                arguments.append(shlex.quote(argument))
        command = " ".join([*map(shlex.quote, words), *arguments])
        lines.append(command + (" <dump" if self.call.stdin else ""))
        lines.append(
            f"# status {self.status}{' (ended by the check: it hung)' if self.hung else ''}, {self.seconds:.2f} s"
        )
        for name, value in (("stdout", self.stdout), ("stderr", self.stderr)):
            lines += [f"# {name}: {line[:500]}" for line in value.splitlines()[:40]]
        return "\n".join(lines)
