"""The command line of a worker: join, start, cache, prepare-image, status, why, ask, earnings, probe."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fallow.errors import FallowError, Reason
from fallow.limits import GIB, LEASES_PER_WORKER_MAX
from fallow.region import REGION_RULE, is_region
from fallow.session import SANDBOX_ORDER, SandboxLevel, TaskKind
from fallow.shown_text import log_to_stderr, shown

ANY_ADDRESS = "0.0.0.0:0"
"""Where a cache listens unless its owner says otherwise."""
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    # gRPC writes every failed handshake to stderr; the link tells them in words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    options = _parser().parse_args(arguments)
    log_to_stderr(options.log_level.upper(), "%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        raise SystemExit(options.command(options))
    except FallowError as error:
        raise SystemExit(_tell_error(error, as_json=options.json)) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


def _tell_error(error: FallowError, *, as_json: bool) -> int:
    if as_json:
        from fallow_worker.start import print_json

        detail = {"reason": error.reason.value, "message": error.message, "field": error.field}
        print_json({"error": {**detail, "limit": error.limit, "hint": error.hint}})
    sys.stderr.write(shown(f"fallow-worker: {error}\n"))
    return EXIT_FAILED


# ------------------------------------------------------------------------------------------------- commands


def _join(options: argparse.Namespace) -> int:
    from fallow.enrollment import join
    from fallow.identity import write_private
    from fallow.join_line import parse_join_line
    from fallow.roles import Role
    from fallow_worker.start import print_json
    from fallow_worker.state_folder import StateFolder

    line = parse_join_line(options.line)
    folder = StateFolder(_state(options))
    with folder.locked():
        write_private(folder.join_line, options.line.encode())
        credentials = asyncio.run(join(line, folder.credentials, options.name or platform.node()))
        folder.resume_token.unlink(missing_ok=True)
        if credentials.role is not Role.WORKER:
            # The key is enrolled as something else now: the next try needs another one.
            folder.forget_credentials()
            raise FallowError(
                Reason.PERMISSION_DENIED,
                f"this join line is for a {credentials.role.value}, not for a worker",
                hint="ask the coordinator's operator for a worker's line",
            )
    facts = {
        "worker_id": credentials.party_id,
        "account_id": credentials.account_id,
        "pool_id": credentials.pool_id,
        "tier": credentials.tier.value if credentials.tier else "",
        "coordinator": credentials.control_endpoint,
        "state": str(folder.folder),
    }
    if options.json:
        print_json(facts)
    else:
        where = f" --state {shlex.quote(options.state)}" if options.state else ""
        sys.stdout.write(
            f"Joined {credentials.control_endpoint} as {credentials.party_id}. Start it with:"
            f" fallow-worker start{where}\n"
        )
    return 0


def _prepare_image(options: argparse.Namespace) -> int:
    from fallow.identity import write_private
    from fallow.join_line import parse_join_line
    from fallow_worker.start import print_json
    from fallow_worker.state_folder import StateFolder

    folder = StateFolder(_state(options))
    with folder.locked():
        if options.line:
            parse_join_line(options.line)
            write_private(folder.join_line, options.line.encode())
        if not folder.join_line.exists():
            raise FallowError(
                Reason.FIELD_MISSING,
                f"{folder.folder} holds no join line, so that a copy of it could not join by itself",
                field="LINE",
                hint="run fallow-worker prepare-image LINE with a line of as many uses as there will be machines",
            )
        folder.prepare_image()
    if options.json:
        print_json({"state": str(folder.folder), "prepared": True})
    else:
        sys.stdout.write(
            f"{folder.folder} holds no key any more. Copy this machine now: each copy enrols itself at its first"
            " `fallow-worker start`, as long as the join line lets it in.\n"
        )
    return 0


def _start(options: argparse.Namespace) -> int:
    from fallow_worker.config import WorkerConfig
    from fallow_worker.executor.choice import ExecutorSetting
    from fallow_worker.start import print_json, work

    accepted = SandboxLevel(options.accept_weaker_sandbox) if options.accept_weaker_sandbox else SandboxLevel.FULL
    config = WorkerConfig(
        state=_state(options),
        executor=ExecutorSetting(options.executor),
        ray_address=options.ray_address,
        cpus=options.cpus,
        slots=options.slots,
        task_kinds=_task_kinds(options.tasks),
        weakest_sandbox=accepted,
        idle_release_ms=int(options.idle_release * 1000),
        drain_run_grace_ms=None if options.drain_grace is None else int(options.drain_grace * 1000),
        region=options.region or "",
        ask_microcredits_per_unit=None if options.ask is None else _ask_of(options.ask, "--ask"),
        cache_bytes_max=int(options.cache_gib * GIB),
        serve_cache=options.serve_cache,
        life_fd=options.life_fd,
    )

    def told(facts: dict[str, object]) -> None:
        if options.json:
            print_json(facts)

    return asyncio.run(work(config, told=told))


def _cache(options: argparse.Namespace) -> int:
    from fallow_worker.config import WorkerConfig
    from fallow_worker.start import print_json, work

    config = WorkerConfig(
        state=_state(options),
        task_kinds=frozenset(),
        cache_bytes_max=int(options.cache_gib * GIB),
        serve_cache=options.listen,
        works=False,
        life_fd=options.life_fd,
    )

    def told(facts: dict[str, object]) -> None:
        if options.json:
            print_json(facts)
        else:
            sys.stdout.write(f"Serves its pool at {facts['pool_cache']}, up to {options.cache_gib:g} GiB\n")
            sys.stdout.flush()

    return asyncio.run(work(config, told=told))


def _status(options: argparse.Namespace) -> int:
    from fallow_worker.executor.tunings import read_tunings, tuning_words
    from fallow_worker.probe_report import standing_words
    from fallow_worker.start import joined, print_json
    from fallow_worker.state_folder import StateFolder

    folder = StateFolder(_state(options))
    credentials = joined(folder)
    pid = folder.running_pid()
    status: dict[str, Any] = {
        **folder.read_status(),
        "worker_id": credentials.party_id,
        "coordinator": credentials.control_endpoint,
        "certificate_not_after_ms": credentials.not_after_ms,
        "state": str(folder.folder),
        "running": pid is not None,
        "pid": pid,
        "tuning": read_tunings(folder.tuning),
    }
    if options.json:
        print_json(status)
        return 0
    session = status.get("session", "offline") if pid is not None else "not running"
    lines = [
        f"worker       {credentials.party_id}",
        f"coordinator  {credentials.control_endpoint}",
        f"session      {session}",
    ]
    if pid is not None:
        lines += [f"offer        {status.get('offer', '')}", f"leases       {status.get('leases', {})}"]
        lines += [f"so far       {status.get('counts', {})}"]
        if "pool_cache" in status:
            lines += [f"serves       its pool at {status['pool_cache']}: {status.get('served', {})}"]
        standings: Any = status.get("standings", {})
        lines += [f"measured     {name}: {standing_words(standing)}" for name, standing in standings.items()]
        lines += [f"tuned        {digest[:16]}: {tuning_words(entry)}" for digest, entry in status["tuning"].items()]
        error = status.get("last_error")
        lines += [f"last error   {error['message']}"] if isinstance(error, dict) else []
    sys.stdout.write(shown("\n".join(lines) + "\n"))
    return 0


def _why(options: argparse.Namespace) -> int:
    from fallow_worker.start import joined, print_json
    from fallow_worker.state_folder import StateFolder
    from fallow_worker.why import why, why_facts, why_text

    folder = StateFolder(_state(options))
    found = why(folder, joined(folder))
    if options.json:
        print_json(why_facts(found))
    else:
        sys.stdout.write(shown(why_text(found)))
    return 0


def _ask(options: argparse.Namespace) -> int:
    from fallow.credits import credits_text, price_per_hour
    from fallow_worker.start import print_json
    from fallow_worker.state_folder import StateFolder

    folder = StateFolder(_state(options))
    if options.ask is not None:
        folder.write_ask(_ask_of(options.ask, "CREDITS"))
    asked = folder.read_ask()
    if options.json:
        print_json({"ask_microcredits_per_unit": asked, "running": folder.running_pid() is not None})
        return 0
    changed = "; the running worker says so within seconds" if options.ask and folder.running_pid() else ""
    sys.stdout.write(f"{credits_text(price_per_hour(asked))} credits for an hour of a reference core{changed}\n")
    return 0


def _ask_of(text: str, field: str) -> int:
    from fallow.credits import ASK_MICROCREDITS_PER_UNIT_MAX, ask_per_unit, parse_credits, price_per_hour

    return ask_per_unit(parse_credits(text, field, price_per_hour(ASK_MICROCREDITS_PER_UNIT_MAX)))


def _earnings(options: argparse.Namespace) -> int:
    from fallow.credits import parse_credits
    from fallow_worker import earnings
    from fallow_worker.start import joined, print_json
    from fallow_worker.state_folder import StateFolder

    tariff = parse_credits(options.tariff, "--tariff")
    credentials = joined(StateFolder(_state(options)))
    found = asyncio.run(earnings.earnings_of(credentials, options.days))
    if options.json:
        print_json(earnings.facts(found, tariff))
    elif options.csv:
        sys.stdout.write(earnings.csv_text(found))
    else:
        sys.stdout.write(shown(earnings.text(found, options.days, tariff) + "\n"))
    return 0


def _probe(options: argparse.Namespace) -> int:
    from fallow_worker.probe_report import report_in_time, report_text, with_standings
    from fallow_worker.start import print_json
    from fallow_worker.state_folder import StateFolder

    standings: Any = StateFolder(_state(options)).read_status().get("standings", {})
    report = with_standings(report_in_time(), standings)
    if options.json:
        print_json(report)
    else:
        sys.stdout.write(report_text(report))
    return 0


# ------------------------------------------------------------------------------------------------- options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fallow-worker", description="Lend this machine's idle time to a coordinator."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, words: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
        made.add_argument("--state", default=None, metavar="DIR", help="this worker's folder")
        made.add_argument("--json", action="store_true", help="one JSON object on stdout")
        made.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
        made.set_defaults(command=function)
        return made

    join = command("join", "make a key here and enrol it with a join line", _join)
    join.add_argument("line", metavar="LINE", help="the word that the coordinator's operator gave you")
    join.add_argument("--name", default="", help="a name for people; default: this machine's")

    start = command("start", "work until stopped (Ctrl-C or SIGTERM: finish what runs, then leave)", _start)
    start.add_argument("--executor", choices=("auto", "ray", "process"), default="auto")
    start.add_argument("--ray-address", default="", metavar="HOST:PORT", help="your own Ray cluster; default: none")
    start.add_argument("--cpus", type=_count, default=0, metavar="N", help="cores to lend; default: all of them")
    start.add_argument("--slots", type=_slots, default=0, metavar="N", help="leases at once; default: by device")
    start.add_argument(
        "--tasks",
        "--task-kinds",
        default="map,challenge",
        metavar="KIND[,KIND…]",
        help="kinds of tasks to take; default: map,challenge (without challenge: no paid work)",
    )
    start.add_argument(
        "--accept-weaker-sandbox",
        choices=[level.value for level in SANDBOX_ORDER[:-1]],
        default="",
        metavar="LEVEL",
        help="run strangers' programs although the sandbox here reaches only LEVEL (none, limits, no-files)",
    )
    start.add_argument(
        "--idle-release", type=_seconds, default=300.0, metavar="S", help="give memory back after so long without work"
    )
    start.add_argument(
        "--drain-grace", type=_seconds, default=None, metavar="S", help="how long runs may go on when told to stop"
    )
    start.add_argument(
        "--region", type=_region, default=None, metavar="NAME", help="where this machine stands, if you like"
    )
    start.add_argument(
        "--ask",
        default=None,
        metavar="CREDITS",
        help="what you ask in market pools for an hour of one reference core (3,600 units); default: as before, or 0",
    )
    start.add_argument("--cache-gib", type=_positive, default=20.0, metavar="GIB", help="disk for bundles; default: 20")
    start.add_argument(
        "--serve-cache",
        nargs="?",
        const=ANY_ADDRESS,
        default="",
        metavar="HOST:PORT",
        help="give bundles to other workers of the pool in this network (managed workers only)",
    )
    start.add_argument("--life-fd", type=int, default=None, metavar="FD", help=argparse.SUPPRESS)

    cache = command("cache", "serve bundles to the workers of the pool in this network, and take no work", _cache)
    cache.add_argument("--listen", default=ANY_ADDRESS, metavar="HOST:PORT", help="default: all addresses, any port")
    cache.add_argument("--cache-gib", type=_positive, default=20.0, metavar="GIB", help="disk for blobs; default: 20")
    cache.add_argument("--life-fd", type=int, default=None, metavar="FD", help=argparse.SUPPRESS)

    image = command("prepare-image", "make this folder fit to be copied to many machines", _prepare_image)
    image.add_argument(
        "line", metavar="LINE", nargs="?", default="", help="a join line for as many uses; default: the last one"
    )

    command("status", "how the worker on this folder fares", _status)
    command("why", "why this machine has no work now", _why)
    ask = command("ask", "what you ask in market pools: shown, or changed also while the worker runs", _ask)
    ask.add_argument(
        "ask",
        nargs="?",
        default=None,
        metavar="CREDITS",
        help="credits for an hour of one reference core (3,600 units)",
    )
    earned = command("earnings", "what this worker earned, and what it might ask", _earnings)
    earned.add_argument("--days", type=_days, default=30, metavar="N", help="how far back; default: 30")
    earned.add_argument(
        "--tariff", default="0", metavar="CREDITS", help="what a kWh costs you, in credits as they are worth to you"
    )
    earned.add_argument("--csv", action="store_true", help="one line for each day and pool")
    command("probe", "what this machine could offer", _probe)
    return parser


def _state(options: argparse.Namespace) -> Path:
    from fallow_worker.state_folder import default_state_folder

    return Path(options.state).expanduser() if options.state else default_state_folder()


def _task_kinds(text: str) -> frozenset[TaskKind]:
    try:
        return frozenset(TaskKind(kind.strip()) for kind in text.split(","))
    except ValueError:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{text!r} names a task kind that there is not",
            field="--tasks",
            limit=", ".join(kind.value for kind in TaskKind),
        ) from None


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("at least 0")
    return value


def _days(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 366:
        raise argparse.ArgumentTypeError("between 1 and 366 days")
    return value


def _slots(text: str) -> int:
    value = _count(text)
    if value > LEASES_PER_WORKER_MAX:
        raise argparse.ArgumentTypeError(f"at most {LEASES_PER_WORKER_MAX}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86_400:
        raise argparse.ArgumentTypeError("between 0 and 86400 seconds")
    return value


def _region(text: str) -> str:
    if not is_region(text):
        raise argparse.ArgumentTypeError(REGION_RULE)
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1_000_000:
        raise argparse.ArgumentTypeError("more than 0")
    return value


if __name__ == "__main__":
    main()
