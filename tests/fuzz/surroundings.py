"""A machine that is not as it should be: streams closed or full, limits, odd environments, files that go meanwhile."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from .answers import serve
from .sandbox import Hook, at_event, streams
from .world import Case, Scene, World

COUNT = 120
COMMANDS = (("distill",), ("data",), ("distill", "--dry-run"), ("eval",), ("--help",), ("distill", "--help"))
Way = Callable[[Scene], Hook]


def on(stream: Callable[[], int], *numbers: int) -> Way:
    """Standard streams that are something else."""

    def way(scene: Scene) -> Hook:
        def hook() -> None:
            for number in numbers:
                os.dup2(stream(), number)

        return hook

    return way


def broken_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def closed(*numbers: int) -> Way:
    def way(scene: Scene) -> Hook:
        def hook() -> None:
            for number in numbers:
                setattr(sys, ("stdin", "stdout", "stderr")[number], None)
                os.close(number)

        return hook

    return way


def ascii_only(scene: Scene) -> Hook:
    def hook() -> None:
        streams(0, 1, 2)
        sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115

    return hook


def limited(which: int, most: int) -> Way:
    def way(scene: Scene) -> Hook:
        def hook() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(which, (most, most))

        return hook

    return way


def masked(mask: int) -> Way:
    def hook() -> None:
        os.umask(mask)

    return lambda scene: hook


def environment(**names: str) -> Way:
    def way(scene: Scene) -> Hook:
        return lambda: os.environ.update({name: text.replace("HERE", str(scene.path)) for name, text in names.items()})

    return way


def nowhere(scene: Scene) -> Hook:
    def hook() -> None:
        place = scene.path / "tmp/place"
        place.mkdir()
        os.chdir(place)
        place.rmdir()

    return hook


def meanwhile(act: Callable[[Scene], Any]) -> Way:
    """Something happens before the nth change of the run directory."""

    def way(scene: Scene) -> Hook:
        nth = scene.rng.randint(2, 150)

        def hook() -> None:
            signal.signal(signal.SIGUSR1, lambda *_: act(scene))
            at_event(nth, scene.run, signal.SIGUSR1)()

        return hook

    return way


def emptied(*pattern: str) -> Callable[[Scene], Any]:
    def act(scene: Scene) -> None:
        for place in (path for one in pattern for path in list(scene.run.glob(one))):
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                with suppress(OSError):
                    place.unlink()

    return act


def replaced(scene: Scene) -> None:
    shutil.rmtree(scene.run, ignore_errors=True)
    with suppress(OSError):
        scene.run.write_text("mine")


WAYS: dict[str, Way] = {
    "standard output a pipe that nobody reads": on(broken_pipe, 1),
    "both outputs a pipe that nobody reads": on(broken_pipe, 1, 2),
    "standard output full": on(full, 1),
    "both outputs full": on(full, 1, 2),
    "no standard input": closed(0),
    "no standard output": closed(1),
    "no standard streams": closed(0, 1, 2),
    "an ASCII terminal": ascii_only,
    "a directory that is gone": nowhere,
    **{f"{most} open files": limited(resource.RLIMIT_NOFILE, most) for most in (16, 24, 48)},
    **{f"files of {most} bytes": limited(resource.RLIMIT_FSIZE, most) for most in (5000, 20_000)},
    "files of which nothing may be done": masked(0o777),
    "files of one's own": masked(0o077),
    "a terminal of no columns": environment(COLUMNS="0", LINES="0"),
    "a terminal of one column": environment(COLUMNS="1"),
    "a terminal of nonsense": environment(COLUMNS="x", LINES="-5", TERM="\x1b[31m"),
    "a temporary directory that is not there": environment(TMPDIR="HERE/nowhere"),
    "a temporary directory that is a file": environment(TMPDIR="HERE/outside/canary.txt"),
    "a home that is not there": environment(HOME="HERE/nowhere", XDG_CACHE_HOME="HERE/nowhere"),
    "threads of nonsense": environment(OMP_NUM_THREADS="x", MKL_NUM_THREADS="-1"),
    "launcher's words of nonsense": environment(RANK="x", WORLD_SIZE="-1"),
    "a key with a line break": environment(NPD_TEACHER_API_KEY="a\r\nX-Evil: 1"),
    "a key of other letters": environment(NPD_TEACHER_API_KEY="ключ \x1b[31m"),
    "the run removed meanwhile": meanwhile(emptied("*", ".*")),
    "the run replaced by a file meanwhile": meanwhile(replaced),
    "snapshots removed meanwhile": meanwhile(emptied("policy/*")),
    "parts removed meanwhile": meanwhile(emptied("generations/*/part-*")),
    "manifests removed meanwhile": meanwhile(emptied("generations/*/manifest.json")),
    "checkpoints removed meanwhile": meanwhile(emptied("checkpoints/*")),
    "the cache removed meanwhile": meanwhile(emptied("cache")),
    "half written files removed meanwhile": meanwhile(emptied("**/.*.tmp")),
}
SILENT = ("output", "outputs", "streams")  # there a reason can't be seen


def attack(case: Case, world: World) -> None:
    scene = world.scene(case)
    names = list(WAYS)
    name = names[case.number % len(names)]
    command: Sequence[str] = COMMANDS[case.number // len(names) % len(COMMANDS)]
    lead = 0.0
    if "meanwhile" in name:
        command, lead = ("distill",), scene.rng.choice((0.0, 1.0))
    sections: dict[str, Any] = {"schedule": {"lead": lead}}
    if command == ("eval",):
        sections |= {"data": {"eval": str(world.data)}, "evaluation": {"tasks": ["answer"]}}
    server = None
    tree = world.tree(scene.run, sections)
    if "key" in name:
        server, url = serve(world, "vllm", lambda handler, answer: None, 0, False, "")
        tree["teacher"] = {"model": "big", "server": url, "timeout": 5.0, "retry_seconds": 1.0}
    config = scene.write_config(tree)
    case.told = f"{name}, {' '.join(command)}"
    arguments = command if "--help" in command else (command[0], str(config), *command[1:])
    process = scene.start(*arguments, hook=WAYS[name](scene))
    ended = process.wait(60)
    if server is not None:
        os.kill(server, signal.SIGKILL)
    silent = any(word in name.split() for word in SILENT)
    if name.startswith("files of") and name.endswith("bytes"):  # what is said goes into such a file here
        silent |= len(ended.said.encode()) + 1000 > int(name.split()[2])
    if silent and ended.status in (1, 2, 120, 141):
        if "Traceback" in ended.said:
            case.fault(f"a traceback: {ended.said.strip().splitlines()[-1][:200]}")
        case.status = ended.status
    else:
        scene.judge(ended)
    scene.finish()
    if ended.status == 0:
        scene.check_finished()
