"""`fallow-coordinator carbon`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fallow.shown_text import shown
from fallow_coordinator.cli.options import json_option, state_option


@click.group("carbon")
def carbon_group() -> None:
    """Grams of CO2 per kWh by region and hour: what the coordinator reckons with."""


@carbon_group.command("show")
@state_option
@click.option("--file", "path", type=click.Path(path_type=Path, dir_okay=False), help="Another table than the state's.")
@click.option("--region", default="", help="One region, by its two letters. Default: all, this hour.")
@click.option("--hours", type=click.IntRange(1, 8_784), default=24, show_default=True, help="How many, from now on.")
@json_option
def carbon_show(state: Path, path: Path | None, region: str, hours: int, as_json: bool) -> None:
    """The hours to come, in UTC, and where the figures come from."""
    from fallow_coordinator.carbon.showing import told

    facts, words = told(state.expanduser().absolute(), path, region, hours)
    click.echo(json.dumps(facts) if as_json else shown(words))


@carbon_group.command("check")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def carbon_check(path: Path, as_json: bool) -> None:
    """Reads a table as the coordinator would, and tells the line that is wrong."""
    from fallow_coordinator.carbon.table import read_table

    table = read_table(path)
    facts = {"path": str(path), "source": table.label, "regions": list(table.regions())}
    words = f"{path} is good: {len(table.regions())} regions ({', '.join(table.regions())}); source: {table.label}"
    click.echo(json.dumps(facts) if as_json else shown(words))


@carbon_group.command("export")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--region", "regions", multiple=True, help="Only these; may be repeated.")
@json_option
def carbon_export(path: Path, regions: tuple[str, ...], as_json: bool) -> None:
    """Writes the synthetic default as a table to change; it says of itself that it is synthetic."""
    from fallow_coordinator.carbon.showing import export

    count = export(path, regions)
    facts = {"path": str(path), "regions": count}
    click.echo(json.dumps(facts) if as_json else f"{count} regions in {path}; put it in the state folder as carbon.csv")
