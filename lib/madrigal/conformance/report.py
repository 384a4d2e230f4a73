"""What the checks said: a table for a terminal, JSON, and one page of HTML with the matrix of drivers by checks."""

from __future__ import annotations

import html
import json
from collections import Counter
from dataclasses import asdict, dataclass, field

MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "-"}


@dataclass(frozen=True)
class Result:
    driver: str
    check: str
    action: str
    scene: str
    outcome: str
    """passed, failed or skipped."""
    said: str
    script: str
    """How to run it again."""
    seconds: float
    log: list[str]
    counts: dict[str, int] = field(default_factory=dict)
    """How many kills, kills in a stream and dumps it was."""


DUMPS, KILLS, EACH, IN_STREAM = 10_000, 2_000, 20, 0.5
"""What a whole check has at least: broken dumps, kills, kills of each action in each form, and, of the kills of actions
that bring data, the part inside a data stream: some of the bytes that a clean run brings have arrived, and some have
not."""


@dataclass(frozen=True)
class Totals:
    counts: dict[str, int]
    """Of what there was how much."""
    kills: dict[str, int]
    """By kind, action and form, `tm clone current`."""
    streams: dict[str, int]
    """How many of them were inside a data stream, for those that have one."""

    @property
    def in_stream(self) -> float:
        """The part that was inside a data stream of the kills of actions that have one."""
        return sum(self.streams.values()) / max(1, sum(self.kills[name] for name in self.streams))

    @property
    def fewest(self) -> str:
        return min(self.kills, key=lambda name: self.kills[name])

    def missed(self) -> list[str]:
        found = []
        for name, least in (("broken dumps", DUMPS), ("kills", KILLS)):
            if (count := self.counts.get(name, 0)) < least:
                found.append(f"{count:,} {name} of at least {least:,}")
        for name, count in self.kills.items():
            if count < EACH:
                found.append(f"{name} was killed {count} times, of at least {EACH}")
        if self.in_stream < IN_STREAM:
            told = "of the kills of actions with a data stream were inside it"
            found.append(f"{self.in_stream:.0%} {told}, of at least {IN_STREAM:.0%}")
        return found


class Report:
    def __init__(self, whole: bool = False) -> None:
        """WHOLE: all of it was checked, so that there has to be as much as FLOORS says."""
        self.whole = whole
        self.results: list[Result] = []
        self.broken = False
        """Whether the check itself did not get through."""

    @property
    def holds(self) -> bool:
        """Whether all that applies holds, and something does apply."""
        if self.broken or self.failures or self.missed:
            return False
        return any(one.outcome == "passed" for one in self.results)

    @property
    def totals(self) -> Totals:
        counts: Counter[str] = Counter()
        kills: Counter[str] = Counter()
        streams: Counter[str] = Counter()
        for one in self.results:
            counts.update(one.counts)
            kind, form = one.driver.partition("/")[0], one.driver.partition("[")[2].rstrip("]")
            if one.check.startswith("kill") and one.outcome != "skipped":
                kills[f"{kind} {one.action} {form}"] += one.counts.get("kills", 0)
            if "kills in a stream" in one.counts:
                streams[f"{kind} {one.action} {form}"] += one.counts["kills in a stream"]
        return Totals(dict(sorted(counts.items())), dict(sorted(kills.items())), dict(sorted(streams.items())))

    @property
    def missed(self) -> list[str]:
        """What there was too little of in a whole check."""
        return self.totals.missed() if self.whole else []

    def sort(self, drivers: list[str], scenes: list[str]) -> None:
        """In the order of these."""
        places = {name: number for number, name in enumerate(drivers)}
        numbers = {name: number for number, name in enumerate(scenes)}
        self.results.sort(key=lambda one: (places[one.driver], numbers.get(one.scene, len(numbers))))

    def load(self, path: str) -> None:
        """Add the results of another one, which `json` wrote."""
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
        self.results += [Result(**one) for one in told["results"]]
        self.broken = self.broken or told["broken"]

    def add(self, result: Result) -> None:
        self.results.append(result)

    @property
    def failures(self) -> list[Result]:
        return [one for one in self.results if one.outcome == "failed"]

    def _matrix(self) -> tuple[list[str], list[str], dict[tuple[str, str], list[Result]]]:
        cells: dict[tuple[str, str], list[Result]] = {}
        for one in self.results:
            cells.setdefault((one.driver, one.check), []).append(one)
        drivers = list(dict.fromkeys(one.driver for one in self.results))
        checks = list(dict.fromkeys(one.check for one in self.results))
        return drivers, checks, cells

    @staticmethod
    def _cell(results: list[Result]) -> str:
        """`12 ok`, `3 of 12 FAILED`, or `-` where all were skipped."""
        failed = sum(one.outcome == "failed" for one in results)
        passed = sum(one.outcome == "passed" for one in results)
        if failed:
            return f"{failed}/{failed + passed} FAILED"
        return f"{passed} ok" if passed else "-"

    def table(self) -> str:
        """A row for each check, a column for each driver."""
        drivers, checks, cells = self._matrix()
        rows = [["", *drivers]]
        rows += [
            [check.replace("_", " "), *(self._cell(cells.get((driver, check), [])) for driver in drivers)]
            for check in checks
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        skipped: dict[str, None] = dict.fromkeys(
            f"{one.driver}: {one.said}" for one in self.results if one.outcome == "skipped"
        )
        if skipped:
            lines += ["", "Not checked:", *(f"  {line}" for line in skipped)]
        lines += self._counted()
        lines += [f"TOO LITTLE: {sentence}" for sentence in self.missed]
        counts = {name: sum(one.outcome == name for one in self.results) for name in MARKS}
        lines += ["", f"{counts['passed']} hold, {counts['failed']} fail, {counts['skipped']} were not checked"]
        return "\n".join(lines)

    def _counted(self) -> list[str]:
        """How many kills and broken dumps there were, and of which action and form the fewest."""
        totals = self.totals
        if not totals.counts:
            return []
        lines = ["", ", ".join(f"{count:,} {name}" for name, count in totals.counts.items())]
        if totals.kills:
            fewest = totals.fewest
            lines.append(
                f"killed: {len(totals.kills)} actions and forms, {fewest} {totals.kills[fewest]} times, the others as "
                "often or more"
            )
        if totals.streams:
            lines.append(f"{totals.in_stream:.0%} of the kills of actions with a data stream were inside it")
        return lines

    def json(self) -> str:
        return (
            json.dumps(
                {
                    "broken": self.broken,
                    "totals": {**asdict(self.totals), "in_stream": round(self.totals.in_stream, 3)},
                    "missed": self.missed,
                    "results": [asdict(one) for one in self.results],
                },
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )

    def junit(self) -> str:
        """As JUnit XML, for continuous integration."""
        cases = []
        for one in self.results:
            inner, first = "", _plain(one.said.partition("\n")[0])
            if one.outcome == "failed":
                text = _plain(one.said + "\n" + one.script)
                inner = f'<failure message="{first}">{text}</failure>'
            elif one.outcome == "skipped":
                inner = f'<skipped message="{first}"/>'
            name = _plain(f"{one.check} {one.scene}")
            head = f'classname="{_plain(one.driver)}" name="{name}" time="{one.seconds:.3f}"'
            cases.append(f"<testcase {head}>{inner}</testcase>")
        counts = {name: sum(one.outcome == name for one in self.results) for name in MARKS}
        head = f'tests="{len(self.results)}" failures="{counts["failed"]}" skipped="{counts["skipped"]}"'
        begin = '<?xml version="1.0" encoding="utf-8"?>\n'
        return f'{begin}<testsuite name="madrigal check" {head}>{"".join(cases)}</testsuite>\n'

    def html(self) -> str:
        drivers, checks, cells = self._matrix()
        head = "".join(f"<th>{html.escape(driver)}</th>" for driver in drivers)
        body = []
        for check in checks:
            row = [f"<th>{html.escape(check.replace('_', ' '))}</th>"]
            for driver in drivers:
                results = cells.get((driver, check), [])
                text = self._cell(results)
                kind = "bad" if "FAILED" in text else "none" if text == "-" else "good"
                link = f'<a href="#{html.escape(driver)}-{check}">{text}</a>' if kind == "bad" else text
                title = html.escape("\n".join(f"{one.scene}: {MARKS[one.outcome]}" for one in results), quote=True)
                row.append(f'<td class="{kind}" title="{title}">{link}</td>')
            body.append(f"<tr>{''.join(row)}</tr>")
        details = []
        for one in self.failures:
            title = html.escape(f"{one.driver} {one.scene}: {one.check.replace('_', ' ')}")
            details.append(
                f'<section><h2 id="{html.escape(one.driver)}-{one.check}">{title}</h2>'
                f"<pre>{html.escape(one.said)}</pre>"
                f"<details><summary>run it again</summary><pre>{html.escape(one.script)}</pre></details></section>"
            )
        skipped = dict.fromkeys(f"{one.driver}: {one.said}" for one in self.results if one.outcome == "skipped")
        counted = [*filter(None, self._counted()), *(f"Too little: {sentence}" for sentence in self.missed)]
        return _PAGE % {
            "counted": "".join(f"<p>{html.escape(line)}</p>" for line in counted),
            "head": head,
            "body": "\n".join(body),
            "details": "\n".join(details) or "<p>None.</p>",
            "skipped": "".join(f"<li>{html.escape(one)}</li>" for one in skipped) or "<li>Nothing.</li>",
        }


def _plain(text: str) -> str:
    """For XML, which cannot carry control characters."""
    return html.escape("".join(char if char in "\n\t" or char >= " " else "?" for char in text), quote=True)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Conformance of storage drivers</title><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; }
th, td { padding: .3em .7em; border: 1px solid #ddd; text-align: center; white-space: nowrap; }
tbody th { text-align: left; font-weight: normal; }
.good { background: #d9f2dd; } .bad { background: #f8d3d0; font-weight: bold; } .none { color: #999; }
pre { background: #f6f6f6; padding: .7em; overflow-x: auto; }
h2 { font-size: 1.05em; margin-top: 2em; }
</style></head><body>
<h1>Conformance of storage drivers</h1>
<table><thead><tr><th></th>%(head)s</tr></thead><tbody>
%(body)s
</tbody></table>
%(counted)s
<h1>What does not hold</h1>
%(details)s
<h1>Not checked</h1>
<ul>%(skipped)s</ul>
</body></html>
"""
