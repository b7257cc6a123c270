"""What the command says: results on stdout, everything else on stderr, JSON when asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, NoReturn, cast

import click

from fallow.errors import FallowError
from fallow.shown_text import shown

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130


class Output:
    """Where a command's words go."""

    def __init__(self, *, as_json: bool) -> None:
        """With `as_json` stdout carries JSON, one object a line, and nothing else."""
        self.as_json = as_json

    def result(self, facts: Mapping[str, Any], text: str) -> None:
        """A result: `facts` as one JSON object, or `text`."""
        click.echo(json.dumps(plain(facts), ensure_ascii=False) if self.as_json else shown(text))

    def note(self, text: str) -> None:
        """Something beside the result, for people."""
        if not self.as_json:
            click.echo(shown(text), err=True)

    def failed(self, error: FallowError) -> NoReturn:
        """Tells an error and ends the command with exit code 1."""
        if self.as_json:
            facts = {
                "reason": error.reason.value,
                "message": error.message,
                "field": error.field,
                "limit": error.limit,
                "hint": error.hint,
            }
            click.echo(json.dumps({"error": facts}, ensure_ascii=False), err=True)
        else:
            click.echo(shown(f"fallow: {error.message}"), err=True)
            for name, value in (("field", error.field), ("allowed", error.limit), ("hint", error.hint)):
                if value and value not in error.message:
                    click.echo(shown(f"  {name}: {value}"), err=True)
        sys.exit(EXIT_FAILED)


def plain(value: object) -> Any:
    """`value` in the types that JSON has; digests and other bytes become hexadecimal."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in cast("Sequence[object]", value)]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return value


def counted(count: int, noun: str) -> str:
    """`1 row`, `7,700 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
