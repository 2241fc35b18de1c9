"""Verifiers of others' making, asked in a process of their own: one that raises, hangs or eats memory costs one response.

`python -m npd.verifying` is that process. What it is told is pickled by its parent; what it says is a line of JSON.
"""

from __future__ import annotations

import atexit
import json
import pickle
import select
import struct
import subprocess
import sys
from contextlib import suppress
from typing import IO, Any

from npd.errors import foreign

SECONDS = 5.0  # of a processor, for one response
PATIENCE = 120.0  # seconds until a process that says nothing is taken to hang where it cannot be interrupted
START = 600.0  # seconds that it may take to import the verifiers
MEMORY = 8 << 30  # bytes of addresses that the process may use


class Unjudged(Exception):
    """Why a response could not be judged, in a few words."""


class Judge:
    """reasoning-gym's verifiers; their process is started when the first one is asked, and again if it ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def __call__(self, task: str, options: dict[str, Any], said: str, entry: dict[str, Any]) -> float:
        """What the verifier of a task with these options gives an answer to an entry.

        Raises:
            Unjudged: it raises, says no number, or takes too long.
        """
        try:
            question = pickle.dumps((task, options, said, entry))
        except Exception as error:
            raise Unjudged(f"its entry can't be handed on ({type(error).__name__})") from error
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(struct.pack("<Q", len(question)) + question)
            process.stdin.flush()
            line = _said(process, PATIENCE)
        except OSError:
            line = b""
        if not line:
            self.close()
            raise Unjudged("it takes too long" if line is None else "it ended its process")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise Unjudged(foreign(answer, 120))
        return float(answer)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            apart: dict[str, Any] = {"stderr": subprocess.DEVNULL, "start_new_session": True}
            command = [sys.executable, "-m", "npd.verifying", str(SECONDS)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **apart)
            _said(self._process, START)
        return self._process

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was not written any more
                    pipe.close()  # type: ignore[union-attr]


def _said(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next line that it says; empty if it has ended, None if it takes longer."""
    assert process.stdout is not None
    there, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if there else None


class _TooLong(BaseException):
    """Not an Exception: verifiers catch those."""


def answer_all(questions: IO[bytes], answers: IO[bytes], seconds: float) -> None:
    """Judge what is asked until nobody asks any more."""
    import signal

    import reasoning_gym

    def interrupt(*_: object) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.1)  # once more, should this one be swallowed
        raise _TooLong

    signal.signal(signal.SIGVTALRM, interrupt)
    known: dict[str, Any] = {}
    answers.write(b"ready\n")
    answers.flush()
    while head := questions.read(8):
        task, options, said, entry = pickle.loads(questions.read(struct.unpack("<Q", head)[0]))
        value: float | str
        try:
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
                key = repr((task, options))
                if key not in known:
                    known[key] = reasoning_gym.create_dataset(task, **options)
                value = float(known[key].score_answer(said, entry))
                value = value if value == value else "it gives no number"
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except _TooLong:
            value = f"it takes more than {seconds:g} s"
        except BaseException as error:  # whatever a verifier does about what a model may write
            value = f"{type(error).__name__}: {error}"
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()


def main() -> None:
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ImportError, ValueError, OSError):  # not everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a verifier prints is no answer
    answer_all(sys.stdin.buffer, answers, float(sys.argv[1]))


if __name__ == "__main__":
    main()
