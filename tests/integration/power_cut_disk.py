"""A disk whose power can be cut: an SQLite VFS that notes every write and every sync, and rebuilds what was left after.

The VFS stands between SQLite and the operating system (https://sqlite.org/vfs.html): it hands each call to the built-in
one and keeps a log of writes, truncations, deletions and syncs, in order. From the log and a moment in it, `survivors`
makes a file system as a power cut at that moment might have left it: what was synced is there; of each later write
nothing, all, or only its first 512-byte sectors; a file that was never synced may be missing altogether. The shared
index is memory and never survives. What this proves: SQLite, used as our store uses it, asks for its syncs before
`append` returns, in an order that always leaves a whole journal. What it cannot prove: that a disk keeps what it
reported as synced.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SECTOR_BYTES = 512
SQLITE_OK = 0
SQLITE_FULL = 13
SQLITE_IOERR_FSYNC = 10 | (4 << 8)

_POINTER = ctypes.c_void_p
_WRITE = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, ctypes.c_int, ctypes.c_int64)
_TRUNCATE = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_int64)
_SYNC = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_int)
# The name is handed on as the pointer it came as: SQLite keeps it for as long as the file is open.
_OPEN = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, _POINTER, ctypes.c_int, ctypes.POINTER(ctypes.c_int))
_DELETE = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_char_p, ctypes.c_int)


class _Methods(ctypes.Structure):
    """`sqlite3_io_methods`."""

    _fields_ = (
        ("iVersion", ctypes.c_int),
        ("xClose", _POINTER),
        ("xRead", _POINTER),
        ("xWrite", _POINTER),
        ("xTruncate", _POINTER),
        ("xSync", _POINTER),
        ("others", _POINTER * 13),
    )


class _Vfs(ctypes.Structure):
    """`sqlite3_vfs`."""

    _fields_ = (
        ("iVersion", ctypes.c_int),
        ("szOsFile", ctypes.c_int),
        ("mxPathname", ctypes.c_int),
        ("pNext", _POINTER),
        ("zName", ctypes.c_char_p),
        ("pAppData", _POINTER),
        ("xOpen", _POINTER),
        ("xDelete", _POINTER),
        ("others", _POINTER * 14),
    )


class _File(ctypes.Structure):
    """`sqlite3_file`."""

    _fields_ = (("pMethods", ctypes.POINTER(_Methods)),)


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that SQLite asked of a file: `write`, `truncate`, `sync` or `delete`."""

    kind: str
    path: str
    offset: int = 0
    """Of a write; the new size of a truncation."""
    data: bytes = b""


class Fault(NamedTuple):
    """An error to give back for one kind of call, as long as it is set."""

    kind: str
    code: int


class PowerCutDisk:
    """While entered, every database that is opened in this process writes through the log. One at a time."""

    def __init__(self) -> None:
        self.log: list[Operation] = []
        self.fault: Fault | None = None
        self._library = ctypes.CDLL(_sqlite3.__file__)
        self._library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        self._library.sqlite3_vfs_find.argtypes = (ctypes.c_char_p,)
        self._library.sqlite3_vfs_register.argtypes = (ctypes.POINTER(_Vfs), ctypes.c_int)
        self._under = self._library.sqlite3_vfs_find(None)
        self._files: dict[int, str] = {}
        self._methods: dict[int, _Methods] = {}
        self._alive: list[Any] = []
        """Callbacks that C holds on to; ctypes frees what Python forgets."""
        self._vfs = _Vfs.from_buffer_copy(self._under.contents)
        self._vfs.pNext = None
        self._vfs.zName = b"power-cut"
        self._vfs.xOpen = self._callback(_OPEN, self._open)
        self._vfs.xDelete = self._callback(_DELETE, self._delete)

    def __enter__(self) -> PowerCutDisk:
        assert self._library.sqlite3_vfs_register(ctypes.byref(self._vfs), 1) == SQLITE_OK
        return self

    def __exit__(self, *_: object) -> None:
        assert self._library.sqlite3_vfs_register(self._under, 1) == SQLITE_OK
        self._library.sqlite3_vfs_unregister(ctypes.byref(self._vfs))

    def _callback(self, kind: Any, function: Callable[..., int]) -> int | None:
        made = kind(function)
        self._alive.append(made)
        return ctypes.cast(made, _POINTER).value

    def _open(self, _vfs: int, name: int | None, file: int, flags: int, out_flags: Any) -> int:
        code: int = _OPEN(self._under.contents.xOpen)(ctypes.cast(self._under, _POINTER), name, file, flags, out_flags)
        if code == SQLITE_OK and name is not None:
            self._files[file] = ctypes.string_at(name).decode()
            opened = ctypes.cast(file, ctypes.POINTER(_File))
            opened.contents.pMethods = ctypes.pointer(self._wrapped(opened.contents.pMethods))
        return code

    def _wrapped(self, methods: Any) -> _Methods:
        """The file's own methods with ours in front; one copy for each set of methods."""
        address = ctypes.addressof(methods.contents)
        if address not in self._methods:
            copy = _Methods.from_buffer_copy(methods.contents)
            write, truncate, sync = _WRITE(copy.xWrite), _TRUNCATE(copy.xTruncate), _SYNC(copy.xSync)

            def on_write(file: int, data: int, length: int, offset: int) -> int:
                if (code := self._faulty("write")) != SQLITE_OK:
                    return code
                self.log.append(Operation("write", self._files[file], offset, ctypes.string_at(data, length)))
                done: int = write(file, data, length, offset)
                return done

            def on_truncate(file: int, size: int) -> int:
                self.log.append(Operation("truncate", self._files[file], size))
                done: int = truncate(file, size)
                return done

            def on_sync(file: int, flags: int) -> int:
                if (code := self._faulty("sync")) != SQLITE_OK:
                    return code
                done: int = sync(file, flags)
                self.log.append(Operation("sync", self._files[file]))
                return done

            copy.xWrite = self._callback(_WRITE, on_write)
            copy.xTruncate = self._callback(_TRUNCATE, on_truncate)
            copy.xSync = self._callback(_SYNC, on_sync)
            self._methods[address] = copy
        return self._methods[address]

    def _delete(self, _vfs: int, name: bytes, sync_folder: int) -> int:
        self.log.append(Operation("delete", name.decode()))
        code: int = _DELETE(self._under.contents.xDelete)(ctypes.cast(self._under, _POINTER), name, sync_folder)
        return code

    def _faulty(self, kind: str) -> int:
        return self.fault.code if self.fault is not None and self.fault.kind == kind else SQLITE_OK


@dataclass(slots=True)
class _FileImage:
    durable: bytearray
    synced_once: bool
    later: list[Operation]


class DiskHistory:
    """Plays a log forward and tells, at any moment of it, what a power cut would have left."""

    def __init__(self, log: list[Operation], base: Mapping[str, bytes] | None = None) -> None:
        """`base` is what lay durably on the disk before the log began, by file name."""
        self._log = log
        self._next = 0
        self._files: dict[str, _FileImage] = {}
        self._base = base or {}

    def advance(self, count: int) -> None:
        """Goes on until `count` operations of the log have happened."""
        while self._next < count:
            operation = self._log[self._next]
            self._next += 1
            image = self._files.get(operation.path)
            if image is None:
                before = self._base.get(Path(operation.path).name)
                image = self._files[operation.path] = _FileImage(bytearray(before or b""), before is not None, [])
            if operation.kind == "sync":
                for later in image.later:
                    _apply(image.durable, later)
                image.later.clear()
                image.synced_once = True
            elif operation.kind == "delete":
                del self._files[operation.path]
            else:
                image.later.append(operation)

    def survivors(self, folder: Path, chance: random.Random, kept_0_to_1: float) -> None:
        """Writes the files into `folder`; each unsynced operation survives, wholly or torn, with that probability."""
        touched = {Path(path).name for path in self._files}
        for name, before in self._base.items():
            if name not in touched:
                (folder / name).write_bytes(before)
        for path, image in self._files.items():
            if not image.synced_once and chance.random() >= kept_0_to_1:
                continue
            data = bytearray(image.durable)
            for operation in image.later:
                if chance.random() < kept_0_to_1:
                    _apply(data, _torn(operation, chance) if chance.random() < 0.5 else operation)
            (folder / Path(path).name).write_bytes(data)


def _apply(data: bytearray, operation: Operation) -> None:
    if operation.kind == "truncate":
        del data[operation.offset :]
        data.extend(bytes(operation.offset - len(data)))
        return
    end = operation.offset + len(operation.data)
    if len(data) < end:
        data.extend(bytes(end - len(data)))
    data[operation.offset : end] = operation.data


def _torn(operation: Operation, chance: random.Random) -> Operation:
    """Only the first sectors of a write."""
    if operation.kind != "write" or len(operation.data) <= SECTOR_BYTES:
        return operation
    sectors = chance.randrange(1, len(operation.data) // SECTOR_BYTES + 1)
    return Operation("write", operation.path, operation.offset, operation.data[: sectors * SECTOR_BYTES])
