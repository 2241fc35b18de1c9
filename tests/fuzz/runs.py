"""Run directories that are damaged: a file lost, cut, overwritten, replaced by a link, or strange ones beside it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

from .hostile import DICTIONARY, deep, mutated
from .models import anywhere
from .sandbox import at_event
from .world import Case, World

COUNT = 200
COMMANDS = (
    *(("distill",), ("distill",), ("refresh",), ("refresh", "--reselect", "--selection.upper=0.5"), ("eval",), ("report",)),
    *(("distill", "--dry-run"), ("report", "--trace"), ("refresh", "--follow")),
)
STRANGE = (
    *(
        "policy/v000000-copy",
        "policy/vX",
        "policy/v1",
        "policy/v999999999999",
        "checkpoints/step-000004.bak",
        "checkpoints/step-x",
    ),
    *("generations/g000/part-00000.bak.parquet", "generations/g000/part-x.parquet", "generations/g999", "generations/gX"),
    *(
        "logs",
        "student.old",
        ".x.tmp",
        ".a.b.c.d.tmp",
        "policy/.x.tmp",
        "generations/g000/part-99999.parquet",
        "cache",
        "report.html",
    ),
    *("trackers", "checkpoints/.step-000009.x.y.tmp", "\x1b[31m", "events.jsonl.1", "generations/references", "student/x"),
)
TARGETS = ("outside", "outside/canary.txt", "/dev/null", "/nonexistent/x", "run", "/dev/full", "/etc")


def made(world: World, name: str) -> Path:
    """A run that is finished, or that was killed half-way."""

    def make(folder: Path) -> None:
        scene = world.scene(Case("runs", -1))
        sections: dict[str, Any] = {"schedule": {"generations": 3}, "data": {"eval": str(world.data)}}
        config = scene.write_config(world.tree(scene.run, sections | {"evaluation": {"tasks": ["answer"], "kl_prompts": 2}}))
        seen = world.root / "changes"
        scene.npd("distill", str(config), hook=at_event(0, scene.run, 0, seen), fine=[0])
        if name != "finished":
            shutil.rmtree(scene.run)
            nth = int(seen.stat().st_size * {"early": 0.3, "late": 0.8}[name])
            scene.npd("distill", str(config), hook=at_event(nth, scene.run, signal.SIGKILL), fine=[-9])
        if scene.case.faults:
            raise AssertionError(f"a plain run fails: {scene.case.faults}\n{scene.case.said}")
        seen.unlink()
        shutil.copytree(scene.path, folder / "scene", symlinks=True)

    return world.kept(f"run-{name}", make) / "scene"


def damage(scene_path: Path, run: Path, rng: random.Random) -> str:
    places = [path for path in sorted(run.rglob("*")) if not path.is_symlink() and path.name != "tokenizer.json"]
    key = {path.relative_to(run).parts[0] for path in places}
    top = rng.choice(sorted(key))  # so that each kind of file has its turn
    path = rng.choice([path for path in places if path.relative_to(run).parts[0] == top])
    name = path.relative_to(run)
    way = rng.choice(("bytes", "bytes", "value", "gone", "link", "link", "other", "strange", "empty", "line"))
    if way == "strange":
        strange = run / rng.choice(STRANGE)
        strange.parent.mkdir(parents=True, exist_ok=True)
        if not strange.exists():
            match rng.randrange(3):
                case 0:
                    strange.mkdir()
                case 1:
                    strange.write_bytes(b"\x1b[31m\xff")
                case 2:
                    strange.symlink_to(scene_path / rng.choice(TARGETS))
        return f"a strange {strange.relative_to(run)!s}"
    if way == "link":
        target = scene_path / rng.choice(TARGETS)
        remove(path)
        path.symlink_to(target)
        return f"{name} a link to {target}"
    if way == "gone":
        remove(path)
        return f"{name} is gone"
    if way == "other" or path.is_dir():
        was = path.is_dir()
        remove(path)
        if was:
            path.write_text("x")
        else:
            path.mkdir()
        return f"{name} is a {'file' if was else 'directory'}"
    content = path.read_bytes()
    if way == "empty":
        path.write_bytes(b"")
        return f"{name} is empty"
    if way in ("value", "line") and path.suffix in (".json", ".jsonl", ".yaml"):
        value = rng.choice([value for value in DICTIONARY if not isinstance(value, bytes)])
        if path.suffix == ".jsonl":
            lines = content.decode().splitlines()
            at = rng.randrange(len(lines))
            lines[at] = hostile_json(json.loads(lines[at]), rng, value)
            path.write_text("\n".join(lines) + "\n")
        elif path.suffix == ".json":
            path.write_text(hostile_json(json.loads(content), rng, value))
        else:
            import yaml

            tree = yaml.safe_load(content)
            path.write_bytes(yaml.safe_dump(anywhere(tree, rng, value)).encode("utf-8", "surrogatepass"))
        return f"{name} with {str(value)[:40]!r}"
    path.write_bytes(
        rng.choice((mutated(content, rng), mutated(content, rng), b"7\n", b"-1\n", b"v999999\n", deep(3000).encode()))
    )
    return f"damaged bytes in {name}"


def hostile_json(tree: Any, rng: random.Random, value: Any) -> str:
    try:
        return json.dumps(anywhere(tree, rng, value))
    except ValueError:
        return '{"step": ' + "9" * 5000 + "}"


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def attack(case: Case, world: World) -> None:
    state = ("early", "late", "finished")[case.number % 3]
    place = made(world, state)
    scene = world.scene(case)
    rng = scene.rng
    for name in ("run", "config.yaml"):
        source = place / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, scene.path / name)
    case.told = f"a run {state}: {damage(scene.path, scene.run, rng)}"
    if rng.random() < 0.3:
        case.told += f"; {damage(scene.path, scene.run, rng)}"
    name, *flags = command = COMMANDS[case.number % len(COMMANDS)]
    case.told += f", {' '.join(command)}"
    if name == "report":
        flags = ["--trace", str(scene.run / "trace.json")] if flags else []
    on = scene.run if name == "report" or rng.random() < 0.3 else scene.path / "config.yaml"
    follows = "--follow" in flags
    process = scene.start(name, str(on), *flags)
    if follows:  # which waits for a trainer for as long as there is none
        deadline = 3.0
        import time

        began = time.monotonic()
        while not process.over() and time.monotonic() - began < deadline:
            time.sleep(0.01)
        if not process.over():
            process.signal(signal.SIGTERM)
    scene.judge(process.wait(60), (0, 1, 2, 143) if follows else (0, 1, 2))
    if os.path.lexists(scene.run) and name == "distill" and case.status == 0 and not flags:
        scene.check_finished()
    scene.finish()
