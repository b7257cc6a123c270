"""Rows per second of the whole system against raw ONNX Runtime on the same cores, in interleaved pairs."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from scripts.benches.raw_peer import Labelled, RawPeer, Setting, raw_peer
from scripts.benches.report import Report, median, say
from scripts.benches.rows import contents_of, fresh, standard_library
from scripts.benches.system import System, cpu_seconds, running_system

from fallow.bundle import BytesCodec
from fallow.bundle_file import Bundle

BUDGET_RATIO = 0.95
PAIRS_MIN = 7
WARM_UP_ROWS = 512


def options(parser: argparse.ArgumentParser) -> None:
    """What can be changed."""
    parser.add_argument("--pairs", type=int, default=PAIRS_MIN, help=f"interleaved pairs, at least {PAIRS_MIN}")
    parser.add_argument("--rows", type=int, default=4_000, help="rows of each run")
    parser.add_argument("--executor", choices=("ray", "process"), default="ray")


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of each side over the same fresh rows."""

    rows: int
    seconds: float
    raw_seconds: float
    counts: dict[str, int]
    labels_differing: int
    raw_cpu_percent_of_system: float
    """What the system at rest took of one core while the peer ran."""

    @property
    def ratio(self) -> float:
        return self.raw_seconds / self.seconds

    def facts(self) -> dict[str, Any]:
        return {
            "rows_per_s": round(self.rows / self.seconds, 1),
            "raw_rows_per_s": round(self.rows / self.raw_seconds, 1),
            "ratio": round(self.ratio, 4),
            **self.counts,
            "labels_differing": self.labels_differing,
            "system_cpu_percent_while_raw_ran": round(self.raw_cpu_percent_of_system, 1),
        }


async def measure(chosen: argparse.Namespace) -> Report:
    """Runs both sides in turn."""
    bundle = Bundle.magika()
    codec = bundle.manifest.stages[0]
    assert isinstance(codec, BytesCodec)
    contents = contents_of(standard_library(), codec)
    pairs: list[Pair] = []
    with raw_peer(bundle) as peer:
        setting = await asyncio.to_thread(peer.best_setting, fresh(contents, 1_000, seed=-1))
        async with running_system("--executor", chosen.executor) as system:
            say("warming up: inspection, Ray, engine …")
            await _system_run(system, bundle, codec, fresh(contents, WARM_UP_ROWS, seed=-2))
            for number in range(chosen.pairs):
                rows = fresh(contents, chosen.rows, seed=number)
                pair = await _pair(system, peer, setting, bundle, codec, rows, system_first=number % 2 == 0)
                say(f"pair {number + 1} of {chosen.pairs}: {pair.facts()}")
                pairs.append(pair)
    return _report(chosen, setting, pairs)


async def _pair(
    system: System,
    peer: RawPeer,
    setting: Setting,
    bundle: Bundle,
    codec: BytesCodec,
    rows: Sequence[bytes],
    *,
    system_first: bool,
) -> Pair:
    await asyncio.to_thread(peer.load, rows)
    before = await system.counts()
    raw: tuple[float, list[Labelled]] | None = None
    foreign_percent = 0.0
    if not system_first:
        raw, foreign_percent = await _raw_run(system, peer, setting)
    seconds, table = await _system_run(system, bundle, codec, rows)
    after = await system.counts(rows_settled_min=before.rows_settled + len(rows))
    if raw is None:
        raw, foreign_percent = await _raw_run(system, peer, setting)
    labels = table.column("label").to_pylist()
    assert len(labels) == len(rows), f"{len(labels)} results for {len(rows)} rows"
    differing = sum(ours != theirs for ours, (theirs, _) in zip(labels, raw[1], strict=True))
    return Pair(len(rows), seconds, raw[0], after.since(before), differing, foreign_percent)


async def _system_run(
    system: System, bundle: Bundle, codec: BytesCodec, rows: Sequence[bytes]
) -> tuple[float, pa.Table]:
    """Seconds from `client.map` until the whole result lies in the client's memory, and that result."""
    table = pa.table({codec.column: pa.array(rows, pa.binary())})
    began = time.perf_counter()
    job = await system.client.map(bundle, table, data="public")
    result = await job.table()
    return time.perf_counter() - began, result


async def _raw_run(system: System, peer: RawPeer, setting: Setting) -> tuple[tuple[float, list[Labelled]], float]:
    """The peer's run, and what the system took of a core meanwhile, in percent."""
    processes = system.processes()
    before = cpu_seconds(processes)
    raw = await asyncio.to_thread(peer.run, setting)
    return raw, 100 * (cpu_seconds(processes) - before) / raw[0]


def _report(chosen: argparse.Namespace, setting: Setting, pairs: Sequence[Pair]) -> Report:
    void = [
        f"pair {number + 1}: {name} is {count}"
        for number, pair in enumerate(pairs)
        for name, count in pair.counts.items()
        if count <= 0
    ]
    if len(pairs) < PAIRS_MIN:
        void.append(f"{len(pairs)} pairs, fewer than {PAIRS_MIN}")
    ratio = median([pair.ratio for pair in pairs])
    return Report(
        {
            "ratio_to_raw": round(ratio, 4),
            "budget": f"ratio_to_raw >= {BUDGET_RATIO}",
            "holds": ratio >= BUDGET_RATIO and not void,
            "rows_per_s": round(median([pair.rows / pair.seconds for pair in pairs]), 1),
            "raw_rows_per_s": round(median([pair.rows / pair.raw_seconds for pair in pairs]), 1),
            "raw_setting": {
                "processes": setting.processes,
                "threads": setting.threads,
                "batch_rows": setting.batch_rows,
            },
            "executor": chosen.executor,
            "rows": chosen.rows,
            "ratios": [round(pair.ratio, 4) for pair in pairs],
            "pairs": [pair.facts() for pair in pairs],
        },
        void,
    )
