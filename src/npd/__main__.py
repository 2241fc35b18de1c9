"""The `npd` command, as the shell starts it."""

from __future__ import annotations

from npd.signals import end_at_once


def main() -> None:
    """Answer signals from the first moment on; only then import what takes its time."""
    end_at_once()
    from npd.cli import entry

    entry()


if __name__ == "__main__":
    main()
