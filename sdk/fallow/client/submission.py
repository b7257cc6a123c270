"""What it takes to submit a map job: checks that need no coordinator, the dataset's blocks, the request."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

from fallow.bundle import RESERVED_PREFIX, BytesCodec
from fallow.bundle_file import Bundle
from fallow.client.blobs import BlobTransfers, Upload
from fallow.dataset import Block, DatasetReader
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.job import DatasetBlock, JobOptions
from fallow.limits import BLOB_BYTES_MAX, INLINE_PAYLOAD_BYTES_MAX, JOB_ROWS_MAX, TITLE_BYTES_MAX
from fallow.roles import DataClass
from fallow.rows import RowCodec
from fallow.session import BlobReference
from fallow.sources import Rows, SourceRequest, source_of
from fallow.v1 import job_pb2, job_service_pb2
from fallow.wire.blob import BlobKind, reference_to_message
from fallow.wire.enums import DATA_CLASSES
from fallow.wire.job import block_to_message, options_to_message
from fallow.wire.schema import encode_schema

IDEMPOTENCY_KEY_BYTES: Final = (16, 64)
BLOCKS_AT_ONCE: Final = 4
"""Blocks of a dataset that are in memory together."""


@dataclass(frozen=True, slots=True)
class MapRequest:
    """A map job as its submitter states it."""

    bundle: Bundle
    rows: Rows
    data: DataClass
    keep: Sequence[str] = ()
    inputs: Mapping[str, str | Sequence[str]] = field(default_factory=dict[str, "str | Sequence[str]"])
    cast: bool = False
    title: str = ""
    options: JobOptions = field(default_factory=JobOptions)
    idempotency_key: bytes = b""
    pool_id: str = ""

    def source_request(self) -> SourceRequest:
        """What is asked of the source. Raises FIELD_INVALID or SCHEMA_MISMATCH for names that cannot be."""
        manifest = self.bundle.manifest
        named = {column.name for column in manifest.input_schema.columns}
        for name in self.inputs:
            if name not in named:
                raise FallowError(
                    Reason.SCHEMA_MISMATCH,
                    f"the bundle has no input {name!r}",
                    field=f"inputs[{name}]",
                    limit=", ".join(sorted(named)),
                )
        outputs = {column.name for column in manifest.output_schema.columns}
        for name in self.keep:
            if name in outputs or name.startswith(RESERVED_PREFIX) or list(self.keep).count(name) > 1:
                raise FallowError(
                    Reason.FIELD_INVALID,
                    f"column {name!r} cannot be kept: the result has one of that name",
                    field=f"keep[{name}]",
                    hint="rename it, or leave it out",
                )
        windows = {
            stage.column: (stage.head_window_bytes, stage.tail_window_bytes)
            for stage in manifest.stages
            if isinstance(stage, BytesCodec)
        }
        inputs = {name: (given,) if isinstance(given, str) else tuple(given) for name, given in self.inputs.items()}
        return SourceRequest(manifest.input_schema, windows, inputs, tuple(self.keep), self.cast)


def data_class_of(data: DataClass | str | None) -> DataClass:
    """The data class that a submitter stated. Raises DATA_CLASS_MISSING or FIELD_INVALID."""
    allowed = ", ".join(member.value for member in DataClass)
    if data is None or data == "":
        raise FallowError(
            Reason.DATA_CLASS_MISSING,
            "who may see these rows is not stated",
            field="data",
            limit=allowed,
            hint='`data="public"` lets strangers\' machines see them',
        )
    try:
        return DataClass(data)
    except ValueError:
        raise FallowError(Reason.FIELD_INVALID, f"{data!r} is no data class", field="data", limit=allowed) from None


def check_texts(title: str, idempotency_key: bytes) -> None:
    """Raises LIMIT_EXCEEDED or FIELD_INVALID for a title or key out of range."""
    if len(title.encode()) > TITLE_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a title of {len(title.encode())} bytes",
            field="title",
            limit=f"{TITLE_BYTES_MAX} bytes",
        )
    low, high = IDEMPOTENCY_KEY_BYTES
    if not low <= len(idempotency_key) <= high:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"an idempotency key of {len(idempotency_key)} bytes",
            field="idempotency_key",
            limit=f"{low} to {high} bytes",
        )


def check_failed_rows_max(count: int) -> None:
    """Raises FIELD_INVALID for a number of failed rows that no job can allow."""
    if not 0 <= count <= JOB_ROWS_MAX:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"failed_rows_max is {count}",
            field="failed_rows_max",
            limit=f"0 to {JOB_ROWS_MAX} rows",
        )


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset that lies in the blob service, or travels with the submission."""

    blocks: Sequence[job_pb2.DatasetBlock]
    kept: BlobReference | None
    rows: int
    unread_rows: int


def dataset_reader(request: MapRequest, *, nonce_key: bytes) -> DatasetReader:
    """A reader of the rows, once it is sure that the source has what the bundle takes. May block.

    Raises FIELD_INVALID or SCHEMA_MISMATCH.
    """
    schema = request.bundle.manifest.input_schema
    return DatasetReader(
        source_of(request.rows, schema),
        request.source_request(),
        RowCodec(schema, digest_of(encode_schema(schema))),
        nonce_key=nonce_key,
        unread_rows_max=request.options.failed_rows_max,
    )


async def upload_dataset(
    reader: DatasetReader,
    transfers: BlobTransfers,
    *,
    kept_path: Path | None,
    on_rows: Callable[[int], None] | None = None,
) -> Dataset:
    """Reads the rows and brings them to the blob service, a few blocks at a time; tiny datasets stay inline.

    `on_rows` is told how many rows are there so far. Raises what sources, row blocks and uploads raise.
    """
    messages: list[job_pb2.DatasetBlock] = []
    blocks = reader.blocks(kept_path)
    group = await asyncio.to_thread(_next_blocks, blocks)
    if len(group) == 1 and len(group[0].data) <= INLINE_PAYLOAD_BYTES_MAX:
        # One block and a group that is not full: that was the whole dataset.
        messages.append(block_to_message(_described(group[0], inline=True), group[0].data))
    else:
        while group:
            following = asyncio.ensure_future(asyncio.to_thread(_next_blocks, blocks))
            try:
                await transfers.upload([Upload(_described(b).blob, BlobKind.ROW_BLOCK, b.data) for b in group])
                messages += [block_to_message(_described(block), b"") for block in group]
                if on_rows is not None:
                    on_rows(sum(message.rows for message in messages))
            finally:
                # The reader is never left running beside whoever comes after us.
                group = await following
    kept = await _upload_kept(reader, transfers, kept_path)
    return Dataset(messages, kept, reader.rows, len(reader.unread))


def submission(request: MapRequest, dataset: Dataset) -> job_service_pb2.SubmitMapJobRequest:
    """The request that submits the job."""
    return job_service_pb2.SubmitMapJobRequest(
        idempotency_key=request.idempotency_key,
        bundle_digest=request.bundle.digest,
        blocks=dataset.blocks,
        data_class=DATA_CLASSES.number(request.data),
        pool_id=request.pool_id,
        title=request.title,
        options=options_to_message(request.options),
        kept=reference_to_message(dataset.kept) if dataset.kept is not None else None,
    )


async def _upload_kept(reader: DatasetReader, transfers: BlobTransfers, path: Path | None) -> BlobReference | None:
    if path is None or reader.kept_schema is None:
        return None
    digest, length = await asyncio.to_thread(_digest_of_file, path)
    if length > BLOB_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"the kept columns take {length} bytes",
            field="keep",
            limit=f"{BLOB_BYTES_MAX} bytes",
            hint="keep fewer columns, or submit several jobs",
        )
    kept = BlobReference(digest, length)
    await transfers.upload([Upload(kept, BlobKind.OPAQUE, path)])
    return kept


def _next_blocks(blocks: Iterator[Block]) -> list[Block]:
    return list(islice(blocks, BLOCKS_AT_ONCE))


def _described(block: Block, *, inline: bool = False) -> DatasetBlock:
    return DatasetBlock(BlobReference(block.digest, len(block.data)), block.rows, inline=inline)


def _digest_of_file(path: Path) -> tuple[Digest, int]:
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").digest()), file.tell()
