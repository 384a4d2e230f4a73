"""Reaching hosts, over both transports alike: words arrive whole, nothing hangs, no key is trusted blindly."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TREE, Done, Hosts, check_stderr, eventually, run_action

from madrigal import config, deadline
from madrigal.errors import (
    ConfigError,
    DeadlineExceeded,
    Forbidden,
    HostKeyRefused,
    HostUnreachable,
    MadrigalError,
    MissingProgram,
)
from madrigal.host import Host, openssh

HOSTILE = [
    "/tmp/a b/$(id)/'x';*",
    "line\nfeed",
    "-n",
    "--",
    "",
    "n" * 255,
    os.fsdecode(b"\xff\xfe caf\xe9"),
    'a"b\\c`id`',
    "\\",
    "!~*?[a]{b,c}|&<>#%",
    "tab\tand\rreturn",
    "ünïcödé 💾",
]
WORDS = b"".join(os.fsencode(word) + b"\0" for word in HOSTILE)


@pytest.fixture
def near(env: dict[str, str]) -> Host:
    """host01, whose environment to be reached is set."""
    return Host("host01")


def config_with(tmp_path: Path, hosts: Hosts, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an ssh configuration that begins with LINES and goes on with the one of `hosts`."""
    file = tmp_path / "config"
    file.write_text(f"{lines}\nInclude {hosts.ssh_config}\n")
    monkeypatch.setenv("MADRIGAL_SSH_CONFIG", str(file))


def forget() -> None:
    """Let this process have no connection that it has kept."""
    if os.environ["MADRIGAL_TRANSPORT"] == "paramiko":
        from madrigal.host import paramiko_client

        paramiko_client.disconnect()


def delete(target: str, env: dict[str, str]) -> Done:
    """An action that needs a host and finds nothing to do there."""
    return run_action("tm/ssh/delete", target, target.rpartition("/")[2], "100", env=env)


# -- words and streams -----------------------------------------------------------------------------------------


def test_words_of_an_argument_list_arrive_whole(near: Host) -> None:
    done = near.run(["printf", "%s\\0", *HOSTILE], 30)
    assert (done.status, done.stdout, done.stderr) == (0, WORDS, b"")


def test_values_of_a_script_arrive_whole(near: Host) -> None:
    done = near.script('printf "%s\\0" "$@"; echo "$LC_ALL $LANG" >&2; exit 5', HOSTILE, 30)
    assert (done.status, done.stdout, done.stderr) == (5, WORDS, b"C C\n")


def test_this_machine_is_a_host_too() -> None:
    for name in ("", "localhost", os.uname().nodename):
        done = Host(name).script('printf "%s\\0" "$@"; exit 5', HOSTILE, 30)
        assert (done.status, done.stdout) == (5, WORDS)


def test_large_input_output_and_errors_at_once(near: Host) -> None:
    data = os.urandom(24 << 20)
    script = "head -c 1048576 /dev/zero | tr '\\0' e >&2; cat; echo last >&2; exit 7"
    done = near.run(["bash", "-c", script], 60, input=data)
    assert done.status == 7
    assert done.stdout == data
    assert done.stderr.endswith(b"eee" * 1000 + b"last\n")


def test_input_that_nobody_reads(near: Host) -> None:
    done = near.run(["true"], 30, input=bytes(8 << 20))
    assert (done.status, done.stdout) == (0, b"")


@pytest.mark.parametrize("status", [0, 1, 127, 254, 255])
def test_status_is_the_programs_own(near: Host, status: int) -> None:
    done = near.run(["sh", "-c", f"echo words >&2; exit {status}"], 30)
    assert (done.status, done.stderr) == (status, b"words\n")


def test_program_that_is_not_there(near: Host) -> None:
    assert near.run(["no-such-program"], 30).status == 127


def test_total_deadline_of_a_command(near: Host) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="host01"):
        near.run(["sleep", "60"], 0.5)
    assert time.monotonic() - began < 20


def test_command_is_not_repeated_when_the_connection_breaks(near: Host, hosts: Hosts, datastore: str) -> None:
    hosts.on("host01", datastore).mkdir()
    # it looks like what sshd says when it has no connection free, which would be worth another try
    script = f"echo x >> {datastore}/count; echo 'Connection reset by peer' >&2; kill -9 $PPID; sleep 60"
    near.run(["bash", "-c", script], 30)
    assert hosts.on("host01", f"{datastore}/count").read_text() == "x\n"


# -- odd hosts -------------------------------------------------------------------------------------------------

NOISE = r"""
echo "Welcome to host01"
echo "bash: warning: setlocale: LC_ALL: cannot change locale" >&2
printf '\033]0;no newline\007'
"""


@pytest.fixture(scope="module")
def odd(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """More hosts: `noisy` has a talkative login shell, `bare` no python3, `ancient` an older one, `gone` is down."""
    work = tmp_path_factory.mktemp("odd")
    work.chmod(0o755)
    (work / ".bashrc").write_text(NOISE)
    for name in ("bare", "ancient"):
        (work / name).mkdir()
        for program in ("bash", "env", "cat"):
            found = shutil.which(program)
            assert found
            (work / name / program).symlink_to(found)
    old = work / "ancient" / "python3"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -I -c "import sys; sys.version_info = (3, 5, 9); $6"\n')
    old.chmod(0o755)
    hosts.add("noisy", sshd=f"SetEnv HOME={work}")
    hosts.add("bare", sshd=f"SetEnv HOME={work}/bare PATH={work}/bare")
    hosts.add("ancient", sshd=f"SetEnv HOME={work}/bare PATH={work}/ancient")
    hosts.add("gone")
    hosts.end("gone")
    yield hosts
    for name in ("noisy", "bare", "ancient"):
        hosts.end(name)


def test_noise_of_a_login_shell_is_survived(odd: Hosts, env: dict[str, str], datastore: str) -> None:
    if os.path.basename(pwd.getpwuid(os.getuid()).pw_shell) != "bash":
        pytest.skip("only bash reads ~/.bashrc for a command that comes over ssh, and it is not this user's shell")
    plain = subprocess.run(["ssh", "-F", odd.ssh_config, "noisy", "echo begun"], capture_output=True)
    assert plain.stdout.startswith(b"Welcome") and plain.stdout.endswith(b"\x07begun\n"), "the noise is not there"
    host = Host("noisy")
    assert host.run(["printf", "%s\\0", *HOSTILE], 30).stdout == WORDS
    assert host.run(["sh", "-c", "exit 255"], 30).status == 255
    with host.session() as session:
        session.call("hold", path=f"{datastore}/1", make="all")
    assert odd.on("noisy", f"{datastore}/1").is_dir()
    done = delete(f"noisy:{datastore}/1", env)
    check_stderr(done, "delete")
    assert done.status == 0 and not odd.on("noisy", f"{datastore}/1").exists()


@pytest.mark.parametrize("name", ["bare", "ancient"])
def test_host_without_a_fit_python(odd: Hosts, env: dict[str, str], name: str) -> None:
    with pytest.raises(MissingProgram, match=f"{name} has no python3.*3.6.*install it"):
        Host(name).session().call("exists", path="/")
    assert Host(name).run(["env", "cat"], 30, input=b"works").stdout == b"works"
    done = delete(f"{name}:{odd.datastores}/0/1", env)
    assert done.status == 23
    assert "python3" in check_stderr(done, "delete")


def test_host_that_is_down(odd: Hosts, env: dict[str, str]) -> None:
    with pytest.raises(HostUnreachable, match=r"gone cannot be reached: .*refused"):
        Host("gone").run(["true"], 30)
    done = delete(f"gone:{odd.datastores}/0/1", env)
    assert done.status == 10
    assert "gone" in check_stderr(done, "delete")


def test_name_that_nobody_knows(
    hosts: Hosts, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_with(tmp_path, hosts, "Host lost\n  HostName lost.invalid\nMatch all", monkeypatch)
    with pytest.raises(HostUnreachable, match=r"lost cannot be reached: .*resolve"):
        Host("lost").run(["true"], 30)


def test_login_that_is_refused(
    hosts: Hosts, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    lines = f"Host host01\n  IdentityFile {tmp_path}/other\nHost host01\n  IdentitiesOnly yes\n"
    config_with(tmp_path, hosts, lines, monkeypatch)
    text = Path(hosts.ssh_config).read_text().replace(f"{hosts.work}/hosts/key", f"{tmp_path}/other")
    (tmp_path / "config").write_text(text)
    with pytest.raises(Forbidden, match=r"host01 does not let us in: .*denied"):
        Host("host01").run(["true"], 30)


# -- hosts that hang -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"], ids=["silent", "after its greeting"])
def test_host_that_accepts_and_never_answers(
    hosts: Hosts,
    env: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    greeting: bytes,
) -> None:
    monkeypatch.setenv("MADRIGAL_CONNECT_TIMEOUT", "0.7")
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def greet() -> None:
            kept = []
            server.settimeout(0.1)
            while not stop.is_set():
                try:
                    kept.append(server.accept()[0])
                    kept[-1].sendall(greeting)
                except OSError:
                    continue

        thread = threading.Thread(target=greet)
        thread.start()
        port = server.getsockname()[1]
        config_with(tmp_path, hosts, f"Host hung\n  Port {port}\n  HostName 127.0.0.1\nMatch all", monkeypatch)
        began = time.monotonic()
        with pytest.raises(HostUnreachable, match="hung"):
            Host("hung").run(["true"], 60)
        with pytest.raises(HostUnreachable, match="hung"):
            Host("hung").session(bulk=True).call("exists", path="/")
        assert time.monotonic() - began < 20
        stop.set()
        thread.join()


def test_host_that_is_stopped_while_connected(hosts: Hosts, near: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    near.run(["true"], 30)
    stopped = hosts.pids("host01")
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        monkeypatch.setenv("MADRIGAL_CONNECT_TIMEOUT", "1")
        began = time.monotonic()
        with pytest.raises((DeadlineExceeded, HostUnreachable), match="host01"):
            near.run(["true"], 1)
        with pytest.raises(HostUnreachable, match="host01"):
            near.session().call("exists", path="/")
        assert time.monotonic() - began < 20
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    monkeypatch.delenv("MADRIGAL_CONNECT_TIMEOUT")
    assert near.run(["echo", "back"], 30).stdout == b"back\n"


# -- host keys -------------------------------------------------------------------------------------------------


@pytest.fixture
def known(hosts: Hosts, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A known_hosts file of the test's own, with the keys of `hosts` in it, for a host01 without HostKeyAlias."""
    file = tmp_path / "known hosts"
    file.write_text(Path(f"{hosts.work}/hosts/known_hosts").read_text())
    lines = f'Host host01\n  HostKeyAlias none-such\nMatch all\n  UserKnownHostsFile "{file}"'
    config_with(tmp_path, hosts, lines, monkeypatch)
    text = (tmp_path / "config").read_text().replace("HostKeyAlias none-such", "HostKeyAlias host01")
    (tmp_path / "config").write_text(text)
    return file


def port_of(hosts: Hosts, name: str) -> str:
    lines = Path(f"{hosts.work}/hosts/{name}/ssh_config").read_text().split()
    return lines[lines.index("Port") + 1]


def refused() -> str:
    with pytest.raises(HostKeyRefused) as caught:
        Host("host01").run(["true"], 30)
    with pytest.raises(HostKeyRefused):
        Host("host01").session(bulk=True).call("exists", path="/")
    return str(caught.value)


def key_of(hosts: Hosts, name: str) -> str:
    return " ".join(Path(f"{hosts.work}/hosts/{name}/hostkey.pub").read_text().split()[:2])


def test_known_key(known: Path) -> None:
    assert Host("host01").run(["echo", "in"], 30).stdout == b"in\n"


def test_unknown_key_is_refused(known: Path) -> None:
    known.write_text("")
    assert "host01" in refused()
    assert not known.read_text(), "a key was learned"


def test_swapped_key_is_refused(known: Path, hosts: Hosts) -> None:
    known.write_text(f"host01 {key_of(hosts, 'host02')}\n")
    assert "right machine" in refused()


def test_swapped_key_ends_an_action(known: Path, hosts: Hosts, env: dict[str, str]) -> None:
    known.write_text(f"host01 {key_of(hosts, 'host02')}\n")
    env["MADRIGAL_SSH_CONFIG"] = os.environ["MADRIGAL_SSH_CONFIG"]
    done = delete(f"host01:{hosts.datastores}/0/1", env)
    assert done.status == 22
    check_stderr(done, "delete")


def test_revoked_key_is_refused(known: Path, hosts: Hosts) -> None:
    known.write_text(known.read_text() + f"@revoked * {key_of(hosts, 'host01')}\n")
    refused()


def test_hashed_names(known: Path, hosts: Hosts) -> None:
    subprocess.run(["ssh-keygen", "-qHf", known], check=True, capture_output=True)
    assert "host01" not in known.read_text()
    assert Host("host01").run(["echo", "in"], 30).stdout == b"in\n"


@pytest.mark.parametrize(
    ("names", "is_known"),
    [
        ("[127.0.0.1]:PORT", True),
        ("127.0.0.1", True),  # where there is no entry with the port
        ("[127.0.0.1]:22", False),
        ("host0?,[127.0.0.*]:PORT", True),
        ("*,![127.0.0.1]:PORT,!127.0.0.1", False),
    ],
)
def test_key_by_address_and_port(known: Path, hosts: Hosts, tmp_path: Path, names: str, is_known: bool) -> None:
    text = (tmp_path / "config").read_text().replace("HostKeyAlias host01", "HostKeyAlias [127.0.0.1]:1")
    rest = Path(hosts.ssh_config).read_text().replace("  HostKeyAlias host01\n", "")
    (tmp_path / "config").write_text(text.replace("  HostKeyAlias [127.0.0.1]:1\n", "").split("Include")[0] + rest)
    known.write_text(f"{names.replace('PORT', port_of(hosts, 'host01'))} {key_of(hosts, 'host01')}\n")
    if is_known:
        assert Host("host01").run(["echo", "in"], 30).stdout == b"in\n"
    else:
        refused()


# -- the way there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ProxyJump host02", "ProxyCommand ssh -F CONFIG -W %h:%p host02"])
def test_through_another_host(
    hosts: Hosts, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    lines = f"Host host01\n  {how.replace('CONFIG', hosts.ssh_config)}\nMatch all"
    config_with(tmp_path, hosts, lines, monkeypatch)
    before = Path(f"{hosts.work}/hosts/host02/log").read_text().count("Accepted publickey")
    assert Host("host01").run(["echo", "in"], 30).stdout == b"in\n"
    assert Path(f"{hosts.work}/hosts/host02/log").read_text().count("Accepted publickey") == before + 1


def test_key_in_the_agent(hosts: Hosts, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket_path = f"{hosts.work}/agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket_path], stdout=subprocess.DEVNULL)
    try:
        key = f"{hosts.work}/hosts/key"
        argv, told = ["ssh-add", "-q", key], {**os.environ, "SSH_AUTH_SOCK": socket_path}
        assert eventually(lambda: subprocess.run(argv, capture_output=True, env=told).returncode == 0)
        for lines in ("IdentityAgent " + socket_path, ""):
            text = Path(hosts.ssh_config).read_text().replace(f"IdentityFile {key}", f"IdentityFile {key}.pub")
            (tmp_path / "config").write_text(f"Host *\n  {lines}\n{text}")
            monkeypatch.setenv("MADRIGAL_SSH_CONFIG", str(tmp_path / "config"))
            if not lines:
                monkeypatch.setenv("SSH_AUTH_SOCK", socket_path)
            assert Host("host01").run(["echo", "in"], 30).stdout == b"in\n"
            openssh.disconnect()
    finally:
        agent.terminate()
        agent.wait()
        Path(socket_path).unlink(missing_ok=True)


def test_the_agent_stays_here(
    hosts: Hosts, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the user's configuration forwards it: whoever is root on a host could use it while an action runs."""
    socket_path = f"{hosts.work}/agent2"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket_path], stdout=subprocess.DEVNULL)
    try:
        assert eventually(lambda: os.path.exists(socket_path))
        (tmp_path / "config").write_text(f"Host *\n  ForwardAgent yes\n{Path(hosts.ssh_config).read_text()}")
        monkeypatch.setenv("SSH_AUTH_SOCK", socket_path)
        plain = subprocess.run(
            ["ssh", "-F", str(tmp_path / "config"), "host01", "echo $SSH_AUTH_SOCK"], capture_output=True, timeout=30
        )
        assert b"/agent." in plain.stdout, "as ssh itself does with this configuration"
        monkeypatch.setenv("MADRIGAL_SSH_CONFIG", str(tmp_path / "config"))
        assert Host("host01").run(["sh", "-c", "echo agent: $SSH_AUTH_SOCK"], 30).stdout == b"agent:\n"
        openssh.disconnect()
    finally:
        agent.terminate()
        agent.wait()
        Path(socket_path).unlink(missing_ok=True)


def test_set_env_of_the_users_configuration(
    hosts: Hosts, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts.add("accepting", sshd="AcceptEnv MADRIGAL_TEST")
    try:
        config_with(tmp_path, hosts, 'Host accepting\n  SetEnv MADRIGAL_TEST="a b"\nMatch all', monkeypatch)
        assert Host("accepting").run(["printenv", "MADRIGAL_TEST"], 30).stdout == b"a b\n"
    finally:
        hosts.end("accepting")


def test_unknown_transport(hosts: Hosts, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_TRANSPORT", "telnet")
    with pytest.raises(ConfigError, match="telnet"):
        Host("host01").run(["true"], 30)


# -- shared connections ----------------------------------------------------------------------------------------


def sessions_of_sshd(hosts: Hosts, name: str) -> list[int]:
    """The processes of sshd on a host that serve one connection each."""
    return hosts.pids(name)[1:]


def test_connection_that_is_killed_on_the_host(hosts: Hosts, near: Host) -> None:
    session = near.session()
    session.call("exists", path="/")
    for pid in sessions_of_sshd(hosts, "host01"):
        if os.path.exists(f"/proc/{pid}") and pid not in hosts.workers("host01"):
            with contextlib.suppress(ProcessLookupError):  # a child of one before
                os.kill(pid, signal.SIGKILL)
    with pytest.raises(HostUnreachable, match="host01"):
        session.call("exists", path="/")
    session.fail()
    with near.session() as again:
        assert again.call("exists", path="/")


def control_socket(hosts: Hosts) -> Path:
    found = sorted(Path(os.environ["MADRIGAL_RUN_DIR"]).glob("host01-*.s"))
    assert len(found) == 1
    return found[0]


def master(hosts: Hosts) -> int:
    """The process of OpenSSH that holds the shared connection to host01."""
    wanted = f"ControlPath={control_socket(hosts)}"
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if wanted in words or (words[0].startswith("ssh: ") and str(control_socket(hosts)) in words[0]):
            return int(name)
    raise AssertionError("there is no shared connection")


@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_shared_connection_that_is_killed_in_use(hosts: Hosts, cold: dict[str, str]) -> None:
    host = Host("host01")
    session = host.session()
    session.call("exists", path="/")
    os.kill(master(hosts), signal.SIGKILL)
    with pytest.raises(HostUnreachable, match="host01"):
        session.call("exists", path="/")
    session.fail()
    assert control_socket(hosts).exists()
    assert host.run(["echo", "again"], 30).stdout == b"again\n"


@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_shared_connection_that_the_network_has_lost(
    hosts: Hosts, cold: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh itself sees it after a minute; who comes before takes a new one, and so do those who come next."""
    monkeypatch.setenv("MADRIGAL_CONNECT_TIMEOUT", "2")
    host = Host("host01")
    with hosts.link("host01") as link:
        with host.session() as session:
            session.call("exists", path="/")
        link.tell("lose")
        began = time.monotonic()
        for _ in range(2):
            with host.session() as session:
                assert session.call("exists", path="/")
        assert time.monotonic() - began < 8
        assert link.count()["connections"] == 1
        link.tell("hang")  # which is no reason to try for ever
        began = time.monotonic()
        with pytest.raises(HostUnreachable, match="host01"), host.session() as session:
            session.call("exists", path="/")
        assert time.monotonic() - began < 15
        link.tell("go-on")
        with host.session() as session:
            assert session.call("exists", path="/")


@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
@pytest.mark.parametrize("kind", ["socket", "file"])
def test_stale_control_socket(hosts: Hosts, cold: dict[str, str], kind: str) -> None:
    host = Host("host01")
    host.run(["true"], 30)
    path = control_socket(hosts)
    openssh.disconnect()
    assert eventually(lambda: not path.exists())
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
    else:
        path.write_text("")
    assert host.run(["echo", "again"], 30).stdout == b"again\n"
    assert path.is_socket()


def test_many_sessions_at_once(hosts: Hosts, cold: dict[str, str]) -> None:
    """More than one connection may have (MaxSessions 10), from none on."""
    together = threading.Barrier(25)

    def use(number: int) -> bytes:
        with Host("host01").session() as session:
            together.wait(60)
            assert session.call("exists", path="/")
        return Host("host01").run(["echo", str(number)], 60).stdout

    forget()
    with concurrent.futures.ThreadPoolExecutor(25) as pool:
        assert sorted(pool.map(use, range(25))) == sorted(b"%d\n" % number for number in range(25))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_channel_of_a_connection_that_is_gone_is_closed_in_silence(
    near: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread says goodbye for paramiko; if that fails, Python would write a traceback to stderr."""

    def gone(_: object) -> None:
        raise EOFError

    channel = near.start("sleep 60")
    if os.environ["MADRIGAL_TRANSPORT"] == "paramiko":
        transport = channel._session.get_transport()  # type: ignore[attr-defined]
        monkeypatch.setattr(transport.packetizer, "send_message", gone)
    before = set(threading.enumerate())
    channel.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    forget()


def test_many_processes_at_once(hosts: Hosts, cold: dict[str, str], datastore: str) -> None:
    """Processes have no connection in common but what the transport keeps: MaxStartups 10:30:100, from none on."""

    def act(number: int) -> tuple[int, str]:
        done = delete(f"host01:{datastore}/{number}", cold)
        return done.status, check_stderr(done, "delete")

    with concurrent.futures.ThreadPoolExecutor(25) as pool:
        assert list(pool.map(act, range(25))) == [(0, "")] * 25


@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_shared_connection_holds_no_pipe_of_ours(hosts: Hosts, cold: dict[str, str], datastore: str) -> None:
    script = '"$@" 2>&1 | cat'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, f"{TREE}/tm/ssh/delete", f"host01:{datastore}/1", "1", "100"],
        env=cold,
        stdin=subprocess.PIPE,
        capture_output=True,
        timeout=60,  # less than the connection is kept
    )
    assert done.returncode == 0 and done.stdout.startswith(b"INFO: delete: "), done
    assert openssh.PERSIST > 60 and master(hosts), "there is no connection that could hold the pipe"


# -- the directory of connections ------------------------------------------------------------------------------


def refused_run_dir(path: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_RUN_DIR", str(path))
    with pytest.raises(ConfigError, match="only its owner"):
        config.run_dir()


def test_run_dir_that_others_can_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    for mode in (0o755, 0o710, 0o701, 0o770):
        (tmp_path / "run").chmod(mode)
        refused_run_dir(tmp_path / "run", monkeypatch)


def test_run_dir_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        (tmp_path / "run").mkdir(mode=0o700)
        os.chown(tmp_path / "run", 65534, 65534)
        refused_run_dir(tmp_path / "run", monkeypatch)
    else:
        refused_run_dir("/root", monkeypatch)


def test_run_dir_that_is_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to("real")
    refused_run_dir(tmp_path / "run", monkeypatch)


def test_run_dir_is_made_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_RUN_DIR", str(tmp_path / "run"))
    assert os.stat(config.run_dir()).st_mode & 0o777 == 0o700


@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_run_dir_that_is_too_long_for_a_socket(hosts: Hosts, env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / ("d" * 90)
    env["MADRIGAL_RUN_DIR"] = str(path)
    done = delete(f"host01:{hosts.datastores}/0/1", env)
    assert done.status == 20
    assert "MADRIGAL_RUN_DIR" in check_stderr(done, "delete")


def test_deadlines_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("x", "0", "-1"):
        monkeypatch.setenv("MADRIGAL_CONNECT_TIMEOUT", text)
        with pytest.raises(MadrigalError, match="MADRIGAL_CONNECT_TIMEOUT"):
            deadline.connect()
