"""`madrigal check`: does a driver keep the contract?"""

from __future__ import annotations

import os

import click

from madrigal.cli.settings import Settings, pass_settings
from madrigal.conformance import Options, run
from madrigal.conformance.kit import PROFILES
from madrigal.conformance.subject import FORMS
from madrigal.embedded.front_end import default_tree
from madrigal.errors import NotSupported


@click.command()
@click.option(
    "--datastore", "datastores", metavar="DIR|NAME", multiple=True, help="A datastore driver, by directory or name."
)
@click.option(
    "--tm", "tms", metavar="DIR|NAME", multiple=True, help="A transfer driver.  [default: all that have a driver.toml]"
)
@click.option(
    "--remotes", metavar="DIR", help="Where datastore/ and tm/ are.  [default: those that came with this library]"
)
@click.option(
    "--host", "hosts", metavar="H", multiple=True, help="A host that ssh reaches, twice or more.  [default: its own]"
)
@click.option(
    "--contract", "forms", type=click.Choice(FORMS), multiple=True, help="The form of the contract.  [default: both]"
)
@click.option("--profile", type=click.Choice(PROFILES), default="quick", show_default=True, help="How thoroughly.")
@click.option(
    "-k",
    "only",
    metavar="EXPRESSION",
    default="",
    help="Only checks, drivers and scenes with these words in their names.",
)
@click.option(
    "-j", "--jobs", type=click.IntRange(1), default=1, help="How many scenes to play at a time.  [default: 1]"
)
@click.option("--seed", type=int, default=0, help="Other moments for kills.")
@click.option(
    "--prepare-with",
    "prepare",
    metavar="DIR",
    default="",
    help="Let the drivers of this tree bring about what scenes begin with.",
)
@click.option("--junit", metavar="FILE", default="", help="Write the results as JUnit XML.")
@click.option("--json", "json_file", metavar="FILE", default="", help="Write them as JSON.")
@click.option("--html", metavar="FILE", default="", help="Write one page with the matrix of drivers by checks.")
@click.argument("pytest", nargs=-1)
@pass_settings
def check(settings: Settings, remotes: str | None, json_file: str, **values: object) -> int:
    """Check drivers against the contract, as processes and from outside, on real SSH hosts.

    What a driver cannot do is not checked, and listed.  Words behind `--` go to pytest: `-- -x --pdb` stops at the
    first failure.  The exit status is 0 only if all that applies holds.
    """
    if os.geteuid() and not values["hosts"]:
        raise NotSupported(
            "machines of the check's own need root: run it as root, or name hosts with --host, twice or more"
        )
    tree = os.path.abspath(remotes or settings.tree) if remotes or settings.tree else default_tree()
    forms = values.pop("forms") or ((settings.contract,) if settings.contract else ())
    report = run(Options(tree=tree, forms=forms, json=json_file, **values))  # type: ignore[arg-type]
    click.echo(report.table())
    return 0 if report.holds else 1
