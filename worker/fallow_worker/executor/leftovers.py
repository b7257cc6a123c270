"""Finding and ending processes that a killed Ray left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

GONE_SECONDS_MAX: Final = 5.0
_PROC: Final = Path("/proc")


def leftovers(*, folder: str, session: int) -> list[int]:
    """Living processes of one Ray: of the driver's session, or with its private folder in environment or arguments."""
    found: list[int] = []
    mark = folder.encode()
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if fields[0] in {"Z", "X"}:
                continue
            is_ours = int(fields[3]) == session
            if not is_ours and (mark in (entry / "cmdline").read_bytes() or mark in (entry / "environ").read_bytes()):
                is_ours = True
        except (OSError, IndexError, ValueError):
            continue
        if is_ours:
            found.append(int(entry.name))
    return found


async def end_leftovers(*, folder: str, session: int) -> None:
    """Kills them and waits until they are gone."""
    deadline = asyncio.get_running_loop().time() + GONE_SECONDS_MAX
    while pids := leftovers(folder=folder, session=session):
        if asyncio.get_running_loop().time() > deadline:
            log.error("ray.leftovers pids=%s", pids)
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.02)
