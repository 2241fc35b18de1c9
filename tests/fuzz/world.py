"""What cases stand on: tiny models and data, a run of a second, a folder for each case, and the verdict."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from conftest import save_model, write_jsonl

from .sandbox import Ended, Process, leftover_processes

KEY = "canary-key-5f0c1d2e"  # the server's key: it must never lie in a file
PASSWORD = "canary-password-77aa"
SECRETS = (KEY, PASSWORD)
LIMIT = 90.0  # seconds after which a process is taken to hang: machines are shared
SLOW = 30.0  # seconds of processor time that nothing here needs
MEMORY = 1 << 30  # bytes beyond what imports took
LONGEST = 2000  # characters of an explanation
VOCABULARY = 20
TIMED = ("tokens_per_second", "publish_seconds", "seconds")
TRACE = "Traceback (most recent call last)"
Tree = dict[str, Any]


@dataclass
class Case:
    """One attack: what was done, and everything that is wrong with what came of it."""

    kind: str
    number: int
    told: str = ""
    """What was done, in a few words."""
    group: str = ""
    """What it is counted with."""
    status: int | None = None
    faults: list[str] = field(default_factory=list)
    said: str = ""

    def fault(self, what: str) -> None:
        self.faults.append(what)


class World:
    """Models, data and undisturbed runs, made once; each case gets a new folder beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shared, self.case_dir = root / "shared", root / "case"
        self.shared.mkdir()
        self.student = save_model(self.shared / "student", seed=2, hidden=16, layers=1)
        self.teacher = save_model(self.shared / "teacher", seed=1, hidden=16, layers=2)
        rows = [
            {"prompt": f"{n}+{n % 7}*3=", "completion": f"{n}", "answer": "1", "source": "ab"[n % 2]} for n in range(10, 16)
        ]
        self.data = write_jsonl(self.shared / "data.jsonl", rows)
        self._kept: dict[str, Path] = {}

    def tree(self, run_dir: Path | str, sections: Mapping[str, Any] | None = None) -> Tree:
        """A run of half a second: two generations, three snapshots, checkpoints amid passes."""
        tree: Tree = {
            "run_dir": str(run_dir),
            "student": {"model": str(self.student)},
            "teacher": {"model": str(self.teacher)},
            "data": {"train": str(self.data), "max_prompt_tokens": 16},
            "schedule": {"generations": 2, "passes": 2, "lead": 0.0},
            "rollout": {"max_new_tokens": 6, "batch_size": 4, "part_size": 2},
            "scoring": {"top_k": 3, "batch_tokens": 64},
            "selection": {"rule": "none"},
            "packing": {"length": 22},
            "training": {"batch_tokens": 66, "learning_rate": 1e-2, "final_learning_rate": 1e-3},
            "checkpoint": {"every_steps": 2},
            "placement": {"train_threads": 1, "rollout_threads": 1},
            "tracking": {"trackers": [], "report": False},
        }
        for name, options in (sections or {}).items():
            tree[name] = {**tree.get(name, {}), **options} if isinstance(options, dict) else options
        return tree

    def kept(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder that `make` fills, the first time that it is asked for."""
        if name not in self._kept:
            self._kept[name] = self.shared / "kept" / name
            self._kept[name].mkdir(parents=True)
            make(self._kept[name])
        return self._kept[name]

    def scene(self, case: Case) -> Scene:
        return Scene(self, case)


class Scene:
    """The folder of a case: `run` may change, `tmp` must be empty at the end, and nothing else may change at all."""

    def __init__(self, world: World, case: Case) -> None:
        self.world, self.case, self.path = world, case, world.case_dir
        shutil.rmtree(self.path, ignore_errors=True)
        self.run, self.log = self.path / "run", self.path / "logs" / "0.log"
        for name in ("here", "tmp", "home", "logs", "outside"):
            (self.path / name).mkdir(parents=True)
        (self.path / "outside/canary.txt").write_text("mine\n")
        self.rng = random.Random(f"{case.kind} {case.number}")
        self.environment = {
            "NPD_TEACHER_API_KEY": KEY,
            "TMPDIR": str(self.path / "tmp"),
            "HOME": str(self.path / "home"),
        }
        self.before: dict[str, Any] = {}
        self.planted: set[Path] = set()
        self.count = 0
        self.killed = False

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        return path

    def write_config(self, tree: Any, name: str = "config.yaml") -> Path:
        return self.write(name, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))

    def start(self, *arguments: str, **options: Any) -> Process:
        """Start `npd ARGUMENTS` here; what lies around the run directory is looked at before the first start."""
        if not self.before:
            self.before = self.around()
            self.planted = set(self.run.rglob(".*.tmp"))
        self.count += 1
        log = self.path / "logs" / f"{self.count}.log"
        return Process(arguments, cwd=self.path / "here", log=log, environment=self.environment, **options)

    def npd(
        self, *arguments: str, fine: Sequence[int] = (0, 1, 2), limit: float = LIMIT, slow: float = SLOW, **options: Any
    ) -> Ended:
        """Run `npd ARGUMENTS`, and judge how it ends."""
        ended = self.start(*arguments, **options).wait(limit)
        self.judge(ended, fine, slow=slow)
        return ended

    def judge(self, ended: Ended, fine: Sequence[int] = (0, 1, 2), *, slow: float = SLOW) -> None:
        """Faults of one process: its status, what it said, and what it took."""
        case = self.case
        case.status, case.said = ended.status, ended.said
        if ended.hung:
            case.fault(f"hangs: nothing after {ended.seconds:.0f} s")
            return
        if ended.status not in fine:
            case.fault(f"exit status {ended.status}, wanted {' or '.join(map(str, fine))}")
        self.judge_words(ended)
        if ended.cpu > slow:
            case.fault(f"took {ended.cpu:.0f} s of processor time")
        if ended.memory > MEMORY:
            case.fault(f"took {ended.memory / 2**20:.0f} MiB of memory")

    def judge_words(self, ended: Ended) -> None:
        case, said = self.case, ended.said
        if TRACE in said:
            case.fault(f"a traceback: {said.strip().splitlines()[-1][:200]}")
        if controls := sorted({c for c in said if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"}):
            case.fault(f"control characters reach the terminal: {controls!r}")
        if ended.status in (1, 2, 130, 143):
            lines = said.rstrip("\n").split("\n")
            starts = [i for i, line in enumerate(lines) if line.startswith(("npd: ", "Usage: npd", "Error: "))]
            if not starts and TRACE not in said:
                case.fault(f"exit status {ended.status} without a reason")
            words = lines[starts[-1] :] if starts else []
            one = ended.status in (2, 130, 143) and words and words[0].startswith("npd: ")
            if one and len(words) > 1 and "log " not in words[0]:
                case.fault(f"{len(words)} lines instead of one paragraph: {words[-1][:100]!r}")
            if (length := sum(map(len, words))) > LONGEST and "log " not in words[0]:
                case.fault(f"an explanation of {length} characters")

    # -- what must not change

    def around(self) -> dict[str, Any]:
        """Every file but those of the run: what it is, and when it changed."""
        state: dict[str, Any] = {}
        for top in (self.path, self.world.shared):
            for folder, names, files in os.walk(top):
                here = Path(folder)
                if here == self.path:
                    names[:] = [name for name in names if name not in ("run", "logs", "tmp")]
                for name in (*names, *files):
                    if here == self.path and name == "run":  # a file, if somebody has put one there
                        continue
                    with suppress(OSError):
                        facts = (here / name).lstat()
                        directory = (here / name).is_dir() and not (here / name).is_symlink()
                        own = here == self.path
                        state[str(here / name)] = (
                            facts.st_ino,
                            facts.st_mode,
                            *(() if directory and own else (facts.st_mtime_ns,)),
                            0 if directory else facts.st_size,
                        )
        return state

    def finish(self) -> None:
        """Faults of what lies there after all processes: left over, written where it must not be, secret, not finite."""
        case = self.case
        if left := leftover_processes():
            case.fault(f"processes left over: {left}")
        after = self.around()
        changed = sorted(name for name in after.keys() | self.before.keys() if after.get(name) != self.before.get(name))
        if self.before and changed:
            names = [str(Path(name).relative_to(self.world.root)) for name in changed]
            case.fault(f"written outside of the run directory: {names[:5]}")
        if not self.killed and (left := [str(path.relative_to(self.path)) for path in (self.path / "tmp").iterdir()]):
            case.fault(f"left in TMPDIR: {left[:5]}")
        if (
            not self.killed
            and self.run.is_dir()
            and (left := [str(path) for path in {*self.run.rglob(".*.tmp")} - self.planted])
        ):
            case.fault(f"left half written: {left[:5]}")
        for path in files_of(self.path / "logs", self.run):
            data = path.read_bytes()
            for secret in SECRETS:
                if secret.encode() in data:
                    case.fault(f"a secret in {path.relative_to(self.path)}")
            if path.suffix == ".log" and path.parent.parent == self.run and TRACE.encode() in data:
                last = data.decode("utf-8", "replace").strip().splitlines()[-1]
                case.fault(f"a traceback in {path.relative_to(self.path)}: {last[:200]}")

    def check_finished(self) -> None:
        """Faults of what a run that says it is finished has trained on, and made."""
        from safetensors.torch import load_file

        for path in sorted(self.run.glob("generations/*/part-*.parquet")):
            for what in wrong_in_part(path):
                self.case.fault(f"trained on nonsense: {path.name}: {what}")
        weights = self.run / "student/model.safetensors"
        if weights.exists() and not all(bool(value.isfinite().all()) for value in load_file(weights).values()):
            self.case.fault("a finished student with weights that are not finite")


def files_of(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            with suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    yield path


def wrong_in_part(path: Path) -> list[str]:
    """What no teacher can have said."""
    wrong = []
    for row in pq.read_table(path).to_pylist():
        ids, logprobs = np.array(row["topk_ids"] or []), np.array(row["topk_logprobs"] or [], np.float64)
        k = len(ids) // max(1, len(row["response_ids"]))
        nll = row["teacher_nll"]
        if nll is not None and not (math.isfinite(nll) and nll > -1e-3):
            wrong.append(f"a teacher's NLL of {nll}")
        if not k:
            continue
        if not np.isfinite(logprobs).all() or (logprobs > 1e-3).any():
            wrong.append("log-probabilities that are none")
            continue
        if (np.exp(logprobs.reshape(-1, k)).sum(1) > 1.01).any():
            wrong.append("probabilities of more than 1")
        if any(len(set(row)) < k for row in ids.reshape(-1, k).tolist()) or ids.min() < 0 or ids.max() >= VOCABULARY:
            wrong.append("ids twice, or outside of the vocabulary")
    return sorted(set(wrong))


def state_of(run: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on interruptions."""
    patterns: tuple[str, ...] = (
        "student/*",
        "generations/*/part-*",
        "generations/*/manifest.json",
        "policy/v*/*",
        "policy/LATEST",
    )
    patterns += ("checkpoints/step-*/model.safetensors", "checkpoints/LATEST")
    names = [path for pattern in patterns for path in run.glob(pattern) if path.is_file()]
    state: dict[str, Any] = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return state | {"metrics": [{key: value for key, value in line.items() if key not in TIMED} for line in lines]}


def altered(tree: Tree, path: Sequence[str], value: Any) -> Tree:
    """A copy with one value replaced, sections made where there are none."""
    copy = deepcopy(tree)
    at = copy
    for name in path[:-1]:
        if not isinstance(at.get(name), dict):
            at[name] = {}
        at = at[name]
    at[path[-1]] = value
    return copy
