"""Check a part of the drivers: what `madrigal check --jobs` starts, with its options as one JSON document."""

import json
import sys
from typing import Any

from madrigal.conformance import Options, run

values: dict[str, Any] = {
    name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(sys.argv[1]).items()
}
sys.exit(0 if run(Options(**values)).holds else 1)
