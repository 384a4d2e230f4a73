"""`make bench` with small images, and tests/rigs/link: what is measured is what the figures are said to be of."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RIGS, TREE, Hosts

pytestmark = pytest.mark.long

MIB = 1 << 20


def bench(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, f"{TREE}/benchmarks/run", "--rounds", "1", "--size", "16M", "--output", str(results)]
    return subprocess.run([*argv, *arguments], capture_output=True, text=True)


@pytest.mark.usefixtures("hosts")  # where there can be none, there is nothing to measure
def test_parts_measure_and_leave_what_others_have_found(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    old = {"ratios": {"throughput.gone": 1, "overhead.kept": 2}, "seconds": {"throughput.gone": 1}}
    results.write_text(json.dumps(old))
    done = bench(results, "throughput", "sparse", "latency", "delta")
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())
    ratios, seconds = found["ratios"], found["seconds"]
    assert ratios["overhead.kept"] == 2
    assert "throughput.gone" not in {**ratios, **seconds}
    for name in (
        "throughput.dense.vs_pipe",
        "throughput.dense_checksum.vs_pipe",
        "throughput.dense_digest.vs_pipe",
        "throughput.dense.vs_stock",
        "throughput.dense.cpu_vs_pipe",
        "sparse.vs_dense_1g",
        "sparse.zeros.vs_stock",
        "latency.vs_stock",
        "delta.vs_stock",
        "delta.scattered.vs_stock",
    ):
        assert ratios[name] > 0, name
    # With one round the medians are what the ratios are made of.
    for ratio, theirs, ours in (
        ("throughput.dense_digest.vs_stock", "throughput.dense.stock", "throughput.dense.ours_digest"),
        ("latency.vs_pipe", "latency.pipe", "latency.ours"),
    ):
        assert ratios[ratio] == pytest.approx(seconds[theirs] / seconds[ours], rel=0.02), ratio
    assert seconds["latency.pipe"] > 0.2, "a connection takes several round trips of 40 ms"
    assert seconds["delta.stock"] > 16 * MIB * 8 / 1e9
    assert 5 < ratios["throughput.peak_mib"] < 100
    assert set(found["runs"]) == {"throughput", "sparse", "latency", "delta"}


def test_what_may_be_asked_for(tmp_path: Path) -> None:
    for wrong in (["no-part"], ["--size", "big"], ["--output", f"{TREE}/benchmarks/results.json"]):
        done = bench(tmp_path / "results.json", *wrong)
        assert done.returncode == 2 and "error: " in done.stderr, wrong
    assert not (tmp_path / "results.json").exists()


# -- the link --------------------------------------------------------------------------------------------------


class Server:
    """Reads what it is sent, and answers with as many bytes as it was sent when that is over."""

    def __init__(self, *options: str) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        argv = [f"{RIGS}/link", *options, str(self._listening.getsockname()[1])]
        self.link = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.link.stdin and self.link.stdout
        self._in, self._out = self.link.stdin, self.link.stdout
        self.port = int(self._out.readline())

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()

    def tell(self, line: str) -> dict[str, int]:
        self._in.write(line + "\n")
        self._in.flush()
        said: dict[str, int] = json.loads(self._out.readline())
        return said

    def send(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(MIB), b""))

    def close(self) -> None:
        self._in.close()
        assert self.link.wait(5) == 0, "it ends with its input"
        self._out.close()
        self._listening.close()


def _answer(connection: socket.socket) -> None:
    with connection:
        data = b"".join(iter(lambda: connection.recv(MIB), b""))
        connection.sendall(data[::-1])


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def took(server: Server, data: bytes) -> float:
    began = time.monotonic()
    assert server.send(data) == data[::-1]
    return time.monotonic() - began


def test_a_link_changes_nothing_but_when(server: Server) -> None:
    data = bytes(range(256)) * 40000
    took(server, data)
    assert server.tell("count") == {"connections": 1, "forth": len(data), "back": len(data), "cuts": 0}
    assert server.tell("delay 50") == {"connections": 0, "forth": 0, "back": 0, "cuts": 0}
    assert took(server, b"x") >= 0.1
    server.tell("delay 0")
    server.tell("rate 80e6")
    assert took(server, bytes(2 * MIB)) >= 2 * 2 * MIB * 8 / 80e6


def test_a_link_has_one_rate_for_all(server: Server) -> None:
    server.tell("rate 80e6")
    began = time.monotonic()
    threads = [threading.Thread(target=server.send, args=(bytes(MIB),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= 4 * MIB * 8 / 80e6


def test_a_link_cuts_once(server: Server) -> None:
    server.tell(f"cut-after {MIB}")
    answer = b""
    with contextlib.suppress(OSError):
        answer = server.send(bytes(64 * MIB))
    assert len(answer) < 64 * MIB
    said = server.tell("count")
    assert said["cuts"] == 1 and MIB <= said["forth"] + said["back"] < 32 * MIB
    took(server, bytes(8 * MIB))
    assert server.tell("count")["cuts"] == 0


def test_hosts_are_reached_by_the_link(hosts: Hosts) -> None:
    argv = ["ssh", "-F", hosts.ssh_config, "host01", "head -c 1000000 /dev/zero"]
    with hosts.link("host01") as link:
        assert len(subprocess.run(argv, capture_output=True, check=True).stdout) == 1000000
        assert link.count()["back"] > 1000000
        link.cut_after(500000)
        assert subprocess.run(argv, capture_output=True).returncode == 255
        assert link.count()["cuts"] == 1
    subprocess.run(argv, capture_output=True, check=True)


def test_an_import_of_every_kind_is_measured_beside_the_pipe(tmp_path: Path) -> None:
    argv = [sys.executable, f"{TREE}/benchmarks/import", "--rounds", "1", "--size", "12"]
    done = subprocess.run([*argv, "--result", str(tmp_path / "found")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imports = json.loads((tmp_path / "found").read_text())["imports"]
    kinds = [f"{kind}{more}" for kind in ("plain", "gz", "xz", "zst") for more in ("", ", digest")]
    assert set(imports) == {*kinds, "plain, to qcow2", "gz, to qcow2"}
    for found in imports.values():
        assert set(found) == {"pipe", "ours"}
        assert found["ours"]["requests"] == 1
        assert found["ours"]["cpu"] > 0


def test_make_bench_import() -> None:
    for words in (["import"], ["PART=import"]):
        argv = ["make", "-n", "bench", *words, "STOCK=/x y"]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=TREE)
        assert done.stdout.count("benchmarks/import --stock /x") == 1 and "benchmarks/run" not in done.stdout, done
