"""A run's mirror kept up to date while it goes on, by a thread that the trainer never waits for but at the end."""

from __future__ import annotations

import math
import threading
import time

from npd.config import Config
from npd.errors import NpdError, RunError, foreign
from npd.mirror.copying import Copies, Lost, Stopped
from npd.mirror.place import Refused
from npd.observe.display import Display
from npd.observe.events import Events, SpanName

LOOK = 1.0  # seconds between looks for a new checkpoint, which is copied at once
EVERY = 30.0  # seconds between copies of whatever else is new
LONGEST = 600.0  # seconds after a copy that failed before the next one
PATIENCE = 300.0  # seconds that the last copy may fail for
GRACE = 5.0  # seconds that a run which failed, or is stopped, waits for the file that is being copied


class Mirror:
    """Copies a run directory, which this process has locked, to checkpoint.mirror, from `begin` to `close`.

    Raises:
        UserError: it can't be reached.
    """

    def __init__(self, config: Config, display: Display, events: Events) -> None:
        self.copies, self.display, self.events = Copies(config, events), display, events
        self.shown = self.copies.place.shown
        self._failed: NpdError | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Claim the mirror, and copy what there is and what comes, beside this thread.

        Raises:
            UserError: it is another run's, or can't be read or written.
        """
        self.copies.claim()
        self._thread = threading.Thread(target=self._go_on, name="mirror", daemon=True)
        self._thread.start()

    def close(self, error: BaseException | None) -> None:
        """End: after a run that ended well once all of it is there, else soon.

        Raises:
            RunError: the last copy failed for minutes; the message says what is not mirrored.
        """
        self.copies.over.set()
        if self._thread is not None:
            self._thread.join(None if error is None else GRACE)
        if error is not None:
            if (left := self.copies.left()) and not isinstance(self._failed, Lost):
                self.display.say(f"Not in the mirror {self.shown} yet: {left}. The same command, run again here, copies it.")
            return
        self.copies.over.clear()
        self.finish()
        total = self.copies.total
        self.display.say(
            f"The mirror {self.shown} has all of it: {total.files:,} files ({total.bytes / 1e6:,.1f} MB) copied in "
            f"{total.seconds:.1f} s, at most {total.lag:.0f} s after they were written."
        )

    def finish(self) -> None:
        """Copy what is not there yet, and wait for it.

        Raises:
            RunError: it failed for minutes.
        """
        began, pause = time.monotonic(), 1.0
        while True:
            try:
                if self.copies.copy(everything=True):
                    return
            except (RunError, Lost) as failed:
                if isinstance(failed, Refused | Lost) or time.monotonic() - began > PATIENCE:
                    left = self.copies.left() or "nothing"
                    raise RunError(
                        f"The run in {self.copies.store.path} is whole, but its mirror is not: {left} is missing there. "
                        f"{failed.what.rstrip('.')}.",
                        failed.remedy or "Mend that, and run the same command again: it copies what is missing.",
                    ) from failed
            time.sleep(pause)
            pause = min(2 * pause, 30.0)

    # -- the thread

    def _go_on(self) -> None:
        seen: list[int] | None = None
        pause, copied = EVERY, -math.inf
        while not self.copies.over.is_set():
            now = self.copies.store.checkpoints()
            due = time.monotonic() - copied >= pause
            if (due or now != seen) and (self._failed is None or due):
                seen = now
                pause = EVERY if self._try() else min(2 * pause, LONGEST)
                copied = time.monotonic()
                if isinstance(self._failed, Lost):
                    return
            self.copies.over.wait(LOOK)

    def _try(self) -> bool:
        try:
            self.copies.copy(everything=False)
        except Stopped:
            return True
        except Exception as error:  # whatever it is, training goes on
            failed = error if isinstance(error, NpdError) else RunError(f"{type(error).__name__}: {foreign(error)}")
            if self._failed is None:
                again = (
                    "Nothing more is copied there."
                    if isinstance(failed, Lost)
                    else "It is tried again while the run goes on."
                )
                text = f"The mirror falls behind. {failed.what.rstrip('.')}. {again}"
                self.events.mark(SpanName.WARNING, about="mirror", text=text)
                self.display.say(f"Warning: {text}")
            self._failed = failed
            return False
        if self._failed is not None:
            self._failed = None
            self.display.say(f"The mirror {self.shown} has caught up.")
        return True
