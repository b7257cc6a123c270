"""Runs a module as a child that never outlives its parent: `python -m fallow_coordinator.attended MODULE ARGUMENTS…`.

The kernel sends SIGTERM when the thread that started this process ends, however it ends; the coordinator starts its
children from its main thread. Where the kernel cannot (macOS), a thread watches the parent.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
from typing import Final

PARENT_VARIABLE: Final = "FALLOW_ATTENDED_BY"
"""Process id of the parent, so that a parent that died before this process could ask is noticed too."""
_PR_SET_PDEATHSIG: Final = 1
_WATCH_INTERVAL_S: Final = 0.5


def attend() -> None:
    """Ties this process to the parent named in the environment; ends it at once when that one is gone already."""
    named = os.environ.get(PARENT_VARIABLE)
    parent = int(named) if named else os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-watch").start()
    if os.getppid() != parent:
        raise SystemExit(0)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_INTERVAL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Becomes the module named in the arguments."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m fallow_coordinator.attended MODULE [ARGUMENT…]")
    attend()
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
