"""`python3 -m madrigal.drivers` says which files are older than the driver.toml files; with --write it renews them."""

import os
import sys

from madrigal.drivers.generate import outdated

TREE = os.path.abspath(f"{os.path.dirname(__file__)}/../../..")


def main() -> int:
    write = sys.argv[1:] == ["--write"]
    files = outdated(TREE)
    for path, text in files.items():
        if write:
            os.makedirs(os.path.dirname(f"{TREE}/{path}"), exist_ok=True)
            with open(f"{TREE}/{path}", "w", encoding="utf-8") as file:
                file.write(text)
        print(f"{path} is written" if write else f"{path} is older than the driver.toml files: make generated")
    return 1 if files and not write else 0


sys.exit(main())
