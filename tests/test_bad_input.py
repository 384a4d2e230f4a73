"""Bad input, as a table: a row for every action and argument, and a missing row fails.

Each value must give one clear sentence and the right status, and leave nothing behind.
"""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import PATH, check_stderr, run_action
from dumps import dump, system_dump, vm_document

from madrigal import backup, datastore, tm

LONG = "x" * 300

# What an argument of a transfer driver must not be.  The 3.4 form and today's have the same rows.
HOST_PATH = ["", "nothing", "/no/host", ":/x/0/17", "-oProxyCommand=id:/x/0/17", "a b:/x/0/17", "h;id:/x/0/17"]
HOST_PATH += ["fe:", "fe:/", "fe:relative/0/17", "fe:/x/../0/17", "fe:/x/0/..", "$(id):/x/0/17", "fe\n:/x/0/17"]
DISK = [*(f"{value}/disk.0" for value in HOST_PATH), "fe:/x/0/17", "fe:/x/0/17/disk.", "fe:/x/0/17/disk.1x"]
DISK += ["fe:/x/0/17/disk.-1", "fe:/x/0/17/disk.0.snap", "fe:/x/0/17/deployment.0"]
VM_DIR = [*HOST_PATH, "fe:/x", "fe:/x/0/vm", "fe:/x/0/17x", "fe:/x/0/-17", "fe:/etc"]
NUMBER = ["", "x", "-5", "1.5", "1e3", "0x10", "1 ", "--help", "1;id", LONG]
DISK += ["fe:/disk.0", "fe:/x/disk.0"]
IMAGE = ["", "relative", "fe:relative", "fe:/", "/x/../y", "fe:/x/../y"]

HOSTS = ["", "-oProxyCommand=id", "a b", "h;id", "$(id)", "fe\n", "fe:/x", "/x"]

TM = {
    "image": IMAGE,
    "disk": DISK,
    "source": VM_DIR,
    "target": VM_DIR,
    "size": [*NUMBER, "0"],
    "format": ["", "nosuchfs", "ext4; id", "$(id)", "../ext4", "-F", LONG],
    "snapshot": ["", "x", "-2", "1.5"],
    "files": [
        "",
        "/no/such/file",
        "/no/such:name",
        "relative",
        "/proc/self/mem:a/b",
        "http://127.0.0.1:1/x",
        "ftp://x/y",
    ],
    "vmid": NUMBER,
    "dsid": NUMBER,
    "origin": HOSTS,
    "host": HOSTS,
    "dir": ["", "relative/0/17", "/x/../0/17", "/x/0/..", "/x/0/18", "/x/0/17x", "/x/vm/17", "/17", "/x/0/17/disk.0"],
}
GOOD = {
    "image": "fe:/no/such/image",
    "disk": "fe:{base}/0/17/disk.0",
    "source": "fe:{base}/0/17",
    "target": "fe:{base}/0/17",
    "size": "1",
    "format": "raw",
    "snapshot": "-1",
    "files": "/etc/hostname",
    "origin": "fe",
    "host": "fe",
    "dir": "{base}/0/17",
}

# What an argument of a backup action must not be, by its place in what the usage line shows.  DEPLOY_ID is anything.
OF_A_VM = [*VM_DIR, "fe:/x/0/17/disk.0", "fe:/x/0/18"]
BACKUPS = {
    **dict.fromkeys(
        (action for action in backup.ACTIONS if action != "restore"),
        (OF_A_VM, ["", "x", "0:", ":0", "0::1", "-1", "0,1", "0;id", "$(id)", "0\n"], [], NUMBER, NUMBER, NUMBER),
    ),
    "restore": (OF_A_VM, NUMBER, NUMBER, ["", "x", "-2", "1.5"], ["", "x", "-2", "all"]),
}

# What an element of a dump must not be: (path, value), by action; "dump" and "id" are the arguments themselves.
DUMPS = {
    "empty": b"",
    "not base64": b"<DS_DRIVER_ACTION_DATA/>",
    "cut off": b"PERTX0RSSVZFUl9BQ1RJT05fREFUQT4",
    "not XML": base64.b64encode(b"x" * 100),
    "half a document": base64.b64encode(b"<DS_DRIVER_ACTION_DATA><IMAGE>"),
    "another document": base64.b64encode(b"<VM><ID>1</ID></VM>"),
    "no datastore": base64.b64encode(b"<DS_DRIVER_ACTION_DATA></DS_DRIVER_ACTION_DATA>"),
    "an entity": base64.b64encode(
        b'<!DOCTYPE DS_DRIVER_ACTION_DATA [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        b"<DS_DRIVER_ACTION_DATA><IMAGE><PATH>&x;</PATH></IMAGE></DS_DRIVER_ACTION_DATA>"
    ),
    "many entities": base64.b64encode(
        b'<!DOCTYPE DS_DRIVER_ACTION_DATA [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
        b"<DS_DRIVER_ACTION_DATA><IMAGE><PATH>&b;</PATH></IMAGE></DS_DRIVER_ACTION_DATA>"
    ),
    "bytes": base64.b64encode(bytes(range(256))),
    "deep": base64.b64encode(b"<a>" * 5000),
}
IDS = ["", "x", "-1", "1.5", "1 2", "--help", "1;id", "½", LONG]
PATHS = [
    "",
    "relative",
    "/no/such/file",
    "/etc/../etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
    "gopher://x/y",
    "http://",
]
PATHS += ["http://127.0.0.1:1/x", "http://a b/c", "file://host/x", "json:{}", "/", "/tmp/a b/$(id)/'x';*", "-rf"]
BASE_PATHS = ["", "relative", "/", "/x/../y", ".."]
SIZES = ["", "0", "-1", "x", "1.5", "9" * 30]
REGTIMES = [None, "x", "1.5"]
DIGESTS = ["x", "0" * 31, "0" * 33, "g" * 32, "; id"]
HOSTS = ["-oProxyCommand=id", "a;id", "$(id)", "a/b", "host1 a'b"]
SNAPS = ("snap_delete", "snap_revert", "snap_flatten")
DS: dict[tuple[str, str], Sequence[object]] = {
    ("cp", "IMAGE/PATH"): PATHS,
    ("cp", "IMAGE/REGTIME"): REGTIMES,
    ("cp", "BASE_PATH"): BASE_PATHS,
    ("cp", "MD5"): DIGESTS,
    ("cp", "SHA1"): DIGESTS,
    ("cp", "SHA256"): DIGESTS,
    ("mkfs", "IMAGE/SIZE"): SIZES,
    ("mkfs", "IMAGE/FORMAT"): ["", "dmg", "raw;id"],
    ("mkfs", "IMAGE/FS"): ["nosuchfs", "ext4 -L x", "$(id)", "../ext4"],
    ("mkfs", "IMAGE/REGTIME"): REGTIMES,
    ("mkfs", "BASE_PATH"): BASE_PATHS,
    ("rm", "IMAGE/SOURCE"): [
        "",
        "relative",
        "/etc/passwd",
        "{base}",
        "{base}/..",
        "{base}/sub/x",
        "{base}/../x",
        "-rf",
    ],
    ("rm", "BASE_PATH"): BASE_PATHS,
    ("clone", "IMAGE/PATH"): ["", "/no/such/image", "relative"],
    ("clone", "IMAGE/FORMAT"): ["", "raw disk", "9" * 300],
    ("clone", "IMAGE/REGTIME"): REGTIMES,
    ("clone", "BASE_PATH"): BASE_PATHS,
    ("stat", "IMAGE/PATH"): PATHS,
    ("monitor", "BASE_PATH"): BASE_PATHS,
    ("export", "IMAGE/SOURCE"): ["", "relative", "/etc/passwd", "{base}", "{base}/../x", "{base}/missing"],
    ("export", "IMAGE/SIZE"): SIZES,
    ("export", "BASE_PATH"): BASE_PATHS,
    **{(action, "BRIDGE_LIST"): HOSTS for action in ("cp", "mkfs", "rm", "clone", "monitor", "export")},
    ("cp", "LIMIT_TRANSFER_BW"): ["x", "10MB", "-1", "0", "1M;id"],
    ("stat", "LIMIT_TRANSFER_BW"): ["x", "0"],
    ("cp", "STAGING_DIR"): ["relative", "/x/../y"],
    ("cp", "SPARSE"): ["maybe"],
    ("mkfs", "SPARSE"): ["maybe"],
    ("clone", "SPARSE"): ["maybe"],
    ("clone", "STAGING_DIR"): ["relative"],
    **{(action, "NFS_AUTO_ENABLE"): ["maybe"] for action in ("cp", "mkfs", "rm", "clone", "monitor", "export")},
    **{
        (action, "IMAGE/SOURCE"): ["", "relative", "/etc/passwd", "{base}/..", "{base}/sub/x", "-rf"]
        for action in SNAPS
    },
    **{(action, "IMAGE/TARGET_SNAPSHOT"): ["", "x", "-2", "1.5", "../1", "0;id"] for action in SNAPS},
    ("snap_revert", "IMAGE/FORMAT"): ["", "iso"],
    ("snap_delete", "BASE_PATH"): BASE_PATHS,
}
OF_THE_DATASTORE = ("BRIDGE_LIST", "LIMIT_TRANSFER_BW", "STAGING_DIR", "SPARSE", "NFS_AUTO_ENABLE")
OTHERS = {"restore"}
"""What only datastore/dummy has."""
OTHER_DRIVER = pytest.param("shared", marks=pytest.mark.long)
"""It shares with the first how arguments are read."""
STATUSES = {2, 10, 13, 20, 21, 24, 30, 40, 41}


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir(mode=0o700)
    run = tempfile.mkdtemp(prefix="m", dir="/tmp")  # short: names of sockets are limited
    yield {
        "PATH": PATH,
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "ONE_LOCATION": str(tmp_path),
        "MADRIGAL_RUN_DIR": run,
        "MADRIGAL_FRONTEND": "fe",  # this machine: no ssh is needed to be refused
        "MADRIGAL_CONNECT_TIMEOUT": "3",
    }
    shutil.rmtree(run)


def refused(action: str, argv: list[str], env: dict[str, str], input: bytes = b"") -> str:
    """Run ACTION and assert that it says no in one sentence; returns that."""
    (Path(env["ONE_LOCATION"]) / "var").mkdir(exist_ok=True)
    before = everything(env)
    done = run_action(action, *argv, env=env, input=input)
    shown = (action, argv, done)
    assert done.status in STATUSES, shown
    message = check_stderr(done, action, marks="ERROR MESSAGE" in done.stderr)
    assert 10 < len(message) < 900, shown
    assert "bug in this driver" not in message, shown
    assert everything(env) == before, shown
    return message


def everything(env: dict[str, str]) -> list[str]:
    """All that is below the action's directories."""
    return sorted(str(path) for path in Path(env["ONE_LOCATION"]).rglob("*"))


def tm_cases() -> list[tuple[str, str, str, str]]:
    """(form, action, argument, value) of every row."""
    cases = []
    for action, (words, (_, most)) in tm.ACTIONS.items():
        for form in ["current", *(["3.4"] if most > 0 else [])]:
            arguments = words.split() + (["vmid", "dsid"] if form == "current" else [])
            cases += [(form, action, argument, value) for argument in arguments for value in TM[argument]]
    return cases


def test_every_argument_has_a_row() -> None:
    assert {argument for _, _, argument, _ in tm_cases()} == set(TM)
    for action, (words, _) in tm.ACTIONS.items():
        assert set(words.split()) <= set(TM), action
    assert {action for action, _ in DS} | OTHERS == set(datastore.ACTIONS)


@pytest.mark.parametrize("driver", ["ssh", OTHER_DRIVER])
@pytest.mark.parametrize("action", tm.ACTIONS)
def test_arguments_of_transfer_drivers(action: str, driver: str, env: dict[str, str], tmp_path: Path) -> None:
    base = tmp_path / "datastores"
    for form, name, argument, value in tm_cases():
        if name != action or (action == "context" and argument in ("vmid", "dsid")):
            continue  # of context, what does not end in two numbers is 3.4's: see below
        words = tm.ACTIONS[action][0].split()
        argv = [value if word == argument else GOOD[word].format(base=base) for word in words]
        if form == "current":
            argv += [value if argument == "vmid" else "17", value if argument == "dsid" else "0"]
        refused(f"tm/{driver}/{action}", argv, env, base64.b64encode(vm_document(17, {})))


@pytest.mark.parametrize("action", tm.MIGRATIONS)
def test_callers_and_vms_of_migrations(action: str, env: dict[str, str], tmp_path: Path) -> None:
    argv = ["fe", "fe", f"{tmp_path}/datastores/0/17", "17", "0"]
    good = base64.b64encode(vm_document(17, {0: {"TM_MAD": "ssh"}}))
    others = [base64.b64encode(vm_document(18, {})), base64.b64encode(b"<VM><ID>x</ID></VM>")]
    dtd = base64.b64encode(b'<!DOCTYPE VM [<!ENTITY x SYSTEM "file:///etc/passwd">]><VM><ID>17</ID></VM>')
    dumps = [bad for what, bad in DUMPS.items() if what not in ("another document",)]
    for driver in ("ssh", "dev"):
        for caller in ("", "../x", "a/b", "-x", "x;id", " ", LONG + "/"):
            refused(f"tm/{driver}/{action}", [*argv, caller], env, good)
        for bad in (*dumps, *others, dtd, vm_document(17, {})):
            refused(f"tm/{driver}/{action}", argv, env, bad)


@pytest.mark.parametrize("action", backup.ACTIONS)
def test_arguments_of_backups(action: str, env: dict[str, str]) -> None:
    drivers = ("ssh", "dummy") if action == "restore" else ("ssh",)
    good = ["fe:/x/0/17", "17", "3", "-1", "0"] if action == "restore" else ["fe:/x/0/17", "0:1", "one", "-", "17", "0"]
    told = b"" if action == "restore" else vm_document(17, {})
    shown = backup.ACTIONS[action].partition(" <")[0].split()
    assert len(BACKUPS[action]) == len(good) == len(shown), "a row for every argument"
    for driver in drivers:
        for number, values in enumerate(BACKUPS[action]):
            for value in values:
                bad = [*good[:number], value, *good[number + 1 :]]
                assert "backups are not supported" not in refused(f"tm/{driver}/{action}", bad, env, told), bad
        for wrong in range(9):
            if wrong not in (len(good), 5):
                assert f"usage: {action} HOST:DIR" in refused(f"tm/{driver}/{action}", ["x"] * wrong, env, told)


@pytest.mark.parametrize("action", [action for action in backup.ACTIONS if action != "restore"])
def test_vms_of_backups(action: str, env: dict[str, str]) -> None:
    good = vm_document(17, {0: {}})
    dtd = b'<!DOCTYPE VM [<!ENTITY x SYSTEM "file:///etc/passwd">]><VM><ID>17</ID></VM>'
    others = [vm_document(18, {}), b"<VM><ID>x</ID></VM>", b"<a/>"]
    for bad in (b"", b"x", good[:40], base64.b64encode(good), dtd, *others):
        message = refused(f"tm/ssh/{action}", ["fe:/x/0/17", "0", "one", "-", "17", "0"], env, bad)
        assert "backups are not supported" not in message


@pytest.mark.parametrize("action", ["clone", "ln", "mv", "mvds", "cpds"])
def test_arguments_of_what_is_not_the_same_everywhere(action: str, env: dict[str, str], tmp_path: Path) -> None:
    """The variants for a system datastore of another driver, and disks that can have snapshots on hosts' storage."""
    words = tm.ACTIONS[action][0].split()
    good = [GOOD[word].format(base=tmp_path / "datastores") for word in words]
    for number, word in enumerate(words):
        for value in TM[word][:6]:
            argv = [*good[:number], value, *good[number + 1 :], "17", "0"]
            for executable in (f"tm/qcow2/{action}.ssh", f"tm/local/{action}"):
                refused(executable, argv, env)
    assert "(3.4)" not in refused(f"tm/shared/{action}.ssh", ["x"], env)


def test_context_without_two_numbers_is_34s(env: dict[str, str], tmp_path: Path) -> None:
    disk = f"fe:{tmp_path}/0/17/disk.0"
    for bad in NUMBER:
        message = refused("tm/ssh/context", ["/etc/hostname", disk, bad, "0"], env)
        assert "is not HOST:PATH" in message
        refused("tm/ssh/context", ["/etc/hostname", disk, "17", bad], env)


@pytest.mark.parametrize("action", tm.ACTIONS)
def test_any_other_number_of_arguments_is_a_usage_error(action: str, env: dict[str, str]) -> None:
    words, (fewest, most) = tm.ACTIONS[action]
    if action == "context":
        wrong = [0, 1]
    else:
        right = {len(words.split()) + 2, *range(fewest, most + 1), 6 if action in tm.MIGRATIONS else 0} - {0}
        wrong = [number for number in range(9) if number not in right]
    for driver in ("ssh", "shared", "dummy"):
        for number in wrong:
            message = refused(f"tm/{driver}/{action}", ["x"] * number, env)
            assert f"usage: {action}" in message


@pytest.mark.parametrize("action", datastore.ACTIONS)
@pytest.mark.parametrize("driver", ["fs", *(pytest.param(name, marks=pytest.mark.long) for name in ("dev", "dummy"))])
def test_arguments_of_datastore_drivers(action: str, driver: str, env: dict[str, str], tmp_path: Path) -> None:
    name, good = f"datastore/{driver}/{action}", dump(tmp_path / "base", {"PATH": "/no/such/file"})
    if not os.path.exists(Path(__file__).parent.parent / name):
        assert action in OTHERS and driver != "dummy"
        return
    for wrong in (["1"] * 3, ["1"] * 4, []):
        message = refused(name, wrong, env, good)
        assert f"usage: {action}" in message
    for id in IDS:
        if id != "--help":
            refused(name, [id], env, good)
        refused(name, [good.decode(), id], env)
    for what, bad in DUMPS.items():
        if (what == "no datastore" and driver in ("dummy", "dev")) or (what == "deep" and not bad):
            continue  # it looks at nothing
        message = refused(name, ["42"], env, bad)
        assert "passwd" not in message or "document type" in message
        refused(name, [bad.decode(), "42"], env)


@pytest.mark.parametrize("driver", ["shared", "dummy"])
def test_arguments_of_monitoring_a_system_datastore(driver: str, env: dict[str, str], tmp_path: Path) -> None:
    name, good = f"tm/{driver}/monitor", system_dump(tmp_path / "datastores")
    for wrong in ([], ["1"] * 3):
        assert "usage: monitor" in refused(name, wrong, env, good)
    for id in IDS:
        if id != "--help":
            refused(name, [id], env, good)
    for what, bad in DUMPS.items():
        if what != "no datastore" or driver != "dummy":  # it looks at nothing
            refused(name, ["0"], env, bad)
    assert "3.6" in refused(name, [good.decode(), "0"], env)
    for place in BASE_PATHS[1:] if driver == "shared" else []:
        assert "DATASTORE_LOCATION" in refused(name, ["0"], env, system_dump(place))


@pytest.mark.parametrize(("action", "element"), DS)
def test_elements_of_dumps(action: str, element: str, env: dict[str, str], tmp_path: Path) -> None:
    base = tmp_path / "var" / "datastores" / "1"
    good: dict[str, object] = {
        "PATH": "/etc/hostname",
        "FORMAT": "raw",
        "SIZE": 1,
        "SOURCE": f"{base}/x",
        "TARGET_SNAPSHOT": 0,
    }
    for value in DS[action, element]:
        shown = value.format(base=base) if isinstance(value, str) and "{base}" in value else value
        image, where = dict(good), str(base)
        attributes: dict[str, object] = {}
        template: dict[str, object] = {}
        if element == "BASE_PATH":
            where = str(shown)
        elif element.startswith("IMAGE/"):
            image[element.removeprefix("IMAGE/")] = shown
        else:
            (template if element in OF_THE_DATASTORE else attributes)[element] = shown
        message = refused(f"datastore/fs/{action}", ["42"], env, dump(where, image, attributes, template))
        if not shown or element in ("IMAGE/REGTIME", "BASE_PATH", "MD5", "SHA1", "SHA256", *OF_THE_DATASTORE):
            assert element.rpartition("/")[2] in message, message


@pytest.mark.parametrize("action", ["cp", "mkfs", "rm", "clone", "stat", "monitor"])
def test_a_dump_of_a_front_end_between_the_forms_is_named(action: str, env: dict[str, str], tmp_path: Path) -> None:
    between = dump(tmp_path / "base", {"FORMAT": "raw", "PATH": "/x"}).decode()
    for driver in ("fs", "dummy"):
        message = refused(f"datastore/{driver}/{action}", [between, "42"], env)
        assert "3.6" in message and "not supported" in message


def test_the_form_can_be_forced_but_not_bent(env: dict[str, str], tmp_path: Path) -> None:
    disk = f"fe:{tmp_path}/0/17/disk.0"
    for contract, argv in (("3.4", ["1", disk, "17", "0"]), ("current", ["1", disk]), ("4.0", ["1", disk])):
        refused("tm/ssh/mkswap", argv, {**env, "MADRIGAL_CONTRACT": contract})
    good = dump(tmp_path / "base", {"PATH": "/no/such/file"})
    for contract, argv in (("3.4", ["42"]), ("current", [good.decode(), "42"]), ("4.0", ["42"])):
        refused("datastore/fs/cp", argv, {**env, "MADRIGAL_CONTRACT": contract}, good)


def test_variables_are_named_when_they_make_no_sense(env: dict[str, str], tmp_path: Path) -> None:
    disk = f"host1:{tmp_path}/0/17/disk.0"
    for name in ("MADRIGAL_STALL_TIMEOUT", "MADRIGAL_LOCK_TIMEOUT", "MADRIGAL_CONNECT_TIMEOUT"):
        for value in ("x", "-1", "0", "nan", "inf"):
            assert name in refused("tm/ssh/mkswap", ["1", disk], {**env, name: value})
    asked = {"ONE_XMLRPC": "http://127.0.0.1:1/", "ONE_AUTH": f"{tmp_path}/one_auth", "MADRIGAL_CONTROL_TIMEOUT": "x"}
    (tmp_path / "one_auth").write_text("a:b")
    argv = ["fe:/x/y", disk, "17", "0"]
    assert "MADRIGAL_CONTROL_TIMEOUT" in refused("tm/ssh/clone", argv, {**env, **asked})
    del asked["MADRIGAL_CONTROL_TIMEOUT"]
    for value in ("ftp://x/", "http://", "http://user@host/", "http://127.0.0.1:x/", "http://127.0.0.1:99999/"):
        assert value in refused("tm/ssh/clone", argv, {**env, **asked, "ONE_XMLRPC": value})
    for name, value in (("MADRIGAL_TRANSPORT", "telnet"), ("MADRIGAL_RUN_DIR", "/proc/nothing")):
        message = refused("tm/ssh/mkswap", ["1", disk], {**env, name: value})
        assert name in message or value in message


def test_configuration_files_are_named_with_their_line(env: dict[str, str], tmp_path: Path) -> None:
    conf = tmp_path / "var" / "remotes" / "etc" / "datastore" / "datastore.conf"
    conf.parent.mkdir(parents=True)
    for line in ("SUPPORTED_FS=$(id)", "id", "SUPPORTED_FS=ext4; id", "SUPPORTED_FS='ext4", "=x"):
        conf.write_text(f"# a comment\n{line}\n")
        image = {"FORMAT": "raw", "FS": "ext4", "SIZE": 1, "PATH": ""}
        message = refused("datastore/fs/mkfs", ["42"], env, dump(tmp_path / "base", image))
        assert f"{conf}, line 2" in message or "SUPPORTED_FS" in message


def test_help_is_for_everybody_and_does_nothing(env: dict[str, str]) -> None:
    (Path(env["ONE_LOCATION"]) / "var").mkdir()
    tree = Path(__file__).resolve().parent.parent
    for path in sorted([*tree.glob("tm/*/*"), *tree.glob("datastore/*/*")]):
        if path.parent.name == "common" or path.suffix or not os.access(path, os.X_OK):
            continue
        done = run_action(str(path.relative_to(tree)), "--help", env=env)
        assert (done.status, done.stderr) == (0, ""), path
        assert f"usage: {path.name} " in done.stdout, path
        assert "exit status" in done.stdout, path
