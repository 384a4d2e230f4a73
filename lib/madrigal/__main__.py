"""`python3 -m madrigal`: the same as the `madrigal` command."""

import sys

from madrigal.cli import main

if __name__ == "__main__":
    sys.exit(main())
