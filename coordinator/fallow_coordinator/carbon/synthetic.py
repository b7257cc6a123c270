"""The synthetic default: hourly curves made from published yearly mixes and typical shapes. Nothing here was measured.

For each country the mix of 2023 (`grid_mixes.csv`, which names its sources) is spread over a year: demand with two
daily peaks and a season, sun by latitude and hour, wind as a few waves of two to six days, nuclear and biomass flat,
hydropower half flat; fossil plants cover what is left. Life-cycle factors are the medians of IPCC AR5 WG III, Annex
III (2014). The curve is then scaled so that its mean over the year is the published figure. Days and hours are
typical, not those of any year; who wants real ones replaces the file.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

HOURS_OF_YEAR: Final = 8_760
LABEL: Final = (
    "synthetic: typical daily and seasonal shapes over the national mixes of 2023 "
    "(Our World in Data from Ember and the Energy Institute, CC BY 4.0; factors: IPCC AR5 WG III Annex III)"
)
WORLD: Final = "world"
WORLD_GRAMS_PER_KWH: Final = 481
"""Mean of the world's electricity in 2023 (Ember, Global Electricity Review 2024); stands for regions nobody knows."""
GRAMS_PER_KWH: Final[Mapping[str, int]] = {
    "coal": 820, "gas": 490, "oil": 650, "nuclear": 12, "hydro": 24, "wind": 11, "solar": 45, "bio": 230,
}  # fmt: skip
_SOURCES: Final = tuple(GRAMS_PER_KWH)
_WAVES: Final = ((151.0, 0.42), (89.0, 0.30), (53.0, 0.18), (24.0, 0.06))
"""Hours and strength of the waves of wind: weather passes in two to six days."""
_HYDRO_FLAT: Final = 0.5
_FOSSIL_LEAST: Final = 0.25
"""Of their mean, what fossil plants never go below: heat, reserves, slow starts."""
ALIASES: Final[Mapping[str, str]] = {"uk": "gb", "usa": "us", "deu": "de", "fra": "fr"}


@dataclass(frozen=True, slots=True)
class GridMix:
    """A country's electricity in a year, in TWh by source."""

    region: str
    name: str
    latitude: float
    utc_offset_hours: float
    grams_per_kwh: int
    terawatt_hours: Mapping[str, float]


@cache
def grid_mixes() -> Mapping[str, GridMix]:
    """All of them, by region: the country's two letters in lower case."""
    text = resources.files("fallow_coordinator.carbon").joinpath("grid_mixes.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {
        row["region"]: GridMix(
            region=row["region"],
            name=row["name"],
            latitude=float(row["latitude"]),
            utc_offset_hours=float(row["utc_offset_hours"]),
            grams_per_kwh=int(row["grams_per_kwh"]),
            terawatt_hours={source: float(row[source]) for source in _SOURCES},
        )
        for row in rows
    }


@cache
def synthetic_year(region: str) -> Sequence[int]:
    """Grams per kWh of every hour of a typical year from 1 January 00:00 UTC; KeyError for a region without a mix."""
    if region == WORLD:
        return array("H", [WORLD_GRAMS_PER_KWH] * HOURS_OF_YEAR)
    mix = grid_mixes()[region]
    raw = _raw_year(mix)
    scale = mix.grams_per_kwh * len(raw) / sum(raw)
    return array("H", [max(1, round(grams * scale)) for grams in raw])


def _raw_year(mix: GridMix) -> list[float]:
    twh = mix.terawatt_hours
    total = sum(twh.values())
    share = {source: amount / total for source, amount in twh.items()}
    hours = range(HOURS_OF_YEAR)
    demand = _with_mean([_demand(mix, hour) for hour in hours], 1.0)
    sun = _with_mean([_sun(mix, hour) for hour in hours], share["solar"])
    wind = _with_mean([_wind(mix, hour) for hour in hours], share["wind"])
    flat = share["nuclear"] + share["bio"] + _HYDRO_FLAT * share["hydro"]
    fossil = share["coal"] + share["gas"] + share["oil"]
    flexible = fossil + (1 - _HYDRO_FLAT) * share["hydro"]
    return [_grams(share, demand[hour], sun[hour], wind[hour], flat, flexible, fossil) for hour in hours]


def _grams(
    share: Mapping[str, float], demand: float, sun: float, wind: float, flat: float, flexible: float, fossil: float
) -> float:
    """Grams per kWh of one hour: what sun, wind and flat plants leave is covered by water and fuel."""
    load = max(_FOSSIL_LEAST, (demand - sun - wind - flat) / flexible) if flexible > 0 else 0.0
    # Gas follows the load more than coal does.
    made = {
        "coal": share["coal"] * math.pow(load, 0.8),
        "gas": share["gas"] * math.pow(load, 1.25),
        "oil": share["oil"] * load,
        "nuclear": share["nuclear"],
        "bio": share["bio"],
        "hydro": share["hydro"] * (_HYDRO_FLAT + (1 - _HYDRO_FLAT) * load),
        "wind": wind,
        "solar": sun,
    }
    return sum(amount * GRAMS_PER_KWH[source] for source, amount in made.items()) / sum(made.values())


def _demand(mix: GridMix, hour: int) -> float:
    """Low at night, peaks at 9 and 19 o'clock, less on two days of seven, more in winter away from the equator."""
    local = (hour + mix.utc_offset_hours) % 24
    peaks = math.exp(-(((local - 9.5) / 3.0) ** 2)) + 1.15 * math.exp(-(((local - 19.0) / 2.8) ** 2))
    day = 0.86 + 0.26 * peaks + (0.08 if 9 <= local <= 18 else 0.0)
    week = 0.93 if (hour // 24) % 7 >= 5 else 1.0
    season = 1 + 0.12 * math.sin(math.radians(mix.latitude)) * math.cos(2 * math.pi * (hour / HOURS_OF_YEAR - 0.04))
    return day * week * season


def _sun(mix: GridMix, hour: int) -> float:
    """Sine of the sun's height above the horizon (Cooper's declination, Solar Energy 12, 1969)."""
    day = hour // 24 + 1
    declination = math.radians(23.45) * math.sin(2 * math.pi * (284 + day) / 365)
    latitude = math.radians(mix.latitude)
    angle = math.radians(15 * ((hour + 0.5 + mix.utc_offset_hours) % 24 - 12))
    height = math.sin(latitude) * math.sin(declination) + math.cos(latitude) * math.cos(declination) * math.cos(angle)
    return max(0.0, height)


def _wind(mix: GridMix, hour: int) -> float:
    """Waves of weather, each country's at its own time, stronger in winter."""
    seed = sum(ord(letter) * (index + 3) for index, letter in enumerate(mix.region))
    waves = sum(
        strength * math.sin(2 * math.pi * hour / period + seed * (index + 1))
        for index, (period, strength) in enumerate(_WAVES)
    )
    season = 1 + 0.25 * math.sin(math.radians(mix.latitude)) * math.cos(2 * math.pi * (hour / HOURS_OF_YEAR - 0.04))
    return max(0.08, season * (1 + waves))


def _with_mean(values: list[float], mean: float) -> list[float]:
    scale = mean * len(values) / sum(values)
    return [value * scale for value in values]
