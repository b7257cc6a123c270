"""The Ray driver: a child of the daemon that starts Ray, keeps a supervisor on each node, and spreads leases over them.

Started by `on_ray` as `python -m fallow_worker.executor.ray_driver ARGUMENTS`. It ends when its control socket closes,
and takes Ray with it: the processes that it starts die with it, even by `kill -9`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from fallow.session import Cause
from fallow_worker.engine.frames import FrameError, from_json
from fallow_worker.engine.protocol import clipped_reason
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.ray_head import HeadAnswer, ask_head, silent
from fallow_worker.executor.ray_messages import (
    STREAM_BYTES,
    CancelWork,
    Down,
    DriverArguments,
    FromDriver,
    RowsDone,
    StartWork,
    ToDriver,
    Up,
    WorkEnded,
    encode,
    end_of,
    read_frame,
    work_of,
)
from fallow_worker.executor.ray_nodes import Nodes
from fallow_worker.executor.ray_settings import TOKEN_PATH_VARIABLE, RaySettings

END_SECONDS_MAX: Final = 8.0
"""Between the end of the control socket and the end of this process."""
PROGRESS_SECONDS: Final = 2.0
EXIT_DAEMON_GONE: Final = 71
EXIT_NO_RAY: Final = 72
HEAD_LOOK_SECONDS: Final = 2.0
HEAD_SILENT_SECONDS_MAX: Final = 12.0
"""A head of the owner's cluster that answers nothing for so long is taken for dead; Ray itself would wait a minute."""
_VERSIONS: Final = re.compile(r"Ray: (\S+)\s+Python: (\S+)")
_SIDES: Final = 2


def main() -> None:
    """The whole life of a driver."""
    arguments: DriverArguments = from_json(sys.argv[1], DriverArguments)
    control = socket.socket(fileno=arguments.control_fd)
    _end_with_daemon(control)
    try:
        processes = start_ray(arguments.settings, arguments.folder)
    except BaseException as error:  # whatever Ray raises: the daemon tells it to the owner
        _say_at_once(control, Down(clipped_reason(words_of_start(error, arguments.settings))))
        shutil.rmtree(arguments.folder, ignore_errors=True)
        os._exit(EXIT_NO_RAY)
    try:
        asyncio.run(Driver(arguments, control, processes).serve())
    finally:
        _stop_ray()
        shutil.rmtree(arguments.folder, ignore_errors=True)
    os._exit(0)


def words_of_start(error: BaseException, settings: RaySettings) -> str:
    """Why Ray did not start, and what to do where that is known."""
    if settings.is_local:
        return f"Ray did not start: {error}"
    versions = _VERSIONS.findall(str(error))
    if len(versions) == _SIDES:
        (theirs, their_python), (ours, our_python) = versions
        return (
            f"the Ray cluster at {settings.address} runs Ray {theirs} on Python {their_python}, this worker Ray {ours}"
            f" on Python {our_python}: install ray=={theirs} on Python {their_python} here, or ours on every node"
        )
    return f"Ray at {settings.address} did not let this worker join: {error}"


def start_ray(settings: RaySettings, folder: str) -> dict[str, int]:
    """Starts a Ray of our own or joins the owner's; gives the processes without which it cannot go on, by name."""
    import ray as untyped_ray

    ray: Any = untyped_ray
    if not settings.is_local:
        ray.init(address=settings.address, log_to_driver=False, configure_logging=False)
        return {}
    _leave_out_helpers()
    supervisor = settings.supervisor
    from fallow_worker.probes.cpu import cores_usable

    ray.init(
        address="local",
        num_cpus=supervisor.cores or cores_usable(),
        num_gpus=settings.gpus,
        resources={"NPU": settings.npus} if settings.npus else None,
        object_store_memory=settings.object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=f"{folder}/t",
    )
    return _vital_processes()


def _leave_out_helpers() -> None:
    """Keeps Ray from starting what a private Ray of one machine has no use for: autoscaler, log shipping, web server.

    These are Ray's own methods and no public interface: where a version of Ray lacks them, the helpers just run.
    """
    from ray._private.node import Node

    def nothing(*_: object, **__: object) -> None:
        """Starts nothing."""

    for name in ("start_monitor", "start_log_monitor", "start_api_server"):
        if hasattr(Node, name):
            setattr(Node, name, nothing)


def _vital_processes() -> dict[str, int]:
    import ray as untyped_ray

    ray: Any = untyped_ray
    node: Any = getattr(getattr(ray, "_private", None), "worker", None)
    started: Any = getattr(getattr(node, "_global_node", None), "all_processes", {})
    vital: dict[str, int] = {}
    for name, infos in dict(started).items():
        if name in {"raylet", "gcs_server"} and infos:
            vital[str(name)] = int(infos[0].process.pid)
    return vital


def _stop_ray() -> None:
    import ray as untyped_ray

    ray: Any = untyped_ray
    with contextlib.suppress(Exception):
        ray.shutdown()


def _end_with_daemon(control: socket.socket) -> None:
    """Ends this process some time after the daemon closed the socket, whatever the rest of it is doing."""
    watched = control.dup()

    def watch() -> None:
        import select

        poll = select.poll()
        poll.register(watched, select.POLLRDHUP | select.POLLHUP)
        poll.poll()
        time.sleep(END_SECONDS_MAX)
        os._exit(EXIT_DAEMON_GONE)

    threading.Thread(target=watch, name="life", daemon=True).start()


def _say_at_once(control: socket.socket, message: FromDriver) -> None:
    with contextlib.suppress(OSError):
        header, _ = encode(message)
        control.setblocking(True)
        control.sendall(header)


class Driver:
    """Answers the daemon until it closes the socket."""

    def __init__(self, arguments: DriverArguments, control: socket.socket, processes: dict[str, int]) -> None:
        self._settings = arguments.settings
        self._control = control
        self._processes = processes
        self._nodes = Nodes(arguments.settings)
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._writing = asyncio.Lock()
        self._ended = asyncio.Event()

    async def serve(self) -> None:
        """Works until the daemon or Ray is gone."""
        reader, self._writer = await asyncio.open_connection(sock=self._control, limit=STREAM_BYTES)
        self._watch_processes()
        if not self._settings.is_local:
            threading.Thread(target=self._watch_head, name="head", daemon=True).start()
        try:
            facts = await self._nodes.start()
        except WorkFailed as failed:
            await self._say(Down(failed.reason))
            return
        await self._say(Up(facts))
        receiving = asyncio.create_task(self._receive(reader))
        ending = asyncio.create_task(self._ended.wait())
        await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
        for task in (receiving, ending, *self._calls.values()):
            task.cancel()
        await asyncio.gather(receiving, ending, *self._calls.values(), return_exceptions=True)
        if not self._ended.is_set():
            await self._nodes.stop()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while (frame := await read_frame(reader, ToDriver)) is not None:
                message, body = frame
                if isinstance(message, StartWork):
                    call = asyncio.create_task(self._run(message, body))
                    self._calls[message.call] = call
                    call.add_done_callback(self._forgetter(message.call))
                elif isinstance(message, CancelWork) and message.call in self._calls:
                    self._calls[message.call].cancel()
        except FrameError:
            return

    def _forgetter(self, call: int) -> Callable[[asyncio.Task[None]], None]:
        def forget(_: asyncio.Task[None]) -> None:
            self._calls.pop(call, None)

        return forget

    async def _run(self, start: StartWork, input_block: bytes) -> None:
        telling = asyncio.create_task(self._tell_progress(start))
        try:
            end = await self._nodes.run(work_of(start, input_block))
            telling.cancel()
            message, body = end_of(start.call, end)
            await self._say(message, body)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            reason = clipped_reason(f"the Ray driver made a mistake: {error!r}")
            await self._say(WorkEnded(start.call, Cause.PLATFORM, reason))
        finally:
            telling.cancel()

    async def _tell_progress(self, start: StartWork) -> None:
        told = 0
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            rows = await self._nodes.rows_done(start.lease_id)
            if rows > told:
                told = rows
                await self._say(RowsDone(start.call, rows))

    async def _say(self, message: FromDriver, body: bytes = b"") -> None:
        assert self._writer is not None
        header, body = encode(message, body)
        async with self._writing:
            self._writer.write(header)
            if body:
                self._writer.write(body)
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()

    def _watch_processes(self) -> None:
        """Hears at once when a process dies without which Ray cannot go on."""
        loop = asyncio.get_running_loop()
        for name, pid in self._processes.items():
            try:
                descriptor = os.pidfd_open(pid)
            except (OSError, AttributeError):
                continue
            loop.add_reader(descriptor, self._process_died, name, descriptor)

    def _watch_head(self) -> None:
        """Ends this process when the head of the owner's cluster is gone, with words for the owner.

        A thread: calls into Ray hold the event loop up while the head is away.
        """
        address, token_path = self._settings.address, os.environ.get(TOKEN_PATH_VARIABLE, "")
        answered = time.monotonic()
        while True:
            time.sleep(HEAD_LOOK_SECONDS)
            if ask_head(address, token_path) is not HeadAnswer.SILENT:
                answered = time.monotonic()
            elif time.monotonic() - answered >= HEAD_SILENT_SECONDS_MAX:
                # No farewell here either.
                since = time.monotonic() - answered
                _say_at_once(self._control.dup(), Down(clipped_reason(str(silent(address, since)))))
                os._exit(EXIT_NO_RAY)

    def _process_died(self, name: str, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        # No farewell to Ray: it would wait for a process that is gone. What is left dies with this process.
        _say_at_once(self._control.dup(), Down(f"Ray's {name} died"))
        os._exit(EXIT_NO_RAY)


if __name__ == "__main__":
    main()
