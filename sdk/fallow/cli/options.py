"""Options that several commands share, and what they mean."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from fallow.bundle import Precision
from fallow.bundle_file import MANIFEST_NAME, About, Bundle
from fallow.cli.output import EXIT_INTERRUPTED, Output
from fallow.errors import FallowError
from fallow.roles import DataClass

Command = TypeVar("Command", bound=Callable[..., Any])

_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DURATION_DIGITS_MAX: Final = 9

json_option = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, one object a line.")
login_option = click.option(
    "--login",
    type=click.Path(path_type=Path),
    help="Folder with credentials made by `fallow login`. [default: found by itself]",
)


class DurationType(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A duration such as `90s`, `15m`, `24h` or `7d`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """The time span."""
        if isinstance(value, timedelta):
            return value
        number, unit = str(value)[:-1], str(value)[-1:]
        if unit not in _UNIT_SECONDS or not number.isdecimal() or len(number) > _DURATION_DIGITS_MAX:
            self.fail(f"{value!r} is no duration; write 90s, 15m, 24h or 7d", param, ctx)
        return timedelta(seconds=int(number) * _UNIT_SECONDS[unit])


def run(output: Output, work: Coroutine[Any, Any, None]) -> None:
    """Runs a command's work; an error ends it with exit code 1, Ctrl-C with 130."""
    try:
        asyncio.run(work)
    except FallowError as error:
        output.failed(error)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def stated_data(given: str | None) -> str:
    """The data class; asked on a terminal, refused elsewhere when it is not stated."""
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise click.UsageError(
            "say who may see the rows: --data public (strangers' machines), internal (your organisation's), "
            "or sensitive (the operator's only)"
        )
    click.echo(
        "Who may see these rows? public: volunteers' machines, which can read them; internal: managed machines; "
        "sensitive: the operator's own.",
        err=True,
    )
    answer = click.prompt("data", type=click.Choice([member.value for member in DataClass]), err=True)
    return str(answer)


def model_options(command: Command) -> Command:
    """Options that say what a model file leaves open."""
    for option in reversed(
        (
            click.option("--outputs", help="Outputs of the model to keep, by name, with commas. [default: all]"),
            click.option(
                "--shape",
                "shapes",
                multiple=True,
                metavar="NAME=N,N…",
                help="Row shape, without the row axis, of an input or output that the model leaves open.",
            ),
            click.option("--dim", "dims", multiple=True, metavar="NAME=N", help="Size of a named dimension."),
            click.option(
                "--precision",
                type=click.Choice([member.value for member in Precision]),
                default="fp32",
                show_default=True,
                help="Arithmetic that you accept.",
            ),
        )
    ):
        command = option(command)
    return command


def bundle_of(
    model: str, *, outputs: str | None, shapes: tuple[str, ...], dims: tuple[str, ...], precision: str, about: About
) -> Bundle:
    """The bundle that MODEL names: an ONNX file, a bundle folder, or `magika`. Raises BUNDLE_INVALID."""
    path = Path(model)
    given = outputs or shapes or dims or about or precision != "fp32"
    if model == "magika" and not path.exists():
        _refuse_options(given, "magika")
        return Bundle.magika()
    if path.is_dir() and (path / MANIFEST_NAME).exists():
        _refuse_options(given, "a bundle that is made already")
        return Bundle.load(path)
    about["precision"] = Precision(precision)
    return Bundle.from_onnx(
        path,
        outputs=split_names(outputs),
        shapes={name: _sizes(name, value) for name, value in pairs("--shape", shapes).items()},
        dims={name: _size(name, value) for name, value in pairs("--dim", dims).items()},
        **about,
    )


def is_made(model: str) -> bool:
    """Whether MODEL names a bundle that is made already, and no model file."""
    path = Path(model)
    return (model == "magika" and not path.exists()) or (path.is_dir() and (path / MANIFEST_NAME).exists())


def pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE` options as a mapping."""
    made: dict[str, str] = {}
    for pair in given:
        # Names of tensors may hold an equals sign; sizes and column names that are listed may not.
        name, equals, value = pair.rpartition("=")
        if not equals or not name or not value:
            raise click.UsageError(f"{option} takes NAME=VALUE, not {pair!r}")
        made[name] = value
    return made


def split_names(given: str | None) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in given.split(",") if name.strip()] if given else []


def input_columns(given: tuple[str, ...]) -> Mapping[str, list[str]]:
    """`--input NAME=COLUMN,COLUMN…` as a mapping."""
    return {name: split_names(value) for name, value in pairs("--input", given).items()}


def _refuse_options(given: object, what: str) -> None:
    if given:
        raise click.UsageError(f"options about the model do not go with {what}")


def _sizes(name: str, value: str) -> tuple[int, ...]:
    return tuple(_size(name, part) for part in value.split(","))


def _size(name: str, value: str) -> int:
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise click.UsageError(f"{value!r} is no size for {name!r}")
    return size
