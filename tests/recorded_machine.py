"""A machine from a recording: files, links, commands and answers of children, as JSON in tests/fixtures/machines/.

The recordings are written by hand after the formats that the kernel, the drivers and the tools document; none was taken
from such a machine. `_about` in each says what it stands for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fallow_worker.probes.machine import Answer, Ran

FOLDER = Path(__file__).parent / "fixtures" / "machines"


@dataclass
class RecordedMachine:
    """Obeys the `Machine` port. Commands and children that were not recorded are not installed."""

    system: str = "Linux"
    architecture: str = "x86_64"
    release: str = "6.12.0"
    cores: int = 1
    files: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    """Absolute targets."""
    commands: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By child, and for trials by `<provider> <device option or empty>`; `{"failure": …}` for a child that died."""
    asked: list[str] = field(default_factory=list)

    @classmethod
    def named(cls, name: str) -> RecordedMachine:
        """The recording of that name."""
        recording = cast("dict[str, Any]", json.loads((FOLDER / f"{name}.json").read_text()))
        return cls(**{key: value for key, value in recording.items() if not key.startswith("_")})

    def cores_allowed(self) -> int:
        return self.cores

    def read(self, path: str) -> str | None:
        return self.files.get(self._resolved(path))

    def names(self, folder: str) -> tuple[str, ...]:
        place = self._resolved(folder).rstrip("/") + "/"
        inside = [path.removeprefix(place) for path in (*self.files, *self.links) if path.startswith(place)]
        return tuple(sorted({path.partition("/")[0] for path in inside}))

    def target(self, path: str) -> str | None:
        place = self._resolved(path)
        exists = place in self.files or self.names(place) or path in self.links or place in self.links.values()
        return place if exists else None

    def run(self, command: Sequence[str], *, deadline_s: float) -> Ran:
        recorded = self.commands.get(" ".join(command))
        self.asked.append(command[0])
        if recorded is None:
            return Ran(-1, "", f"{command[0]}: No such file or directory")
        return Ran(recorded.get("status", 0), recorded.get("output", ""), recorded.get("failure", ""))

    def ask(self, child: str, question: Mapping[str, Any], *, deadline_s: float) -> Answer:
        key = child
        if "provider" in question:
            options = question["options"]
            key = f"{question['provider']} {options.get('device_type') or options.get('device_id') or ''}".strip()
        self.asked.append(key)
        recorded = self.answers.get(key, {"failure": f"{key} was not recorded"})
        if "failure" in recorded:
            return Answer({}, str(recorded["failure"]))
        return Answer(recorded)

    def _resolved(self, path: str) -> str:
        place = ""
        for part in path.strip("/").split("/"):
            place = f"{place}/{part}"
            while place in self.links:
                place = self.links[place]
        return place
