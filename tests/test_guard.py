"""What may be read: by the opened file, by component, and without telling what is there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from madrigal.errors import ConfigError, Forbidden, MadrigalError, NotFound, SourceUnavailable, UsageError
from madrigal.onhost import guard


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory `safe` and a directory `secret`, a file in each."""
    for name in ("safe", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image").write_text(name)
    return tmp_path


def read(path: Path | str, safe: Path | str = "", restricted: Path | str = "", always: tuple[str, ...] = ()) -> str:
    fd = guard.open_allowed(str(path), str(safe), str(restricted), always)
    try:
        assert not os.get_inheritable(fd)
        assert os.get_blocking(fd)
        return os.read(fd, 100).decode()
    finally:
        os.close(fd)


def refusal(path: Path | str, *arguments: object) -> MadrigalError:
    with pytest.raises(MadrigalError) as raised:
        read(path, *arguments)  # type: ignore[arg-type]
    return raised.value


def test_what_no_rule_names_may_be_read(place: Path) -> None:
    assert read(place / "safe/image") == "safe"


def test_safe_goes_before_restricted(place: Path) -> None:
    assert read(place / "safe/image", place / "safe", "/") == "safe"
    assert read(place / "safe/image", place / "safe", place / "safe") == "safe"
    assert read(place / "safe/image", place / "safe", "", (str(place),)) == "safe"


def test_restricted_is_refused_and_the_text_says_what_to_check(place: Path) -> None:
    error = refusal(place / "secret/image", place / "safe", place)
    assert isinstance(error, Forbidden)
    assert error.status == 21
    assert f"RESTRICTED_DIRS has {place}" in str(error)
    assert "check RESTRICTED_DIRS and SAFE_DIRS of the datastore" in str(error)


def test_some_directories_are_always_restricted(place: Path) -> None:
    error = refusal(place / "secret/image", "", "", ("", str(place / "secret")))
    assert "is always restricted; check RESTRICTED_DIRS and SAFE_DIRS" in str(error)
    assert read(place / "safe/image", "", "", ("", str(place / "secret"))) == "safe"


def test_directories_are_compared_by_component(place: Path) -> None:
    (place / "safefoo").mkdir()
    (place / "safefoo/image").write_text("foo")
    assert isinstance(refusal(place / "safefoo/image", place / "safe", "/"), Forbidden)
    assert read(place / "safefoo/image", "", place / "safe") == "foo"


def test_directories_are_not_patterns(place: Path) -> None:
    (place / "s.fe").mkdir()
    assert isinstance(refusal(place / "safe/image", place / "s.fe", "/"), Forbidden)
    assert isinstance(refusal(place / "safe/image", f"{place}/.*", "/"), Forbidden)


def test_several_directories_stand_in_one_attribute(place: Path) -> None:
    assert read(place / "safe/image", f"/nowhere  {place}/safe/ ", "/") == "safe"
    assert isinstance(refusal(place / "secret/image", "", f"/nowhere {place}/secret//"), Forbidden)


def test_the_directory_itself_is_in_it(place: Path) -> None:
    assert read(place / "safe/image", place / "safe/image", "/") == "safe"


@pytest.mark.parametrize("entry", ["var/tmp", ".", "~/images"])
def test_an_entry_that_is_not_absolute_is_said(place: Path, entry: str) -> None:
    error = refusal(place / "safe/image", entry, "/")
    assert isinstance(error, ConfigError)
    assert entry in str(error)


def test_links_are_followed_before_anything_is_compared(place: Path) -> None:
    (place / "safe/link").symlink_to(place / "secret/image")
    (place / "safe/there").symlink_to(place / "secret")
    (place / "alias").symlink_to(place / "safe")
    for path in ("safe/link", "safe/there/image"):
        assert isinstance(refusal(place / path, place / "safe", "/"), Forbidden)
    assert read(place / "safe/image", place / "alias", "/") == "safe"
    assert read(place / "alias/image", place / "safe", "/") == "safe"


def test_the_opened_file_counts_not_its_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is turned round between any two steps gets nobody the secret."""
    link, readlink = place / "safe/link", os.readlink
    link.symlink_to(place / "secret/image")

    def turn(path: str) -> str:
        link.unlink()
        link.symlink_to(place / "safe/image")
        return readlink(path)

    monkeypatch.setattr(os, "readlink", turn)
    assert isinstance(refusal(link, place / "safe", "/"), Forbidden)

    def turn_back(path: str) -> str:
        real = readlink(path)
        link.unlink()
        link.symlink_to(place / "secret/image")
        return real

    monkeypatch.setattr(os, "readlink", turn_back)
    assert read(link, place / "safe", "/") == "safe"


@pytest.mark.parametrize("rules", [("/safe", "/"), ("", "/secret")])
@pytest.mark.parametrize("name", ["image", "nothing", "image/below", "no/such/directory"])
@pytest.mark.parametrize("through", ["secret", "safe/link"])
def test_what_is_there_cannot_be_found_out(place: Path, rules: tuple[str, str], name: str, through: str) -> None:
    (place / "safe/link").symlink_to(place / "secret")
    safe, restricted = (f"{place}{rule}" if len(rule) > 1 else rule for rule in rules)
    there = refusal(place / through / "image", safe, restricted)
    asked = refusal(place / through / name, safe, restricted)
    assert type(asked) is type(there) is Forbidden
    assert str(asked).replace(name, "image") == str(there)


def test_a_missing_file_where_one_may_read_is_not_found(place: Path) -> None:
    for name in ("nothing", "no/directory", "image/below"):
        error = refusal(place / "safe" / name, place / "safe", "/")
        assert isinstance(error, NotFound)
        assert name in str(error)
    (place / "safe/loop").symlink_to(place / "safe/loop")
    assert isinstance(refusal(place / "safe/loop", place / "safe", "/"), NotFound)


@pytest.mark.parametrize("path", ["image", "", "./image", "/var/tmp/../../etc/passwd", "/etc/..", "/a\0b"])
def test_a_path_must_be_absolute_and_without_dots(path: str) -> None:
    assert isinstance(refusal(path, "", ""), UsageError)


def test_only_files_and_block_devices_are_read_and_nothing_waits(place: Path) -> None:
    os.mkfifo(place / "safe/fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "safe/socket"))
        start = time.monotonic()
        for path, kind in (
            (place / "safe/fifo", "a FIFO"),
            (place / "safe/socket", "a socket"),
            (place / "safe", "a directory"),
            ("/dev/zero", "a character device"),
            ("/dev/null", "a character device"),
        ):
            error = refusal(path, "/", "/")
            assert isinstance(error, Forbidden)
            assert f"it is {kind}" in str(error)
        assert time.monotonic() - start < 5


def test_the_kind_of_a_forbidden_file_is_not_told(place: Path) -> None:
    os.mkfifo(place / "secret/fifo")
    file, fifo = (refusal(place / "secret" / name, place / "safe", "/") for name in ("image", "fifo"))
    assert str(fifo).replace("fifo", "image") == str(file)


@pytest.mark.parametrize(
    "path", ["/proc/self/environ", "/proc/self/mem", "/proc/1/cmdline", "/sys/kernel/uevent_seqnum"]
)
def test_what_the_kernel_only_shows_is_refused(path: str) -> None:
    assert isinstance(refusal(path, "/", ""), Forbidden)


def test_descriptors_under_proc_lead_to_their_file(place: Path) -> None:
    with (place / "secret/image").open() as file:
        path = f"/proc/self/fd/{file.fileno()}"
        assert isinstance(refusal(path, "/proc", "/"), Forbidden)
        assert read(path, place / "secret", "/") == "secret"
    one, other = os.pipe()
    assert isinstance(refusal(f"/proc/self/fd/{one}", "", ""), Forbidden)
    os.close(one)
    os.close(other)
    assert isinstance(refusal(f"/proc/self/root{place}/secret/image", "", place), Forbidden)


def test_names_with_everything_in_them(place: Path) -> None:
    name = "a b;$(id)\n'\"*?[x] (deleted)"
    (place / "safe" / name).write_text("odd")
    assert read(place / "safe" / name, place / "safe", "/") == "odd"


def test_a_directory_only_where_it_is_asked_for(place: Path) -> None:
    fd = guard.open_allowed(str(place / "safe"), str(place / "safe"), "/", (), directory=True)
    assert os.listdir(fd) == ["image"]
    os.close(fd)
    with pytest.raises(Forbidden):
        guard.open_allowed(str(place / "secret"), str(place / "safe"), "/", (), directory=True)


def test_nothing_stays_open(place: Path) -> None:
    before = os.listdir("/proc/self/fd")
    os.mkfifo(place / "safe/fifo")
    for path in ("safe/fifo", "safe/nothing", "secret/image", "safe"):
        refusal(place / path, place / "safe", "/")
    assert os.listdir("/proc/self/fd") == before


def test_a_file_somebody_keeps_to_himself_does_not_hang(place: Path) -> None:
    """A write lease makes an ordinary open wait for lease-break-time, 45 s."""
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n"
    code += "import signal; signal.signal(signal.SIGIO, signal.SIG_IGN); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, place / "safe/image"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        start = time.monotonic()
        assert isinstance(refusal(place / "safe/image", place / "safe", "/"), SourceUnavailable)
        assert time.monotonic() - start < 5
    finally:
        holder.kill()
        holder.communicate()


@pytest.fixture
def device(tmp_path: Path) -> object:
    if os.geteuid() or not shutil.which("losetup"):
        pytest.skip("a block device needs root and losetup")
    backing = tmp_path / "backing"
    backing.write_bytes(b"block" + bytes(4091))
    made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def test_a_block_device_is_read(device: str) -> None:
    assert read(device, "/dev", "/").startswith("block")
    assert isinstance(refusal(device, "", "/"), Forbidden)


def test_permissions_say_no_and_the_rules_say_it_first() -> None:
    """As a user who may not search `secret`: the answer is that of the rules, there or not."""
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o755)
        for name in ("safe", "secret"):
            (place / name).mkdir()
            (place / name / "image").touch(0o000)
        (place / "secret").chmod(0)
        one, other = os.pipe()
        child = os.fork()
        if not child:
            if not os.geteuid():
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            said = []
            for path in ("safe/image", "secret/image", "secret/nothing"):
                try:
                    guard.open_allowed(f"{place}/{path}", f"{place}/safe", "/", ())
                    said.append("opened")
                except MadrigalError as error:
                    said.append(
                        type(error).__name__ + (" permission" if "Permission denied" in str(error) else " rule")
                    )
            os.write(other, ", ".join(said).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(one, 1000).decode() == "Forbidden permission, Forbidden rule, Forbidden rule"
        os.close(one)
        os.close(other)
    finally:
        (place / "secret").chmod(0o755)
        shutil.rmtree(place)
