"""Stands where drivers look for the library, PREFIX/share/madrigal/lib, and leads them to where pip has put it.

Not beside them, because pip has one place for packages and another for everything else.  It also names the Python
that pip has installed for, which is asked if the one that runs a driver does not fit.  (Python 3.6 has to read this.)
"""

import os
import sys


def _site_packages(prefix):
    found = []
    for lib in ("lib", "lib64", "local/lib"):
        try:
            pythons = sorted(os.listdir(os.path.join(prefix, lib)), key=lambda name: name != _OURS)
        except OSError:
            continue
        for python in pythons:
            for packages in ("site-packages", "dist-packages"):
                path = os.path.join(prefix, lib, python, packages)
                if python.startswith("python3") and os.path.exists(path + "/madrigal/__init__.py"):
                    found.append((path, python))
    return found[0] if found else (None, None)


_OURS = "python{}.{}".format(*sys.version_info[:2])
_HERE = os.path.dirname(os.path.realpath(__file__))
_PREFIX = os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))
_PACKAGES, _PYTHON = _site_packages(_PREFIX)
if _PACKAGES is None:
    sys.stderr.write("these drivers belong to a package that is not installed in {} any more\n".format(_PREFIX))
    sys.exit(20)
if os.access(os.path.join(_PREFIX, "bin", _PYTHON), os.X_OK):
    os.environ.setdefault("MADRIGAL_PYTHON", os.path.join(_PREFIX, "bin", _PYTHON))
sys.path[0] = _PACKAGES
del sys.modules["madrigal"]
import madrigal  # noqa: F401 # the real one, which is what the importing driver gets
