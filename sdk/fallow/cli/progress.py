"""Progress of a job on a terminal; elsewhere only what keeps it waiting."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from fallow.job import JobState, JobStatus
from fallow.shown_text import shown

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_WORDS = {
    JobState.PENDING: "inspecting the bundle",
    JobState.QUEUED: "waiting for workers",
    JobState.RUNNING: "running",
    JobState.VERIFYING: "verifying",
    JobState.PAUSED: "paused",
    JobState.SUCCEEDED: "done",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


class JobBar:
    """A progress bar that is told statuses; without a terminal, lines that say why a job waits; or nothing."""

    def __init__(self, progress: Progress | None, task: TaskID | None, *, tells_waiting: bool = False) -> None:
        self._progress = progress
        self._task = task
        self._tells_waiting = tells_waiting
        self._told = ""

    def uploaded(self, rows: int) -> None:
        """Tells how many rows are at the coordinator."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"uploading: {rows:,} rows")

    def status(self, status: JobStatus) -> None:
        """Tells a job's status."""
        words = _WORDS[status.state]
        waits = bool(status.reason) and status.state in {JobState.PENDING, JobState.QUEUED, JobState.PAUSED}
        if waits:
            words = f"{words}: {status.reason}"
        if self._tells_waiting and waits and words != self._told:
            self._told = words
            click.echo(shown(words), err=True)
        if self._progress is None or self._task is None:
            return
        rows = status.progress
        self._progress.update(self._task, description=words, completed=rows.rows_done, total=rows.rows_total or None)


@contextmanager
def job_bar(*, shown: bool) -> Generator[JobBar, None, None]:
    """A bar on stderr when `shown` and stderr is a terminal; elsewhere only what keeps a job waiting is told."""
    if not shown or not sys.stderr.isatty():
        yield JobBar(None, None, tells_waiting=shown)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        # Reasons hold brackets that are no markup.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield JobBar(progress, progress.add_task("reading", total=None))
