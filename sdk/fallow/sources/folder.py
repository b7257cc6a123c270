"""Rows from a folder of files: each file is a row; of long files only the codec's windows are read and travel."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from fallow.errors import FallowError, Reason
from fallow.limits import ROW_BYTES_MAX
from fallow.schema import BytesColumn
from fallow.sources.port import BATCH_BYTES_TARGET, SourceBatch, SourceRequest, UnreadRow, missing_column

PATH_COLUMN = "path"
SIZE_COLUMN = "size_bytes"
_KEPT_TYPES = {PATH_COLUMN: pa.string(), SIZE_COLUMN: pa.int64()}
BATCH_FILES_MAX = 4_096
_ROW_OVERHEAD_BYTES = 4
_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class FolderSource:
    """All regular files under a folder, in path order; symbolic links are not followed.

    Keeps `path` (relative, with `/`) and, when asked, `size_bytes`. A file that cannot be read is an unread row.
    """

    def __init__(self, folder: str | Path, *, include_path: bool = True, exclude: Sequence[str] = ()) -> None:
        """All files under `folder` but those below a folder called as in `exclude`. Raises FIELD_INVALID."""
        self._folder = Path(folder)
        self._include_path = include_path
        self._exclude = frozenset(exclude)
        if not self._folder.is_dir():
            raise FallowError(Reason.FIELD_INVALID, f"{folder} is no folder", field=str(folder))

    def check(self, request: SourceRequest) -> None:
        """See `Source.check`."""
        columns = request.schema.columns
        if len(columns) != 1 or not isinstance(columns[0], BytesColumn):
            raise FallowError(
                Reason.SCHEMA_MISMATCH,
                f"a folder of files gives one column of bytes, the bundle takes {', '.join(c.name for c in columns)}",
                field="rows",
                hint="a folder of Parquet files is read with ParquetSource(folder)",
            )
        for name in request.keep:
            if name not in _KEPT_TYPES:
                raise missing_column(name, list(_KEPT_TYPES))

    def kept_schema(self, request: SourceRequest) -> pa.Schema | None:
        """See `Source.kept_schema`."""
        names = self._kept_names(request)
        return pa.schema([pa.field(name, _KEPT_TYPES[name]) for name in names]) if names else None

    def batches(self, request: SourceRequest) -> Iterator[SourceBatch]:
        """See `Source.batches`."""
        self.check(request)
        column = request.schema.columns[0].name
        window = request.windows.get(column)
        schema = self.kept_schema(request)
        contents: list[bytes] = []
        kept: dict[str, list[object]] = {name: [] for name in self._kept_names(request)}
        unread: list[UnreadRow] = []
        size = 0

        def batch() -> SourceBatch:
            rows = pa.RecordBatch.from_pydict(kept, schema=schema) if schema is not None else None
            return SourceBatch({column: list(contents)}, len(contents), rows, list(unread))

        for path in self._files(self._folder):
            told = {PATH_COLUMN: _text(path.relative_to(self._folder)), SIZE_COLUMN: None}
            try:
                content, length = _read(path, window)
            except (OSError, _UnreadError) as error:
                reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                unread.append(UnreadRow(reason, {name: told[name] for name in kept}))
            else:
                contents.append(content)
                size += len(content)
                for name, values in kept.items():
                    values.append(length if name == SIZE_COLUMN else told[name])
            if size >= BATCH_BYTES_TARGET or len(contents) >= BATCH_FILES_MAX or len(unread) >= BATCH_FILES_MAX:
                yield batch()
                contents.clear()
                unread.clear()
                size = 0
                for values in kept.values():
                    values.clear()
        if contents or unread:
            yield batch()

    def _kept_names(self, request: SourceRequest) -> list[str]:
        always = [PATH_COLUMN] if self._include_path else []
        return list(dict.fromkeys([*always, *request.keep]))

    def _files(self, folder: Path) -> Iterator[Path]:
        """Regular files, and whatever cannot be listed, in path order; one folder's names are in memory at a time."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            if folder == self._folder:
                raise FallowError(Reason.FIELD_INVALID, f"cannot list {folder}", field=str(folder)) from None
            yield folder
            return
        for entry in found:
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name in self._exclude:
                    continue
                yield from self._files(path)
            elif entry.is_file(follow_symlinks=False):
                yield path


class _UnreadError(Exception):
    """Why a file cannot be a row."""


def _read(path: Path, window: tuple[int, int] | None) -> tuple[bytes, int]:
    """(what travels of the file, its length in bytes)."""
    descriptor = os.open(path, _OPEN_FLAGS)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _UnreadError(os.strerror(errno.EISDIR) if stat.S_ISDIR(found.st_mode) else "not a regular file")
        length = found.st_size
        if window is None or length <= sum(window):
            if length > ROW_BYTES_MAX - _ROW_OVERHEAD_BYTES:
                raise _UnreadError(f"file of {length} bytes, more than the {ROW_BYTES_MAX} bytes of a row")
            return _read_span(descriptor, 0, length), length
        head, tail = window
        return _read_span(descriptor, 0, head) + _read_span(descriptor, length - tail, tail), length
    finally:
        os.close(descriptor)


def _read_span(descriptor: int, start: int, length: int) -> bytes:
    parts: list[bytes] = []
    left = length
    while left:
        part = os.pread(descriptor, left, start + length - left)
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _text(path: Path) -> str:
    """The path with `/`; bytes that are no UTF-8 are shown as replacement characters."""
    return os.fsencode(path.as_posix()).decode(errors="replace")
