"""`fallow-coordinator`: start a coordinator, and talk to the one of this user on this machine."""

from __future__ import annotations

from fallow_coordinator.cli.root import main

if __name__ == "__main__":
    main()
