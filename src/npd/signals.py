"""SIGINT (Ctrl-C) and SIGTERM: one line is said, and the process ends with 130 or 143."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

STOPPED = {
    signal.SIGINT: "npd: stopped. Run the same command again to go on.",
    signal.SIGTERM: "npd: stopped by SIGTERM. Run the same command again to go on.",
}


def end_at_once() -> None:
    """Let both end this process where it stands: nothing is begun that would have to be ended in order.

    An exception would be in the way of imports, which swallow it, or make another one of it.
    """
    _answer(_end)


def end_in_order() -> None:
    """Let both raise (KeyboardInterrupt, SystemExit), so that what is begun ends in order; a second one ends it at once."""
    _answer(_raise)


def _answer(handler: Any) -> None:
    for number in STOPPED:
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` and shells' background jobs want it
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    shown = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides the cursor
    os.write(2, shown + STOPPED[signal.Signals(number)].encode() + b"\n")
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    end_at_once()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
