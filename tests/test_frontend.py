"""Asking a front-end: over XML-RPC, with the standard library's server at the other end, and with its own tool."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

import pytest
from dumps import vm_document

from madrigal import frontend
from madrigal.errors import (
    ConfigError,
    DeadlineExceeded,
    Forbidden,
    HostUnreachable,
    MadrigalError,
    NotFound,
    SourceUnavailable,
    UsageError,
)

SECRET = "oneadmin:s3cr3t<&>"
DOCUMENT = vm_document(17, {0: {"SIZE": 7, "FORMAT": "raw"}}).decode()


class Handler(SimpleXMLRPCRequestHandler):
    rpc_paths = ("/RPC2",)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What one.vm.info answers is the first of this list; what it was asked is appended."""
    given: list[Any] = [[True, DOCUMENT, 0]]

    def info(*arguments: Any) -> Any:
        given.append(arguments)
        return given[0]

    (tmp_path / "auth").write_text(f"{SECRET}\n")
    monkeypatch.setenv("ONE_AUTH", str(tmp_path / "auth"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    with SimpleXMLRPCServer(("127.0.0.1", 0), Handler, allow_none=True, encoding="utf-8") as server:
        server.register_function(info, "one.vm.info")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("ONE_XMLRPC", f"http://127.0.0.1:{server.server_address[1]}/RPC2")
        yield given
        server.shutdown()
        thread.join()


def refused(kind: type[MadrigalError] | tuple[type[MadrigalError], ...], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        frontend.vm(17)
    assert "s3cr3t" not in str(caught.value) and "\n" not in str(caught.value)


def size_of_disk() -> int | None:
    disk = frontend.vm(17).disk(0)
    return disk.int("SIZE") if disk else None


def test_one_call(answers: list[Any]) -> None:
    assert size_of_disk() == 7
    assert answers[1:] == [(SECRET, 17)]


def test_other_letters(answers: list[Any]) -> None:
    answers[0] = [True, DOCUMENT.replace("<NAME>vm", "<NAME><![CDATA[ä <½>]]>"), 0]
    assert frontend.vm(17).text("NAME") == "ä <½>"


@pytest.mark.parametrize(
    ("answer", "kind", "match"),
    [
        ([False, "no such", 0x400], NotFound, "refuses one.vm.info: no such"),
        ([False, "not you", 0x100], Forbidden, "not you"),
        ([False, "not this", 0x200], Forbidden, "not this"),
        ([False, "broken", 0x2000], MadrigalError, "broken"),
        ([True], SourceUnavailable, "cannot answer"),
        ("text", SourceUnavailable, "cannot answer"),
        ([True, "<VM", 0], UsageError, "cannot be read as XML"),
        ([True, "<HOST/>", 0], UsageError, "not <VM>"),
    ],
)
def test_answers_that_are_no_vm(answers: list[Any], answer: Any, kind: type[MadrigalError], match: str) -> None:
    answers[0] = answer
    refused(kind, match)


def test_a_page_that_is_not_there(answers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_XMLRPC", os.environ["ONE_XMLRPC"].replace("RPC2", "x"))
    refused(SourceUnavailable, "404")


# -- servers that are none -------------------------------------------------------------------------------------


@pytest.fixture
def server(
    answers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[socket.socket], None]], None]]:
    """Makes ONE_XMLRPC a server that does with each connection what it is given."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        monkeypatch.setenv("ONE_XMLRPC", f"http://127.0.0.1:{listener.getsockname()[1]}/RPC2")
        threads: list[threading.Thread] = []

        def start(act: Callable[[socket.socket], None]) -> None:
            def serve() -> None:
                while not stop.is_set():
                    try:
                        connection, _ = listener.accept()
                    except TimeoutError:
                        continue
                    with connection:
                        try:
                            act(connection)
                        except OSError:
                            pass

            threads.append(threading.Thread(target=serve))
            threads[-1].start()

        yield start
        stop.set()
        for thread in threads:
            thread.join()


def test_silence_and_dripping(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole call has one deadline, however often a byte comes."""
    monkeypatch.setenv("MADRIGAL_CONTROL_TIMEOUT", "0.4")

    def drip(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        for _ in range(60):
            connection.sendall(b"H")
            threading.Event().wait(0.05)

    server(drip)
    refused((DeadlineExceeded, HostUnreachable), "longer than 0.4 s|timed out")


def test_text_that_is_not_http(server: Any) -> None:
    server(lambda connection: (connection.recv(1 << 16), connection.sendall(b"\xff\0 go away\r\n\r\n"))[1])
    refused(SourceUnavailable, "answers")


def test_page_that_is_not_xml_rpc(server: Any) -> None:
    page = b"HTTP/1.0 200 OK\r\n\r\n<html><body>Welcome & more"
    server(lambda connection: (connection.recv(1 << 16), connection.sendall(page))[1])
    refused(SourceUnavailable, "not XML-RPC")


# -- its own tool ----------------------------------------------------------------------------------------------


@pytest.fixture
def onevm(answers: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the onevm in PATH this shell script; nobody answers at ONE_XMLRPC."""
    monkeypatch.setenv("ONE_XMLRPC", "http://127.0.0.1:1/RPC2")

    def make(script: str) -> None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/onevm").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin/onevm").chmod(0o755)

    return make


def test_onevm_is_asked_where_nobody_answers(onevm: Callable[[str], None], tmp_path: Path) -> None:
    onevm(f"printf '%s ' \"$@\" >'{tmp_path}/asked'; echo '{DOCUMENT}'")
    assert size_of_disk() == 7
    assert (tmp_path / "asked").read_text() == "show -x 17 "


def test_onevm_is_asked_without_credentials(onevm: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "auth").unlink()
    onevm(f"echo '{DOCUMENT}'")
    assert size_of_disk() == 7


def test_neither_helps(onevm: Callable[[str], None]) -> None:
    refused(HostUnreachable, r"does not answer at http://127\.0\.0\.1:1/RPC2: .*; and onevm does not help: .*onevm")
    onevm("echo 'no such VM' >&2; exit 255")
    refused(HostUnreachable, "onevm does not help: .*no such VM")


def test_onevm_talks_nonsense(onevm: Callable[[str], None]) -> None:
    onevm("echo hello")
    refused(UsageError, "cannot be read as XML")


@pytest.mark.parametrize("endpoint", ["ftp://x/", "http://", "http://u@h/", "nonsense", "http://h:99999/"])
def test_endpoint_that_makes_no_sense(answers: list[Any], endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_XMLRPC", endpoint)
    refused(ConfigError, "expected http://host:port/path")
