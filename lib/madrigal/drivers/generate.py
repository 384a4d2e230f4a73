"""What is made from the driver.toml files: defaults, configuration files, lines for oned.conf, sudoers, tables."""

from __future__ import annotations

import re

from madrigal.drivers import KINDS, Driver, Option, load
from madrigal.errors import ConfigError

_BEGIN, _END = "<!-- drivers: begin; `make generated` writes this -->", "<!-- drivers: end -->"


# -- for the front-end --------------------------------------------------------------------------------------------


def oned_conf(drivers: list[Driver]) -> str:
    """The lines of oned.conf that make today's front-end know DRIVERS."""
    names = {kind: ",".join(driver.name for driver in drivers if driver.kind == kind) for kind in KINDS}
    parts = [
        "# A driver under another name (a link to its directory) needs that name here.",
        *(
            f"# Names that {what} has to have in the list after -d: {names[kind]}"
            for kind, what in (("tm", "TM_MAD"), ("datastore", "DATASTORE_MAD"))
            if names[kind]
        ),
        "",
    ]
    for driver in drivers:
        values = {"NAME": driver.name}
        if driver.kind == "tm":
            values |= tm_attributes(driver) | {
                "SHARED": _yes(driver.shared),
                "DS_MIGRATE": _yes(driver.ds_migrate),
                "DS_LIVE_MIGRATE": _yes(driver.ds_live_migrate),
                "DS_MIGRATE_SNAP": _yes(driver.ds_migrate_snap),
                "PERSISTENT_SNAPSHOTS": _yes(driver.persistent_snapshots),
            }
        else:
            values["REQUIRED_ATTRS"] = ",".join(driver.required_attributes)
            values["PERSISTENT_ONLY"] = _yes(driver.persistent_only)
            if driver.marketplace_actions:
                values["MARKETPLACE_ACTIONS"] = ",".join(driver.marketplace_actions)
        pairs = ",\n".join(f'    {key} = "{value}"' for key, value in values.items())
        parts.append(f"{'TM' if driver.kind == 'tm' else 'DS'}_MAD_CONF = [\n{pairs}\n]\n")
    if live := " ".join(f"kvm-{driver.name}" for driver in drivers if driver.live_snapshots):
        parts += ["# Not here but in vmm_exec/vmm_execrc: snapshots of disks while the VM runs.", "#"]
        parts[-1] += f' LIVE_DISK_SNAPSHOTS="{live}"\n'
    return "\n".join(parts)


def tm_attributes(driver: Driver) -> dict[str, str]:
    """What the front-end gives a datastore with this transfer driver, by the names of its attributes."""
    values = {"LN_TARGET": driver.ln_target, "CLONE_TARGET": driver.clone_target}
    if driver.tm_mad_system:
        values["TM_MAD_SYSTEM"] = ",".join(driver.tm_mad_system)
    for name, said in driver.tm_mad_system.items():
        values |= {f"{key.upper()}_{name.upper()}": said[key] for key in ("ln_target", "clone_target", "disk_type")}
    values |= {"DRIVER": driver.driver} if driver.driver else {}
    values |= {"DISK_TYPE": driver.disk_type} if driver.disk_type else {}
    return values | {"ALLOW_ORPHANS": driver.allow_orphans}


def sudoers(drivers: list[Driver]) -> str:
    """A file for /etc/sudoers.d of every host: what the front-end's user there may run without a password."""
    lines = ["# What Madrigal's drivers run with sudo on hosts, as the user oneadmin."]
    for driver in drivers:
        if driver.sudo:
            alias = "MADRIGAL_" + re.sub(r"\W", "_", driver.path).upper()
            commands = ", ".join(re.sub(r"([,:=\\])", r"\\\1", command) for command in driver.sudo)
            lines += [f"Cmnd_Alias {alias} = {commands}", f"oneadmin ALL=(ALL) NOPASSWD: {alias}"]
        else:
            lines.append(f"# {driver.path} needs nothing.")
    return "\n".join(lines) + "\n"


def configuration(drivers: list[Driver]) -> dict[str, str]:
    """What belongs into remotes/etc, by path there: every option with its default, commented out."""
    files: dict[str, list[Option]] = {}
    owners = {}
    for driver in drivers:
        for option in driver.options:
            if not option.template_only:
                path = f"{driver.kind}/{driver.kind}.conf" if option.common else f"{driver.path}/{driver.name}.conf"
                files.setdefault(path, []).append(option)
                owners[path] = f"all drivers in {driver.kind}/" if option.common else driver.path
    return {path: _configuration(owners[path], options) for path, options in files.items()}


def _configuration(owner: str, options: list[Option]) -> str:
    lines = [
        f"# Options of {owner}, with their defaults.",
        "# The template of a datastore decides before this file.  Lines: KEY=value in shell syntax, read and not run.",
    ]
    for option in options:
        lines += ["", f"# {option.help}", f'#{option.name}="{option.default}"']
    return "\n".join(lines) + "\n"


# -- for the hot path ---------------------------------------------------------------------------------------------


def defaults(drivers: list[Driver]) -> str:
    """The module defaults.py: what actions know of driver.toml."""
    lines = [
        '"""Option defaults, generated from every driver.toml by `make generated`; a test compares."""',
        "",
        "# By kind and not by driver: a driver may have been linked or copied under another name.",
        "OPTIONS: dict[str, dict[str, str]] = {",
    ]
    for kind in KINDS:
        options = [option for driver in drivers if driver.kind == kind for option in driver.options]
        lines.append(f'    "{kind}": {{')
        lines += [
            f'        "{name}": "{value}",' for name, value in sorted({(o.name, o.default) for o in options}) if value
        ]
        lines[-1:] = [f'    "{kind}": {{}},'] if lines[-1].endswith("{") else [lines[-1], "    },"]
    user = sorted({option.name for driver in drivers for option in driver.options if option.user})
    words = "\n".join(["(", "    {", *(f'        "{name}",' for name in user), "    }", ")"]) if user else "()"
    lines += ["}", f"USER: frozenset[str] = frozenset{words}"]
    return "\n".join(lines) + "\n"


# -- for people ---------------------------------------------------------------------------------------------------


def table(drivers: list[Driver]) -> str:
    """Drivers and their actions, in Markdown."""
    lines = ["| driver | what it is | actions |", "| --- | --- | --- |"]
    lines += [f"| `{driver.path}` | {driver.description} | {', '.join(driver.actions)} |" for driver in drivers]
    return "\n".join(lines) + "\n"


def page(drivers: list[Driver]) -> str:
    """All that every driver.toml says, in Markdown."""
    parts = [
        "# The drivers\n",
        "Generated from every `driver.toml` by `make generated`.  `madrigal driver show NAME` tells the same of one.\n",
        'How an option gets its value is in [contract.md](contract.md), "Options"; where to put its file, in '
        "[installation.md](installation.md).\n",
    ]
    for driver in drivers:
        parts.append(f"## {driver.path}\n\n{driver.description}\n")
        parts.append("".join(f"- {what}: {said}\n" for what, said in summary(driver).items()))
        for title, needs in (("On the front-end", driver.front_end), ("On hosts", driver.hosts)):
            if needs:
                parts.append(f"{title}:\n\n" + "".join(f"- `{name}`: {what}\n" for name, what in needs.items()))
        if driver.options:
            parts.append(_option_table(driver))
        if driver.refused:
            words = "".join(f"- `{name}`: {what}\n" for name, what in driver.refused.items())
            parts.append(f"Refused as an attribute of the datastore, because it would be ignored:\n\n{words}")
    return "\n".join(parts)


def summary(driver: Driver) -> dict[str, str]:
    """What the driver can do, in words by words."""
    said = {"actions": ", ".join(driver.actions), "formats": ", ".join(driver.formats) or "none"}
    if driver.kind == "tm":
        said |= {
            "storage": "shared by front-end and hosts" if driver.shared else "each host its own",
            "space of a non-persistent disk (CLONE_TARGET)": driver.clone_target,
            "space of a persistent disk (LN_TARGET)": driver.ln_target,
            "system datastores with another driver": ", ".join(driver.tm_mad_system) or "none",
            "to another system datastore": _yes(driver.ds_migrate).lower(),
            "while the VM runs": _yes(driver.ds_live_migrate).lower(),
            "with snapshots": _yes(driver.ds_migrate_snap).lower(),
            "snapshots while the VM runs": _yes(driver.live_snapshots).lower(),
            "snapshots that lose their origin (ALLOW_ORPHANS)": driver.allow_orphans,
        }
        said |= {"format of all images": driver.driver} if driver.driver else {}
    else:
        said |= {
            "images are persistent only": _yes(driver.persistent_only).lower(),
            "for marketplaces": ", ".join(driver.marketplace_actions) or "nothing",
        }
    return said | {"sudo on hosts": ", ".join(driver.sudo) or "none"}


def _option_table(driver: Driver) -> str:
    lines = ["| option | type | default | set in | meaning |", "| --- | --- | --- | --- | --- |"]
    for option in driver.options:
        default = f"`{option.default}`" if option.default else ""
        lines.append(f"| `{option.name}` | {option.type} | {default} | {places(driver, option)} | {option.help} |")
    return "\n".join(lines) + "\n"


def places(driver: Driver, option: Option) -> str:
    """Where an option can be set, the first that decides first."""
    file = driver.kind if option.common else driver.name
    found = ["disk, image"] if option.user else []
    found.append("datastore template")
    return ", ".join([*found, *([] if option.template_only else [f"{file}.conf"])])


def _yes(value: bool) -> str:
    return "YES" if value else "NO"


# -- what is checked in -------------------------------------------------------------------------------------------


def generated(tree: str) -> dict[str, str]:
    """Everything in the checkout TREE that comes from the driver.toml files, by path: what it has to be."""
    drivers = load(tree)
    files = {f"remotes/etc/{path}": text for path, text in configuration(drivers).items()}
    files["lib/madrigal/defaults.py"] = defaults(drivers)
    files["docs/drivers.md"] = page(drivers)
    with open(f"{tree}/README.md", encoding="utf-8") as file:
        before, begin, rest = file.read().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ConfigError(f"{tree}/README.md has no '{_BEGIN}' and '{_END}' to put the table of drivers between")
    files["README.md"] = f"{before}{begin}\n\n{table(drivers)}\n{end}{after}"
    return files


def outdated(tree: str) -> dict[str, str]:
    """What of generated() the checkout TREE does not have."""
    return {path: text for path, text in generated(tree).items() if _text(f"{tree}/{path}") != text}


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
