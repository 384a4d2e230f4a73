"""A front-end and two SSH hosts in memory, on which the ways to move an image are timed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench.processes import Peak, cpu
from madrigal.embedded import rpc
from madrigal.errors import MadrigalError, NotFound
from madrigal.host.openssh import disconnect

TREE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
RIGS = f"{TREE}/tests/rigs"
VM = 17
CIPHER = "aes128-gcm@openssh.com"
PATH = "/usr/local/bin:/usr/bin:/bin"
MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Sample:
    """How one run went."""

    seconds: float
    cpu: float
    """Seconds of CPU, on both ends together: on a machine that others use too, a steadier measure than time."""
    mib: float
    """Of the process that took most memory, on both ends."""
    program: str
    """Which that was."""


class Link:
    """A long or narrow path (tests/rigs/link) to a host, by which it is reached while it is open."""

    def __init__(self, state: str, host: str, delay: float = 0, rate: float = 0) -> None:
        self._rig, self._host = (f"{RIGS}/hosts-up", state), host
        port = subprocess.run([*self._rig, "own-port", host], capture_output=True, text=True, check=True).stdout
        argv = [f"{RIGS}/link", "--delay", str(delay), "--rate", f"{rate:.0f}", port.strip()]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        subprocess.run([*self._rig, "port", host, self._answer().strip()], check=True)

    def tell(self, line: str) -> dict[str, int]:
        """What has passed since the last time; LINE as `link --help` says."""
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        said: dict[str, int] = json.loads(self._answer())
        return said

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        subprocess.run([*self._rig, "port", self._host], check=True)
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()


class Cloud:
    """The front-end, host01 and host02 with a tmpfs each; a context manager.

    STOCK: the remotes tree of other drivers.  REFLINK: instead of that, one xfs on a disk, that all of them share.
    """

    def __init__(self, stock: str = "", reflink: bool = False) -> None:
        self.stock = stock
        self.work = tempfile.mkdtemp(prefix="mb", dir=None if reflink else MEMORY)
        self.datastores = f"{self.work}/datastores"
        self.images, self.vm = f"{self.datastores}/1", f"{self.datastores}/0/{VM}"
        self.state = f"{self.work}/hosts"
        self._reflink = reflink
        self._links: list[Link] = []
        self.front_end = os.uname().nodename

    def __enter__(self) -> Cloud:
        try:
            if self._reflink:
                _run(f"{RIGS}/reflink-fs", "up", "xfs", self.datastores, "64G")
            else:
                os.mkdir(self.datastores)
            os.mkdir(self.images)
            own = [] if self._reflink else ["-s", "100%", self.datastores]
            _run(f"{RIGS}/hosts-up", self.state, "-n", "2", *own)
            # Stock drivers reach the front-end by ssh too.
            _run(f"{RIGS}/hosts-up", self.state, "add", self.front_end)
            self._furnish()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for link in self._links:
            link.close()
        if os.path.isdir(f"{self.work}/run"):
            os.environ["MADRIGAL_RUN_DIR"] = f"{self.work}/run"
            disconnect()
            self._answering.close()
        subprocess.run([f"{RIGS}/hosts-down", self.state], check=True)
        if self._reflink:
            _run(f"{RIGS}/reflink-fs", "down", self.datastores)
        shutil.rmtree(self.work)

    def _furnish(self) -> None:
        """What each kind of driver expects to find below ONE_LOCATION, and in PATH."""
        for name, tree in (("ours", TREE), *([("stock", self.stock)] if self.stock else [])):
            os.makedirs(f"{self.work}/{name}/var")
            os.makedirs(f"{self.work}/{name}/lib")
            os.symlink(tree if name == "stock" else f"{tree}/remotes", f"{self.work}/{name}/var/remotes")
            os.symlink(tree, f"{self.work}/{name}/lib/sh")
        for directory in ("run", "bin", "home"):
            os.mkdir(f"{self.work}/{directory}", 0o700)
        # Connections are kept for stock drivers as a front-end's packages have it.
        with open(f"{self.work}/bash_env", "w") as file:
            options = f"-o ControlMaster=auto -o ControlPersist=600 -o ControlPath={self.work}/run/%C"
            file.write(f'ssh() {{ /usr/bin/ssh -F {self.state}/ssh_config {options} "$@"; }}\nexport -f ssh\n')
        self._write("bin/onevm", f"#!/bin/sh\ncat {self.work}/vm.xml\n", 0o755)
        self._write("bin/onedatastore", "#!/bin/sh\necho '<DATASTORE></DATASTORE>'\n", 0o755)
        self._write("one_auth", "oneadmin:token\n", 0o600)

        def show(ident: int | str) -> bytes:
            if int(ident) != VM:
                raise NotFound(f"no VM {ident}")
            with open(f"{self.work}/vm.xml", "rb") as file:
                return file.read()

        def show_datastore(ident: int | str) -> bytes:
            return f"<DATASTORE><ID>{ident}</ID></DATASTORE>".encode()

        self._answering = rpc.Answering("token", {"vm": show, "datastore": show_datastore})

    def _write(self, name: str, text: str, mode: int) -> None:
        with open(os.open(f"{self.work}/{name}", os.O_WRONLY | os.O_CREAT, mode), "w") as file:
            file.write(text)

    # -- places ----------------------------------------------------------------------------------------------

    def on(self, host: str, path: str) -> str:
        """PATH of a host as a path of this machine."""
        with open(f"{self.state}/{host}/pid") as file:
            unshare = file.read().strip()
        with open(f"/proc/{unshare}/task/{unshare}/children") as file:
            return f"/proc/{file.read().split()[0]}/root{path}"

    def clear(self, *paths: str) -> None:
        """Remove what runs before have left."""
        for path in paths:
            subprocess.run(["rm", "-rf", "--", path], check=True)

    def link(self, host: str, delay: float = 0, rate: float = 0) -> Link:
        """HOST is reached by a link from now on."""
        link = Link(self.state, host, delay, rate)
        self._links.append(link)
        return link

    # -- ways ------------------------------------------------------------------------------------------------

    def ours(self, action: str, *arguments: str, verify: str = "") -> Sample:
        """Run our executable ACTION; VERIFY: MADRIGAL_VERIFY, if it is to be set."""
        env = {
            "PATH": PATH,
            "HOME": f"{self.work}/home",
            "ONE_LOCATION": f"{self.work}/ours",
            "ONE_XMLRPC": self._answering.url,
            "ONE_AUTH": f"{self.work}/one_auth",
            "MADRIGAL_SSH_CONFIG": f"{self.state}/ssh_config",
            "MADRIGAL_RUN_DIR": f"{self.work}/run",
        }
        if verify:
            env["MADRIGAL_VERIFY"] = verify
        return self._timed([f"{TREE}/{action}", *arguments, str(VM), "1"], env)

    def of_stock(self, action: str, *arguments: str) -> Sample:
        """Run the stock drivers' executable ACTION."""
        libraries = f"{self.stock}/ruby"
        env = {
            "PATH": f"{self.work}/bin:{PATH}",
            "HOME": f"{self.work}/home",
            "ONE_LOCATION": f"{self.work}/stock",
            "BASH_ENV": f"{self.work}/bash_env",
            "RUBYLIB": libraries,
        }
        return self._timed([f"{self.stock}/{action}", *arguments, str(VM), "1"], env)

    def shell(self, script: str, **values: str) -> Sample:
        """Run a line of bash; `$ssh` there is ssh as it is, `$fast` with the fastest cipher, VALUES are variables."""
        plain = f"ssh -F {self.state}/ssh_config -o ControlPath=none"
        env = {"PATH": PATH, "ssh": plain, "fast": f"{plain} -c {CIPHER}", **values}
        return self._timed(["bash", "-c", f"set -e -o pipefail; {script}"], env)

    def _timed(self, argv: Sequence[str], env: Mapping[str, str]) -> Sample:
        hosts = [int(self.on(name, "").split("/")[2]) for name in ("host01", "host02", self.front_end)]
        with tempfile.TemporaryFile(dir=self.work) as errors:
            spent, began = cpu(hosts), time.monotonic()
            process = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=dict(env), umask=0o022
            )
            with Peak([process.pid, *hosts], self.work) as peak:
                status = process.wait()
                seconds = time.monotonic() - began
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip()
            spent = cpu(hosts) - spent
        if status:
            raise MadrigalError(f"{shlex.join(argv)} failed ({status}): {said}")
        program = max(peak.kib, key=lambda name: peak.kib[name], default="")
        return Sample(seconds, spent, round(peak.mib, 1), program)

    def document(self, size: int, **disk: object) -> None:
        """The VM has a disk 0 of SIZE bytes from now on."""
        mib = -(-size // (1 << 20))
        values = {"DISK_ID": 0, "SIZE": mib, "ORIGINAL_SIZE": mib, "FORMAT": "raw", **disk}
        elements = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in values.items())
        text = (
            f"<VM><ID>{VM}</ID><NAME>vm</NAME><STATE>3</STATE><LCM_STATE>3</LCM_STATE><TEMPLATE><DISK>{elements}"
            "</DISK></TEMPLATE><HISTORY_RECORDS><HISTORY><SEQ>0</SEQ><DS_ID>0</DS_ID></HISTORY></HISTORY_RECORDS></VM>"
        )
        with open(f"{self.work}/vm.xml", "w") as file:
            file.write(text + "\n")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise MadrigalError(f"{argv[0]} failed: {done.stderr.strip()}")
