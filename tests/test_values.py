"""Values and words: places, dumps however broken, configuration files, messages, deadlines."""

from __future__ import annotations

import base64
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TREE
from dumps import dump

from madrigal import arg_host, arg_path, config, deadline, fix_dir_slashes, messages
from madrigal.dump import Dump, decode
from madrigal.errors import ConfigError, DeadlineExceeded, UsageError
from madrigal.location import Location

# -- places ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "host", "path"),
    [
        ("host01:/var/lib/one//datastores/0/7/", "host01", "/var/lib/one/datastores/0/7"),
        ("a:/x:y/disk.0", "a", "/x:y/disk.0"),
        ("/no/colon", "/no/colon", "/no/colon"),
        ("h:/", "h", "/"),
        ("h:", "h", ""),
        ("h:/a b/$(id)/'x';*", "h", "/a b/$(id)/'x';*"),
    ],
)
def test_arg_host_and_arg_path(argument: str, host: str, path: str) -> None:
    """As the shell library's, which tests/bats/values.bats asks the same."""
    assert (arg_host(argument), arg_path(argument)) == (host, path)
    source = '. "$1"; arg_host "$2"; arg_path "$2"'
    done = subprocess.run(
        ["bash", "-c", source, "x", TREE / "scripts_common.sh", argument], capture_output=True, text=True
    )
    assert done.stdout == f"{host}\n{path}\n"


def test_fix_dir_slashes() -> None:
    assert [fix_dir_slashes(path) for path in ("//a///b//", "/", "///", "", "a/")] == ["/a/b", "/", "/", "", "a"]


@pytest.mark.parametrize(
    "argument",
    [
        "",
        "h",
        "h:",
        "h:relative",
        "h:/",
        "h:/a/../b",
        "h:/a/..",
        "-oProxyCommand=x:/a",
        "a b:/x",
        "$(id):/x",
        "h:/a\0b",
    ],
)
def test_what_is_not_a_place(argument: str) -> None:
    with pytest.raises(UsageError):
        Location.parse(argument)


def test_place_of_an_image() -> None:
    """With and without the front-end's name, and what has a colon of its own."""
    for argument, path in (
        ("fe:/ds/1/x", "/ds/1/x"),
        ("/ds/1/x", "/ds/1/x"),
        ("/ds/1/a:b", "/ds/1/a:b"),
        ("http://example.org/x", "http://example.org/x"),
    ):
        found = Location.of_image(argument)
        assert (found.host, found.path) == ("", path)
    assert Location.of_image("http://example.org/x").is_url
    assert Location.parse("h:/ds/0/7/disk.12").disk_id == 12
    assert Location.parse("h:/ds/0/7/disk.x").disk_id is None


# -- dumps -----------------------------------------------------------------------------------------------------

GOOD = dump(
    "/var/lib/one//datastores/1", {"PATH": "/a & b", "SIZE": 7, "FORMAT": "qcow2"}, {"MD5": "x"}, {"DRIVER": "raw"}
)


def test_dump() -> None:
    read = Dump(GOOD)
    assert (read.image.id, read.image.path, read.image.size) == (42, "/a & b", 7)
    assert (read.image.attribute("MD5"), read.datastore.attribute("DRIVER")) == ("x", "raw")
    assert read.image.attribute("NOTHING") == ""
    wrapped = base64.encodebytes(base64.b64decode(GOOD))
    assert Dump(wrapped).image.id == 42


def broken(rng: random.Random) -> bytes:
    """GOOD with some of its bytes changed, before or after they are encoded."""
    document = bytearray(base64.b64decode(GOOD))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(document))
        kind = rng.randrange(4)
        if kind == 0:
            document[at] = rng.randrange(256)
        elif kind == 1:
            del document[at : at + rng.randint(1, 40)]
        elif kind == 2:
            document[at:at] = rng.choice(
                [b"<", b"</IMAGE>", b"&", b"&x;", b"]]>", b"\0", b"\xff", b"<![CDATA[", b"9" * 30]
            )
        else:
            document[at:at] = document[rng.randrange(len(document)) :][: rng.randint(1, 60)]
    encoded = bytearray(base64.b64encode(document))
    if rng.random() < 0.2:
        encoded[rng.randrange(len(encoded))] = rng.randrange(256)
    return bytes(encoded)


def test_ten_thousand_broken_dumps() -> None:
    """Each is read or refused with one sentence; nothing else is raised, whatever is asked of it."""
    rng = random.Random(3)
    refused = 0
    for _ in range(10_000):
        encoded = broken(rng)
        try:
            read = Dump(encoded)
            for part in (read.image, read.datastore):
                for ask in [name for name in dir(part) if not name.startswith("_")]:
                    value = getattr(part, ask)
                    if not callable(value):
                        str(value)
            read.image.attribute("MD5")
        except UsageError as error:
            refused += 1
            assert str(error)
    assert 1000 < refused < 10_000  # the table makes both kinds


def test_entities_are_not_resolved(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for inner in (f'<!ENTITY x SYSTEM "file://{tmp_path}/secret">', '<!ENTITY x "xxxx">'):
        text = f"<!DOCTYPE a [{inner}]><DS_DRIVER_ACTION_DATA><IMAGE><PATH>&x;</PATH></IMAGE></DS_DRIVER_ACTION_DATA>"
        with pytest.raises(UsageError, match="document type") as caught:
            Dump(base64.b64encode(text.encode()))
        assert "secret" not in str(caught.value)


def test_what_is_not_base64() -> None:
    for text in (b"", b"  \n", b"PGEvPg", b"P!Ev", b"\xff\xff"):
        with pytest.raises(UsageError):
            decode(text)


# -- configuration files ---------------------------------------------------------------------------------------


def test_configuration_is_read_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.conf"
    path.write_text(
        '# comment\n\nPLAIN=one\nexport DOUBLE="two words"  # why\nSINGLE=\'$(touch x) "\'\nEMPTY=\n'
        'ESCAPED="a\\"b\\$c"\nLATER=1\nLATER=2;\n'
    )
    assert config.read_shell(str(path)) == {
        "PLAIN": "one",
        "DOUBLE": "two words",
        "SINGLE": '$(touch x) "',
        "EMPTY": "",
        "ESCAPED": 'a"b$c',
        "LATER": "2",
    }
    assert config.read_shell(str(tmp_path / "none")) == {}


@pytest.mark.parametrize("line", ["touch x", "A=$(id) b", "A=one two", "A='open", "if true; then", "1A=x"])
def test_a_line_that_is_more_than_an_assignment_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.conf").write_text(f"A=1\n{line}\n")
    with pytest.raises(ConfigError, match=r"x\.conf, line 2"):
        config.read_shell(str(tmp_path / "x.conf"))


def test_run_dir_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_RUN_DIR", str(tmp_path / "run"))
    assert config.run_dir() == str(tmp_path / "run")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(ConfigError, match="only its owner"):
        config.run_dir()
    (tmp_path / "run").rmdir()
    (tmp_path / "elsewhere").mkdir(0o700)
    (tmp_path / "run").symlink_to("elsewhere")
    with pytest.raises(ConfigError, match="only its owner"):
        config.run_dir()


# -- messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        *("plain", "two\nlines", "-", "", "ERROR: x: y", "INFO: ", "ERROR MESSAGE ------>8--", " a ", "x" * 70000),
        *("WARN: 5 x", "DEBUG: x", "ExitCode: 0", "ExitCode: ", "a\nExitCode: 0\nb", "a\nERROR MESSAGE ------>8--\nb"),
    ],
)
def test_a_message_is_one_line_that_is_taken_for_one(
    text: str, marks: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["clone"])
    before, messages.marks = messages.marks, marks
    try:
        messages.error_message(text)
    finally:
        messages.marks = before
    lines = capfd.readouterr().err.splitlines()
    if marks:
        assert (lines.pop(0), lines.pop()) == ("ERROR MESSAGE --8<------", "ERROR MESSAGE ------>8--")
    (line,) = lines
    assert line.strip() == line != ""
    assert not line.startswith(("-", "ERROR", "INFO:", "WARN:", "DEBUG:", "ExitCode:"))


@pytest.mark.parametrize("text", ["17 disks", "a\n17: b", "ExitCode: 0", "\nExitCode: 0"])
def test_a_log_text_is_of_no_other_object_and_no_status(
    text: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number after the severity is the VM that a front-end logs it for; 3.4 believes the first line with a status."""
    monkeypatch.setattr(sys, "argv", ["clone"])
    messages.log(text)
    for line in capfd.readouterr().err.splitlines():
        assert not re.match(r"(ERROR|INFO|WARN|DEBUG):\s+\d", line) and not line.startswith("ExitCode"), line


def test_every_line_of_a_log_has_the_tag(capfd: pytest.CaptureFixture[str]) -> None:
    messages.log("one\ntwo\r\n\nthree\n")
    name = messages.name()
    assert capfd.readouterr().err == "".join(f"INFO: {name}: {line}\n" for line in ("one", "two", "", "three"))


def test_what_a_dump_has_in_place_of_a_name_does_not_fill_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    messages.log("begins " + "9" * 1_000_000 + " ends")
    messages.error_message("begins " + "9" * 1_000_000 + " ends")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(len(line) < 20_000 and "begins" in line and line.endswith("ends") for line in lines)


def test_log_to_nobody() -> None:
    """The front-end has gone away: no traceback, and the exit status is the driver's."""
    source = f"import sys; sys.path[0] = {str(TREE / 'lib')!r}; import madrigal; madrigal.log('x'); sys.exit(7)"
    process = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.PIPE)
    assert process.stderr
    process.stderr.close()
    assert process.wait() == 7


# -- deadlines -------------------------------------------------------------------------------------------------


def test_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = deadline.Deadline(0.05, "the test")
    assert 0 < limit.left() <= 0.05
    time.sleep(0.06)
    with pytest.raises(DeadlineExceeded, match="the test"):
        limit.left()
    monkeypatch.setenv("MADRIGAL_CONTROL_TIMEOUT", "2.5")
    assert deadline.control() == 2.5
    for text in ("0", "-1", "x", "nan", "inf", "1e400"):
        monkeypatch.setenv("MADRIGAL_CONTROL_TIMEOUT", text)
        with pytest.raises(ConfigError, match="MADRIGAL_CONTROL_TIMEOUT"):
            deadline.control()
