"""What is asked of a datastore that only other machines have (docs/contract.md, "Datastores on other machines")."""

from __future__ import annotations

import hashlib
import re

from madrigal.conformance.calls import Run
from madrigal.conformance.scenes import Play, Wrong, expect, gone, holds, scene, whole
from madrigal.conformance.stage import Stage

TODAY = ("current",)


def _bridge(stage: Stage) -> dict[str, str]:
    """The datastore's template: BASE_PATH is a directory of the host, and none of the front-end."""
    stage.machine(stage.host).sh('mkdir -p "$1"', stage.base)
    return {"BRIDGE_LIST": stage.host}


@scene("datastore", "cp", "by a bridge host", forms=TODAY)
def cp(stage: Stage, _: str) -> Play:
    content = stage.content()
    path = stage.put("fe", f"{stage.import_dir}/image", content)
    call = stage.ds("cp", image={"path": path}, template=_bridge(stage))
    digest = stage.digest(content)

    def verify(run: Run) -> None:
        holds(stage, stage.host, run.stdout.split(" ")[0], "raw", digest, "the new image")

    def safe() -> None:
        listed = stage.machine(stage.host).sh('ls "$1"', stage.base).decode().split("\n")
        for name in filter(re.compile("[0-9a-f]{32}").fullmatch, listed):
            whole(stage, stage.host, f"{stage.base}/{name}", "raw", digest)()

    changes = [stage.at(stage.host, f"{stage.base}/{'[0-9a-f]' * 32}")]
    return Play(call, verify, changes, r"/\S+ raw", safe=safe, sources=[stage.at("fe", path)])


@scene("datastore", "rm", "by a bridge host", forms=TODAY)
def rm(stage: Stage, _: str) -> Play:
    path = stage.put(stage.host, f"{stage.base}/{stage.hash}", stage.content())
    kept = stage.put("fe", f"{stage.base}/{stage.hash}", b"the front-end's")
    call = stage.ds("rm", image={"source": path, "state": "DELETE"}, template=_bridge(stage))
    sources = [stage.at("fe", kept)]
    changes = [stage.at(stage.host, path)]
    return Play(call, lambda run: gone(stage, stage.host, path), changes, sources=sources, astray=sources)


@scene("datastore", "export", "by a bridge host", forms=TODAY)
def export(stage: Stage, _: str) -> Play:
    content = stage.content()
    path = stage.put(stage.host, f"{stage.base}/{stage.hash}", content)

    def verify(run: Run) -> None:
        found = dict(re.findall(r"<(\w+)>(?:<!\[CDATA\[)?([^<\]]*)", run.stdout))
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        expect(found.get("MD5"), digest, "MD5 of what is exported")
        if path not in found.get("IMPORT_SOURCE", ""):
            raise Wrong(f"IMPORT_SOURCE is {found.get('IMPORT_SOURCE')!r} and does not name {path}")

    values = {"source": path, "format": "raw", "size": 3}
    call = stage.ds("export", 7, image=values, template=_bridge(stage))
    changes = [stage.at(stage.host, f"{path}.md5sum")]
    sources = [stage.at(stage.host, path)]
    return Play(call, verify, changes, r"(?s)<IMPORT_INFO>.*</IMPORT_INFO>", sources=sources)


@scene("datastore", "export", "of what a bridge host has not", forms=TODAY, fails=True)
def export_missing(stage: Stage, _: str) -> Play:
    """Its digest cannot be had, which is no digest."""
    values = {"source": f"{stage.base}/{stage.hash}", "format": "raw", "size": 3}
    return Play(stage.ds("export", 7, image=values, template=_bridge(stage)), lambda run: None)
