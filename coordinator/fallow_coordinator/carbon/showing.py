"""The carbon table for people: what is in force, what is to come, and the default to change."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fallow.errors import FallowError, Reason
from fallow_coordinator.carbon.table import SYNTHETIC, CarbonTable, lines_of, read_table
from fallow_coordinator.core.limits import HOUR_MS
from fallow_coordinator.state_folder import StateFolder


def table_in_force(state: Path, path: Path | None) -> CarbonTable:
    """The named table, the state folder's, or the default. Raises FIELD_INVALID with the line that is wrong."""
    if path is not None:
        return read_table(path)
    own = StateFolder(state).carbon_table
    return read_table(own) if own.exists() else SYNTHETIC


def told(state: Path, path: Path | None, region: str, hours: int) -> tuple[dict[str, Any], str]:
    """Facts and words: every region's hour now, or one region's hours to come."""
    table = table_in_force(state, path)
    now_ms = time.time_ns() // 1_000_000
    from_ms = now_ms - now_ms % HOUR_MS
    facts: dict[str, Any] = {"source": table.label, "synthetic": table.is_synthetic, "from_ms": from_ms}
    if not region:
        grams = {name: table.grams(name, now_ms) for name in table.regions()}
        lines = [f"{name:<8}{value:>5} g/kWh" for name, value in grams.items()]
        return {**facts, "grams_per_kwh": grams}, "\n".join((*lines, f"source: {table.label}"))
    known = table.known(region)
    if known is None:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"the table has no region {region}",
            field="--region",
            limit=", ".join(table.regions()),
        )
    curve = table.forecast(region, from_ms, hours)
    lines = [f"{_hour(from_ms + hour * HOUR_MS)}  {value:>5} g/kWh" for hour, value in enumerate(curve)]
    return {**facts, "region": known, "grams_per_kwh": list(curve)}, "\n".join((*lines, f"source: {table.label}"))


def export(path: Path, regions: Sequence[str]) -> int:
    """Writes the default's regions, all unless some are named; gives how many. Raises FIELD_INVALID."""
    names = [name.strip().lower() for name in regions] or list(SYNTHETIC.regions())
    unknown = [name for name in names if name not in SYNTHETIC.regions()]
    if unknown:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"there is no region {unknown[0]}",
            field="--region",
            limit=", ".join(SYNTHETIC.regions()),
        )
    with path.open("x", encoding="utf-8") as file:
        file.writelines(lines_of(SYNTHETIC, names))
    return len(names)


def _hour(at_ms: int) -> str:
    return datetime.datetime.fromtimestamp(at_ms / 1_000, datetime.UTC).strftime("%Y-%m-%d %H:00Z")
