"""What measuring has found of each bundle on this machine: remembered in a file, by machine and runtime."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fallow.ids import Digest
from fallow.machine_identity import machine_digest
from fallow_worker.engine.protocol import THREADS_MAX, Ready, Setting, SpawnOptions, Trial, Tuned

_log = logging.getLogger(__name__)

VERSION: Final = 1
BUNDLES_MAX: Final = 256
"""Bundles that are remembered, the newest."""
VALID_FOR_MS: Final = 30 * 86_400_000
"""Then it is measured anew: the machine may have been busy with something else that day."""
FILE_BYTES_MAX: Final = 1024 * 1024
TRIALS_MAX: Final = 8

Entry = dict[str, Any]


class Tunings:
    """The settings of one node's bundles. A file that cannot be read or written costs measuring again, nothing else."""

    def __init__(self, path: Path | None) -> None:
        """Remembers in `path`; None, or a folder that is not there: while this process lives."""
        self._path = path if path is not None and path.parent.is_dir() else None
        self._entries: dict[str, Entry] = read_tunings(self._path) if self._path is not None else {}

    def setting(self, bundle_digest: Digest, identity: str, options: SpawnOptions) -> Setting | None:
        """The setting that was found for the bundle on this very machine and runtime; None: it has to be measured."""
        entry = self._entries.get(bundle_digest.hex())
        if entry is None or entry.get("identity") != identity:
            return None
        try:
            if not 0 <= time.time() * 1000 - int(entry["at_ms"]) < VALID_FOR_MS:
                return None
            setting = Setting(int(entry["setting"]["in_flight"]), int(entry["setting"]["threads"]))
        except (KeyError, TypeError, ValueError):
            return None
        return setting if is_possible(setting, options) else None

    def keep(self, bundle_digest: Digest, identity: str, options: SpawnOptions, tuned: Tuned) -> None:
        """Remembers what a child has measured, as far as it is possible at all: the child may have been taken over."""
        if not is_possible(tuned.setting, options) or len(tuned.trials) > TRIALS_MAX:
            _log.warning("tuning.refused bundle=%s setting=%s", bundle_digest.hex()[:16], tuned.setting)
            return
        self._entries.pop(bundle_digest.hex(), None)
        self._entries[bundle_digest.hex()] = {
            "identity": identity,
            "setting": asdict(tuned.setting),
            "trials": [asdict(trial) for trial in tuned.trials],
            "at_ms": int(time.time() * 1000),
        }
        while len(self._entries) > BUNDLES_MAX:
            del self._entries[next(iter(self._entries))]
        _log.info(
            "tuning.measured bundle=%s %s", bundle_digest.hex()[:16], tuning_words(self._entries[bundle_digest.hex()])
        )
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        # A full disk must not end a worker. Another node of this machine may have written meanwhile: both stay.
        with contextlib.suppress(OSError):
            entries = dict(list({**read_tunings(self._path), **self._entries}.items())[-BUNDLES_MAX:])
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.new")
            temporary.write_text(json.dumps({"version": VERSION, "bundles": entries}))
            temporary.replace(self._path)


def read_tunings(path: Path) -> dict[str, Entry]:
    """What a file remembers, by bundle digest in hex, the oldest first; empty when it is missing or damaged."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            return {}
        told: Any = json.loads(path.read_text())
        if told["version"] != VERSION:
            return {}
        return {str(digest): dict(entry) for digest, entry in told["bundles"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def identity_of(ready: Ready, options: SpawnOptions) -> str:
    """Of what a measurement depends on: machine, runtime, and how the child was spawned. Another one: measured anew."""
    facts = [
        machine_digest().hex(), ready.runtime, ready.execution_class,
        options.threads, options.lanes, options.allow_spinning, options.niceness,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def is_possible(setting: Setting, options: SpawnOptions) -> bool:
    """Whether a child of these options can run so."""
    return 1 <= setting.in_flight <= min(options.threads, THREADS_MAX) + 1 and 1 <= setting.threads <= options.threads


def tuning_words(entry: Mapping[str, Any]) -> str:
    """A remembered setting in one line for people."""
    try:
        found = Setting(**entry["setting"])
        trials = [Trial(Setting(**trial["setting"]), **_figures(trial)) for trial in entry["trials"]]
    except (KeyError, TypeError):
        return "cannot be read"
    rates = ", ".join(
        f"{setting_words(trial.setting)}: {trial.rows_milli_per_s / 1000:,.0f} rows/s" for trial in trials
    )
    return f"{setting_words(found)} ({rates or 'nothing else to try'})"


def setting_words(setting: Setting) -> str:
    """A setting for people."""
    return f"{setting.in_flight}×{setting.threads}"


def _figures(trial: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(value) for name, value in trial.items() if name != "setting"}
