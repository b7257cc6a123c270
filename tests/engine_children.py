"""Driving engine children from tests: start one, load a bundle, run blocks, inspect; always with deadlines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from engine_models import BUNDLE_DIGEST, INPUT_DIGEST, NONCE, OUTPUT_DIGEST, encoded
from fallow.bundle import BundleManifest
from fallow.limits import BLOCK_BYTES_MAX
from fallow.row_values import ColumnValues
from fallow_worker.engine.protocol import (
    PLACEMENT_ALIGNMENT_BYTES,
    ChildKind,
    Done,
    Failed,
    FilePlacement,
    FromChild,
    Inspect,
    Inspected,
    Load,
    Loaded,
    Placement,
    Progress,
    Ready,
    Run,
    SpawnOptions,
)
from fallow_worker.engine.spawn import SpawnedChild, spawn_child

ANSWER_SECONDS_MAX = 60.0


@contextmanager
def child(kind: ChildKind = ChildKind.RUN, **options: Any) -> Iterator[tuple[SpawnedChild, Ready]]:
    """A child that is ready, killed and reaped at the end."""
    spawning = {name: options.pop(name) for name in ("level_max", "output_bytes") if name in options}
    spawned = spawn_child(SpawnOptions(kind=kind, **options), **spawning)
    try:
        ready = answer(spawned)
        assert isinstance(ready, Ready), ready
        yield spawned, ready
    finally:
        spawned.close()


def answer(spawned: SpawnedChild, *, seconds: float = ANSWER_SECONDS_MAX) -> FromChild:
    """The next message that is no progress."""
    while True:
        message = spawned.receive(timeout_s=seconds)
        assert message is not None, f"no answer within {seconds} s: {spawned.log_text()}"
        if not isinstance(message, Progress):
            return message


def placed(spawned: SpawnedChild, files: Mapping[str, bytes]) -> tuple[tuple[FilePlacement, ...], int]:
    """The files in the input memory, and where free room begins."""
    offset = 0
    placements: list[FilePlacement] = []
    for name, content in files.items():
        spawned.input.write(offset, content)
        placements.append(FilePlacement(name, Placement(offset, len(content))))
        offset = aligned(offset + len(content))
    return tuple(placements), offset


def aligned(offset: int) -> int:
    """The next place where a placement may begin."""
    return -(-offset // PLACEMENT_ALIGNMENT_BYTES) * PLACEMENT_ALIGNMENT_BYTES


def load(
    spawned: SpawnedChild, manifest: BundleManifest, files: Mapping[str, bytes], **options: Any
) -> Loaded | Failed:
    """Loads a bundle."""
    placements, _ = placed(spawned, files)
    options = {"canonical_batch_rows": 4} | options
    spawned.send(Load(BUNDLE_DIGEST, manifest, INPUT_DIGEST, OUTPUT_DIGEST, placements, **options))
    message = answer(spawned)
    assert isinstance(message, Loaded | Failed), message
    return message


def send_block(spawned: SpawnedChild, block: bytes, *, task: str = "task", at: int = 0, nonce: bytes = NONCE) -> None:
    """Asks for one block, placed at `at` in both memories."""
    spawned.input.write(at, block)
    spawned.send(Run(task, Placement(at, len(block)), Placement(at, BLOCK_BYTES_MAX), nonce))


def run(
    spawned: SpawnedChild, manifest: BundleManifest, columns: Mapping[str, ColumnValues], **options: Any
) -> tuple[Done | Failed, bytes]:
    """Runs rows; gives the answer and the output block."""
    send_block(spawned, encoded(manifest, columns), **options)
    message = answer(spawned)
    assert isinstance(message, Done | Failed), message
    return message, spawned.output.read(options.get("at", 0), message.output_bytes) if isinstance(
        message, Done
    ) else b""


def inspected(
    manifest: BundleManifest, files: Mapping[str, bytes], *, sample: bytes = b"", **options: Any
) -> Inspected:
    """The inspection of a bundle in a child of its own."""
    with child(ChildKind.INSPECT, **options) as (spawned, _):
        placements, free = placed(spawned, files)
        place = None
        if sample:
            spawned.input.write(free, sample)
            place = Placement(free, len(sample))
        spawned.send(Inspect(BUNDLE_DIGEST, manifest, INPUT_DIGEST, OUTPUT_DIGEST, placements, place))
        message = answer(spawned, seconds=90)
        assert isinstance(message, Inspected), message
        return message
