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


class Report:
    def __init__(self) -> None:
        self.results: list[Result] = []
        self.broken = False
        """Whether the check itself did not get through."""

    @property
    def holds(self) -> bool:
        """Whether all that applies holds, and something does apply."""
        return not self.broken and not self.failures and any(one.outcome == "passed" for one in self.results)

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
        counts = {name: sum(one.outcome == name for one in self.results) for name in MARKS}
        lines += ["", f"{counts['passed']} hold, {counts['failed']} fail, {counts['skipped']} were not checked"]
        return "\n".join(lines)

    def _counted(self) -> list[str]:
        """How many kills and broken dumps there were, and of which action and form the fewest."""
        total: Counter[str] = Counter()
        kills: Counter[str] = Counter()
        for one in self.results:
            total.update(one.counts)
            if one.counts.get("kills"):
                kills[f"{one.action} {one.driver.partition('[')[2].rstrip(']')}"] += one.counts["kills"]
        if not total:
            return []
        lines = ["", ", ".join(f"{count:,} {name}" for name, count in sorted(total.items()))]
        if kills:
            fewest = min(kills, key=lambda name: kills[name])
            lines.append(f"killed: {len(kills)} actions and forms, {fewest} {kills[fewest]} times, others more often")
        return lines

    def json(self) -> str:
        return (
            json.dumps(
                {"broken": self.broken, "results": [asdict(one) for one in self.results]}, indent=1, ensure_ascii=False
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
        return _PAGE % {
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
<h1>What does not hold</h1>
%(details)s
<h1>Not checked</h1>
<ul>%(skipped)s</ul>
</body></html>
"""
