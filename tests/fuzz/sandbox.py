"""Runs `npd` in forks of this process, which has imported everything: a case costs what npd does, not what imports cost.

A forked process has its own process group, standard streams in files, limits, and an environment of the case's. Workers that
a run starts become forks too, of a helper forked before the run began. A share of the kills takes real processes instead.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import npd.cli
import npd.generations.workers as workers

ADDRESSES = 6 << 30  # bytes beyond this process's own that a case may map: a guard of the machine
LINGER = 15.0  # seconds that what a case started may take to end after it
Hook = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    """Exit status, or minus the signal that killed it."""
    said: str
    """Standard output and error."""
    seconds: float
    cpu: float
    """Seconds of processor time."""
    memory: int
    """Bytes that it held at most beyond what this process held when it was forked."""
    hung: bool


def become_reaper() -> None:
    """Have every process that a case leaves behind become a child of this one, which can then find it."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def held() -> int:
    """Bytes this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Process:
    """`npd ARGUMENTS` in a fork, or with `fresh` in a process of its own that imports everything anew."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        log: Path,
        environment: Mapping[str, str],
        hook: Hook | None = None,
        worker_hook: Hook | None = None,
        fresh: bool = False,
        file_limit: int | None = None,
    ) -> None:
        self.log, self.began = log, time.monotonic()
        self.before = held()
        self.gone: tuple[int, resource.struct_rusage, float] | None = None
        if fresh:
            env = {**os.environ, **environment}
            with log.open("ab") as file:
                command = [sys.executable, "-m", "npd", *arguments]
                self.pid = subprocess.Popen(
                    command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                ).pid
            return
        ready, told = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(told)
            os.read(ready, 1)  # it is about to begin
            os.close(ready)
            self.began = time.monotonic()
            return
        try:
            os.close(ready)
            os.setsid()
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            streams(os.open(os.devnull, os.O_RDONLY), stream, stream)
            os.chdir(cwd)
            os.environ.update(environment)
            sys.argv = ["npd", *arguments]
            limit_memory()
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            fork_workers(log.with_suffix(".workers"), worker_hook)
            if hook is not None:
                hook()
            os.write(told, b".")
            os.close(told)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        as_process(npd.cli.entry)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def worker(self) -> int | None:
        """The newest worker's process, if there is one."""
        with suppress(OSError, IndexError):
            return int(self.log.with_suffix(".workers").read_text().split()[-1])
        return None

    def over(self) -> bool:
        """Has it ended?"""
        if self.gone is None:
            done, status, used = os.wait4(self.pid, os.WNOHANG)
            if done:
                self.gone = status, used, time.monotonic() - self.began
        return self.gone is not None

    def wait(self, limit: float) -> Ended:
        """Until it ends, `limit` seconds after its start at the latest."""
        hung = False
        while not self.over():
            if not hung and time.monotonic() - self.began > limit:
                hung = True
                self.signal(signal.SIGKILL)
            time.sleep(0.002)
        assert self.gone is not None
        status, used, seconds = self.gone
        said = self.log.read_bytes().decode("utf-8", "replace")
        memory = used.ru_maxrss * 1024 - self.before
        return Ended(os.waitstatus_to_exitcode(status), said, seconds, used.ru_utime + used.ru_stime, memory, hung)


def leftover_processes() -> list[str]:
    """What a case has left running after its processes ended; it is killed."""
    deadline = time.monotonic() + LINGER
    while time.monotonic() < deadline:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.005)
        except ChildProcessError:
            return []
    left = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                left.append((folder / "cmdline").read_text().replace("\0", " ")[:200])
                os.kill(int(folder.name), signal.SIGKILL)
    return left


def streams(*numbers: int) -> None:
    """Make these file descriptors standard input, output and error."""
    for target, number in enumerate(numbers):
        os.dup2(number, target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def as_process(main: Callable[[], None]) -> None:
    """Call `main` and end this process as the interpreter would."""
    status = 0
    try:
        try:
            main()
        except SystemExit as error:
            code = error.code
            status = 0 if code is None else code if isinstance(code, int) else 1
            if isinstance(code, str):
                print(code, file=sys.stderr)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        with suppress(BaseException):
            traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        os._exit(status & 0xFF)


# -- workers


class ForkedWorker:
    """Stands in for subprocess.Popen where a run starts a worker."""

    def __init__(self, helper: socket.socket, command: Sequence[str], **options: Any) -> None:
        mine, self._status = os.pipe(), os.pipe()
        order = {"arguments": command[3:], "says": options["pass_fds"][0], "environment": dict(options["env"])}
        files = [mine[0], options["stdout"].fileno(), options["stderr"].fileno(), *options["pass_fds"], self._status[1]]
        socket.send_fds(helper, [json.dumps(order).encode()], files)
        self.pid = int(helper.recv(32))
        self.stdin = os.fdopen(mine[1], "wb", buffering=0)
        os.close(mine[0])
        os.close(self._status[1])
        os.set_blocking(self._status[0], False)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(BlockingIOError):
            if self.returncode is None:
                self.returncode = int(os.read(self._status[0], 32) or b"-9")
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else 1e9)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def fork_workers(note: Path, hook: Hook | None) -> None:
    """From here on workers are forks, of a helper that is forked now; the pids go to `note`, the first one calls `hook`."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        here.close()
        helper(there, note, hook)

    def start(command: Sequence[str], **options: Any) -> ForkedWorker:
        return ForkedWorker(here, command, **options)

    there.close()
    stand_in = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    workers.subprocess = stand_in  # type: ignore[assignment]


def helper(orders: socket.socket, note: Path, hook: Hook | None) -> None:
    """Fork a worker for each order; its parent waits for it, and passes its status on. Ends with whom it serves."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    while True:
        message, files, *_ = socket.recv_fds(orders, 1 << 18, 8)
        if not message:
            os._exit(0)
        first = not note.exists()
        if os.fork() == 0:
            pid = os.fork()
            if pid == 0:
                os.close(orders.fileno())
                try:
                    worker(json.loads(message), files, hook if first else None)
                finally:
                    os._exit(98)
            with note.open("a") as file:
                file.write(f"{pid}\n")
            orders.send(str(pid).encode())
            os.close(orders.fileno())
            for number in files[:-1]:
                os.close(number)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(OSError):
                os.write(files[-1], str(code).encode())
            os._exit(0)
        for number in files:
            os.close(number)
        while not note.exists():
            time.sleep(0.001)


def worker(order: dict[str, Any], files: list[int], hook: Hook | None) -> None:
    stdin, stdout, stderr, says, status = files
    os.close(status)
    os.setsid()
    kept = os.dup2(says, 200)
    streams(stdin, stdout, stderr)
    for number in (stdin, stdout, stderr, says):
        os.close(number)
    os.dup2(kept, order["says"])
    os.close(kept)
    os.environ.update(order["environment"])
    sys.argv = ["workers", *order["arguments"]]
    if hook is not None:
        hook()
    as_process(workers.main)


# -- moments


def at_event(nth: int, root: Path, number: int, seen: Path | None = None) -> Hook:
    """A hook that sends its own process a signal right before the nth change of the directory `root` that Python makes.

    With `seen`, changes are counted in that file instead, a byte each.
    """

    def hook() -> None:
        start, left = str(root), [nth]

        def audit(event: str, args: tuple[Any, ...]) -> None:
            if event == "open":
                ours = str(args[0]).startswith(start) and isinstance(args[1], str) and any(c in args[1] for c in "wax+")
            elif event in ("os.remove", "os.rmdir"):  # rmtree names what it removes relative to an open directory
                ours = str(args[0]).startswith(start) or not str(args[0]).startswith("/")
            else:
                ours = event in ("os.rename", "os.mkdir") and str(args[0]).startswith(start)
            if not ours:
                return
            if counter is not None:
                os.write(counter, b".")
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

        counter = None if seen is None else os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(audit)

    return hook
