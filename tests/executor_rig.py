"""Bundles on disk, leases and process listings for tests of executors."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adversarial.hostile_programs import endless_loop, memory_bomb
from engine_models import FEATURES, PROGRAM_FILE, dense_model, gather_model, tensor_manifest
from fallow.bundle import BundleManifest
from fallow.ids import LeaseId, digest_of
from fallow.limits import BLOCK_BYTES_MAX, MIB
from fallow.row_values import ColumnValues
from fallow.rows import DecodedRows, RowCodec
from fallow.schema import DType, TensorColumn
from fallow.session import TaskKind
from fallow.wire.bundle import encode_manifest
from fallow.wire.schema import encode_schema
from fallow_worker.ports import LoadedBundle, Outcome, Work

NONCE = bytes(range(16))
RUNTIME_MAX_MS = 60_000
WAIT_SECONDS_MAX = 60.0
_leases = itertools.count(1)


@dataclass(frozen=True, slots=True)
class BundleOnDisk:
    """A bundle as a worker holds it, and the means to write and read its rows."""

    manifest: BundleManifest
    loaded: LoadedBundle

    def work(self, columns: Mapping[str, ColumnValues], **changes: Any) -> Work:
        """A map lease over those rows."""
        schema = self.manifest.input_schema
        codec = RowCodec(schema, digest_of(encode_schema(schema)))
        rows = len(next(iter(columns.values())))
        fields: dict[str, Any] = {
            "lease_id": LeaseId(f"lease-{next(_leases)}"),
            "kind": TaskKind.MAP,
            "bundle": self.loaded,
            "input_block": codec.encode(columns, nonce=bytes(16)),
            "rows": rows,
            "nonce": NONCE,
            "output_bytes_max": BLOCK_BYTES_MAX,
            "runtime_max_ms": RUNTIME_MAX_MS,
        }
        return Work(**(fields | changes))

    def decoded(self, outcome: Outcome) -> DecodedRows:
        """The output rows."""
        from fallow.row_block import RowBlock

        schema = self.manifest.output_schema
        codec = RowCodec(schema, digest_of(encode_schema(schema)))
        return codec.decode(RowBlock.parse(outcome.output_block))

    def rewritten(self, outcome: Outcome, change: Callable[[Any], Any]) -> bytes:
        """The output block with `change` done to its only column."""
        schema = self.manifest.output_schema
        [column] = schema.columns
        values = change(self.decoded(outcome).columns[column.name])
        codec = RowCodec(schema, digest_of(encode_schema(schema)))
        return codec.encode({column.name: np.asarray(values)}, nonce=NONCE)


def bundle_on_disk(
    folder: Path, manifest: BundleManifest, files: Mapping[str, bytes], *, batch_rows: int = 4, peak: int = 128 * MIB
) -> BundleOnDisk:
    """Writes the files where a worker's cache would have them."""
    stored = encode_manifest(manifest)
    digest = digest_of(stored)
    paths: dict[str, str] = {}
    for name, content in files.items():
        path = folder / f"{digest.hex()[:12]}-{name}"
        path.write_bytes(content)
        paths[name] = str(path)
    loaded = LoadedBundle(
        bundle_digest=digest,
        manifest=stored,
        files=paths,
        canonical_batch_rows=batch_rows,
        slot_dependent=False,
        memory_bytes_peak=peak,
    )
    return BundleOnDisk(manifest, loaded)


def dense_bundle(folder: Path, *, hidden: int = 8, batch_rows: int = 4) -> BundleOnDisk:
    """Six floats to three."""
    model = dense_model(hidden=hidden)
    return bundle_on_disk(folder, tensor_manifest(model), {PROGRAM_FILE: model}, batch_rows=batch_rows)


def dense_rows(count: int, seed: int = 1) -> dict[str, NDArray[np.float32]]:
    """Rows for `dense_bundle`."""
    return {"x": np.random.default_rng(seed).standard_normal((count, FEATURES), dtype=np.float32)}


def gather_bundle(folder: Path) -> BundleOnDisk:
    """Rows 0 to 3 have a value, others fail."""
    model = gather_model()
    manifest = tensor_manifest(
        model,
        input_columns=(TensorColumn("x", DType.INT64, (1,)),),
        output_columns=(TensorColumn("y", DType.FLOAT32, (2,)),),
    )
    return bundle_on_disk(folder, manifest, {PROGRAM_FILE: model})


def looping_bundle(folder: Path, *, batch_rows: int = 1) -> BundleOnDisk:
    """Each batch takes as many turns as the largest of its rows says, a few microseconds each; every value is 0."""
    program = endless_loop()
    return bundle_on_disk(folder, program.manifest, {PROGRAM_FILE: program.model}, batch_rows=batch_rows)


def looping_rows(*turns: int) -> dict[str, NDArray[np.int64]]:
    """Rows for `looping_bundle`."""
    return {"x": np.array(turns, np.int64)}


def bomb_bundle(folder: Path, *, batch_rows: int = 1) -> BundleOnDisk:
    """Each batch asks for as many floats as the largest of its rows says; inspection saw little."""
    program = memory_bomb(1)
    files = {PROGRAM_FILE: program.model}
    return bundle_on_disk(folder, program.manifest, files, batch_rows=batch_rows, peak=64 * MIB)


# ------------------------------------------------------------------------------------------------------------ processes


def parent_of(pid: int) -> int:
    """The parent of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def state_of(pid: int) -> str:
    """The state letter of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def command_of(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def ancestors_of(pid: int) -> list[int]:
    """Parent, grandparent and so on."""
    found: list[int] = []
    while (pid := parent_of(pid)) > 1:
        found.append(pid)
    return found


def descendants(of: int | None = None) -> list[int]:
    """Every living process below `of` (us), zombies left out."""
    root = of or os.getpid()
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if root in ancestors_of(pid) and state_of(pid) not in {"", "Z"}]


def engine_children(of: int | None = None) -> list[int]:
    """Engine children below `of` (us)."""
    return [pid for pid in descendants(of) if "engine/child.py" in command_of(pid)]


def named(word: str) -> list[int]:
    """Our descendants with that word in their command line."""
    return [pid for pid in descendants() if word in command_of(pid)]


async def until(condition: Callable[[], bool], what: str, *, seconds: float = WAIT_SECONDS_MAX) -> None:
    """Waits for a condition. Fails loudly when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        await asyncio.sleep(0.01)


def silent(_: int) -> None:
    """Hears progress and does nothing."""


async def busiest_child(of: int | None = None, *, cpu_seconds_more: float = 0.5) -> int:
    """The engine child below `of` (us) that computes: its CPU time grows, by default beyond what a start takes."""
    seen: dict[int, float] = {}
    found: list[int] = []

    def computing() -> bool:
        for pid in engine_children(of):
            if cpu_seconds(pid) - seen.setdefault(pid, cpu_seconds(pid)) >= cpu_seconds_more:
                found.append(pid)
        return bool(found)

    await until(computing, "a child that computes")
    return found[0]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
