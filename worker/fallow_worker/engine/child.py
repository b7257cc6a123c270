"""The engine child: locks itself in, then runs one foreign program. Started by its path; see `protocol`.

The first lines run with the standard library alone, before anything has started a thread.
"""

from __future__ import annotations

import json
import sys
import time

_STARTED = time.monotonic()


def main() -> None:
    """Runs the whole life of a child and never returns."""
    raw = json.loads(sys.argv[1])
    sys.path += [path for path in raw["search_paths"] if path not in sys.path]
    from fallow_worker.engine.life import live

    live(sys.argv[1], started=_STARTED)


if __name__ == "__main__":
    main()
