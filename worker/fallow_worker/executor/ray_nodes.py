"""The nodes of the owner's Ray as the driver sees them: one supervisor actor each, restarted when it dies."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import ray as untyped_ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fallow.errors import FallowError
from fallow.ids import LeaseId
from fallow.limits import MIB, NODE_RUNS_PER_TASK_MAX
from fallow.row_block import RowBlock
from fallow.session import Cause, NodeRows, TaskKind
from fallow_worker.engine.protocol import clipped_reason
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.capability import NodeFacts
from fallow_worker.executor.ray_node import NodeSupervisor
from fallow_worker.executor.ray_settings import RaySettings
from fallow_worker.executor.shards import (
    SHARD_BATCHES_MIN,
    RowRange,
    cut,
    join,
    join_failures,
    join_usage,
    weighted_ranges,
)
from fallow_worker.executor.supervisor import LEASES_AT_ONCE_MAX
from fallow_worker.ports import LoadedBundle, Outcome, Work

log = logging.getLogger(__name__)

ray: Any = untyped_ray
"""Ray's functions are typed in part only; what they give is checked here by name."""

START_SECONDS_MAX: Final = 60.0
"""A supervisor that has no node to itself by then is given up: the owner uses the node for something else."""
RESTARTS_MAX: Final = 8
"""Starts of one node's supervisor in a row without a lease that went well."""
RESTART_SECONDS_MIN: Final = 0.25
RESTART_SECONDS_MAX: Final = 30.0
NODE_WAIT_SECONDS_MAX: Final = 20.0
"""Work waits so long for a node that is being restarted."""
PART_ATTEMPTS_MAX: Final = 2
"""Tries of a part whose node died, when another node can take it."""
ARRIVAL_SECONDS_MAX: Final = 30.0
"""A part that has not reached its node by then waits for room there that does not come."""
LOOK_SECONDS: Final = 5.0
FILE_PIECE_BYTES: Final = 8 * MIB


@dataclass(slots=True, eq=False)
class _Node:
    """A node of the cluster; `facts` is None while it has no supervisor."""

    node_id: str
    ordinal: int
    """Its number among the worker's nodes, from the first look on."""
    address: str
    is_ours: bool
    """It shares the daemon's disk."""
    cpus: float
    gpus: float
    npus: float
    actor: Any = None
    facts: NodeFacts | None = None
    leases: int = 0
    failures: int = 0
    restarting: asyncio.Task[None] | None = None
    files: dict[tuple[bytes, str], str] | None = None


class _NotArrivedError(Exception):
    """A part of a lease did not reach its node."""


class Nodes:
    """Spreads leases over the supervisors of all nodes."""

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        self._nodes: list[_Node] = []
        self._changed = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> tuple[NodeFacts, ...]:
        """Starts a supervisor on every node. Raises WorkFailed(platform) when none could be started."""
        self._nodes = self._new_nodes()
        ends = await asyncio.gather(*(self._start_node(node) for node in self._nodes))
        facts = tuple(node.facts for node in self._nodes if node.facts is not None)
        if not facts:
            reasons = "; ".join(dict.fromkeys(end for end in ends if end)) or "the cluster has no node with a CPU"
            raise WorkFailed(Cause.PLATFORM, clipped_reason(f"no node of Ray can work: {reasons}"))
        for node in self._nodes:
            if node.facts is None:
                self._restart(node)
        if not self._settings.is_local:
            self._looking = asyncio.create_task(self._look_for_nodes())
        return facts

    def _new_nodes(self) -> list[_Node]:
        """Living nodes with a CPU that we do not know yet."""
        here = str(ray.get_runtime_context().get_node_id())
        known = {node.node_id for node in self._nodes}
        found: list[_Node] = []
        entries: list[dict[str, Any]] = sorted(ray.nodes(), key=_place)
        for entry in entries:
            node_id = str(entry["NodeID"])
            resources: dict[str, float] = entry.get("Resources", {})
            if entry.get("Alive") and node_id not in known and resources.get("CPU", 0) >= 1:
                found.append(
                    _Node(
                        node_id=node_id,
                        ordinal=len(known) + len(found),
                        address=str(entry.get("NodeManagerAddress", "")),
                        is_ours=node_id == here,
                        cpus=resources["CPU"],
                        gpus=resources.get("GPU", 0.0),
                        npus=resources.get("NPU", 0.0),
                    )
                )
        return found

    async def _look_for_nodes(self) -> None:
        """Takes in nodes that join the owner's cluster later."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            # In a thread: the question blocks while the head is away.
            for node in await asyncio.to_thread(self._new_nodes):
                self._nodes.append(node)
                self._restart(node)

    async def stop(self) -> None:
        """Ends every supervisor with its children."""
        if self._looking is not None:
            self._looking.cancel()
        for node in self._nodes:
            if node.restarting is not None:
                node.restarting.cancel()
        await asyncio.gather(*(self._stop_node(node) for node in self._nodes))

    async def rows_done(self, lease_id: LeaseId) -> int:
        """Rows of a lease that are through the program, over all nodes that answer."""

        async def of(node: _Node) -> int:
            try:
                done: dict[LeaseId, int] = await node.actor.rows_done.remote()
            except RayError:
                return 0
            return done.get(lease_id, 0)

        return sum(await asyncio.gather(*(of(node) for node in self._nodes if node.facts is not None and node.leases)))

    async def run(self, work: Work) -> Outcome | WorkFailed:
        """Runs one lease on as many nodes of one execution class as its rows are worth."""
        started = asyncio.get_running_loop().time()
        try:
            nodes = await self._chosen(work)
            if len(nodes) == 1:
                return await self._run_part(nodes[0], work, PART_ATTEMPTS_MAX)
            parts = self._parts(work, nodes)
        except WorkFailed as failed:
            return failed
        except FallowError as error:
            return WorkFailed(Cause.PLATFORM, clipped_reason(f"the lease cannot be read: {error}"))
        ends = await self._all_or_first_failure(
            [self._run_part(node, part, PART_ATTEMPTS_MAX) for node, _, part in parts]
        )
        if isinstance(ends, WorkFailed):
            return ends
        outcomes = [(rows, end) for (_, rows, _), end in zip(parts, ends, strict=True)]
        elapsed = int((asyncio.get_running_loop().time() - started) * 1e6)
        return _joined(work, outcomes, elapsed)

    # ------------------------------------------------------------------------------------------------------- choosing

    async def _chosen(self, work: Work) -> list[_Node]:
        """Nodes for a lease, the least busy first: one for few rows, several of one execution class for many."""
        deadline = asyncio.get_running_loop().time() + NODE_WAIT_SECONDS_MAX
        while True:
            up = sorted((node for node in self._nodes if node.facts is not None), key=lambda node: node.leases)
            if up:
                break
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise WorkFailed(Cause.PLATFORM, "every node's supervisor is down") from None
        first = up[0].facts
        assert first is not None
        alike = [node for node in up if node.facts is not None and node.facts.execution_class == first.execution_class]
        if work.challenge is not None and work.kind is TaskKind.CHALLENGE:
            return self._challenged(work.challenge.device_id)
        if work.kind in {TaskKind.INSPECT, TaskKind.CHECK, TaskKind.REFEREE}:
            return alike[:1]
        alike = alike[:NODE_RUNS_PER_TASK_MAX]
        batches = -(-work.rows // max(1, work.bundle.canonical_batch_rows))
        worth = max(1, batches // (SHARD_BATCHES_MIN * max(1, first.cores)))
        return alike[:worth]

    def _challenged(self, device_id: str) -> list[_Node]:
        """The node whose processor is the device: the worker numbers them in the order of its nodes."""
        named = [node for node in self._nodes if node.facts is not None and device_id == f"cpu-{node.ordinal}"]
        if not named:
            raise WorkFailed(Cause.PLATFORM, f"no node of this worker is device {device_id!r}"[:200])
        return named

    def _parts(self, work: Work, nodes: list[_Node]) -> list[tuple[_Node, RowRange, Work]]:
        block = RowBlock.parse(work.input_block)
        if len(block) != work.rows:
            raise WorkFailed(Cause.PLATFORM, f"the lease's block is not the {work.rows} rows that it announces")
        weights = [node.facts.cores if node.facts is not None else 1 for node in nodes]
        ranges = weighted_ranges(work.rows, batch_rows=max(1, work.bundle.canonical_batch_rows), weights=weights)
        return [
            (
                node,
                rows,
                replace(
                    work,
                    input_block=cut(block, rows, work.nonce),
                    rows=len(rows),
                    slots=work.slots[rows.start : rows.end],
                    buckets=work.buckets[rows.start : rows.end],
                ),
            )
            for node, rows in zip(nodes, ranges, strict=True)
            if len(rows)
        ]

    # -------------------------------------------------------------------------------------------------------- running

    async def _run_part(self, node: _Node, work: Work, attempts: int) -> Outcome | WorkFailed:
        node.leases += 1
        actor = node.actor
        try:
            bundle = work.bundle if node.is_ours else await self._bundle_on(node, work.bundle)
            end = await self._end_of(actor, replace(work, bundle=bundle))
        except (ObjectStoreFullError, OutOfDiskError, _NotArrivedError):
            return WorkFailed(Cause.PLATFORM, clipped_reason(_store_full(node, work)))
        except RayError as error:
            self._lost(node, actor)
            failed = WorkFailed(Cause.PLATFORM, clipped_reason(f"a node of Ray was lost: {_words(error)}"))
            others = any(other.facts is not None for other in self._nodes)
            if attempts > 1 and others and len(self._nodes) > 1:
                return await self._run_part((await self._chosen(work))[0], work, attempts - 1)
            return failed
        except asyncio.CancelledError:
            actor.cancel.remote(work.lease_id)
            raise
        finally:
            node.leases -= 1
        if not isinstance(end, Outcome):
            return end
        node.failures = 0
        did = join_usage(
            [end.usage], wall_microseconds=end.usage.wall_microseconds, nodes=[NodeRows(node.ordinal, work.rows)]
        )
        return replace(end, usage=did)

    async def _end_of(self, actor: Any, work: Work) -> Outcome | WorkFailed:
        """How the work ended on its node. Raises RayError, and _NotArrivedError when it does not get there."""
        call: Any = actor.run.remote(work)
        ended: asyncio.Future[Outcome | WorkFailed] = asyncio.ensure_future(call)
        try:
            done, _ = await asyncio.wait([ended], timeout=ARRIVAL_SECONDS_MAX)
            if not done and not await actor.holds.remote(work.lease_id):
                ray.cancel(call)
                raise _NotArrivedError
            return await ended
        finally:
            ended.cancel()

    async def _all_or_first_failure(
        self, parts: list[Coroutine[Any, Any, Outcome | WorkFailed]]
    ) -> list[Outcome] | WorkFailed:
        """Every part's outcome in order; at the first failure the other parts are cancelled."""
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            for first in asyncio.as_completed(tasks):
                end = await first
                if isinstance(end, WorkFailed):
                    return end
            return [end for task in tasks if isinstance(end := task.result(), Outcome)]
        finally:
            for task in tasks:
                task.cancel()

    async def _bundle_on(self, node: _Node, bundle: LoadedBundle) -> LoadedBundle:
        """The bundle with its files on the node's own disk, brought there piece by piece when they are not."""
        if node.files is None:
            node.files = {}
        paths: dict[str, str] = {}
        for number, (name, path) in enumerate(bundle.files.items()):
            key = (bundle.bundle_digest, name)
            if key not in node.files:
                node.files[key] = await _copy(node.actor, f"{bundle.bundle_digest.hex()}-{number}", path)
            paths[name] = node.files[key]
        return replace(bundle, files=paths)

    # ------------------------------------------------------------------------------------------------------- starting

    async def _start_node(self, node: _Node) -> str:
        """Why the node's supervisor could not be started; empty when it was."""
        supervisor = self._settings.supervisor
        cores = supervisor.cores or int(node.cpus)
        actor: Any = ray.remote(NodeSupervisor)
        try:
            node.actor = actor.options(
                num_cpus=node.cpus,
                num_gpus=node.gpus,
                resources={"NPU": node.npus} if node.npus else None,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.node_id, soft=False),
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=4 * LEASES_AT_ONCE_MAX,
            ).remote(replace(supervisor, cores=cores))
            async with asyncio.timeout(START_SECONDS_MAX):
                facts: NodeFacts | WorkFailed = await node.actor.describe.remote()
        except TimeoutError:
            self._drop(node)
            return f"its {node.cpus:g} CPUs were not free within {START_SECONDS_MAX:g} s"
        except RayError as error:
            self._drop(node)
            return _words(error)
        if isinstance(facts, WorkFailed):
            self._drop(node)
            return facts.reason
        node.facts, node.files = facts, None
        self._changed.set()
        return ""

    def _lost(self, node: _Node, actor: Any) -> None:
        if node.actor is actor and node.facts is not None:
            log.warning("ray.node_lost node=%s", node.node_id)
            self._drop(node)
            self._restart(node)

    def _drop(self, node: _Node) -> None:
        actor, node.actor, node.facts = node.actor, None, None
        if actor is not None:
            try:
                ray.kill(actor)
            except (RayError, ValueError):
                log.debug("ray.actor_gone node=%s", node.node_id)

    def _restart(self, node: _Node) -> None:
        if node.restarting is None or node.restarting.done():
            node.restarting = asyncio.create_task(self._restart_later(node))

    async def _restart_later(self, node: _Node) -> None:
        while node.failures < RESTARTS_MAX:
            delay = min(RESTART_SECONDS_MAX, RESTART_SECONDS_MIN * 2**node.failures)
            node.failures += 1
            await asyncio.sleep(delay * random.uniform(0.75, 1.25))  # noqa: S311 - jitter, no secret
            why = await self._start_node(node)
            if not why:
                return
            log.warning("ray.node_not_started node=%s reason=%s", node.node_id, why)

    async def _stop_node(self, node: _Node) -> None:
        if node.actor is None:
            return
        try:
            async with asyncio.timeout(3):
                await node.actor.stop.remote()
        except (RayError, TimeoutError):
            log.debug("ray.actor_gone node=%s", node.node_id)
        self._drop(node)


def _place(entry: dict[str, Any]) -> tuple[str, str]:
    """The same order of the same nodes at every look, machine by machine."""
    return str(entry.get("NodeManagerAddress", "")), str(entry["NodeID"])


def _joined(work: Work, outcomes: list[tuple[RowRange, Outcome]], elapsed_microseconds: int) -> Outcome | WorkFailed:
    try:
        output = join([outcome.output_block for _, outcome in outcomes], work.nonce)
    except FallowError as error:
        return WorkFailed(Cause.PROGRAM, clipped_reason(str(error)))
    if len(output) > work.output_bytes_max:
        return WorkFailed(Cause.PROGRAM, f"the output takes more than the {work.output_bytes_max} bytes allowed")
    return Outcome(
        output_block=output,
        failures=join_failures([(rows.start, outcome.failures) for rows, outcome in outcomes]),
        usage=join_usage(
            [outcome.usage for _, outcome in outcomes],
            wall_microseconds=elapsed_microseconds,
            nodes=[NodeRows(outcome.usage.node, len(rows)) for rows, outcome in outcomes],
        ),
        execution_class=outcomes[0][1].execution_class,
    )


async def _copy(actor: Any, name: str, path: str) -> str:
    """Brings a file to an actor's node; gives its path there."""
    source = await asyncio.to_thread(Path(path).open, "rb")
    offset = 0
    with source:
        piece = await asyncio.to_thread(source.read, FILE_PIECE_BYTES)
        place: str = await actor.put_file.remote(name, offset, piece)
        while piece:
            offset += len(piece)
            piece = await asyncio.to_thread(source.read, FILE_PIECE_BYTES)
            if piece:
                place = await actor.put_file.remote(name, offset, piece)
    return place


def _store_full(node: _Node, work: Work) -> str:
    return (
        f"Ray has no room for the {len(work.input_block) // MIB + 1} MiB of a lease and its results on the way to node"
        f" {node.ordinal} ({node.address}): look at `ray memory` for what fills its object stores, free disk space for"
        " spilling, or start the nodes with more --object-store-memory"
    )


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
