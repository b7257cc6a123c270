"""How Ray is started inside an owner's domain: loopback, token, little memory, as quiet as it can be. No Ray import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fallow.limits import MIB
from fallow_worker.executor.supervisor import SupervisorSettings

LOCAL_ADDRESS: Final = "local"
OBJECT_STORE_BYTES: Final = 256 * MIB
"""Room for the blocks of a few leases on their way between processes of one machine."""
FOLDER_VARIABLE: Final = "FALLOW_RAY_FOLDER"
"""In the environment of every process of our Ray: its private folder, by which leftovers are known."""

TOKEN_PATH_VARIABLE: Final = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - where it lies, not what it is

_PASSED: Final = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "TMPDIR")
"""What of the owner's environment a driver and its Ray see; secrets stand elsewhere."""

# Ray reads its internal settings from RAY_<name>. Together these halve what an idle local Ray takes: 3.1 % of a core
# before, 1.7 % after (with the processes that the driver leaves out), measured on two cores with Ray 2.60.
_QUIET: Final[Mapping[str, str]] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # how nice children are is the owner's to say, not Ray's (15)
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_open_telemetry": "0",
    "RAY_event_stats": "0",
    "RAY_event_stats_print_interval_ms": "600000",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_task_events_report_interval_ms": "60000",
    "RAY_debug_dump_period_milliseconds": "600000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "60000",
    "RAY_raylet_check_gc_period_milliseconds": "5000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_kill_idle_workers_interval_ms": "5000",
    "RAY_memory_monitor_refresh_ms": "0",  # the supervisor watches its children itself
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_record_task_actor_creation_sites": "0",
    "RAY_record_ref_creation_sites": "0",
}


@dataclass(frozen=True, slots=True)
class RaySettings:
    """What the owner decides about Ray."""

    address: str = LOCAL_ADDRESS
    """`local`, or the `host:port` of the owner's own cluster."""
    token_path: str = ""
    """The cluster's token file; empty: `~/.ray/auth_token` when it exists. A local Ray gets a fresh token."""
    gpus: int = 0
    npus: int = 0
    """Devices that the supervisor reserves through Ray: GPU, and the custom resource NPU."""
    object_store_bytes: int = OBJECT_STORE_BYTES
    up_seconds_max: float = 90.0
    """A start of Ray, or of supervisors on its nodes, that takes longer is given up."""
    supervisor: SupervisorSettings = field(default_factory=SupervisorSettings)

    @property
    def is_local(self) -> bool:
        """Ray is ours alone and on this machine only."""
        return self.address == LOCAL_ADDRESS


def ray_environment(settings: RaySettings, folder: str, token_path: str) -> dict[str, str]:
    """The whole environment of a driver; Ray's processes inherit it."""
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    environment |= {"HOME": folder, FOLDER_VARIABLE: folder, "PYTHONUNBUFFERED": "1", **_QUIET}
    # Every server of Ray listens on the loopback interface alone when clusters are switched off this way (Ray names
    # the setting after the systems where that is the default).
    if settings.is_local:
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if token_path:
        environment |= {"RAY_AUTH_MODE": "token", TOKEN_PATH_VARIABLE: token_path}
    return environment


def cluster_token_path(settings: RaySettings) -> str:
    """The token file for the owner's cluster; empty when there is none."""
    if settings.token_path:
        return settings.token_path
    default = Path.home() / ".ray" / "auth_token"
    return str(default) if default.is_file() else ""
