"""Giving a child its bundle: the files go into its memory, each digest checked on the way."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final, assert_never

from fallow.bundle import BundleFile, BundleManifest
from fallow.challenge import ChallengePlan
from fallow.ids import digest_of
from fallow.limits import MIB
from fallow.session import Cause, TaskKind
from fallow.wire.schema import encode_schema
from fallow_worker.engine.protocol import (
    INSPECTION_SECONDS_MAX,
    READY_SECONDS_MAX,
    Answered,
    CandidatePlacement,
    Challenge,
    Check,
    Checked,
    Failed,
    FilePlacement,
    Inspect,
    Inspected,
    Load,
    Loaded,
    Placement,
    Ready,
    Referee,
    Refereed,
    Setting,
    clipped_reason,
)
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.engine_child import ChildDiedError, EngineChild, aligned
from fallow_worker.executor.tunings import Tunings, identity_of
from fallow_worker.ports import LoadedBundle, Outcome, RefereeWork, Work

ENTROPY_BYTES: Final = 32
LOAD_SECONDS_MAX: Final = 120.0
INSPECTION_SHARE: Final = 0.8
"""Part of an inspection's time after which measuring stops, so that the report comes in time."""
REFEREE_SHARE: Final = 0.5
"""Part of a referee's time that may go into running the program in other forms."""
INSPECTION_PATIENCE_S: Final = 90.0
"""How long a child may take for a whole inspection, beside a second for every `_INSPECTED_BYTES_PER_S` of its files: a
program that runs without end must not keep honest ones waiting."""
_INSPECTED_BYTES_PER_S: Final = 8 * MIB
_COPY_BYTES: Final = 8 * MIB


async def load_bundle(
    child: EngineChild, bundle: LoadedBundle, manifest: BundleManifest, tunings: Tunings | None = None
) -> tuple[Ready, Loaded | Failed]:
    """Waits for the child and loads the bundle, to run as `tunings` say. Raises ChildDiedError, WorkFailed(worker),
    OSError."""
    ready = await child.ready(timeout_s=READY_SECONDS_MAX)
    setting: Setting | None = None
    if tunings is not None:
        setting = tunings.setting(bundle.bundle_digest, identity_of(ready, child.options), child.options)
    message = Load(
        bundle_digest=bundle.bundle_digest,
        manifest=manifest,
        input_schema_digest=digest_of(encode_schema(manifest.input_schema)),
        output_schema_digest=digest_of(encode_schema(manifest.output_schema)),
        files=await _place_files(child, bundle, manifest),
        canonical_batch_rows=bundle.canonical_batch_rows,
        slot_dependent=bundle.slot_dependent,
        setting=setting,
        measures=tunings is not None and setting is None,
    )
    return ready, await child.load(message, timeout_s=LOAD_SECONDS_MAX)


async def inspect_bundle(
    child: EngineChild, work: Work, manifest: BundleManifest, progress: Callable[[int], None]
) -> Inspected | Failed:
    """Waits for the child and lets it take the bundle apart. Raises ChildDiedError, WorkFailed(worker), OSError."""
    await child.ready(timeout_s=READY_SECONDS_MAX)
    files = await _place_files(child, work.bundle, manifest)
    sample = None
    if work.input_block:
        end = max((file.place.offset_bytes + file.place.length_bytes for file in files), default=0)
        sample = child.place(aligned(end), work.input_block)
    seconds_max = work.runtime_max_ms / 1000
    message = Inspect(
        bundle_digest=work.bundle.bundle_digest,
        manifest=manifest,
        input_schema_digest=digest_of(encode_schema(manifest.input_schema)),
        output_schema_digest=digest_of(encode_schema(manifest.output_schema)),
        files=files,
        sample=sample,
        seconds_max=min(INSPECTION_SECONDS_MAX, seconds_max * INSPECTION_SHARE),
    )
    patience_s = INSPECTION_PATIENCE_S + sum(file.length_bytes for file in manifest.files) / _INSPECTED_BYTES_PER_S
    return await child.inspect(message, progress, timeout_s=min(seconds_max, patience_s))


async def measure(
    child: EngineChild, work: Work, plan: ChallengePlan, *, threads: int, progress: Callable[[int], None]
) -> Outcome:
    """Waits for the child and lets it work out a challenge, or check an answer. Raises ChildDiedError, WorkFailed."""
    await child.ready(timeout_s=READY_SECONDS_MAX)
    message: Challenge | Check
    if work.kind is TaskKind.CHALLENGE:
        message = Challenge(plan, threads, work.nonce)
    else:
        # What the checker draws is drawn here, where the answer has been committed to.
        message = Check(plan, child.place(0, work.input_block), secrets.token_bytes(ENTROPY_BYTES))
    answer, block = await child.measure(message, progress, timeout_s=work.runtime_max_ms / 1_000)
    match answer:
        case Answered():
            return Outcome(block, (), answer.usage, answer.execution_class)
        case Checked():
            return Outcome(b"", (), answer.usage, "", verdict=answer.verdict)
        case Failed():
            raise WorkFailed(answer.cause, clipped_reason(answer.message))
        case _:
            assert_never(answer)


async def referee(
    child: EngineChild, work: Work, task: RefereeWork, manifest: BundleManifest, progress: Callable[[int], None]
) -> Refereed | Failed:
    """Waits for the child and lets it compare. Raises ChildDiedError, WorkFailed(worker), OSError."""
    await child.ready(timeout_s=READY_SECONDS_MAX)
    files = await _place_files(child, work.bundle, manifest) if task.runs_program else ()
    end = max((file.place.offset_bytes + aligned(file.place.length_bytes) for file in files), default=0)

    def placed(data: bytes) -> Placement:
        nonlocal end
        place = child.place(end, data)
        end += aligned(len(data))
        return place

    message = Referee(
        manifest=manifest,
        input_schema_digest=digest_of(encode_schema(manifest.input_schema)),
        output_schema_digest=digest_of(encode_schema(manifest.output_schema)),
        files=files,
        canonical_batch_rows=work.bundle.canonical_batch_rows,
        slot_dependent=work.bundle.slot_dependent,
        input=placed(work.input_block),
        slots=placed(b"".join(slot.to_bytes(4, "little") for slot in work.slots)) if work.slots else None,
        own=placed(task.own_block),
        own_class=task.own_class,
        candidates=tuple(CandidatePlacement(placed(one.block), one.rows, one.class_numbers) for one in task.candidates),
        execution_classes=task.execution_classes,
        profiles=task.profiles,
        spread=task.spread,
        seconds_max=work.runtime_max_ms / 1_000 * REFEREE_SHARE,
    )
    return await child.referee(message, progress, timeout_s=work.runtime_max_ms / 1_000)


async def _place_files(child: EngineChild, bundle: LoadedBundle, manifest: BundleManifest) -> tuple[FilePlacement, ...]:
    """Copies the bundle's files into the child's input memory, checking each digest on the way.

    Raises WorkFailed(worker) when the copy on this machine's disk is not what the manifest names.
    """
    placements: list[FilePlacement] = []
    offset = 0
    for file in manifest.files:
        path = bundle.files.get(file.name)
        if path is None:
            raise WorkFailed(Cause.WORKER, clipped_reason(f"file {file.name!r} of the bundle is not on this machine"))
        try:
            await _place_file(child, Path(path), file, offset)
        except OSError as error:
            raise WorkFailed(Cause.WORKER, clipped_reason(f"file {file.name!r} of the bundle: {error}")) from None
        placements.append(FilePlacement(file.name, Placement(offset, file.length_bytes)))
        offset += aligned(file.length_bytes)
    return tuple(placements)


async def _place_file(child: EngineChild, path: Path, file: BundleFile, offset: int) -> None:
    digest = sha256()
    length = 0
    with path.open("rb") as source:
        while True:
            # Only reading leaves the loop: the child's memory may be closed at any moment, and by the loop alone.
            big = file.length_bytes > _COPY_BYTES
            piece = await asyncio.to_thread(source.read, _COPY_BYTES) if big else source.read(_COPY_BYTES)
            if not piece:
                break
            if not child.alive:
                raise ChildDiedError(await asyncio.shield(child.dead), at_work=True)
            digest.update(piece)
            child.place(offset + length, piece)
            length += len(piece)
    if length != file.length_bytes or digest.digest() != file.digest:
        raise WorkFailed(Cause.WORKER, clipped_reason(f"file {file.name!r} of the bundle was changed on this machine"))
