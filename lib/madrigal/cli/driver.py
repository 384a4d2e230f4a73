"""`madrigal driver`: what the drivers are and what a front-end and its hosts have to be told of them."""

from __future__ import annotations

import dataclasses
import os

import click

from madrigal import drivers
from madrigal.cli.settings import Group, Settings, pass_settings
from madrigal.drivers import generate
from madrigal.embedded.front_end import default_tree


@click.group(cls=Group)
def driver() -> None:
    """The drivers: what they can do, what they need, and their lines for oned.conf and sudoers."""


def _load(settings: Settings, names: tuple[str, ...] = ()) -> list[drivers.Driver]:
    found = drivers.load(os.path.abspath(settings.tree) if settings.tree else default_tree())
    return [drivers.find(found, name) for name in names] or found


@driver.command("list")
@pass_settings
def list_(settings: Settings) -> None:
    """List the drivers."""
    found = _load(settings)
    rows = [(one.path, ", ".join(one.formats), one.description) for one in found]
    settings.table(("DRIVER", "FORMATS", "DESCRIPTION"), rows, [_document(one) for one in found])


@driver.command()
@click.argument("driver")
@pass_settings
def show(settings: Settings, driver: str) -> None:
    """Show a driver (`tm/ssh`, or `ssh` where only one kind has it) with its options and what it needs."""
    (one,) = _load(settings, (driver,))
    settings.show(_document(one))


@driver.command("oned-conf")
@click.argument("drivers", nargs=-1)
@pass_settings
def oned_conf(settings: Settings, drivers: tuple[str, ...]) -> None:
    """Print the lines of oned.conf that make a front-end know DRIVERS (default: all)."""
    click.echo(generate.oned_conf(_load(settings, drivers)), nl=False)


@driver.command()
@click.argument("drivers", nargs=-1)
@pass_settings
def sudoers(settings: Settings, drivers: tuple[str, ...]) -> None:
    """Print what belongs into /etc/sudoers.d on every host for DRIVERS (default: all)."""
    click.echo(generate.sudoers(_load(settings, drivers)), nl=False)


def _document(one: drivers.Driver) -> dict[str, object]:
    fields = dataclasses.asdict(one)
    return {"path": one.path} | {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
