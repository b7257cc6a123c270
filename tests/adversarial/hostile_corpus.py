"""Programs that mean harm, by name: what a submitter may upload as a model, and what must come of it at inspection."""

from __future__ import annotations

from adversarial import hostile_files, hostile_graphs
from adversarial.hostile_models import Hostile, named

assert hostile_files and hostile_graphs, "importing them notes their models"


def corpus() -> list[Hostile]:
    """All of them."""
    return [*named(), *hostile_graphs.wrong_operators(), *hostile_graphs.bombs()]
