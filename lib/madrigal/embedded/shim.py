"""`onevm`, `onedatastore`, `oneimage` and `onehost` for drivers that run these commands: `show -x ID`, nothing else.

A program of its own: the wrappers in a state's bin/ run this file with the command's name as the first argument.
The embedded front-end's one.*.info also takes a name for an id, so none has to be looked up here.
"""

import os
import sys
import xmlrpc.client

KINDS = {"onevm": "vm", "onedatastore": "datastore", "oneimage": "image", "onehost": "host"}


def main() -> int:
    name, words = sys.argv[1], sys.argv[2:]
    options = {word for word in words if word.startswith("-")}
    plain = [word for word in words if not word.startswith("-")]
    if len(plain) != 2 or plain[0] != "show" or not options & {"-x", "--xml"}:
        sys.stderr.write(f"{name}: the embedded front-end only knows '{name} show -x ID'\n")
        return 255
    try:
        with open(os.environ["ONE_AUTH"], encoding="ascii") as file:
            session = file.read().strip()
        front_end = xmlrpc.client.ServerProxy(os.environ["ONE_XMLRPC"])
        ident = int(plain[1]) if plain[1].isdecimal() else plain[1]
        answer = getattr(front_end.one, KINDS[name]).info(session, ident)
    except (KeyError, OSError, xmlrpc.client.Error) as error:
        sys.stderr.write(f"{name}: cannot ask the front-end: {error!r}\n")
        return 255
    assert isinstance(answer, list)
    if not answer[0]:
        sys.stderr.write(f"{answer[1]}\n")
        return 255
    sys.stdout.write(f"{answer[1]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
