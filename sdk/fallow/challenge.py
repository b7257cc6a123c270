"""A challenge: seeded work by which a device shows its speed or its memory. Plan, verdict, and what they are worth."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fallow.bundle import BundleManifest, Precision
from fallow.ids import Digest
from fallow.limits import GIB, MIB
from fallow.schema import BytesColumn, Schema

SEED_BYTES: Final = 32
SAMPLES_DEFAULT: Final = 64
SAMPLES_MAX: Final = 256
FILL_BLOCK_BYTES: Final = 8 * 1024
"""Memory is filled, walked and shown in blocks of this size."""
FILL_BYTES_MIN: Final = MIB
FILL_BYTES_MAX: Final = 16 * GIB
STEP_DIMENSION_MAX: Final = 1 << 16
STEPS_MAX: Final = 256
"""Products of one challenge: each leaves its rows in memory until the samples are drawn."""
REFERENCE_FLOPS_PER_S: Final = 50_000_000_000
"""One unit is a second of a core that multiplies float32 matrices at this speed."""

MANIFEST: Final = BundleManifest(
    name="challenge",
    files=(),
    stages=(),
    input_schema=Schema((BytesColumn("answer"),), ()),
    output_schema=Schema((BytesColumn("answer"),), ()),
    title="A seeded measurement of this device",
)
"""Stands where a bundle's manifest stands in leases: a challenge has no files and no foreign program."""
BUNDLE_DIGEST: Final = Digest(bytes.fromhex("ce9918b16e95014c78a66130a3103075408180489fe5bf1725e0c36d219d2407"))
"""Of the manifest's bytes; stands here because the core may not make them."""
OUTPUT_SCHEMA_DIGEST: Final = Digest(bytes.fromhex("0781b0fc49158d2195442c7e1b7a04bf8547d72c9fba9789a981039bb622ff18"))


class ChallengeKind(StrEnum):
    """What is measured."""

    SPEED = "speed"
    """Products of seeded matrices in a declared precision."""
    MEMORY = "memory"
    """Memory filled by a walk in which each block depends on earlier ones."""


@dataclass(frozen=True, slots=True)
class ChallengePlan:
    """Everything that the device and its checker derive the work from; kilobytes of it are never needed.

    SPEED: `steps` products of a (`rows`, `inner`) by an (`inner`, `columns`) matrix. MEMORY: `fill_bytes` of blocks.
    `samples` of the rows, or blocks, are shown and checked.
    """

    device_id: str
    kind: ChallengeKind
    seed: bytes
    """32 fresh bytes."""
    precision: Precision = Precision.FP32
    rows: int = 0
    inner: int = 0
    columns: int = 0
    steps: int = 0
    fill_bytes: int = 0
    samples: int = SAMPLES_DEFAULT

    @property
    def operations(self) -> int:
        """Multiplications and additions of a SPEED challenge."""
        return 2 * self.rows * self.inner * self.columns * self.steps

    @property
    def blocks(self) -> int:
        """Blocks of a MEMORY challenge."""
        return self.fill_bytes // FILL_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class ChallengeVerdict:
    """What a checker found in an answer."""

    holds: bool
    reason: str
    """Why not; empty when it holds."""


def fault_of_plan(plan: ChallengePlan) -> str:
    """What is wrong with a plan that came over a wire, or nothing: nobody fills memory on a stranger's bare word."""
    if len(plan.seed) != SEED_BYTES:
        return f"a seed of {len(plan.seed)} bytes"
    if not 1 <= plan.samples <= SAMPLES_MAX:
        return f"{plan.samples} samples"
    if plan.kind is ChallengeKind.MEMORY:
        fits = FILL_BYTES_MIN <= plan.fill_bytes <= FILL_BYTES_MAX and plan.fill_bytes % FILL_BLOCK_BYTES == 0
        return "" if fits else f"a fill of {plan.fill_bytes} bytes"
    if not all(1 <= size <= STEP_DIMENSION_MAX for size in (plan.rows, plan.inner, plan.columns)):
        return f"a product of {plan.rows} × {plan.inner} × {plan.columns}"
    if not 1 <= plan.steps <= STEPS_MAX:
        return f"{plan.steps} products"
    return ""


def speed_milliunits_per_s(operations: int, elapsed_ms: int) -> int:
    """Units a second, in thousandths, of a device that did so many operations in that time; rounded down."""
    return operations * 1_000_000 // (REFERENCE_FLOPS_PER_S * max(1, elapsed_ms))
