"""What the options before a group of commands say, and how every command reaches the front-end and answers."""

from __future__ import annotations

import contextlib
import dataclasses
import json as json_module
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from madrigal.cli.progress import Progress
from madrigal.embedded import FrontEnd
from madrigal.errors import UsageError


class Settings:
    """One run of the command."""

    def __init__(self) -> None:
        self.state = self.contract = self.tree = self.datastores = self.hostname = ""
        self.shim = self.json = self.verbose = False
        self._progress: Progress | None = None

    @contextlib.contextmanager
    def front_end(self) -> Iterator[FrontEnd]:
        self._progress = Progress(self.verbose, quiet=self.json)
        with FrontEnd(
            self.state,
            contract=self.contract,
            tree=self.tree,
            datastores=self.datastores,
            hostname=self.hostname,
            with_shim=self.shim,
            observer=self._progress,
        ) as front_end:
            yield front_end

    def answer(self, document: dict[str, Any], text: str) -> None:
        """The result of a command that did something: one line for people, or DOCUMENT with the actions it took."""
        if self.json:
            steps = self._progress.steps if self._progress else []
            self._print({**document, "steps": steps})
        elif text:
            click.echo(text)

    def show(self, document: dict[str, Any]) -> None:
        """One object, whole."""
        if self.json:
            self._print(document)
            return
        lines = list(_flat(document))
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            click.echo(f"{name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], documents: list[dict[str, Any]]) -> None:
        """A list: aligned columns, numbers to the right."""
        if self.json:
            self._print(documents)
            return
        cells = [list(columns), *([str(value) for value in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numeric = [bool(rows) and all(isinstance(row[i], int) for row in rows) for i in range(len(columns))]
        for line in cells:
            parts = (
                f"{cell:{'>' if right else '<'}{width}}"
                for cell, width, right in zip(line, widths, numeric, strict=True)
            )
            click.echo("  ".join(parts).rstrip())

    def fail(self, message: str, status: int) -> int:
        """Say why it failed, and return STATUS."""
        if self._progress:
            self._progress.clear()
        line = " ".join(message.split())
        click.echo(f"madrigal: {line}", err=True)
        if self.json:
            self._print({"error": line, "status": status, "steps": self._progress.steps if self._progress else []})
        return status

    def _print(self, document: object) -> None:
        click.echo(json_module.dumps(document, indent=2, ensure_ascii=False))


def _flat(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                yield from _flat(item, f"{prefix}{name}.{item.get('id', number)}.")
        elif value is not None and value != "" and value != []:
            yield f"{prefix}{name}", _word(name, value)


def _word(name: str, value: Any) -> str:
    if name in ("stime", "etime", "regtime"):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value)) if value else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def document(record: Any) -> dict[str, Any]:
    """A record as JSON shows it."""
    return dataclasses.asdict(record)


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """The KEY=VALUE arguments of a repeated option."""
    result = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise UsageError(f"{option} is '{value}', expected KEY=VALUE")
        result[key] = rest
    return result


class Command(click.Command):
    """A command that takes --json and -v behind its name as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for names, text in (
            (["--json"], "Answer with one JSON document."),
            (["-v", "--verbose"], "Show every action."),
        ):
            self.params.append(
                click.Option(names, is_flag=True, expose_value=False, callback=_also, help=text, hidden=True)
            )


def _also(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and parameter.name:
        setattr(context.obj, parameter.name, True)


class Group(click.Group):
    command_class = Command


pass_settings = click.make_pass_decorator(Settings)
