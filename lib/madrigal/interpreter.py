"""Find a fit interpreter when the one that runs an action is older than 3.11.

Every executable starts with `#!/usr/bin/env python3`; what that is, is up to the PATH of whoever calls.
The candidates are MADRIGAL_PYTHON, then those below.  (Python 3.6 has to read this.)
"""

import os
import sys

_CANDIDATES = ["/usr/bin/python3", "/usr/local/bin/python3"]
_CANDIDATES += ["/usr/bin/python3.{}".format(minor) for minor in (11, 12, 13, 14)]


def change() -> None:
    """Start the running action again under the next candidate, or say that there is none and exit.

    Raises ImportError where no action runs: a program that imports the library keeps its interpreter.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None) or ""
    if os.path.basename(os.path.dirname(os.path.dirname(os.path.abspath(script)))) not in ("tm", "datastore"):
        raise ImportError("madrigal needs Python 3.11 or newer; this is {}".format(sys.executable))
    # by name, because a virtual environment's is a link to one that sees other packages
    tried = os.environ.get("MADRIGAL_TRIED", "").split(":") + [sys.executable]
    for candidate in [os.environ.get("MADRIGAL_PYTHON", "")] + _CANDIDATES:
        if os.access(candidate, os.X_OK) and candidate not in tried:
            os.environ["MADRIGAL_TRIED"] = ":".join(tried)
            os.execv(candidate, [candidate, script] + sys.argv[1:])
    sys.stderr.write("this driver needs Python 3.11 or newer: install it, or name one in MADRIGAL_PYTHON\n")
    sys.exit(23)
