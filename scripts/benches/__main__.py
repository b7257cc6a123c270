"""`python -m scripts.benches NAME [--json]`: one JSON object on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from scripts.benches import (
    blobs,
    carbon,
    control_plane,
    footprint,
    inference,
    latency,
    matching,
    recovery,
    robustness,
    verification,
)
from scripts.benches.report import Report

BENCHES: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[Any], Coroutine[Any, Any, Report]]]] = {
    "inference": (inference.options, inference.measure),
    "latency": (latency.options, latency.measure),
    "footprint": (footprint.options, footprint.measure),
    "blobs": (blobs.options, blobs.measure),
    "matching": (matching.options, matching.measure),
    "carbon": (carbon.options, carbon.measure),
    "control-plane": (control_plane.options, control_plane.measure),
    "recovery": (recovery.options, recovery.measure),
    "robustness": (robustness.options, robustness.measure),
    "verification": (verification.options, verification.measure),
}


def main() -> int:
    """The exit status: 0 when the run counts, 1 when it is void."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure the whole system on this machine.")
    commands = parser.add_subparsers(required=True, metavar="NAME", dest="name")
    for name, (options, _) in BENCHES.items():
        command = commands.add_parser(name)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout (else lines for people)")
        options(command)
    chosen = parser.parse_args()
    # SIGTERM takes the same way out as Ctrl-C, so that nothing stays behind either way. A shell that starts this in the
    # background has both ignored for it and for every child, and then no child could be ended.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    report = asyncio.run(BENCHES[chosen.name][1](chosen))
    if chosen.json:
        print(json.dumps({"bench": chosen.name, **report.facts}))
    else:
        for key, value in report.facts.items():
            print(f"{key:28} {value}")
    for reason in report.void:
        print(f"void: {reason}", file=sys.stderr)
    return 1 if report.void else 0


if __name__ == "__main__":
    sys.exit(main())
