"""Where rows come from: arrays, Arrow tables, Parquet files, folders of files. All are read in bounded memory."""

from __future__ import annotations

from fallow.sources.arrays import ArraySource
from fallow.sources.choice import Rows, source_of
from fallow.sources.folder import FolderSource
from fallow.sources.port import Source, SourceBatch, SourceRequest, UnreadRow
from fallow.sources.tables import ParquetSource, TableSource

__all__ = [
    "ArraySource",
    "FolderSource",
    "ParquetSource",
    "Rows",
    "Source",
    "SourceBatch",
    "SourceRequest",
    "TableSource",
    "UnreadRow",
    "source_of",
]
