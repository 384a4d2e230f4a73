"""The `madrigal` command.  Each group of commands is a module here; `main` is the entry point."""

from __future__ import annotations

import os
import signal
import sqlite3
from types import FrameType
from typing import NoReturn

import click

from madrigal import __version__
from madrigal.cli.check import check
from madrigal.cli.datastore import datastore
from madrigal.cli.driver import driver
from madrigal.cli.host import host
from madrigal.cli.image import image
from madrigal.cli.new import new
from madrigal.cli.ps import ps
from madrigal.cli.settings import Settings
from madrigal.cli.source import source
from madrigal.cli.transfer import transfer
from madrigal.cli.vm import vm
from madrigal.embedded.records import CONTRACTS
from madrigal.errors import Ended, MadrigalError

EPILOG = """
Exit statuses: 1 a driver failed, or other; 2 usage; 10-19 try again; 20-29 configuration or permission; 30-39 not
found, in use; 40-41 data failed verification; 124 took too long; 128+n ended by signal n.  MADRIGAL_TRACE=1 shows
where in the program an error comes from.
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EPILOG)
@click.version_option(__version__, prog_name="madrigal")
@click.option(
    "--state",
    metavar="DIR",
    help="Where this front-end lives; made on first use.  [default: $MADRIGAL_STATE, else madrigal/ in $XDG_DATA_HOME]",
)
@click.option(
    "--contract",
    type=click.Choice(CONTRACTS),
    help="The form in which drivers are called; fixed by the first host, datastore, image or VM.  [default: current]",
)
@click.option(
    "--tree", metavar="DIR", help="Where datastore/ and tm/ are.  [default: those that came with this library]"
)
@click.option(
    "--datastores",
    metavar="PATH",
    help="DATASTORE_LOCATION, fixed as --contract is; in 3.4 it is where hosts have it.  [default: DIR/var/datastores]",
)
@click.option(
    "--hostname", metavar="NAME", help="What drivers are told the front-end is called.  [default: this machine's name]"
)
@click.option("--shim", is_flag=True, help="Let drivers find onevm, onedatastore, oneimage and onehost in their PATH.")
@click.option("--json", is_flag=True, help="Answer with one JSON document.")
@click.option("-v", "--verbose", is_flag=True, help="Show every driver executable with its arguments and log lines.")
@click.pass_obj
def root(settings: Settings, **options: str | bool) -> None:
    """A small front-end for storage drivers: it keeps hosts, datastores, images and VMs, and runs the drivers.

    There is no hypervisor: a VM that runs here has disks on its host, and nothing writes to them.
    """
    vars(settings).update({name: value for name, value in options.items() if value})


for group in (host, datastore, image, vm, driver, transfer, ps, source, new, check):
    root.add_command(group)


def _ended(signum: int, _frame: FrameType | None) -> NoReturn:
    raise Ended(signum)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (default: this process's) and return the exit status."""
    settings = Settings()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _ended)
    trace = bool(os.environ.get("MADRIGAL_TRACE"))
    try:
        result = root.main(arguments, prog_name="madrigal", standalone_mode=False, obj=settings)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return settings.fail("interrupted", 128 + signal.SIGINT)
    except Ended as error:
        return settings.fail(str(error), error.status)
    except MadrigalError as error:
        if trace:
            raise
        return settings.fail(str(error), error.status)
    except (OSError, sqlite3.Error) as error:
        if trace:
            raise
        return settings.fail(f"the state cannot be used: {error}", 1)
    except Exception as error:
        if trace:
            raise
        return settings.fail(
            f"this is a bug in madrigal, please report it: {error!r} (MADRIGAL_TRACE=1 shows where)", 1
        )
