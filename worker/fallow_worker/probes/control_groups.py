"""Limits that a container or a service manager set: control groups, version 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")

Reading = Callable[[str], float | None]


def control_group_limit(file: str, read: Reading) -> float | None:
    """The least value of `file` in this process's control group and those above it; None: no limit."""
    values = [value for folder in _folders() if (value := _value(folder / file, read)) is not None]
    return min(values, default=None)


def control_group_value(file: str, read: Reading) -> float | None:
    """The value of `file` in this process's own control group; None where there is none."""
    for folder in _folders():
        return _value(folder / file, read)
    return None


def _folders() -> Iterator[Path]:
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if own is None:
        return
    folder = _ROOT / own.lstrip("/")
    # Inside a container the path is that of the host, and only the root is there to see.
    yield from (place for place in (folder, *folder.parents) if place.is_relative_to(_ROOT) and place.is_dir())


def _value(path: Path, read: Reading) -> float | None:
    try:
        return read(path.read_text().strip())
    except (OSError, ValueError):
        return None
