"""Entry point of the `fallow` command."""

from __future__ import annotations

import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    """Runs the command. Ctrl-C ends it with 130 even while it loads."""
    try:
        from fallow.cli.root import fallow

        fallow(prog_name="fallow")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
