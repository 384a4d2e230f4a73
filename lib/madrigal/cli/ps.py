"""`madrigal ps`: the transfers that are under way."""

from __future__ import annotations

import click

from madrigal import leftovers
from madrigal.cli.settings import Command, Settings, pass_settings
from madrigal.transfer import progress


@click.command(cls=Command)
@pass_settings
def ps(settings: Settings) -> None:
    """List this user's large transfers on this machine, of whatever has started them.

    A transfer between two other hosts is listed where the action runs, which is here.  What killed actions have left in
    the run directory, and is old, goes.
    """
    leftovers.tidy()
    reports = progress.running()
    rows = [
        (
            *(report["pid"], report["action"], report["path"], progress.size(report["bytes"])),
            progress.size(report["total"]) if report["total"] else "-",
            "-" if (done := progress.percent(report)) is None else f"{done} %",
            *(f"{progress.size(report['rate'])}/s", progress.span(report["seconds"]), " ".join(report["arguments"])),
        )
        for report in reports
    ]
    columns = ("PID", "ACTION", "MAKES", "DONE", "OF", "", "RATE", "SINCE", "ARGUMENTS")
    settings.table(columns, rows, reports)
