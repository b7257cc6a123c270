"""Where things lie on this machine, unless somebody says otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

STATE_VARIABLE: Final = "FALLOW_STATE"
"""Names the coordinator's state folder."""
LOGIN_VARIABLE: Final = "FALLOW_LOGIN"
"""Names the folder of a client's credentials."""


def coordinator_folder() -> Path:
    """The coordinator's state folder: `$FALLOW_STATE`, else `~/.local/state/fallow/coordinator`."""
    named = os.environ.get(STATE_VARIABLE)
    return Path(named).expanduser() if named else _state_home() / "fallow" / "coordinator"


def local_client_folder(state: Path) -> Path:
    """The client credentials that the coordinator makes for its own user, inside its state folder."""
    return state / "client"


def login_folder() -> Path:
    """The client credentials that `fallow login` makes: `$FALLOW_LOGIN`, else `~/.local/state/fallow/client`."""
    named = os.environ.get(LOGIN_VARIABLE)
    return Path(named).expanduser() if named else _state_home() / "fallow" / "client"


def _state_home() -> Path:
    named = os.environ.get("XDG_STATE_HOME")
    return Path(named) if named else Path.home() / ".local" / "state"
