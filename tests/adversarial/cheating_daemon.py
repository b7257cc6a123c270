"""A worker's real daemon whose engine is honest and whose owner is not: outputs change before they are committed to.

`python -m adversarial.cheating_daemon BEHAVIOUR start --state DIR …` is `fallow-worker start …` with one thing patched:
what the executor gave. Everything after that is the daemon's own: root, signature, upload.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.row_block import RowBlock, pack
from fallow.session import Lease, TaskKind
from fallow_worker import daemon
from fallow_worker.__main__ import main as honest_main
from fallow_worker.ports import Outcome

Values = NDArray[np.float32]
"""Output rows of float32 values, (rows, values)."""
Cheat = Callable[[Values], Values]
"""What is committed to in place of honest rows."""

_rng = np.random.default_rng(3)
_share = random.Random(3)


def junk(values: Values) -> Values:
    return _rng.random(values.shape, np.float32)


def constant(values: Values) -> Values:
    return np.repeat(np.full_like(values[:1], 0.25), len(values), axis=0)


def copied(values: Values) -> Values:
    """Every row is the one before it: somebody else's answer."""
    return np.roll(values, 1, axis=0)


def cached(values: Values) -> Values:
    """Four answers serve for all rows."""
    return np.ascontiguousarray(values[np.arange(len(values)) % min(4, len(values))])


def fp16(values: Values) -> Values:
    return values.astype(np.float16).astype(np.float32)


def quantised(values: Values) -> Values:
    step = max(float(np.abs(values).max()), 1e-9) / 127
    return (np.round(values / step) * step).astype(np.float32)


def noisy(values: Values) -> Values:
    return (values * (1 + 1e-4 * _rng.standard_normal(values.shape))).astype(np.float32)


def flipped(values: Values) -> Values:
    return -values


def skips(share: float) -> Cheat:
    """Leaves rows out and makes their answers up."""

    def cheat(values: Values) -> Values:
        made = values.copy()
        for row in range(len(values)):
            if _share.random() < share:
                made[row] = 0.5
        return made

    return cheat


CHEATS: dict[str, Cheat] = {
    "junk": junk,
    "constant": constant,
    "copied": copied,
    "cached": cached,
    "fp16": fp16,
    "quantised": quantised,
    "noisy": noisy,
    "flipped": flipped,
    "skips-50": skips(0.5),
    "skips-10": skips(0.1),
}


def altered(block: bytes, cheat: Cheat) -> bytes:
    """The block with other values in every row that has any."""
    parsed = RowBlock.parse(block)
    valued = [row for row in range(len(parsed)) if len(parsed[row])]
    honest = np.stack([np.frombuffer(parsed[row], np.float32) for row in valued])
    made = dict(zip(valued, cheat(honest), strict=True))
    rows = [made[row].tobytes() if row in made else b"" for row in range(len(parsed))]
    features = [parsed.row_size_features(row) for row in range(len(parsed))]
    return pack(parsed.schema_digest, rows, features, nonce=parsed.nonce)


def main() -> None:
    """As `fallow-worker`, after the name of a cheat."""
    cheat = CHEATS[sys.argv[1]]
    # The one method that hands over what the executor gave.
    honest_outcome = daemon.Daemon._outcome  # pyright: ignore[reportPrivateUsage]

    async def cheated(self: Any, lease: Lease, offer: Any) -> Outcome:
        outcome = await honest_outcome(self, lease, offer)
        if lease.kind is not TaskKind.MAP:
            return outcome
        return replace(outcome, output_block=altered(outcome.output_block, cheat))

    daemon.Daemon._outcome = cheated  # type: ignore[method-assign]  # pyright: ignore[reportPrivateUsage]
    honest_main(sys.argv[2:])


if __name__ == "__main__":
    main()
