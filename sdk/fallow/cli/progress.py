"""Progress of a job on a terminal; silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fallow.job import JobState, JobStatus

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
    """A progress bar that is told statuses."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress = progress
        self._task = task

    def uploaded(self, rows: int) -> None:
        """Tells how many rows are at the coordinator."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"uploading: {rows:,} rows")

    def status(self, status: JobStatus) -> None:
        """Tells a job's status."""
        if self._progress is None or self._task is None:
            return
        words = _WORDS[status.state]
        if status.reason and status.state in {JobState.PENDING, JobState.QUEUED, JobState.PAUSED}:
            words = f"{words}: {status.reason}"
        done = status.progress.rows_done + status.progress.rows_failed
        self._progress.update(self._task, description=words, completed=done, total=status.progress.rows_total or None)


@contextmanager
def job_bar(*, shown: bool) -> Generator[JobBar, None, None]:
    """A bar on stderr when `shown` and stderr is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield JobBar(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield JobBar(progress, progress.add_task("reading", total=None))
