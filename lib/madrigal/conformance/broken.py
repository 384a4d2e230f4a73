"""Dumps that are not what the contract says: cut off, not XML, with entities, huge, without elements, with others.

Made from a right one, by chance but the same each time.
"""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Iterator

CANARY = "canary-fe3b"
"""What a dump that gets executed leaves as a file in /tmp."""

_DOCTYPE = (
    b'<!DOCTYPE DS_DRIVER_ACTION_DATA [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
    b'<!DOCTYPE DS_DRIVER_ACTION_DATA [<!ENTITY x "aaaaaaaaaa">]>',
    b'<!DOCTYPE DS_DRIVER_ACTION_DATA SYSTEM "http://127.0.0.1:1/x">',
)


def injections() -> list[str]:
    """Values that a shell would act upon, that name other places, or that are hard to write down."""
    touch = f"touch /tmp/{CANARY}"
    return [
        f"$({touch})",
        f"`{touch}`",
        f"';{touch};'",
        f'";{touch};"',
        f"'$({touch.replace(' ', '${IFS}')})'",
        f"x; {touch}",
        f"x\n{touch}\n",
        f"x$({touch.replace(' ', '${IFS}')})",
        f"' $({touch}) '",
        f"| {touch} |",
        f"-o /tmp/{CANARY}",
        f"--help;{touch}",
        "a b",
        "*",
        "../../../etc/passwd",
        "é漢𝄞",
        "%s%n",
        "x" * 255,
        "-rf",
    ]


def always() -> list[tuple[str, bytes]]:
    """Those that are tried in any profile, by what they are."""
    root = b"DS_DRIVER_ACTION_DATA"
    nested = b"<" + root + b">" + b"<IMAGE>" * 5000
    return [
        ("empty", b""),
        ("not base64", b"<" + root + b"/>"),
        ("base64 of what is not XML", base64.b64encode(b"x" * 100)),
        ("another document", base64.b64encode(b"<VM><ID>1</ID></VM>")),
        ("no elements", base64.b64encode(b"<" + root + b"></" + root + b">")),
        ("all bytes", base64.b64encode(bytes(range(256)))),
        ("deeply nested", base64.b64encode(nested)),
    ]


def dumps(dump: bytes, count: int, seed: str) -> Iterator[tuple[str, bytes]]:
    """COUNT broken variants of the base64 DUMP: what was done, and the result."""
    chance = random.Random(seed)
    text = base64.b64decode(dump)
    elements = list(re.finditer(rb"<(\w+)>([^<]*|<!\[CDATA\[.*?\]\]>)</\1>", text))
    for number in range(count):
        how = number % 10
        if how == 0:
            at = chance.randrange(len(dump))
            yield f"cut off after {at} characters", dump[:at]
        elif how == 1:
            at = chance.randrange(len(text))
            yield f"XML cut off after {at} bytes", base64.b64encode(text[:at])
        elif how == 2:
            at, byte = chance.randrange(len(text)), chance.randrange(256)
            yield f"byte {at} is {byte}", base64.b64encode(text[:at] + bytes([byte]) + text[at + 1 :])
        elif how == 3:
            doctype = chance.choice(_DOCTYPE)
            one = chance.choice(elements)
            changed = text[: one.start(2)] + b"&x;" + text[one.end(2) :]
            yield f"an entity in {one[1].decode()}", base64.b64encode(doctype + changed)
        elif how == 4:
            one = chance.choice(elements)
            yield (
                f"without {one[1].decode()} at {one.start()}",
                base64.b64encode(text[: one.start()] + text[one.end() :]),
            )
        elif how == 5:
            one = chance.choice(elements)
            yield (
                f"{one[1].decode()} at {one.start()} is empty",
                base64.b64encode(text[: one.start(2)] + text[one.end(2) :]),
            )
        elif how == 6:
            one, size = chance.choice(elements), chance.choice((300, 5000, 200_000))
            changed = text[: one.start(2)] + b"9" * size + text[one.end(2) :]
            yield f"{one[1].decode()} at {one.start()} has {size} digits", base64.b64encode(changed)
        elif how == 7:
            one, value = chance.choice(elements), chance.choice(injections()).encode()
            value = b"<![CDATA[" + value + b"]]>"
            changed = text[: one.start(2)] + value + text[one.end(2) :]
            yield f"{one[1].decode()} at {one.start()} is {value.decode()!r}", base64.b64encode(changed)
        elif how == 8:
            one = chance.choice(elements)
            yield (
                f"{one[1].decode()} at {one.start()} twice",
                base64.b64encode(text[: one.end()] + one[0] + text[one.end() :]),
            )
        else:
            at = chance.randrange(len(dump))
            yield f"character {at} is not base64", dump[:at] + bytes([chance.randrange(1, 256)]) + dump[at + 1 :]


def of_attribute(dump: bytes, path: str, value: str) -> bytes:
    """DUMP with the element PATH (`IMAGE/FS`) having VALUE, made if it is not there."""
    from lxml import etree

    root = etree.fromstring(base64.b64decode(dump))
    element = root
    for name in path.split("/"):
        found = element.find(name)
        element = found if found is not None else etree.SubElement(element, name)
    element.text = etree.CDATA(value)
    return base64.b64encode(etree.tostring(root, encoding="utf-8"))  # in CDATA there are no references
