"""How the cores and the memory of one node are dealt out to engine children: plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fallow.limits import BLOCK_BYTES_MAX, GIB, MIB
from fallow_worker.engine.protocol import DATA_BYTES_DEFAULT, DATA_BYTES_MIN, OUTPUT_MEMORY_BYTES, data_limit_class

CORES_PER_CHILD: Final = 4
"""A child keeps so many cores busy with batches of its own in flight, and a lone row gets them all; more children than
that would hold the weights more often, fewer would wait for one interpreter."""
CHILDREN_MAX: Final = 8
"""Engine children that work at once on a node. Cores beyond that become threads: each child holds its own weights."""
MEMORY_FACTOR: Final = 2
"""A child may grow to this multiple of the peak that inspection saw …"""
MEMORY_BYTES_BASE: Final = GIB // 2
"""… plus this, before it is taken for a bomb."""
MEMORY_SHARE: Final = 0.75
"""Part of the node's memory that all children together may be allowed."""
SHARED_BYTES_MAX: Final = OUTPUT_MEMORY_BYTES + 2 * BLOCK_BYTES_MAX
"""Input and output memory of a child, which counts as resident while it is mapped."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`children` work at once, each on `threads` cores."""

    children: int
    threads: int


@dataclass(frozen=True, slots=True)
class MemoryCap:
    """What one child may take."""

    data_bytes: int
    """RLIMIT_DATA: a power of two, the same on most machines, because it belongs to the execution class."""
    resident_bytes: int
    """Resident size, shared memory included, above which the supervisor kills it."""


def memory_cap(peak_bytes: int, *, program_bytes: int = 0) -> MemoryCap:
    """The cap of a child whose bundle peaked at `peak_bytes` when inspected (0: nobody knows)."""
    wish = (peak_bytes or program_bytes) * MEMORY_FACTOR + MEMORY_BYTES_BASE
    data = data_limit_class(DATA_BYTES_DEFAULT)
    while data < wish:
        data *= 2
    resident = wish + SHARED_BYTES_MAX if peak_bytes else data + SHARED_BYTES_MAX
    return MemoryCap(data_bytes=data, resident_bytes=min(resident, data + SHARED_BYTES_MAX))


def node_layout(*, cores: int, memory_bytes: int, cap: MemoryCap, children_wanted: int = 0) -> Layout:
    """How a node of `cores` and `memory_bytes` runs a bundle with that cap.

    A child runs one batch on each of its threads, so one child of two threads makes as many rows as two children of one
    (4.6 and 4.7 ms of CPU a row for Magika on two cores), holds the weights once, and turns all its threads to a lone
    row. There are as many children as `CORES_PER_CHILD` and `CHILDREN_MAX` say, fewer when their caps do not fit: then
    each gets more threads.
    """
    assert cores >= 1
    most = children_wanted or min(-(-cores // CORES_PER_CHILD), CHILDREN_MAX)
    fitting = int(memory_bytes * MEMORY_SHARE) // max(cap.resident_bytes - SHARED_BYTES_MAX, DATA_BYTES_MIN)
    children = max(1, min(most, fitting, cores))
    return Layout(children=children, threads=max(1, cores // children))


def describe_bytes(count: int) -> str:
    """A size for people."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{max(1, count // MIB)} MiB"
