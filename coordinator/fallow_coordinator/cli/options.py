"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from fallow.places import coordinator_folder

_UNITS_MS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class DurationType(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A duration such as `90s`, `15m`, `24h` or `7d`; gives milliseconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Milliseconds."""
        if isinstance(value, int):
            return value
        number, unit = str(value)[:-1], str(value)[-1:]
        if unit not in _UNITS_MS or not number.isdecimal():
            self.fail(f"{value!r} is no duration; write 90s, 15m, 24h or 7d", param, ctx)
        return int(number) * _UNITS_MS[unit]


def state_option(command: CommandT) -> CommandT:
    """`--state DIR`."""
    return click.option(
        "--state",
        type=click.Path(path_type=Path, file_okay=False),
        default=coordinator_folder,
        show_default="$FALLOW_STATE or ~/.local/state/fallow/coordinator",
        help="The coordinator's state folder.",
    )(command)


def json_option(command: CommandT) -> CommandT:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)
