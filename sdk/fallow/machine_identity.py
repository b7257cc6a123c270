"""Which machine this is, as a digest: tells two machines apart that hold copies of one key, and nothing else."""

from __future__ import annotations

import hashlib
import os
import platform
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Final

MACHINE_VARIABLE: Final = "FALLOW_MACHINE_ID"
"""Overrides what is found: for containers, which may share their host's."""
_ID_FILES: Final = ("/etc/machine-id", "/var/lib/dbus/machine-id")


@lru_cache(maxsize=1)
def machine_digest() -> bytes:
    """SHA-256 over the operating system's machine id, the first network address and the host name.

    Copied disks share the machine id until somebody makes it anew, and seldom the network address. Looked up once: what
    changes while a process runs makes no other machine of it.
    """
    named = os.environ.get(MACHINE_VARIABLE)
    facts = [named] if named else [_machine_id(), _network_address(), platform.node()]
    return hashlib.sha256("\n".join(["fallow/machine", *facts]).encode("utf-8", "replace")).digest()


def _machine_id() -> str:
    for name in _ID_FILES:
        try:
            found = Path(name).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue
        if found:
            return found
    return ""


def _network_address() -> str:
    node = uuid.getnode()
    # The multicast bit stands for a number that was drawn because no address was found: another at each start.
    return "" if node >> 40 & 1 else f"{node:012x}"
