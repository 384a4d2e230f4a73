"""What the pages say: links lead somewhere, sections that are cited exist, examples run, lists are complete."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import PATH, TREE

from madrigal.host import ssh_config

PAGES = [TREE / "README.md", TREE / "CHANGELOG.md", *sorted((TREE / "docs").glob("*.md"))]
NASTY = "a b/$(id)/'x';*"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for name, section in re.findall(r'\[([\w.-]+\.md)\]\([^)]*\),\s"([^"]+)"', text):
        heading = "# " + " ".join(section.split()) + "\n"
        assert heading in (TREE / "docs" / name).read_text(), section


def test_sections_that_the_code_cites() -> None:
    contract = (TREE / "docs/contract.md").read_text()
    cited = set()
    sources = [*(TREE / "lib").rglob("*.py"), *(TREE / "tests").glob("*.py"), TREE / "scripts_common.sh"]
    for path in sources:
        for rest in re.findall(r"docs/contract\.md((?:,? (?:and )?\"[^\"\n]+\")+)", path.read_text()):
            cited.update(re.findall(r'"([^"]+)"', rest))
    assert len(cited) > 5
    for section in cited:
        assert f"\n## {section}\n" in contract, section


def test_every_module_is_in_the_architecture() -> None:
    text = (TREE / "docs/architecture.md").read_text()
    for path in (TREE / "lib/madrigal").rglob("*.py"):
        name = str(path.relative_to(TREE / "lib/madrigal").with_suffix("")).removesuffix("/__init__")
        assert name == "__init__" or f"`{name}`" in text or name == "drivers/__main__", name


def test_every_driver_has_a_page() -> None:
    """Which says what differs from the stock driver; options and needs are generated."""
    from madrigal import drivers

    titles = {page.read_text().partition("\n")[0]: page for page in PAGES}
    for driver in drivers.load(str(TREE)):
        (page,) = (page for title, page in titles.items() if driver.path in title.split())
        assert "## What differs from the stock driver" in page.read_text(), page
        assert "## On disk" in page.read_text(), page


def test_every_action_has_the_gesture_that_triggers_it() -> None:
    text = (TREE / "docs/gestures.md").read_text()
    paths = [path for kind in ("datastore", "tm") for path in (TREE / kind).glob("*/*") if os.access(path, os.X_OK)]
    names = {path.name.partition(".")[0] for path in paths if path.parent.name != "common"}
    assert len(names) > 20
    assert not [name for name in sorted(names) if f"`{name}`" not in text and f"`{name.upper()}`" not in text]


def test_every_test_is_in_the_architecture() -> None:
    text = (TREE / "docs/architecture.md").read_text()
    for path in (TREE / "tests").glob("test_*.py"):
        name = re.sub(r"_embedded_.*", "_embedded_*", path.stem)
        assert f"`{name}`" in text or name == "test_bats", name


def test_keywords_of_ssh() -> None:
    text = (TREE / "docs/ssh.md").read_text()
    listed = text.partition("supported: begin -->")[2].partition("<!--")[0]
    assert re.findall(r"\w+", listed) == list(ssh_config.SUPPORTED)
    assert all(keyword in text for keyword in ssh_config.ONLY)


def test_variables() -> None:
    """Every variable that something reads is on a page."""
    text = "".join(page.read_text() for page in PAGES)
    for path in [*(TREE / "lib").rglob("*.py"), TREE / "scripts_common.sh"]:
        for name in set(re.findall(r"MADRIGAL_[A-Z_]*[A-Z]", path.read_text())):
            assert name in text or name in ("MADRIGAL_TRIED", "MADRIGAL_LOCK_DIR"), f"{name}, in {path}"


def test_every_function_of_the_shell_library_is_listed() -> None:
    text = (TREE / "docs/writing-a-driver.md").read_text()
    names = re.findall(r"^([a-z]\w+)\(\)", (TREE / "scripts_common.sh").read_text(), re.MULTILINE)
    assert len(names) > 20
    for name in names:
        assert f"`{name}`" in text, name


def examples(kind: str) -> list[str]:
    """The whole programs among the code blocks of the page for driver authors."""
    text = (TREE / "docs/writing-a-driver.md").read_text().partition("\n## In Python\n")[2]
    blocks = re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for block in blocks if block.startswith("#!")]


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """An empty directory of a driver, with the libraries where it expects them."""
    (tmp_path / "remotes/tm/mine").mkdir(parents=True)
    (tmp_path / "remotes/lib").symlink_to(TREE / "lib")
    (tmp_path / "remotes/scripts_common.sh").symlink_to(TREE / "scripts_common.sh")
    (tmp_path / NASTY).parent.mkdir(parents=True)
    (tmp_path / NASTY).write_text("image")
    (tmp_path / "one/var").mkdir(parents=True)
    return tmp_path / "remotes/tm/mine"


def run(driver: Path, name: str, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (driver / name).write_text(text)
    (driver / name).chmod(0o755)
    work = driver.parents[2]
    env = {"PATH": PATH, "ONE_LOCATION": f"{work}/one", "MADRIGAL_RUN_DIR": f"{work}/run", "HOME": str(work)}
    return subprocess.run([driver / name, *arguments], capture_output=True, text=True, env=env, cwd=work)


def test_example_of_the_functions(driver: Path) -> None:
    text = next(text for text in examples("python") if "arg_host" in text)
    image, copy = driver.parents[2] / NASTY, driver.parents[2] / f"{NASTY}.d" / NASTY
    done = run(driver, "seal", text, f"fe:{image}", f"localhost:{copy}")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert image.stat().st_mode & 0o222 == 0
    assert copy.read_text() == f"{image}\n"
    image.unlink()
    done = run(driver, "seal", text, f"fe:{image}", f"localhost:{copy}")
    assert done.returncode == 1 and done.stderr.endswith(f"\nCannot seal {image}\n"), done.stderr


@pytest.mark.parametrize("kind", ["python", "bash"])
def test_example_of_an_action(kind: str, driver: Path) -> None:
    text = next(text for text in examples(kind) if "arg_host" not in text or kind == "bash")
    work = driver.parents[2]
    image, disk = work / NASTY, work / "ds/a 'b'/17/disk.0"
    for _ in range(2):
        done = run(driver, "ln", text, f"fe:{image}", f"localhost:{disk}")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert os.path.realpath(disk) == str(image)


def test_toml_of_the_page(tmp_path: Path) -> None:
    from madrigal import drivers

    (block,) = re.findall(
        r"^```toml\n(.*?)^```$", (TREE / "docs/writing-a-driver.md").read_text(), re.DOTALL | re.MULTILINE
    )
    for kind in drivers.KINDS:
        (tmp_path / kind).mkdir()
    (tmp_path / "tm/mine").mkdir()
    (tmp_path / "tm/mine/driver.toml").write_text(block)
    (driver,) = drivers.load(str(tmp_path))
    assert driver.options[0].name == "KEEP"
