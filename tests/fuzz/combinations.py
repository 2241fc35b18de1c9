"""Choices of the configuration, combined: what the checks let through must run.

    python tests/fuzz/combinations.py [--seed 0]

walks over combinations until every pair of choices was in one, with tiny models, and says where a run failed that was let
through. tests/test_combinations.py takes a sample.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import yaml
from conftest import save_model, write_jsonl
from fake_server import serving
from test_adapters import save_adapter
from test_aligned import pairs_tokenizer, save_teacher

import npd
from npd.config import ModelConfig, TeacherConfig, load_config
from npd.demo.task import make_problems
from npd.errors import UserError
from npd.models import load_model
from npd.preflight import prepare
from npd.registry import ENGINES, TEACHERS
from npd.rollout import Weights
from npd.rollout.transformers import TransformersEngine
from npd.scoring.local import LocalTeacher
from npd.scoring.prefill import Reading

Tree = dict[str, Any]


class FilesEngine(TransformersEngine):
    """As vLLM, it takes weights as a directory and has a copy of its own."""

    exact, reads_files, holds_weights = False, True, True

    def take(self, weights: Weights) -> None:
        self.model = load_model(ModelConfig(model=str(weights.path())))


class OnlyReads(npd.scoring.Teacher):
    """A teacher of a plug-in that can do no more than it must."""

    def __init__(self, config: TeacherConfig, setting: Any) -> None:
        super().__init__(config, setting)
        self.inner = LocalTeacher(config.model_copy(update={"kind": None}), setting)

    identify = LocalTeacher.identify

    def read(self, *args: Any, **options: Any) -> list[Reading]:
        return self.inner.read(*args, **options)


CHOICES: Mapping[str, Mapping[str, Tree]] = {
    "command": {"distill": {}, "sft": {}, "eval": {}},
    "engine": {"transformers": {}, "files": {"rollout": {"engine": "files"}}, "static": {"rollout": {"batching": "static"}}},
    "teacher": {
        "here": {},
        "adapter": {"teacher": {"adapter": "ADAPTER"}},
        "served": {"teacher": {"model": "big", "server": "SERVER"}},
        "sglang": {"teacher": {"model": "big", "server": "SGLANG"}},
        "aligned": {"teacher": {"model": "OTHER", "align": True}},
        "aligned, served": {"teacher": {"model": "big", "align": True, "server": "ALIGNED", "tokenizer": "OTHER"}},
        "itself": {"teacher": {"model": "student"}},
        "its snapshots": {"teacher": {"model": "student", "snapshot": "latest"}},
        "only reads": {"teacher": {"kind": "reads"}},
        "told more": {"data": {"train": "TOLD", "columns": {}}},
        "one of two": {"teachers": {"a": {"model": "TEACHER"}}, "teacher": {"model": "OTHER", "align": True}},
    },
    "student": {
        "plain": {},
        "lora": {"student": {"lora": {"r": 2}}},
        "continued": {"student": {"adapter": "ADAPTER"}},
        "merged": {"student": {"adapter": "ADAPTER", "adapter_mode": "merge"}},
        "merged, lora": {"student": {"adapter": "ADAPTER", "adapter_mode": "merge", "lora": {"r": 2}}},
    },
    "references": {
        "none": {},
        "given": {"schedule": {"references": 0.3}},
        "teacher's": {"schedule": {"references": 0.3}, "data": {"references": "teacher"}},
    },
    "loss": {
        "forward_kl": {},
        "tail": {"loss": {"divergence": "reverse_kl", "top_k_mass": "tail"}},
        "renormalize": {"loss": {"divergence": "jensen_shannon", "top_k_mass": "renormalize"}},
        "ce alone": {"loss": {"kd_weight": 0.0}},
        "first tokens": {"loss": {"divergence": "total_variation", "first_tokens": 3}},
    },
    "selection": {
        "none": {},
        "delta": {"selection": {"rule": "delta_ifd", "lower": -9.0, "upper": 9.0}},
        "adaptive": {"selection": {"rule": "adaptive", "adaptive_lower": -9.0}},
        "correct": {"selection": {"reward": "correct"}},
        "contrast": {"selection": {"reward": "contrast"}, "rollout": {"samples_per_prompt": 2}},
        "unverified": {"scoring": {"verify": False}},
    },
    "evaluation": {
        "nothing": {},
        "task": {"evaluation": {"tasks": ["answer"]}, "data": {"eval": "DATA"}},
        "teacher's": {"evaluation": {"tasks": ["answer"], "teacher": True, "kl_prompts": 0}, "data": {"eval": "DATA"}},
        "no kl": {"evaluation": {"tasks": ["answer"], "kl_prompts": 0}, "data": {"eval": "DATA"}},
        "kl": {"data": {"eval": "DATA"}},
        "harness": {"evaluation": {"harness": {"tasks": ["choices"], "include_path": "TASKS"}}},
        "harness, teacher": {"evaluation": {"harness": {"tasks": ["choices"], "include_path": "TASKS"}, "teacher": True}},
    },
    "training": {
        "plain": {},
        "checkpointed": {"training": {"gradient_checkpointing": True}},
        "dropout": {"training": {"dropout": True, "shard": "full"}},
        "rows": {"student": {"attention": "eager"}},
    },
}

Picked = Mapping[str, str]
TRIES = 3  # of two choices, together


@dataclass
class Bench:
    """Where combinations are tried."""

    folder: Path
    names: dict[str, str]
    tried: int = 0

    def tree(self, picked: Picked) -> Tree:
        """The configuration of a combination."""
        self.tried += 1
        made: Tree = {
            "run_dir": str(self.folder / f"run-{self.tried}"),
            "student": {"model": "STUDENT"},
            "teacher": {"model": "TEACHER"},
            "data": {"train": "DATA", "max_prompt_tokens": 32},
            "schedule": {"generations": 2, "passes": 1, "lead": 0.0},
            "rollout": {"max_new_tokens": 6, "batch_size": 8},
            "scoring": {"top_k": 4},
            "selection": {"rule": "none"},
            "packing": {"length": 64},
            "training": {"batch_tokens": 64, "max_steps": 1},
            "evaluation": {},
            "tracking": {"trackers": [], "report": False},
        }
        for factor, choice in picked.items():
            for section, options in CHOICES[factor][choice].items():
                made[section] = made.get(section, {}) | options
        if (
            picked["teacher"] in ("served", "sglang", "aligned, served", "its snapshots", "itself")
            and "adapter" in made["teacher"]
        ):
            del made["teacher"]["adapter"]
        text = json.dumps(made)
        for name, path in self.names.items():
            text = text.replace(f'"{name}"', json.dumps(path))
        tree: Tree = json.loads(text)
        return tree


def attempt(bench: Bench, picked: Picked) -> str:
    """What became of a combination: "refused: why", "ran", or "failed: how", which no check should let come about."""
    tree, command = bench.tree(picked), picked["command"]
    run_dir = Path(tree["run_dir"])
    try:
        try:
            prepare(load_config(tree), command)
        except UserError as error:
            return f"refused: {error}"
        try:
            commands: dict[str, Callable[[Tree], Any]] = {"distill": npd.distill, "sft": npd.sft, "eval": npd.evaluate}
            commands[command](tree)
        except UserError as error:
            at = traceback.extract_tb(error.__traceback__)
            if any(frame.name in ("prepare", "evaluate") and "evaluator" not in (frame.line or "") for frame in at[-1:]):
                return f"refused: {error}"  # there is nothing to evaluate
            return f"failed: {error} [{at[-1].name}]"
        except npd.RunError as error:
            if str(error).startswith("Selection dropped all"):  # chance may keep none of a few
                return f"ran: {error}"
            return f"failed: {error}"
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)
            return f"failed: {type(error).__name__}: {error} [{at[-1].filename}:{at[-1].lineno}]"
        return "ran"
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


@contextmanager
def bench() -> Iterator[Bench]:
    """Tiny models, data, servers and tasks."""
    homes = {registry: dict(registry._homes) for registry in (ENGINES, TEACHERS)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ENGINES.register("files", FilesEngine)
        TEACHERS.register("reads", OnlyReads)
        student = save_model(folder / "student", seed=2, tied=False)
        teacher = save_model(folder / "teacher", seed=2, tied=False)
        other = save_teacher(folder / "other", pairs_tokenizer())
        adapter = save_adapter(folder / "adapter", student)
        rows = [
            {"prompt": p.prompt, "completion": p.completion[:4], "answer": p.answer, "source": "ab"[i % 2]}
            for i, p in enumerate(make_problems(8, seed=7))
        ]
        tasks = folder / "tasks"
        tasks.mkdir()
        problems = write_jsonl(tasks / "problems.jsonl", [{"q": f"{n}+1=", "gold": n % 2} for n in range(3)])
        mean = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        task = {
            "task": "choices", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(problems)}},
            "test_split": "test", "doc_to_text": "{{q}}", "target_delimiter": "", "metadata": {"version": 1},
            "output_type": "multiple_choice", "doc_to_choice": ["1", "2"], "doc_to_target": "gold", "metric_list": [mean],
        }  # fmt: skip
        (tasks / "choices.yaml").write_text(yaml.safe_dump(task))
        told = write_jsonl(folder / "told.jsonl", [row | {"teacher_prompt": "1+" + row["prompt"]} for row in rows])
        yield Bench(
            folder,
            {
                "STUDENT": str(student),
                "TEACHER": str(teacher),
                "OTHER": str(other),
                "ADAPTER": str(adapter),
                "DATA": str(write_jsonl(folder / "data.jsonl", rows)),
                "TOLD": str(told),
                "TASKS": str(tasks),
                "SERVER": stack.enter_context(serving(teacher)).url,
                "SGLANG": stack.enter_context(serving(teacher, kind="sglang")).url,
                "ALIGNED": stack.enter_context(serving(other)).url,
            },
        )
    for registry, kinds in homes.items():
        registry._homes = kinds


def walk(place: Bench, seed: int) -> Iterator[tuple[Picked, str]]:
    """Combinations until every two choices have met in one that ran, or were refused together a few times."""
    draw, factors = random.Random(seed), list(CHOICES)
    open_pairs = {
        frozenset(((a, x), (b, y))): TRIES
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(CHOICES[a], CHOICES[b])
    }

    def pairs(picked: Picked) -> set[frozenset[tuple[str, str]]]:
        return {frozenset(pair) for pair in itertools.combinations(picked.items(), 2)}

    while open_pairs:
        forced = dict(draw.choice(sorted(map(sorted, open_pairs))))
        candidates: Sequence[Picked] = [
            {name: forced.get(name) or draw.choice(list(CHOICES[name])) for name in factors} for _ in range(50)
        ]
        best = max(candidates, key=lambda picked: len(pairs(picked) & open_pairs.keys()))
        outcome = attempt(place, best)
        for pair in pairs(best) & open_pairs.keys():
            open_pairs[pair] -= 1 if outcome.startswith("refused") else TRIES
            if open_pairs[pair] <= 0:
                del open_pairs[pair]
        yield best, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with bench() as place:
        for picked, outcome in walk(place, options.seed):
            told = ", ".join(f"{name} {choice}" for name, choice in picked.items())
            print(f"{outcome[:400]}\n    {told}", flush=True)


if __name__ == "__main__":
    main()
