"""Processes of a run killed, ended, interrupted or stopped for a while at any moment; what was lost is made again, identical.

Half of the moments are times, which differ from machine to machine; half are changes of the run directory by their number,
which are the same everywhere. Every tenth process is a fresh one, and is hit while it starts.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .sandbox import Ended, Process, at_event
from .world import LIMIT, Case, Scene, World, state_of

COUNT = 1000
BASES: dict[str, dict[str, Any]] = {
    "turns": {},
    "beside": {"schedule": {"lead": 1.0}},
    "measured": {
        "schedule": {"references": 0.3, "kl_budget": 0.02},
        "training": {"max_steps": 8},
        "evaluation": {"kl_prompts": 2, "tasks": ["answer"]},
    },
    "external": {"schedule": {"lead": 1.0}, "placement": {"rollout": "external"}},
}
ORDER = ("turns", "beside", "measured", "beside", "turns", "beside", "measured", "external")
SIGNALS = ("KILL", "KILL", "KILL", "TERM", "TERM", "INT", "INT", "STOP", "HUP", "INT twice")
ENDS = {"KILL": (-9, 0), "TERM": (143, 0), "INT": (130, 0), "INT twice": (130, 0), "HUP": (-1, 129, 0), "STOP": (0,)}
STARTING = 6.0  # seconds in which a fresh process starts, at most


class Run:
    """The processes of a run: a trainer, and a follower where generations are made elsewhere."""

    def __init__(self, scene: Scene, base: str, **options: Any) -> None:
        self.scene, self.external = scene, base == "external"
        sections = dict(BASES[base])
        if base == "measured":
            sections["data"] = {"eval": str(scene.world.data)}
        self.config = scene.write_config(scene.world.tree(scene.run, sections))
        self.options = options
        self.trainer: Process | None = None
        self.follower: Process | None = None

    def start(self) -> None:
        if self.trainer is None:
            self.trainer = self.scene.start("distill", str(self.config), **self.options)
            self.options = {}
        if self.external and self.follower is None:
            deadline = time.monotonic() + LIMIT
            while not (self.scene.run / "prompts.arrow").exists() and time.monotonic() < deadline:
                if self.trainer.over():
                    return
                time.sleep(0.005)
            self.follower = self.scene.start("refresh", str(self.config), "--follow")


def undisturbed(world: World, base: str) -> dict[str, Any]:
    """What a run comes to that nobody disturbs: its state, seconds, and changes of its directory by process."""

    def make(folder: Path) -> None:
        counts = world.root / "counts"
        counts.mkdir(exist_ok=True)
        scene = world.scene(Case("undisturbed", 0))
        hooks = {
            "hook": at_event(0, scene.run, 0, counts / f"{base}-trainer"),
            "worker_hook": at_event(0, scene.run, 0, counts / f"{base}-worker"),
        }
        run = Run(scene, base, **hooks)
        began = time.monotonic()
        run.start()
        for process in (run.trainer, run.follower):
            if process is not None:
                scene.judge(process.wait(LIMIT), fine=[0])
        seconds = time.monotonic() - began
        scene.finish()
        if scene.case.faults:
            raise AssertionError(f"an undisturbed run fails: {scene.case.faults}\n{scene.case.said}")
        files = {role: counts / f"{base}-{role}" for role in ("trainer", "worker")}
        changes = {role: file.stat().st_size if file.exists() else 0 for role, file in files.items()}
        (folder / "facts.json").write_text(json.dumps({"state": state_of(scene.run), "seconds": seconds, "changes": changes}))

    facts: dict[str, Any] = json.loads((world.kept(base, make) / "facts.json").read_text())
    return facts


def attack(case: Case, world: World) -> None:
    base = ORDER[case.number % len(ORDER)]
    facts = undisturbed(world, base)
    scene = world.scene(case)
    rng = scene.rng
    starting = case.number % 10 == 7
    name = rng.choice(SIGNALS)
    roles = {"beside": ("trainer", "worker", "both"), "external": ("trainer", "follower", "both")}.get(base, ("trainer",))
    role = "trainer" if starting else rng.choice(roles)
    if role == "worker" and name.startswith("INT"):
        name = "TERM"  # Ctrl-C is for the trainer
    number = getattr(signal, f"SIG{name.split()[0]}")
    case.group = f"{name.replace(' ', '-')} {'a fresh process, starting' if starting else f'{role}, {base}'}"
    at_change = (
        not starting and base != "external" and role != "both" and name not in ("STOP", "INT twice") and rng.random() < 0.5
    )
    if at_change:
        nth = rng.randint(1, max(1, facts["changes"][role]))
        case.told = f"{base}: SIG{name} to the {role} before change {nth} of the directory"
        hook = at_event(nth, scene.run, number)
        run = Run(scene, base, **{"hook" if role == "trainer" else "worker_hook": hook})
        run.start()
    else:
        share = rng.random()
        seconds = share * (STARTING if starting else facts["seconds"])
        case.told = f"{base}: SIG{name} to the {role} after {seconds:.3f} s" + (", a fresh process" if starting else "")
        run = Run(scene, base, fresh=starting)
        run.start()
        assert run.trainer is not None
        time.sleep(max(0.003, run.trainer.began + seconds - time.monotonic()))
        hit = [run.trainer] if role in ("trainer", "both") else []
        hit += [run.follower] if role in ("follower", "both") and run.follower is not None else []
        for process in hit:
            process.signal(number)
        worker = run.trainer.worker() if role in ("worker", "both") else None
        if worker is not None:
            signal_process(worker, number)
        if name == "INT twice":
            time.sleep(rng.choice((0.001, 0.02, 0.1)))
            for process in hit:
                process.signal(number)
        if name == "STOP":
            time.sleep(rng.choice((0.01, 0.1, 0.5)))
            for process in hit:
                process.signal(signal.SIGCONT)
            if worker is not None:
                signal_process(worker, signal.SIGCONT)
    scene.killed = True
    finish(scene, run, ENDS[name], early=starting)
    scene.killed = False
    scene.finish()
    state = state_of(scene.run) if (scene.run / "metrics.jsonl").exists() else {}
    different = sorted(key for key in state.keys() | facts["state"].keys() if state.get(key) != facts["state"].get(key))
    if different:
        case.fault(f"differs from the undisturbed run: {different[:8]}")
    scene.check_finished()
    if (scene.run / "cache").exists():
        case.fault("cache/ is left")


def signal_process(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def finish(scene: Scene, run: Run, struck: tuple[int, ...], *, early: bool) -> None:
    """Wait for what was struck; start again whatever has not ended by itself, until the run is finished."""
    deadline = time.monotonic() + LIMIT
    first = {"trainer": True, "follower": True}
    while time.monotonic() < deadline:
        for role in ("trainer", "follower"):
            process: Process | None = getattr(run, role)
            if process is None or not process.over():
                continue
            ended: Ended = process.wait(LIMIT)
            fine = (*struck, 0) if first[role] else (0,)
            if first[role] and early and -ended.status in (signal.SIGTERM, signal.SIGINT) and "/npd/" not in ended.said:
                ended = replace(ended, said="")  # Python was hit, before npd began
                fine = (*fine, ended.status)
            scene.judge(ended, fine)
            first[role] = False
            setattr(run, role, None)
            if ended.status == 0 and (role == "trainer" or run.trainer is None):
                if role == "trainer" and run.follower is not None:
                    scene.judge(run.follower.wait(LIMIT), (*struck, 0) if first["follower"] else (0,))
                if scene.run.joinpath("student/npd.json").exists():
                    return
            if ended.hung or ended.status not in fine:
                for other in (run.trainer, run.follower):
                    if other is not None:
                        other.signal(signal.SIGKILL)
                        other.wait(LIMIT)
                return
            run.start()
        time.sleep(0.003)
    scene.case.fault("does not come to an end")
    for other in (run.trainer, run.follower):
        if other is not None:
            other.signal(signal.SIGKILL)
            other.wait(LIMIT)
