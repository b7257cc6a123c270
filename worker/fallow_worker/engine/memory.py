"""Memory shared between a supervisor and its child: one side cannot hurt the other by what it does to it."""

from __future__ import annotations

import os
import tempfile
from typing import Final

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows runs engines through WSL2
    fcntl = None  # type: ignore[assignment]

# From <linux/fcntl.h>; Python 3.11 has them on Linux only.
_F_ADD_SEALS: Final = 1033
_F_SEAL_SEAL: Final = 1
_F_SEAL_SHRINK: Final = 2
_F_SEAL_GROW: Final = 4

Buffer = bytes | bytearray | memoryview


class SharedMemory:
    """An anonymous file in memory (a memfd; an unlinked temporary file where there is none).

    The supervisor reads and writes it with pread and pwrite and never maps it, so nothing that a child does to it can
    make the supervisor fault.
    """

    __slots__ = ("_child_fd", "_fd")

    def __init__(self, fd: int, child_fd: int) -> None:
        """Takes descriptors that `readable_by_child` or `writable_by_child` opened; call those."""
        self._fd = fd
        self._child_fd = child_fd

    @classmethod
    def readable_by_child(cls, name: str) -> SharedMemory:
        """Memory that grows as the supervisor writes it, and that the child can only read."""
        fd = _anonymous_file(name)
        try:
            child_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            child_fd = os.dup(fd)
        return cls(fd, child_fd)

    @classmethod
    def writable_by_child(cls, name: str, size_bytes: int) -> SharedMemory:
        """Memory of a fixed size, sealed where the system can: the child can neither shrink nor grow it."""
        fd = _anonymous_file(name)
        os.ftruncate(fd, size_bytes)
        if fcntl is not None and hasattr(os, "memfd_create"):
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
        return cls(fd, os.dup(fd))

    @property
    def child_fd(self) -> int:
        """The descriptor to pass to the child; closed on this side by `passed`."""
        assert self._child_fd >= 0, "the descriptor was passed already"
        return self._child_fd

    def passed(self) -> None:
        """The child has its descriptor; ours for it is closed."""
        if self._child_fd >= 0:
            os.close(self._child_fd)
            self._child_fd = -1

    def write(self, offset_bytes: int, data: Buffer) -> None:
        """Puts `data` at an offset. Raises OSError: ENOSPC or ENOMEM when the machine has no memory left."""
        view = memoryview(data).cast("B")
        while view.nbytes:
            written = os.pwrite(self._fd, view, offset_bytes)
            view = view[written:]
            offset_bytes += written

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """A copy of `length_bytes` bytes, fewer at the end of the memory."""
        first = os.pread(self._fd, length_bytes, offset_bytes)
        if len(first) == length_bytes or not first:
            return first
        pieces = [first]
        got = len(first)
        while got < length_bytes:
            piece = os.pread(self._fd, length_bytes - got, offset_bytes + got)
            if not piece:
                break
            pieces.append(piece)
            got += len(piece)
        return b"".join(pieces)

    def give_back(self) -> None:
        """Frees every page of a memory that only the supervisor can write; it is empty afterwards.

        Only while the child works on nothing: a mapping of it would fault.
        """
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Closes our descriptors; the memory is gone when the child's are too."""
        self.passed()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _anonymous_file(name: str) -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"fallow-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    descriptor, path = tempfile.mkstemp(prefix=f"fallow-{name}-")
    os.unlink(path)  # noqa: PTH108 - paired with mkstemp
    return descriptor
