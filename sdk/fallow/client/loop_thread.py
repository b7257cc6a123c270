"""One event loop on a thread of its own, so that blocking code can use asynchronous code anywhere."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, ClassVar, Final, TypeVar

from fallow.errors import FallowError, Reason

Result = TypeVar("Result")

STOP_TIMEOUT_S: Final = 5.0


class LoopThread:
    """A running event loop that other threads hand work to."""

    _shared: ClassVar[LoopThread | None] = None
    _making: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        """Starts the thread."""
        self._process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fallow-client", daemon=True)
        self._thread.start()

    @classmethod
    def shared(cls) -> LoopThread:
        """The loop of this process: one is enough, and gRPC likes it best. Raises FIELD_INVALID in a forked child."""
        with cls._making:
            if cls._shared is None:
                cls._shared = cls()
                atexit.register(cls._shared.stop)
            cls._shared.check_process()
            return cls._shared

    def check_process(self) -> None:
        """Raises FIELD_INVALID in a forked child: it has neither this thread nor gRPC's, and would hang or crash."""
        if self._process != os.getpid():
            raise FallowError(
                Reason.FIELD_INVALID,
                "this process was forked from one that had connected",
                field="process",
                limit="connections are not carried through a fork",
                hint='start processes with multiprocessing.get_context("spawn"), or connect after the fork only',
            )

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`; when the caller is interrupted, the work is cancelled."""
        try:
            self.check_process()
        except FallowError:
            work.close()
            raise
        ended = threading.Event()

        async def tracked() -> Result:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(tracked(), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                # What it used may be closed next, so it has to be over first.
                ended.wait(STOP_TIMEOUT_S)
            raise

    def iterate(self, values: AsyncGenerator[Result, None]) -> Iterator[Result]:
        """The values as they come."""
        try:
            while (batch := self.run(_next(values))) is not None:
                yield batch[0]
        finally:
            self.run(values.aclose())

    def stop(self) -> None:
        """Ends the loop; what still runs on it is cancelled."""
        if self._loop.is_closed() or self._process != os.getpid():
            return
        future = asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)
        try:
            future.result(STOP_TIMEOUT_S)
        except TimeoutError:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _next(values: AsyncGenerator[Result, None]) -> tuple[Result] | None:
    """The next value in a tuple of its own; None at the end."""
    async for value in values:
        return (value,)
    return None


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
