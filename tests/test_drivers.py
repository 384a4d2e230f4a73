"""driver.toml: what may stand in it, and what is made of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import PATH, TREE

from madrigal import config, drivers
from madrigal.drivers import generate
from madrigal.embedded import FrontEnd
from madrigal.errors import ConfigError, NotFound, UsageError

ALL = drivers.load(str(TREE))


def test_generated_files_are_up_to_date() -> None:
    assert not generate.outdated(str(TREE)), "make generated"


def test_every_driver_has_a_file() -> None:
    found = {f"{kind}/{path.name}" for kind in drivers.KINDS for path in (TREE / kind).iterdir() if path.is_dir()}
    assert found == {driver.path for driver in ALL} | {"tm/common", "datastore/common"}


@pytest.mark.parametrize("driver", ALL, ids=lambda driver: driver.path)
def test_every_option_is_read_somewhere(driver: drivers.Driver) -> None:
    for option in driver.options:
        name = option.name.partition("<")[0]
        sources = [path for path in (TREE / "lib/madrigal").rglob("*.py") if path.name != "defaults.py"]
        assert any(name in path.read_text() for path in sources), f"nothing reads {option.name}"


def test_configuration_files_can_be_read_and_change_nothing(tmp_path: Path) -> None:
    for path, text in generate.configuration(ALL).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        assert config.read_shell(str(tmp_path / path)) == {}
        # without the comment signs before them they are the defaults
        (tmp_path / path).write_text(re.sub(r"^#(?=[A-Z]\w*=)", "", text, flags=re.MULTILINE))
        values = config.read_shell(str(tmp_path / path))
        assert values
        options = {option.name: option.default for driver in ALL for option in driver.options}
        assert values == {name: options[name] for name in values}


def test_lines_for_oned_conf() -> None:
    text = generate.oned_conf(ALL)
    assert len(re.findall(r"^(TM|DS)_MAD_CONF = \[$", text, re.MULTILINE)) == len(ALL)
    ssh = text[text.index('NAME = "ssh"') :]
    assert 'LN_TARGET = "SYSTEM"' in ssh and 'SHARED = "NO"' in ssh
    assert "dev,dummy,local,qcow2,shared,ssh" in text
    dev, fs = (text[text.index(f'NAME = "{name}"') :].partition("]")[0] for name in ("dev", "fs"))
    assert 'PERSISTENT_ONLY = "YES"' in dev and "MARKETPLACE_ACTIONS" not in dev
    assert 'PERSISTENT_ONLY = "NO"' in fs and 'MARKETPLACE_ACTIONS = "export"' in fs and 'REQUIRED_ATTRS = ""' in fs


def test_all_that_oned_conf_wants_of_a_transfer_driver(tree: Path) -> None:
    """And of vmm_execrc, which says whether running VMs have snapshots; the embedded front-end reads the same."""
    (tree / "tm/mine").mkdir()
    text = GOOD_TM + '[tm_mad_system.ssh]\nclone_target = "SELF"\nln_target = "NONE"\ndisk_type = "FILE"\n'
    (tree / "tm/mine/driver.toml").write_text(text)
    (driver,) = drivers.load(str(tree))
    said = generate.oned_conf([driver])
    values = dict(re.findall(r'^    (\w+) = "(.*)",?$', said, re.MULTILINE))
    of_datastores = {
        "LN_TARGET": "NONE",
        "CLONE_TARGET": "SYSTEM",
        "TM_MAD_SYSTEM": "ssh",
        "LN_TARGET_SSH": "NONE",
        "CLONE_TARGET_SSH": "SELF",
        "DISK_TYPE_SSH": "FILE",
        "DRIVER": "raw",
        "DISK_TYPE": "BLOCK",
        "ALLOW_ORPHANS": "MIXED",
    }
    moves = {"DS_MIGRATE": "YES", "DS_LIVE_MIGRATE": "NO", "DS_MIGRATE_SNAP": "YES", "PERSISTENT_SNAPSHOTS": "NO"}
    assert values == {"NAME": "mine", "SHARED": "YES", **of_datastores, **moves}
    assert '\n# LIVE_DISK_SNAPSHOTS="kvm-mine"\n' in said
    assert generate.tm_attributes(driver) == of_datastores
    with FrontEnd(str(tree / "state"), tree=str(tree)) as front_end:
        image = front_end.datastores.create("image", tm_mad="mine").template
        assert image.items() >= of_datastores.items()
        system = front_end.datastores.create("new", tm_mad="mine", type="system").template
        assert system.items() >= {"ALLOW_ORPHANS": "MIXED", "SHARED": "YES", "DS_MIGRATE": "YES"}.items()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"MIXED"', '"SOME"', "allow_orphans is 'SOME', expected one of NO, YES"),
        ('"raw"\ndisk', '"vmdk"\ndisk', "driver is 'vmdk', expected one of raw, qcow2"),
        ('"BLOCK"', '"TAPE"', "disk_type is 'TAPE'"),
        ("ds_migrate = true", "", "ds_migrate is missing"),
        ("ds_migrate = true", "migration = true", "'migration' is not known"),
        ("sudo = []", 'sudo = []\n[tm_mad_system]\nssh = "SYSTEM"', "[tm_mad_system.ssh]"),
        ("sudo = []", "sudo = []\n[tm_mad_system.ssh]", "clone_target and ln_target and disk_type is missing"),
        (
            "sudo = []",
            'sudo = []\n[tm_mad_system.ssh]\nclone_target = "X"\nln_target = "NONE"\ndisk_type = "FILE"',
            "clone_target is 'X'",
        ),
    ],
)
def test_bad_driver_toml_of_a_transfer_driver(old: str, new: str, said: str, tree: Path) -> None:
    (tree / "tm/mine").mkdir()
    text = GOOD_TM.replace(old, new)
    assert text != GOOD_TM
    (tree / "tm/mine/driver.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        drivers.load(str(tree))


def test_what_only_refuses_is_no_ability() -> None:
    dev = drivers.find(ALL, "tm/dev")
    assert "ln" in dev.actions and not {"resize", "cpds", "snap_create"} & set(dev.actions)
    for driver in ALL:
        if driver.kind == "tm":
            backups = {name for name in driver.actions if "backup" in name or name == "restore"}
            assert backups == ({"restore"} if driver.name == "dummy" else set()), driver.path


def test_sudoers_is_one_that_visudo_takes(tmp_path: Path) -> None:
    lvm = drivers.Driver("tm", "x-lvm", (), "", (), ("/sbin/lvs -o a,b --config x=1", "/sbin/lvcreate"), {}, {}, (), {})
    text = generate.sudoers([*ALL, lvm])
    assert "Cmnd_Alias MADRIGAL_TM_X_LVM = /sbin/lvs -o a\\,b --config x\\=1, /sbin/lvcreate" in text
    visudo = shutil.which("visudo", path=f"{PATH}:/usr/sbin")
    if visudo:
        (tmp_path / "sudoers").write_text(text)
        (tmp_path / "sudoers").chmod(0o440)
        done = subprocess.run([visudo, "-cf", tmp_path / "sudoers"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_find() -> None:
    assert drivers.find(ALL, "tm/ssh") == drivers.find(ALL, "ssh")
    with pytest.raises(UsageError, match="datastore/dummy and tm/dummy"):
        drivers.find(ALL, "dummy")
    with pytest.raises(NotFound, match="there is no driver 'ceph'"):
        drivers.find(ALL, "ceph")


GOOD_TM = """description = "x"
formats = []
shared = true
clone_target = "SYSTEM"
ln_target = "NONE"
allow_orphans = "MIXED"
ds_migrate = true
ds_live_migrate = false
ds_migrate_snap = true
persistent_snapshots = false
live_snapshots = true
driver = "raw"
disk_type = "BLOCK"
sudo = []
"""
GOOD = """description = "x"
formats = ["raw"]
sudo = []
[options.ONE]
type = "yes/no"
default = "yes"
help = "x"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for kind in drivers.KINDS:
        (tmp_path / kind).mkdir()
    (tmp_path / "datastore" / "mine").mkdir()
    return tmp_path


def test_driver_of_ones_own(tree: Path) -> None:
    for name, mode in (("cp", 0o755), ("README", 0o644)):
        (tree / "datastore/mine" / name).write_text("")
        (tree / "datastore/mine" / name).chmod(mode)
    (tree / "datastore/mine/driver.toml").write_text(GOOD)
    (driver,) = drivers.load(str(tree))
    assert (driver.path, driver.actions, driver.formats) == ("datastore/mine", ("cp",), ("raw",))
    assert driver.options[0].default == "yes"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("description", "descripton", "'descripton' is not known"),
        ('description = "x"\n', "", "description is missing"),
        ('"x"\nformats', "7\nformats", "description must be of the type str"),
        ("[options.ONE]", "[options.one]", "a table with a name such as"),
        ('"yes/no"', '"maybe"', "type is 'maybe', expected one of"),
        ('default = "yes"', 'default = "always"', "is not of the type yes/no"),
        ('["raw"]', "[7]", "formats is a list of texts"),
        ("sudo = []", 'sudo = ["lvs"]', "expected the absolute path"),
        ("sudo = []", "sudo = [", "is not TOML"),
        ("sudo = []", "sudo = []\npersistent_only = 'yes'", "persistent_only must be of the type bool"),
        ("sudo = []", "sudo = []\nmarketplace_actions = [7]", "marketplace_actions is a list of texts"),
        ("sudo = []", "sudo = []\nclone_target = 'SELF'", "'clone_target' is not known"),
    ],
)
def test_bad_driver_toml(old: str, new: str, said: str, tree: Path) -> None:
    text = GOOD.replace(old, new)
    assert text != GOOD
    (tree / "datastore/mine/driver.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        drivers.load(str(tree))
    assert str(tree) in str(caught.value)


def madrigal(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = ["/usr/bin/python3", "-m", "madrigal", *arguments]
    env = {**os.environ, "PYTHONPATH": str(TREE / "lib")}
    return subprocess.run(argv, capture_output=True, text=True, env=env)


def test_required_attributes_are_in_the_lines_for_oned_conf(tree: Path) -> None:
    text = GOOD.replace("sudo = []", 'sudo = []\nrequired_attributes = ["DISK_TYPE", "BRIDGE_LIST"]')
    (tree / "datastore/mine/driver.toml").write_text(text)
    assert 'REQUIRED_ATTRS = "DISK_TYPE,BRIDGE_LIST"' in generate.oned_conf(drivers.load(str(tree)))


def test_command() -> None:
    assert madrigal("driver", "oned-conf", "tm/ssh").stdout == generate.oned_conf([drivers.find(ALL, "tm/ssh")])
    assert madrigal("driver", "sudoers").stdout == generate.sudoers(ALL)
    shown = madrigal("driver", "show", "ssh").stdout
    assert re.search(r"^clone_target +SYSTEM$", shown, re.MULTILINE)
    failed = madrigal("driver", "show", "dummy")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "madrigal: 'dummy' is datastore/dummy and tm/dummy: say which\n"


def test_defaults_must_agree(tree: Path) -> None:
    """Actions know them by kind, because a driver may have another name in a front-end's tree."""
    (tree / "datastore/other").mkdir()
    for name, default in (("mine", "yes"), ("other", "no")):
        (tree / "datastore" / name / "driver.toml").write_text(GOOD.replace('"yes"\nhelp', f'"{default}"\nhelp'))
    with pytest.raises(ConfigError, match=r"^ONE: `default` must be the same"):
        drivers.load(str(tree))
