"""How many batches to keep in flight, and on how many threads each: measured on a lease's own rows. Plain arithmetic.

The same batches run under each setting in turn, so that rows of unlike sizes, and a machine that is busy for a while,
fall on all settings alike. A setting counts only while its bits are those of the fixed one; the canonical batch stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from fallow_worker.engine.protocol import Setting, Trial, Tuned

ROUNDS: Final = 9
"""Measured rounds; one more before them warms threads and caches and is not counted."""
ROUNDS_MIN: Final = 5
"""With fewer, because batches are slow, nothing is taken but the fixed setting."""
GAIN_PERMILLE_MIN: Final = 1_040
"""A setting must be so much faster than the fixed one, in thousandths, to be taken: less may be chance."""
ROUNDS_LOST_MAX: Final = 1
"""Of all rounds a better setting may lose one. Its fastest round must be faster by the same gain, too: what else the
machine does makes rounds longer and never shorter, so on a busy machine the medians say little and the fastest much."""
TUNING_SECONDS_MAX: Final = 4.0
"""What measuring may cost a bundle on a machine, once; a setting that is not decided by then stays the fixed one."""
SLICE_SECONDS: Final = 0.02
"""One lane works about this long on the batches of a round."""
RATE_MAX: Final = 10**15


def settings_to_try(*, threads: int, lanes: int, wide: bool) -> tuple[Setting, ...]:
    """The fixed setting first, then what may be better. `wide`: one batch may use all threads without other bits."""
    fixed = Setting(lanes, max(1, threads // lanes))
    if threads == 1:
        return (fixed,)
    tried = [fixed, Setting(lanes + 1, fixed.threads)]
    if lanes > 2:
        tried.append(Setting(lanes // 2, fixed.threads))
    if wide:
        tried += [Setting(1, threads), Setting(2, threads)]
    return tuple(dict.fromkeys(tried))


@dataclass(slots=True)
class _Seen:
    setting: Setting
    seconds: list[float]
    same_bits: bool = True


class Tuner:
    """Decides between settings by rounds that somebody else runs."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        """`settings`: the fixed one first."""
        self._seen = [_Seen(setting, []) for setting in settings]
        self._rounds = -1
        self._rows = 0
        self._spent = 0.0
        self.decided: Tuned | None = None
        """What came of it; None while rounds are missing."""
        if len(settings) == 1:
            self._decide()

    def wants_more(self) -> bool:
        """Whether rounds are missing."""
        return self.decided is None

    @property
    def fixed(self) -> Setting:
        """The setting that is used while nothing is decided, and whose bits are right."""
        return self._seen[0].setting

    def round(self) -> Iterator[Setting]:
        """The settings of the next round in their order: another one begins each time; the fixed one is among them."""
        count = len(self._seen)
        start = (self._rounds + 1) % count
        for index in range(count):
            seen = self._seen[(start + index) % count]
            if seen.same_bits:
                yield seen.setting

    def measured(self, rows: int, seconds: dict[Setting, float], other_bits: Sequence[Setting]) -> None:
        """What a whole round over the same rows took under each setting, and whose bits were not the fixed one's."""
        for seen in self._seen:
            if seen.setting in other_bits and seen is not self._seen[0]:
                seen.same_bits = False
            elif self._rounds >= 0 and seen.setting in seconds:
                seen.seconds.append(max(seconds[seen.setting], 1e-9))
        self._rows += rows if self._rounds >= 0 else 0
        self._rounds += 1
        self._spent += sum(seconds.values())
        if self._rounds >= ROUNDS or self._spent >= TUNING_SECONDS_MAX:
            self._decide()

    def spoilt(self, seconds: dict[Setting, float]) -> None:
        """A round in which a row failed: it says nothing, and costs."""
        self._spent += sum(seconds.values())
        if self._spent >= TUNING_SECONDS_MAX:
            self._decide()

    def _decide(self) -> None:
        fixed = self._seen[0]
        trials: list[Trial] = []
        best, best_gain = fixed.setting, GAIN_PERMILLE_MIN
        for seen in self._seen:
            rounds = len(seen.seconds)
            if not rounds or not seen.same_bits:
                continue
            ratios = [mine / its for mine, its in zip(fixed.seconds, seen.seconds, strict=False)]
            gain = round(1_000 * min(median(ratios), min(fixed.seconds) / min(seen.seconds)))
            rate = round(1_000 * self._rows / sum(seen.seconds))
            trials.append(Trial(seen.setting, min(RATE_MAX, rate), min(RATE_MAX, gain)))
            lost = sum(ratio < 1 for ratio in ratios)
            if rounds >= ROUNDS_MIN and lost <= (ROUNDS_LOST_MAX if rounds >= ROUNDS else 0) and gain >= best_gain:
                best, best_gain = seen.setting, gain
        self.decided = Tuned(best, tuple(trials))
