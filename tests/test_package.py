"""Where drivers may lie: in a checkout, linked or copied into a front-end's remotes tree, and installed from the wheel.

Each is run as a front-end does: with no PYTHONPATH, from another directory, in a bare environment.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TREE
from dumps import dump


def environment(work: Path, **more: str) -> dict[str, str]:
    (work / "one/var").mkdir(parents=True, exist_ok=True)
    return {"PATH": "/usr/bin:/bin", "ONE_LOCATION": str(work / "one"), "MADRIGAL_FRONTEND": "fe", "LANG": "C", **more}


def works(remotes: Path, work: Path, **more: str) -> None:
    """A datastore and a tm action of the tree REMOTES do their work, one of them a link into tm/common."""
    env = environment(work, **more)
    disk = work / "ds" / "0" / "7" / "disk.0"
    (work / "ds").mkdir()
    (work / "image").write_bytes(b"image" * 1000)
    for argv in (
        ["tm/ssh/clone", f"fe:{work}/image", f"fe:{disk}"],
        ["tm/ssh/delete", f"fe:{disk.parent}"],
        ["datastore/fs/stat", "--help"],
    ):
        done = subprocess.run(
            [f"{remotes}/{argv[0]}", *argv[1:]], capture_output=True, text=True, env=env, cwd=f"{work}/one/var"
        )
        assert done.returncode == 0, (argv[0], done.stderr)
        if argv[0] == "tm/ssh/clone":
            assert disk.read_bytes() == b"image" * 1000
    assert not (work / "ds" / "0" / "7").exists()


def test_checkout(tmp_path: Path) -> None:
    works(TREE, tmp_path)


def test_link_to_the_tree_of_remotes(tmp_path: Path) -> None:
    (tmp_path / "remotes").symlink_to(TREE / "remotes")
    works(tmp_path / "remotes", tmp_path)


def test_drivers_linked_one_by_one(tmp_path: Path) -> None:
    """As docs/installation.md says, beside drivers of another origin."""
    for name in ("tm/ssh", "datastore/fs"):
        (tmp_path / "remotes" / name).parent.mkdir(parents=True)
        (tmp_path / "remotes" / name).symlink_to(TREE / name)
    works(tmp_path / "remotes", tmp_path)


def test_executables_linked_one_by_one(tmp_path: Path) -> None:
    for name in ("tm/ssh", "datastore/fs"):
        (tmp_path / "remotes" / name).mkdir(parents=True)
        for action in (TREE / name).iterdir():
            (tmp_path / "remotes" / name / action.name).symlink_to(action)
    works(tmp_path / "remotes", tmp_path)


def test_drivers_copied(tmp_path: Path) -> None:
    remotes = tmp_path / "remotes"
    for name in ("tm/ssh", "datastore/fs", "lib"):
        (remotes / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-rL", TREE / name, remotes / name], check=True)
    works(remotes, tmp_path)


def test_tree_of_remotes_copied(tmp_path: Path) -> None:
    subprocess.run(["cp", "-rL", TREE / "remotes", tmp_path / "remotes"], check=True)
    assert (tmp_path / "remotes/etc/datastore/fs/fs.conf").is_file()
    works(tmp_path / "remotes", tmp_path)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is in this checkout, so that nothing is built in it."""
    copy = tmp_path_factory.mktemp("checkout") / "madrigal"
    ignored = shutil.ignore_patterns(".git", ".venv", "*cache*", "build", "dist", "*.egg-info")
    shutil.copytree(TREE, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """PREFIX of a virtual environment with the wheel, built and installed by pip without the network."""
    prefix = tmp_path_factory.mktemp("venv") / "venv"
    # with pip and setuptools of this machine, and its lxml and click
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--system-site-packages", prefix], check=True)
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(
        [prefix / "bin/python", "-m", "pip", "install", *options, "."], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    yield prefix


def test_wheel(installed: Path, tmp_path: Path) -> None:
    works(installed / "share/madrigal", tmp_path)


def test_wheel_linked(installed: Path, tmp_path: Path) -> None:
    for name in ("tm/ssh", "datastore/fs"):
        (tmp_path / "remotes" / name).parent.mkdir(parents=True)
        (tmp_path / "remotes" / name).symlink_to(installed / "share/madrigal" / name)
    works(tmp_path / "remotes", tmp_path)


def test_wheel_has_everything(installed: Path) -> None:
    """Every driver with its run bits, the shell library and the defaults, as they are here."""
    share = installed / "share/madrigal"
    for part in ("tm", "datastore", "remotes/etc"):
        for path in (TREE / part).rglob("*"):
            if path.is_file():
                there = share / path.relative_to(TREE)
                assert there.is_file(), f"setup.cfg does not list {path.relative_to(TREE)}"
                assert there.read_bytes() == path.read_bytes()
                assert os.access(there, os.X_OK) == os.access(path, os.X_OK)
    assert (share / "scripts_common.sh").read_bytes() == (TREE / "scripts_common.sh").read_bytes()
    (packages,) = installed.glob("lib/python3*/site-packages/madrigal")
    modules = {path.relative_to(TREE / "lib/madrigal") for path in (TREE / "lib/madrigal").rglob("*.py")}
    assert modules == {path.relative_to(packages) for path in packages.rglob("*.py")}
    for name in ("hosts-up", "hosts-down", "link"):  # for madrigal check
        assert os.access(packages / "conformance/rig" / name, os.X_OK)


def test_wheel_has_the_command(installed: Path, tmp_path: Path) -> None:
    argv = [str(installed / "bin/madrigal"), "--state", str(tmp_path / "state"), "driver", "list"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "tm/ssh" in done.stdout


def test_drivers_that_stay_when_the_package_goes(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(installed / "share", tmp_path / "share")
    done = subprocess.run(
        [tmp_path / "share/madrigal/tm/ssh/delete", "fe:/x/0/7"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert (done.returncode, done.stdout) == (20, "")
    assert done.stderr == f"these drivers belong to a package that is not installed in {tmp_path} any more\n"


def test_requirements_are_debian_s() -> None:
    """What pip would ask for is there in Debian 12's own packages, so that these alone are enough."""
    setup = configparser.ConfigParser()
    setup.read(TREE / "setup.cfg")
    required = setup["options"]["install_requires"].split("\n")[1:]
    assert required == ["lxml >= 4.9", "click >= 8.1"]


# -- the interpreter -------------------------------------------------------------------------------------------


def bare(work: Path) -> str:
    """A PATH whose python3 sees no package of the distribution, as with an administrator's virtual environment."""
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", work / "bare"], check=True)
    assert subprocess.run([work / "bare/bin/python3", "-c", "import lxml"], capture_output=True).returncode
    return f"{work}/bare/bin:/usr/bin:/bin"


def old_pythons() -> list[str]:
    """Pythons of before 3.11 on this machine, if any."""
    names = [f"/usr/bin/python3.{minor}" for minor in range(6, 11)]
    names += [str(path) for path in Path.home().glob(".pyenv/versions/3.*/bin/python3")]
    old = "import sys; sys.exit(not (3, 6) <= sys.version_info < (3, 11))"
    return [name for name in names if os.path.exists(name) and not subprocess.run([name, "-c", old]).returncode]


def test_python_without_any_package(tmp_path: Path) -> None:
    """Actions need the standard library alone."""
    works(TREE, tmp_path, PATH=bare(tmp_path))


def test_python_that_is_too_old_finds_another(tmp_path: Path) -> None:
    """Really run by the old ones that this machine has."""
    for number, python in enumerate(old_pythons()):
        work = tmp_path / str(number)
        (work / "bin").mkdir(parents=True)
        (work / "bin/python3").symlink_to(python)
        works(TREE, work, PATH=f"{work}/bin:/usr/bin:/bin")


def test_all_pythons_are_too_old(tmp_path: Path) -> None:
    """A copy of the library that asks for more than there is."""
    subprocess.run(["cp", "-rL", TREE / "remotes", tmp_path / "remotes"], check=True)
    package = tmp_path / "remotes/lib/madrigal/__init__.py"
    package.write_text(package.read_text().replace("sys.version_info < (3, 11)", "sys.version_info < (3, 99)"))
    argv = [str(tmp_path / "remotes/tm/ssh/delete"), "fe:/x/0/7"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(tmp_path))
    assert (done.returncode, done.stdout) == (23, "")
    assert done.stderr == "this driver needs Python 3.11 or newer: install it, or name one in MADRIGAL_PYTHON\n"


def test_options_of_a_driver_under_another_name(tmp_path: Path) -> None:
    """Its defaults stay; its file is that of its name here."""
    (tmp_path / "remotes/datastore").mkdir(parents=True)
    (tmp_path / "remotes/lib").symlink_to(TREE / "lib")
    shutil.copytree(TREE / "datastore/fs", tmp_path / "remotes/datastore/renamed")
    (tmp_path / "remotes/datastore/linked").symlink_to(TREE / "datastore/fs")
    (tmp_path / "one/var/remotes/etc/datastore/linked").mkdir(parents=True)
    (tmp_path / "one/var/remotes/etc/datastore/linked/linked.conf").write_text("DRIVER=qcow2\n")
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    (tmp_path / "ds").mkdir()
    for name, format in (("renamed", "raw"), ("linked", "qcow2")):
        image = {"ID": 7, "PATH": tmp_path / "image", "FORMAT": "", "REGTIME": len(name)}
        encoded = dump(tmp_path / "ds", image, {"SAFE_DIRS": "/"})
        argv = [str(tmp_path / "remotes/datastore" / name / "cp"), "7"]
        done = subprocess.run(argv, input=encoded, capture_output=True, env=environment(tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().split()[1] == format
