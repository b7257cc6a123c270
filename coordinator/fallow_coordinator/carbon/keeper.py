"""Tells the core what electricity will emit where workers are: each hour, and whenever the table's file changes."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from pathlib import Path
from typing import Final

from fallow.errors import FallowError
from fallow_coordinator.carbon.table import SYNTHETIC, CarbonTable, read_table
from fallow_coordinator.core.carbon import ELSEWHERE
from fallow_coordinator.core.commands import RecordForecasts
from fallow_coordinator.core.events import RegionForecast
from fallow_coordinator.core.limits import FORECAST_HOURS_MAX, FORECAST_REGIONS_MAX, HOUR_MS
from fallow_coordinator.core.state import State
from fallow_coordinator.engine import Engine, wall_clock_ms

_log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 10.0
"""How often the file's date, the hour and the workers' regions are looked at."""
SOURCE_LENGTH_MAX: Final = 200


class CarbonKeeper:
    """Owns the table in force. No file means the synthetic default; one that is wrong changes nothing."""

    def __init__(self, path: Path, *, required: bool) -> None:
        """`required`: the operator named the file. Raises FIELD_INVALID with the line when it can't be read."""
        self._path = path
        self._seen = _stamp(path)
        self.table = SYNTHETIC
        if required or self._seen is not None:
            self.table = read_table(path)

    async def keep_for_ever(self, engine: Engine) -> None:
        """Records forecasts when they are due; never ends by itself."""
        _log.info("carbon.table source=%r regions=%d", self.table.label, len(self.table.regions()))
        while True:
            await self.keep(engine)
            await asyncio.sleep(LOOK_EVERY_S)

    async def keep(self, engine: Engine) -> None:
        """One look: the file if it changed, then the forecast if something in it did."""
        await self._reload()
        regions = regions_of(engine.state)
        command = await asyncio.to_thread(forecasts, self.table, regions, wall_clock_ms())
        try:
            # The core writes nothing when nothing has changed.
            await engine.submit(command)
        except FallowError as error:
            _log.warning("carbon.not_recorded error=%s", error)

    async def _reload(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        if stamp is None:
            self.table = SYNTHETIC
        else:
            try:
                self.table = await asyncio.to_thread(read_table, self._path)
            except FallowError as error:
                _log.error("carbon.file_refused error=%s: the last good one stays", error)
                return
        _log.info("carbon.table source=%r regions=%d", self.table.label, len(self.table.regions()))


def regions_of(state: State) -> tuple[str, ...]:
    """Regions that connected workers name, those of the most workers first."""
    counts = Counter[str]()
    for group in state.groups.values():
        counts[group.ability.region] += len(group.members)
    return tuple(region for region, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if region)


def forecasts(table: CarbonTable, regions: tuple[str, ...], now_ms: int) -> RecordForecasts:
    """What the core shall know now: the coming hours of these regions, and of everywhere else."""
    from_ms = now_ms - now_ms % HOUR_MS
    told = [
        RegionForecast(region, grams)
        for region in (*sorted(regions[: FORECAST_REGIONS_MAX - 1]), ELSEWHERE)
        if (grams := table.forecast(region, from_ms, FORECAST_HOURS_MAX))
    ]
    return RecordForecasts(from_ms, tuple(told), table.label[:SOURCE_LENGTH_MAX])


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
