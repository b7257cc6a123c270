"""Descriptors: each connection takes one, and a process without any left cannot even write down what it knows."""

from __future__ import annotations

import resource
from typing import Final

DESCRIPTORS_WANTED: Final = 16_384
DESCRIPTORS_KEPT: Final = 256
"""For the journal, its views, children and logs: no connection ever takes these."""


def raise_limit() -> None:
    """Lets this process and its children have more descriptors, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connections_max(share: float) -> int:
    """How many connections a server may hold that gets this share of the process's descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    all_of_them = DESCRIPTORS_WANTED if soft == resource.RLIM_INFINITY else min(soft, DESCRIPTORS_WANTED)
    return max(16, int((all_of_them - DESCRIPTORS_KEPT) * share))
