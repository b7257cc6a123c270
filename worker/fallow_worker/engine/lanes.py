"""Keeps batches in flight: so many at once, each on so many threads, in the order in which they were given."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fallow_worker.engine.protocol import Setting, Tuned
from fallow_worker.engine.tuning import SLICE_SECONDS, Tuner, settings_to_try

LANE_SECONDS_MIN: Final = 0.002
"""A lane takes batches for about this long at a time, so that handing them out costs little."""

Answer = dict[str, NDArray[Any]] | Exception
"""A batch's outputs, or what the runtime raised."""
RunBatch = Callable[[int, bool], Answer]
"""Runs the batch that starts at a row; on all threads when the second argument is true."""
_Answers = Iterable[tuple[int, Answer]]


class Lanes:
    """The lanes of one loaded bundle. Which setting is used changes no bit."""

    def __init__(self, *, threads: int, lanes: int) -> None:
        """As `SpawnOptions` say: the fixed setting."""
        self._count = lanes
        self._fixed = Setting(lanes, max(1, threads // lanes))
        self._widest = Setting(1, threads)
        self._setting = self._fixed
        self._pools: dict[int, ThreadPoolExecutor] = {}
        """By batches in flight; threads start as they are needed."""
        self._tuner: Tuner | None = None
        self._group = 1
        self._slice = 1

    @property
    def count(self) -> int:
        """Batches in flight under the fixed setting."""
        return self._count

    def warmed(self, seconds: float) -> None:
        """Hears how long a batch takes on one lane."""
        self._group = max(1, round(LANE_SECONDS_MIN / max(seconds, 1e-6)))
        self._slice = max(1, round(SLICE_SECONDS / max(seconds, 1e-6)))

    def tune(self, setting: Setting | None, *, measures: bool, wide: bool) -> None:
        """Takes the setting that was measured before, or measures on the next batches which one is best.

        `wide`: a batch on all threads has the bits of one on a lane.
        """
        settings = settings_to_try(threads=self._widest.threads, lanes=self._count, wide=wide)
        if setting is not None:
            self._setting = setting if setting in settings else self._fixed
        elif measures and self._count > 1:
            self._tuner = Tuner(settings)

    def newly_tuned(self) -> Tuned | None:
        """What measuring has found, told once."""
        if self._tuner is None or self._tuner.decided is None:
            return None
        tuned, self._tuner = self._tuner.decided, None
        return tuned

    def answers(self, run: RunBatch, total: int, batch: int) -> Iterator[tuple[int, Answer]]:
        """(start, answer) of every batch of `total` rows, in order."""
        turn = self._group * self._count * batch
        # As many batches as keep the lanes busy for a while, or as there are, if those keep them busy at all.
        measured, size = 0, max(turn, min(self._slice * self._count * batch, total // turn * turn))
        while self._tuner is not None and self._tuner.wants_more() and total - measured >= size:
            yield from self._round(self._tuner, partial(self._run, run, range(measured, measured + size, batch)), size)
            measured += size
        # What does not keep all lanes busy runs on all threads, one batch after the other.
        whole = measured + (total - measured) // turn * turn if self._count > 1 else measured
        if whole > measured:
            yield from self._run(run, range(measured, whole, batch), self._setting)
        yield from self._run(run, range(whole, total, batch), self._widest)

    def _run(self, run: RunBatch, starts: range, setting: Setting) -> _Answers:
        wide = setting.threads > self._fixed.threads
        if setting.in_flight == 1:
            return ((start, run(start, wide)) for start in starts)

        def run_group(group: range) -> list[tuple[int, Answer]]:
            return [(start, run(start, wide)) for start in group]

        groups = [starts[first : first + self._group] for first in range(0, len(starts), self._group)]
        return itertools.chain.from_iterable(self._pool(setting.in_flight).map(run_group, groups))

    def _round(self, tuner: Tuner, run: Callable[[Setting], _Answers], rows: int) -> _Answers:
        """The answers of some batches, which run under every setting in turn."""
        answers: dict[Setting, list[tuple[int, Answer]]] = {}
        seconds: dict[Setting, float] = {}
        for setting in tuner.round():
            began = time.perf_counter()
            answers[setting] = list(run(setting))
            seconds[setting] = time.perf_counter() - began
        right = answers[tuner.fixed]
        if any(isinstance(answer, Exception) for _, answer in right):
            tuner.spoilt(seconds)
        else:
            tuner.measured(rows, seconds, [one for one, found in answers.items() if not _same(right, found)])
        if tuner.decided is not None:
            self._setting = tuner.decided.setting
        return right

    def _pool(self, in_flight: int) -> ThreadPoolExecutor:
        if in_flight not in self._pools:
            self._pools[in_flight] = ThreadPoolExecutor(in_flight, thread_name_prefix="lane")
        return self._pools[in_flight]


def _same(one: list[tuple[int, Answer]], other: list[tuple[int, Answer]]) -> bool:
    """Whether the answers are the same bits."""
    for (_, mine), (_, its) in zip(one, other, strict=True):
        if isinstance(mine, Exception) or isinstance(its, Exception):
            return False
        if not all(_bits(mine[name]) == _bits(its[name]) for name in mine):
            return False
    return True


def _bits(array: NDArray[Any]) -> bytes | list[Any]:
    return array.tolist() if array.dtype == np.object_ else array.tobytes()
