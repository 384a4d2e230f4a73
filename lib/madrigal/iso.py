"""The context image of a VM: an ISO 9660 file with the files that configure the guest."""

from __future__ import annotations

import contextlib
import os

from madrigal import command, deadline, scratch
from madrigal.errors import MissingProgram, NotFound, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PROGRAMS = (("genisoimage",), ("xorriso", "-as", "mkisofs"), ("mkisofs",))


@contextlib.contextmanager
def built(files: Sequence[str]) -> Iterator[int]:
    """An open file with the ISO of FILES; it has no name, so nothing of it is left whatever happens.

    Each is a path, `path:name` to store it under another name, or an http:// URL.  Raises NotFound,
    UsageError, MissingProgram and what the source of a URL raises.
    """
    with contextlib.ExitStack() as stack:
        grafts, opened = {}, []
        for file in files:
            name, path = _named(file)
            if "://" in file:
                from madrigal.source.download import downloaded

                fd = stack.enter_context(downloaded(file))
                opened.append(fd)
                path = f"/proc/self/fd/{fd}"
            elif not os.path.exists(path):
                raise NotFound(f"the context file '{path}' does not exist")
            grafts[name] = path
        target = stack.enter_context(scratch.nameless())
        words = [f"{_escaped(name)}={_escaped(path)}" for name, path in grafts.items()]
        options = ["-quiet", "-f", "-V", "CONTEXT", "-J", "-joliet-long", "-R", "-graft-points"]
        argv = [*_program(), *options, "-o", f"/proc/self/fd/{target}", "--", *words]
        what, fds = "making the context image", [target, *opened]
        done = command.run(argv, deadline.stall(), what=what, pass_fds=fds, patient=True)
        if not os.fstat(target).st_size:
            raise command.CommandFailed(f"{argv[0]} said that all went well, but has written no context image", done)
        yield target


def _named(file: str) -> tuple[str, str]:
    """The name in the image and the path of the argument FILE."""
    if "://" in file:
        path = file
        name = file.partition("?")[0].rpartition("/")[2]
    else:
        path, colon, name = file.partition(":")
        if not colon or os.path.exists(file):
            path, name = file, os.path.basename(file)
        name = name.strip("'")  # some front-ends quote it
    if not name or "/" in name or name in (".", ".."):
        raise UsageError(f"the context file '{file}' has no usable name")
    return name, path


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace("=", "\\=")


def _program() -> tuple[str, ...]:
    path = command.environment()["PATH"].split(":")
    for program in _PROGRAMS:
        if any(os.access(f"{directory}/{program[0]}", os.X_OK) for directory in path):
            return program
    raise MissingProgram("neither genisoimage nor xorriso is installed here: a context image needs one of them")
