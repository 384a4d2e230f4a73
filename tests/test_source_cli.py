"""`madrigal source`: what a source would give."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TREE
from servers import Web
from sources import MIB, content, packed

pytestmark = pytest.mark.usefixtures("no_proxy")


def madrigal(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "madrigal", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(TREE / "lib"), **env}
    return subprocess.run(argv, capture_output=True, text=True, env=variables, timeout=60)


def test_what_a_source_is(web: Web, tmp_path: Path) -> None:
    qcow2, raw = tmp_path / "image.qcow2", tmp_path / "raw"
    raw.write_bytes(content())
    os.truncate(raw, 64 * MIB)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True, timeout=60)
    data = packed(qcow2.read_bytes(), "xz", "-0")
    to = tmp_path / "to"
    done = madrigal("--json", "source", web.file("/image.xz", data), "--to", to)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["format"], said["virtual_size"]) == ("qcow2", 64 * MIB)
    assert (said["fetched"], said["size"], said["file"]) == (len(data), qcow2.stat().st_size, str(to))
    assert (said["md5"], said["sha256"]) == (hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest())
    assert said["bytes_per_second"] > 0
    assert to.read_bytes() == qcow2.read_bytes()
    done = madrigal("source", str(raw))
    assert done.returncode == 0, done.stderr
    assert f"virtual_size      {64 * MIB}\n" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["image.qcow2", "raw", "to"]


def test_holes_stay_holes(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(content(MIB))
    os.truncate(raw, 256 * MIB)
    assert madrigal("source", raw, "--to", tmp_path / "to").returncode == 0
    assert (tmp_path / "to").stat().st_size == 256 * MIB
    assert (tmp_path / "to").stat().st_blocks * 512 < 3 * MIB


def test_what_is_wrong_is_one_sentence_and_nothing_is_left(web: Web, tmp_path: Path) -> None:
    to, url = tmp_path / "to", web.page("/image", content())
    for status, words in (
        (40, ["source", url, "--digest", f"MD5={'0' * 32}"]),
        (2, ["source", url, "--digest", "MD5=x"]),
        (2, ["source", url, "--digest", "SHA512=x"]),
        (2, ["source", "ftp://host/x"]),
        (13, ["source", web.url + "/nothing"]),
        (30, ["source", str(tmp_path / "nothing")]),
        (20, ["source", "s3://bucket/key"]),
    ):
        done = madrigal(*words, "--to", to, AWS_ACCESS_KEY_ID="")
        assert (done.returncode, done.stdout) == (status, ""), done
        assert done.stderr.startswith("madrigal: ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_an_image_that_would_be_refused_says_why(tmp_path: Path) -> None:
    path = tmp_path / "image"
    argv: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw"]
    subprocess.run([*argv, path, "1M"], check=True, timeout=60)
    done = madrigal("source", path)
    assert done.returncode == 0
    assert "backing file '/etc/shadow'" in done.stdout


def test_a_bar_on_a_terminal(web: Web) -> None:
    url = web.page("/image", content())
    leader, follower = pty.openpty()
    argv = [sys.executable, "-m", "madrigal", "source", url]
    env = {**os.environ, "PYTHONPATH": str(TREE / "lib"), "TERM": "xterm"}
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=follower, env=env, timeout=60)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert done.returncode == 0
    assert re.search(r"\[#+\] 100 %  3\.0 MiB, ", shown)
    assert shown.endswith("\r") and not shown.split("\r")[-2].strip()
