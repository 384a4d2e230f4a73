"""`madrigal transfer`: images from place to place, by hand."""

from __future__ import annotations

import time

import click

from madrigal.cli.settings import Group, Settings, pass_settings
from madrigal.errors import UsageError
from madrigal.location import Location
from madrigal.transfer import by_hand, plan


@click.group(cls=Group)
def transfer() -> None:
    """Bring images from place to place.

    A place is [HOST:]PATH: a file, a directory or a block device; without HOST it is one of this machine.
    """


def place(argument: str) -> Location:
    """What an administrator has written as [HOST:]PATH; raises UsageError."""
    if argument.startswith("/"):
        return Location("", argument.rstrip("/") or "/").checked()
    if ":" not in argument:
        raise UsageError(f"'{argument}' is not [HOST:]PATH with an absolute path")
    return Location.parse(argument)


@transfer.command()
@click.argument("source")
@click.argument("target")
@pass_settings
def explain(settings: Settings, source: str, target: str) -> None:
    """Show all ways from SOURCE to TARGET, what they cost and why others are impossible; nothing is copied.

    The cheapest is first, and the seconds are a rough guess.
    """
    ways = plan.ways(by_hand.facts(place(source), place(target)))
    rows = [(way.name, "-" if way.seconds is None else f"{way.seconds:.2f} s", way.why) for way in ways]
    settings.table(("WAY", "TAKES", "WHY"), rows, [way.document() for way in ways])


@transfer.command("copy")
@click.argument("source")
@click.argument("target")
@click.option("--replace", is_flag=True, help="Replace what is at TARGET already, or on that block device.")
@click.option("--reads-zeros", is_flag=True, help="The block device TARGET is fresh: all of it reads as zeros.")
@pass_settings
def copy_(settings: Settings, source: str, target: str, replace: bool, reads_zeros: bool) -> None:
    """Copy an image, a directory or a block device as it is.

    The copy is checked, and seen when all of it is there.  If this is interrupted, the same command goes on with it.
    """
    origin, goal = place(source), place(target)
    began = time.monotonic()
    way = by_hand.copy(origin, goal, replace, reads_zeros)
    seconds = time.monotonic() - began
    document = {"source": str(origin), "target": str(goal), "way": way, "seconds": round(seconds, 3)}
    settings.answer(document, f"copied {origin} to {goal} ({way}, {seconds:.1f} s)")
