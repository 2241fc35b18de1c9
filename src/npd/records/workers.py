"""What a background worker says of itself: how far it is, and why it ended."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field

from npd.errors import NpdError, RunError, UserError
from npd.records.record import Record

MOST_SAID = 4000  # characters of a worker's words: nobody reads the pipe before it has ended, and a pipe holds 64 KiB


@dataclass(frozen=True)
class Progress(Record):
    """What is being done now, and how far it is."""

    name: str
    short: str
    """The name where the place is known."""
    total: float
    unit: str
    done: float = 0.0
    note: str = ""
    began: float = field(default_factory=time.time)
    """Seconds since the epoch."""


@dataclass(frozen=True)
class WorkerEnd(Record):
    """Why a worker ended that can say so: it would go wrong again. One that ends without this died."""

    kind: str
    """user: what the user gave is wrong; run: the run failed."""
    what: str
    remedy: str = ""

    @classmethod
    def of(cls, error: NpdError) -> WorkerEnd:
        return cls("user" if isinstance(error, UserError) else "run", error.what[:MOST_SAID], error.remedy[:MOST_SAID])

    def error(self, role: str) -> NpdError:
        """The worker's error, for the process that tells of it."""
        error = (UserError if self.kind == "user" else RunError)(self.what, self.remedy)
        error.role = role
        return error

    def tell(self, descriptor: int) -> None:
        """Write it to a pipe or file; the reader has it once this end is closed."""
        data = (json.dumps(self.to_json(), ensure_ascii=False) + "\n").encode("utf-8", "replace")
        while data:
            data = data[os.write(descriptor, data) :]

    @classmethod
    def hear(cls, descriptor: int) -> WorkerEnd | None:
        """What a worker that has ended left in a pipe or file; None if it told nothing whole."""
        os.set_blocking(descriptor, False)  # processes of its own may have outlived it, and hold the pipe open
        data = b""
        with suppress(BlockingIOError):
            while piece := os.read(descriptor, 1 << 16):
                data += piece
        try:
            return cls.from_json(json.loads(data))
        except ValueError:
            return None
