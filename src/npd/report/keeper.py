"""A run's report while it goes on and when it ends, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from npd.errors import NpdError
from npd.observe.display import Display
from npd.observe.events import Events, SpanName

FIRST = 60.0  # seconds into a run at which its report is first written
SHARE = 0.01  # of the wall-clock that writing it may take


@contextmanager
def observed(events: Events, display: Display, *, report: bool, command: str = "distill") -> Iterator[None]:
    """Around a command's work on a run: marks its start and its end in events.jsonl, and keeps report.html up to date.

    A report that can't be written is a warning: never the end of a run.
    """
    run_dir = events.path.parent
    events.mark(SpanName.STARTED, command=command)
    pages = Pages(run_dir) if report else None
    try:
        yield
        events.mark(SpanName.ENDED, command=command)
    except BaseException as error:
        # KeyboardInterrupt too: it is on record that the run was stopped by hand, not killed.
        events.failed(error, command=command)
        raise
    finally:
        if pages is not None:
            pages.stop()
            _write_last(run_dir, display, sys.exc_info()[1])


def _write_last(run_dir: Path, display: Display, error: BaseException | None) -> None:
    from npd.report.page import write_report

    try:
        path = write_report(run_dir, going_on=False)
    except Exception as failed:
        why = str(failed) if isinstance(failed, NpdError) else f"{type(failed).__name__}: {failed}"
        display.say(f"The report of {run_dir} could not be written ({why}). Nothing else is lost.")
        return
    if error is None or isinstance(error, Exception):
        display.say(f"The report is in {path}.")


class Pages:
    """Writes report.html again and again beside a run, in a process of the lowest priority."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="report", daemon=True)
        self._thread.start()

    def _go_on(self) -> None:
        pause = FIRST
        while not self._over.wait(pause):
            began = time.monotonic()
            with suppress(OSError):
                self.process = process = subprocess.Popen(
                    [sys.executable, "-m", "npd.report.keeper", str(self.run_dir)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # the last report says what is wrong with all of them
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is for the run
                )
                if self._over.is_set():  # `stop` may not have seen it
                    process.terminate()
                process.wait()
            pause = max(FIRST, (time.monotonic() - began) / SHARE)

    def stop(self) -> None:
        """Write no more; one that is being written is given up."""
        self._over.set()
        if self.process is not None:
            with suppress(OSError):
                self.process.terminate()
        self._thread.join()
        if self.process is not None:
            for leftover in self.run_dir.glob(f".report.html.*.{self.process.pid}.tmp"):
                leftover.unlink(missing_ok=True)


def main() -> None:
    """Write the report of a run that goes on: RUN_DIR."""
    with suppress(OSError, AttributeError):
        os.nice(19)
    from npd.report.page import write_report

    write_report(sys.argv[1])


if __name__ == "__main__":
    main()
