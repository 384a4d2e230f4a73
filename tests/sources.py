"""What tests of sources share: terms that allow everything, contents, the real packers, and reading one to its end."""

from __future__ import annotations

import io
import random
import subprocess
from pathlib import Path

from madrigal.onhost import guard as door
from madrigal.source import schemes, stream

MIB = 1 << 20
PACKERS = {"gzip": "gz", "bzip2": "bz2", "xz": "xz", "zstd": "zst", "lz4": "lz4"}


def guard(path: str) -> int:
    return door.open_allowed(path, "", "", ())


def no_file(path: str) -> int:
    raise AssertionError(f"{path} was asked for")


TERMS, NO_FILE = schemes.Terms(guard), schemes.Terms(no_file)


def content(length: int = 3 * MIB + 123) -> bytes:
    """Something that packs, but not to nothing."""
    dice = random.Random(7)
    noise = dice.randbytes(length // 4)
    return (noise + bytes(length // 2) + noise + b"end" * length)[:length]


def packed(data: bytes, packer: str, *options: str) -> bytes:
    """DATA through the real program."""
    argv = [packer, "-c", *options]
    return subprocess.run(argv, input=data, capture_output=True, check=True, timeout=60).stdout


def drain(
    url: str | Path, digests: dict[str, str] | None = None, decompress: bool = True, limit: int | None = None
) -> bytes:
    out = io.BytesIO()
    with schemes.open(str(url), TERMS) as opened:
        written = stream.fetch(opened, out.write, decompress=decompress, digests=digests or {}, limit=limit)
    assert written == len(out.getvalue())
    return out.getvalue()
