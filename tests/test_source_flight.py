"""Imports of the same source at the same time: it is asked once, and each gets an image of its own."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from conftest import PATH, Hosts, eventually, start_action
from dumps import dump
from servers import Handler, Web
from sources import MIB, content


class Imports:
    """Several `cp` of one URL, started together."""

    def __init__(self, work: Path, env: dict[str, str], base: str = "") -> None:
        self.base, self._env = base or str(work / "ds"), env
        self._running: list[tuple[object, threading.Thread, list[object]]] = []

    def start(self, id: int, url: str, attributes: dict[str, str] | None = None, **template: str) -> int:
        text = dump(self.base, {"PATH": url, "ID": id}, attributes, template)
        process = start_action("datastore/fs/cp", str(id), env=self._env)
        done: list[object] = []
        thread = threading.Thread(target=lambda: done.extend(process.communicate(text)))
        thread.start()
        self._running.append((process, thread, done))
        return process.pid

    def end(self) -> list[tuple[int, str, str]]:
        """(status, stdout, stderr) of each."""
        ended = []
        for process, thread, done in self._running:
            thread.join(60)
            ended.append((process.returncode, done[0].decode(), done[1].decode()))  # type: ignore[attr-defined]
        self._running.clear()
        return ended


@pytest.fixture
def imports(tmp_path: Path) -> Imports:
    (tmp_path / "one/var").mkdir(parents=True)
    env = {"PATH": PATH, "HOME": str(tmp_path), "ONE_LOCATION": str(tmp_path / "one")}
    return Imports(tmp_path, {**env, "MADRIGAL_RUN_DIR": str(tmp_path / "run")})


def held(web: Web, path: str = "/image", status: int = 200) -> tuple[str, threading.Event]:
    """A page whose end comes when the event is set."""
    go = threading.Event()

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content())))
        handler.end_headers()
        handler.wfile.write(content()[:MIB])
        go.wait(30)
        handler.wfile.write(content()[MIB:])

    web.pages[path] = answer
    return web.url + path, go


def waiting(imports: Imports, run: Path, count: int) -> bool:
    """Whether COUNT imports wait for another."""
    return eventually(lambda: Path("/proc/locks").read_text().count(others(run)) >= count, 10) if others(run) else False


def others(run: Path) -> str:
    """What the lock of those that wait is called in /proc/locks."""
    eventually(lambda: list(run.glob("import-*.others")), 10)
    found = next(iter(run.glob("import-*.others")))
    return f":{found.stat().st_ino} "


def test_the_source_is_asked_once_and_each_has_its_own_image(imports: Imports, web: Web, tmp_path: Path) -> None:
    url, go = held(web)
    imports.start(1, url)
    assert eventually(lambda: web.asked)
    for id in (2, 3):
        imports.start(id, url)
    assert waiting(imports, tmp_path / "run", 2)
    go.set()
    ended = imports.end()
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    assert len(web.asked) == 1
    paths = [Path(stdout.split()[0]) for _, stdout, _ in ended]
    assert len({path.stat().st_ino for path in paths}) == 3
    assert all(path.read_bytes() == content() for path in paths)
    assert os.listdir(tmp_path / "run") == []
    imports.start(4, url)  # later it may have changed
    assert imports.end()[0][0] == 0
    assert len(web.asked) == 2


def test_what_is_not_wanted_alike_is_not_shared(imports: Imports, web: Web) -> None:
    url, go = held(web)
    imports.start(1, url)
    imports.start(2, url, {"MD5": "0" * 32})
    imports.start(3, url, DRIVER="qcow2")
    assert eventually(lambda: len(web.asked) == 3)
    go.set()
    ended = imports.end()
    assert [status for status, _, _ in ended] == [0, 40, 0]
    assert ended[2][1].endswith(" qcow2\n")


def test_a_failure_is_everybody_s(imports: Imports, web: Web, tmp_path: Path) -> None:
    url, go = held(web)
    digest = {"MD5": "0" * 32}
    imports.start(1, url, digest)
    assert eventually(lambda: web.asked)
    imports.start(2, url, digest)
    assert waiting(imports, tmp_path / "run", 1)
    go.set()
    ended = imports.end()
    assert [status for status, _, _ in ended] == [40, 40]
    assert len(web.asked) == 1
    assert not Path(imports.base).exists()


def test_when_the_first_is_killed_another_goes_on(imports: Imports, web: Web, tmp_path: Path) -> None:
    for number, kill in enumerate((signal.SIGKILL, signal.SIGTERM)):
        url, go = held(web, f"/{number}")
        web.asked.clear()
        first = imports.start(1, url)
        assert eventually(lambda: web.asked)
        imports.start(2, url)
        imports.start(3, url)
        assert waiting(imports, tmp_path / "run", 2)
        os.kill(first, kill)
        assert eventually(lambda: len(web.asked) == 2)
        go.set()
        ended = imports.end()
        assert [status for status, _, _ in ended][1:] == [0, 0], ended
        assert ended[0][0] != 0
        assert len(web.asked) <= 3
        for path in Path(imports.base).iterdir():
            path.unlink()


def test_on_a_bridge_too(hosts: Hosts, env: dict[str, str], datastore: str, web: Web, tmp_path: Path) -> None:
    imports = Imports(tmp_path, env, datastore)
    url, go = held(web)
    imports.start(2, url, BRIDGE_LIST="host01")
    assert eventually(lambda: web.asked)
    imports.start(4, url, BRIDGE_LIST="host01")
    assert waiting(imports, Path(env["MADRIGAL_RUN_DIR"]), 1)
    go.set()
    ended = imports.end()
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert len(web.asked) == 1
    for _, stdout, _ in ended:
        assert hosts.on("host01", stdout.split()[0]).read_bytes() == content()
