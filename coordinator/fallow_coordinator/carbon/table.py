"""What electricity costs in carbon, by region and hour: the operator's file, or the synthetic default."""

from __future__ import annotations

import datetime
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fallow.errors import FallowError, Reason
from fallow_coordinator.carbon import synthetic
from fallow_coordinator.core.limits import HOUR_MS

FILE_BYTES_MAX: Final = 64 * 1024 * 1024
REGIONS_MAX: Final = 500
REGION_LENGTH_MAX: Final = 64
GRAMS_PER_KWH_MAX: Final = 3_000
"""Lignite over its life cycle stays below half of this."""
COLUMNS: Final = ("region", "hour_of_year", "grams_per_kwh")
HOURS_OF_LEAP_YEAR: Final = 8_784
LENGTHS: Final = (24, 168, synthetic.HOURS_OF_YEAR, HOURS_OF_LEAP_YEAR)
"""Hours a region may have: a day or a week (from Monday) that comes again and again, or a year. All in UTC."""
WORLD: Final = synthetic.WORLD
_SYNTHETIC_REGIONS: Final = frozenset({*synthetic.grid_mixes(), WORLD})


@dataclass(frozen=True, slots=True)
class CarbonTable:
    """Grams of CO₂ equivalents for each kWh of a region's electricity in each hour, UTC."""

    label: str
    """Where the figures come from; begins with `synthetic` when nobody measured them."""
    hours: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    """By region, lower case. Empty: the synthetic default."""

    @property
    def is_synthetic(self) -> bool:
        """Whether nobody measured these figures."""
        return not self.hours

    def regions(self) -> tuple[str, ...]:
        """Every region there is, sorted."""
        return tuple(sorted(self.hours or _SYNTHETIC_REGIONS))

    def known(self, region: str) -> str | None:
        """The region of the table that stands for what a worker calls its own, or None.

        `de-berlin` is `de` unless it has figures of its own; what nobody knows is `world`, where the table has it.
        """
        have = frozenset(self.hours) or _SYNTHETIC_REGIONS
        name = region.strip().lower()
        while name:
            found = synthetic.ALIASES.get(name, name) if name not in have else name
            if found in have:
                return found
            name = name.rpartition("-")[0]
        return WORLD if WORLD in have else None

    def grams(self, region: str, at_ms: int) -> int | None:
        """Grams per kWh in the hour that holds `at_ms`; None when the table knows neither region nor world."""
        known = self.known(region)
        if known is None:
            return None
        hours = self.hours[known] if self.hours else synthetic.synthetic_year(known)
        return hours[_index(at_ms, len(hours))]

    def forecast(self, region: str, from_ms: int, hours: int) -> tuple[int, ...]:
        """Grams per kWh of so many hours from the one that holds `from_ms` on; none for a region nobody knows."""
        found = (self.grams(region, from_ms + hour * HOUR_MS) for hour in range(hours))
        return tuple(grams for grams in found if grams is not None)


def _index(at_ms: int, length: int) -> int:
    moment = datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC)
    if length == 24:
        return moment.hour
    if length == 168:
        return moment.weekday() * 24 + moment.hour
    hour = (moment.timetuple().tm_yday - 1) * 24 + moment.hour
    # A year without 29 February lends leap years its last day twice.
    return hour if hour < length else hour - 24


SYNTHETIC: Final = CarbonTable(synthetic.LABEL)


def read_table(path: Path) -> CarbonTable:
    """The table in a file. Raises FIELD_INVALID or LIMIT_EXCEEDED with the line where it went wrong."""
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED, f"{path} has {size} bytes", field=str(path), limit=f"{FILE_BYTES_MAX} bytes"
            )
        with path.open(encoding="utf-8", newline="") as file:
            return parse_table(file, str(path))
    except OSError as error:
        raise FallowError(
            Reason.FIELD_INVALID, f"{path} can't be read: {error.strerror}", field=str(path), hint="name another file"
        ) from None
    except UnicodeDecodeError:
        raise FallowError(Reason.FIELD_INVALID, f"{path} is not UTF-8", field=str(path), limit="CSV in UTF-8") from None


def parse_table(lines: Iterable[str], name: str) -> CarbonTable:
    """The table in these lines; `name` says whose. Lines that begin with `#` are comments, the first one the label."""
    found: dict[str, dict[int, int]] = {}
    label = ""
    header_seen = False
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text.startswith("#"):
            label = label or text.lstrip("# ")[:200]
        elif text and not header_seen:
            if tuple(cell.strip() for cell in text.split(",")) != COLUMNS:
                raise _wrong(name, number, f"the header is {text[:80]!r}", ",".join(COLUMNS))
            header_seen = True
        elif text:
            _take_row(found, text.split(","), name, number)
    if not found:
        raise _wrong(name, 1, "there are no figures", f"{','.join(COLUMNS)}, then one line for each region and hour")
    hours = {region: _whole(region, by_hour, name) for region, by_hour in sorted(found.items())}
    return CarbonTable(label or f"the operator's file {Path(name).name}", hours)


def _take_row(found: dict[str, dict[int, int]], cells: list[str], name: str, number: int) -> None:
    if len(cells) != len(COLUMNS):
        raise _wrong(name, number, f"{len(cells)} cells", f"{len(COLUMNS)}: {','.join(COLUMNS)}")
    region = cells[0].strip().lower()
    if not 1 <= len(region) <= REGION_LENGTH_MAX or not region.isprintable():
        raise _wrong(name, number, f"region is {region[:80]!r}", f"1 to {REGION_LENGTH_MAX} printable characters")
    hour = _natural(cells[1], HOURS_OF_LEAP_YEAR - 1, "hour_of_year", name, number)
    grams = _natural(cells[2], GRAMS_PER_KWH_MAX, "grams_per_kwh", name, number)
    by_hour = found.setdefault(region, {})
    if len(found) > REGIONS_MAX:
        raise _wrong(name, number, f"{region} is one region too many", f"{REGIONS_MAX} regions")
    if hour in by_hour:
        raise _wrong(name, number, f"hour {hour} of {region} stands here a second time", "each hour once")
    by_hour[hour] = grams


def _natural(text: str, highest: int, column: str, name: str, number: int) -> int:
    """A figure from 0 to `highest`; fractions are rounded."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= highest or (column == "hour_of_year" and value != int(value)):
        raise _wrong(name, number, f"{column} is {text.strip()[:40]!r}", f"0 to {highest}")
    return round(value)


def _whole(region: str, by_hour: Mapping[int, int], name: str) -> Sequence[int]:
    """All hours of a region in order. Raises FIELD_INVALID when one is missing."""
    missing = next((hour for hour in range(len(by_hour)) if hour not in by_hour), None)
    if missing is not None or len(by_hour) not in LENGTHS:
        gap = f"hour {missing} is missing" if missing is not None else "hours after the last one are missing"
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{name}: region {region} has {len(by_hour)} hours; {gap}",
            field=name,
            limit="all of " + ", ".join(str(length) for length in LENGTHS) + " hours, counted from 0",
        )
    return array("H", [by_hour[hour] for hour in range(len(by_hour))])


def _wrong(name: str, number: int, what: str, allowed: str) -> FallowError:
    return FallowError(Reason.FIELD_INVALID, f"{name}, line {number}: {what}", field=f"{name}:{number}", limit=allowed)


def lines_of(table: CarbonTable, regions: Sequence[str] = ()) -> Iterable[str]:
    """The table as the lines of such a file, for a person to look at and to change."""
    yield f"# {table.label}\n"
    yield ",".join(COLUMNS) + "\n"
    for region in regions or table.regions():
        hours = table.hours[region] if table.hours else synthetic.synthetic_year(region)
        for hour, grams in enumerate(hours):
            yield f"{region},{hour},{grams}\n"
