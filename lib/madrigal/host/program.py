"""What is sent to a host: a program for the Python there, and the modules it has (the host part)."""

from __future__ import annotations

import marshal
import os
import struct
import sys
from _frozen_importlib_external import MAGIC_NUMBER, SourceFileLoader, cache_from_source

from madrigal.host import local

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HOST_PART = (
    "errors",
    "command",
    "onhost.undo",
    "onhost.lock",
    "onhost.part",
    "onhost.blocks",
    "onhost.gmac",
    "onhost.pace",
    "onhost.squeeze",
    "onhost.pipe",
    "onhost.stream",
    "onhost.receiver",
    "onhost.survey",
    "onhost.device",
    "onhost.copy",
    "onhost.image",
    "onhost.consume",
    "onhost.filesystem",
    "onhost.guest",
    "onhost.chain",
    "onhost.layout",
    "onhost.snapshots",
    "onhost.holding",
    "onhost.monitor_ds",
    "onhost.passing",
    "onhost.session",
    "onhost.images",
    "onhost.ssh",
    "onhost.direct",
    "onhost.worker",
)
"""The modules that are sent to hosts: Python 3.6, standard library."""

MARKER = "madrigal worker, ready"

# Read the program and, after a zero, its modules, of which the first line is the length; leave the rest of stdin to it.
_BOOT = (
    "import sys;i=sys.stdin.buffer;"
    'sent=i.read(int(i.readline())).split(b"\\0",1);exec(compile(sent[0],"madrigal","exec"))'
)
# Paths cross as UTF-8 whatever the locale there: by the option, or by the variable for 3.6, which does not know that.
COMMAND = f"exec env LC_ALL=C.UTF-8 python3 -I -S -X utf8 -c '{_BOOT}'"

_PROGRAM = """\
import sys
if sys.version_info < (3, 6):
    sys.stderr.write("python3 here is older than 3.6\\n")
    sys.exit(127)
import marshal
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER
class Sent:
    magic, modules = marshal.loads(sent[1])
    def find_spec(self, name, path=None, target=None):
        if name in self.modules:
            return ModuleSpec(name, self, is_package=not self.modules[name][0])
    def create_module(self, spec):
        pass
    def exec_module(self, module):
        name = module.__name__
        source, code = self.modules[name]
        try:
            code = marshal.loads(code if self.magic == MAGIC_NUMBER else b"")
        except (EOFError, TypeError, ValueError):
            code = compile(source, name, "exec")
        exec(code, module.__dict__)
sys.meta_path.insert(0, Sent())
"""
# A module is loaded when it is imported: most sessions need half of them.

_PORTABLE = 2
"""The version of marshal's format for what any Python reads."""


def program() -> bytes:
    """What is sent to a host: the host part, and the start of its worker."""
    umask = os.umask(0)
    os.umask(umask)
    start = f"from madrigal.onhost import worker\nworker.main({MARKER!r}, {local.timeouts()!r}, {umask})\n"
    return assembled(HOST_PART, start)


def assembled(parts: Sequence[str], start: str) -> bytes:
    """What COMMAND reads: a Python program that has the modules PARTS and begins with START, its length before it.

    Each module is sent as its source and, for a Python of our version, compiled, which saves a host most of the time
    that a worker takes to start.
    """
    library = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    modules = {"madrigal": (b"", b""), "madrigal.onhost": (b"", b"")}
    for name in parts:
        path = f"{library}/{name.replace('.', '/')}.py"
        with open(path, "rb") as file:
            modules[f"madrigal.{name}"] = (file.read(), _compiled(path, os.fstat(file.fileno())))
    sent = (_PROGRAM + start).encode() + b"\0" + marshal.dumps((MAGIC_NUMBER, modules), _PORTABLE)
    return b"%d\n%s" % (len(sent), sent)


def _compiled(path: str, source: os.stat_result) -> bytes:
    """The code of the module at PATH, as Python's cache has it; b"" if it has not and we may not put it there."""
    cache = cache_from_source(path)
    header = MAGIC_NUMBER + struct.pack("<III", 0, int(source.st_mtime) & 0xFFFFFFFF, source.st_size)
    try:
        with open(cache, "rb") as file:
            if file.read(len(header)) == header:
                return file.read()
    except OSError:
        pass
    if sys.dont_write_bytecode or not os.access(os.path.dirname(cache), os.W_OK):
        return b""  # compiling it for each session would take longer than the host does
    return marshal.dumps(SourceFileLoader("", path).get_code(""))
