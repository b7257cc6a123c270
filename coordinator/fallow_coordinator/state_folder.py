"""The coordinator's state folder: where everything lies, who may use it now, and on which ports it was reachable."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.identity import write_private
from fallow.places import local_client_folder

FREE_BYTES_MIN: Final = 64 * 1024 * 1024
"""Below this the coordinator does not start: its journal could not grow."""
PORT_PATIENCE_S: Final = 8.0
DEFAULT_PORT: Final = 7440


@dataclass(frozen=True, slots=True)
class StateFolder:
    """Paths inside one folder, which belongs to one user (0700)."""

    path: Path

    @property
    def authority(self) -> Path:
        """Folder of the certificate authority."""
        return self.path / "authority"

    @property
    def authority_certificate(self) -> Path:
        """PEM, for the blob service and for people."""
        return self.path / "authority.pem"

    @property
    def coordinator_key(self) -> Path:
        """The key that signs leases, grants and settlements."""
        return self.path / "coordinator.pem"

    @property
    def coordinator_public_key(self) -> Path:
        """Its public half, DER, for the blob service."""
        return self.path / "coordinator-public.der"

    @property
    def blobs(self) -> Path:
        """Folder of the blob service: its key and certificate, and the blobs."""
        return self.path / "blobs"

    @property
    def journal(self) -> Path:
        """Folder of the journal and its views."""
        return self.path / "journal"

    @property
    def carbon_table(self) -> Path:
        """The operator's figures of carbon by region and hour; may be absent."""
        return self.path / "carbon.csv"

    @property
    def client(self) -> Path:
        """Operator credentials of the user who runs the coordinator."""
        return local_client_folder(self.path)

    @property
    def operator_worker(self) -> Path:
        """State folder of the operator's own worker."""
        return self.path / "operator-worker"

    @property
    def logs(self) -> Path:
        """Output of the child processes."""
        return self.path / "logs"

    def prepare(self) -> None:
        """Makes the folders. Raises FIELD_INVALID or STORAGE_FULL with what to do when it can't."""
        try:
            for folder in (self.path, self.blobs, self.journal, self.operator_worker, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            raise _unusable(self.path, error) from None
        stat = os.statvfs(self.path)
        free_bytes = stat.f_bavail * stat.f_frsize
        if free_bytes < FREE_BYTES_MIN:
            raise FallowError(
                Reason.STORAGE_FULL,
                f"only {free_bytes // (1024 * 1024)} MiB are free where {self.path} lies",
                field=str(self.path),
                limit=f"at least {FREE_BYTES_MIN // (1024 * 1024)} MiB",
                hint="free some space, or name another folder with --state",
            )

    @contextlib.contextmanager
    def locked(self) -> Generator[None, None, None]:
        """While the block runs no other coordinator uses this folder. Raises PERMISSION_DENIED when one does now."""
        path = self.path / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                raise FallowError(
                    Reason.PERMISSION_DENIED,
                    f"another coordinator (process {holder}) is running on {self.path}",
                    field=str(self.path),
                    hint="stop it first, or name another folder with --state",
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Ports:
    """One port for each endpoint."""

    enrollment: int
    control: int
    blobs: int

    @classmethod
    def chosen(cls, folder: StateFolder, host: str, first: int | None) -> Ports:
        """`first` and the two after it; without it those of the last start, so that parties find the coordinator again.

        0 takes free ones when there was no last start. Raises FIELD_INVALID when a port is taken.
        """
        path = folder.path / "ports.json"
        if not first and path.exists():
            with contextlib.suppress(ValueError, TypeError):
                ports = cls(**json.loads(path.read_text()))
                ports.wait_free(host)
                return ports
        if first == 0:
            ports = cls(*_free_ports(host, 3))
        else:
            base = first or DEFAULT_PORT
            ports = cls(base, base + 1, base + 2)
        ports.check_free(host)
        write_private(path, json.dumps(asdict(ports)).encode())
        return ports

    def wait_free(self, host: str) -> None:
        """As `check_free`, with patience: children of a coordinator that was killed need a moment to end."""
        deadline = time.monotonic() + PORT_PATIENCE_S
        while True:
            try:
                return self.check_free(host)
            except FallowError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def check_free(self, host: str) -> None:
        """Returns when all three can be listened on. Raises FIELD_INVALID naming the one that can't."""
        for name, port in asdict(self).items():
            try:
                with _bound(host, port):
                    pass
            except OSError as error:
                raise port_taken(host, port, name, error) from None


def port_taken(host: str, port: int, endpoint: str, error: OSError) -> FallowError:
    """What a person is told when an endpoint can't be listened on."""
    taken = error.errno == errno.EADDRINUSE
    return FallowError(
        Reason.FIELD_INVALID,
        f"port {port} on {host}, wanted for {endpoint}, "
        + ("is in use by another process" if taken else f"can't be listened on: {error.strerror}"),
        field="port",
        hint="name another first port with --port, or 0 for free ones" if taken else "name another with --listen",
    )


@contextlib.contextmanager
def _bound(host: str, port: int) -> Generator[int, None, None]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As gRPC listens: a port whose old connections linger in TIME_WAIT is free, one that is listened on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)
        yield probe.getsockname()[1]


def _free_ports(host: str, count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(_bound(host, 0)) for _ in range(count)]


def _unusable(path: Path, error: OSError) -> FallowError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return FallowError(
        Reason.STORAGE_FULL if full else Reason.FIELD_INVALID,
        f"the state folder {path} can't be written: {error.strerror}",
        field=str(path),
        hint="free some space" if full else "give this user write permission, or name another folder with --state",
    )
