"""Benchmarks of lm-eval (EleutherAI's harness), on the student's weights, by lm-eval's own models and scoring.

Its figures are eval/harness/TASK/METRIC, with METRIC_stderr as lm-eval computes it and, from that, the ends of a normal 95%
interval. A filter other than "none" is part of the metric's name: exact_match,strict-match.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.util
import json
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from npd.config import Config, HarnessConfig, HarnessTaskConfig, TaskConfig
from npd.errors import NpdError, RunError, UserError, foreign
from npd.evaluation import Benchmark, BenchmarkSetting, Figures, Student

NAME = "harness"
NORMAL = 1.959963984540054  # standard errors to either end of a 95% interval
RESAMPLES = 1000  # for the error of what is no mean, such as an F1 over all problems
PROBE_SECONDS = 5.0
LENGTHS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}  # what tasks call a response's length
LOCAL_DATA = ("json", "csv", "parquet", "arrow", "text", "pandas")  # loaders of datasets that read files


class Stated(NamedTuple):
    """A benchmark of the paper."""

    benchmark: str
    task: str
    """What lm-eval calls it, or what stands in for it."""
    note: str = ""


PAPER = (
    Stated("MMLU", "mmlu"),
    Stated("CMMLU", "cmmlu"),
    Stated("C-Eval", "ceval-valid", "its validation split: the test split's answers are not public"),
    Stated("IF-Eval", "ifeval"),
    Stated("CLUEWSC", "xwinograd_zh", "lm-eval lacks it; 488 of these 504 sentences are CLUEWSC's, asked as a choice of two"),
    Stated("GSM8K", "gsm8k"),
    Stated("MATH-500", "minerva_math500"),
    Stated("DROP", "drop"),
    Stated("GPQA-Diamond", "gpqa_diamond_zeroshot", "asks for leave on the Hub: accept its terms, then `hf auth login`"),
    Stated("MBPP", "mbpp", "runs what the model wrote"),
    Stated("HumanEval", "humaneval", "runs what the model wrote"),
)
"""The benchmarks that METHOD's paper reports, in its order."""


@dataclass
class Asked:
    """A task, group or tag, loaded."""

    config: HarnessTaskConfig
    loaded: list[Any]
    """lm-eval's Group, or its Tasks."""
    names: list[str]
    """Under which names of lm-eval's results its figures stand."""
    problems: int


class Harness(Benchmark):
    """Whatever `evaluation.harness` names. Making it loads tasks and their data."""

    slow = True

    def __init__(self, task: TaskConfig, setting: BenchmarkSetting) -> None:
        super().__init__(task, setting)
        self.options = options = setting.config.evaluation.harness
        self.only_at_end = options.every == "end"
        wanted = list(options.tasks)
        known = {one.name for one in wanted}
        wanted += [HarnessTaskConfig(name=stated.task) for stated in PAPER if options.suite and stated.task not in known]
        if not wanted:
            raise UserError(f"evaluation.tasks has {NAME!r}, but evaluation.harness names no tasks.", "Set its tasks.")
        check_installed(options)
        check_placed(setting.config)
        self.index = TaskIndex(options.include_path, [one.name for one in wanted])
        self.left_out: list[str] = []
        by_suite = {one.name for one in wanted} - known
        for one in list(wanted):
            unsafe = [name for name, leaf in self.index.leaves(one.name) if leaf.get("unsafe_code")]
            if not unsafe or options.unsafe_code:
                continue
            if one.name not in by_suite:
                raise UserError(
                    f"evaluation.harness.tasks has {foreign(one.name, 80)!r}, which runs code that the model writes "
                    f"({foreign(', '.join(unsafe), 120)}).",
                    "Leave it out, or, where such code can do no harm, set evaluation.harness.unsafe_code: true.",
                )
            wanted.remove(one)
            self.left_out.append(one.name)
        with allowed_code(options.unsafe_code), quiet():
            self.asked = [self.index.load(one, options.max_new_tokens) for one in wanted]

    @classmethod
    def from_section(cls, setting: BenchmarkSetting) -> list[Benchmark]:
        options = setting.config.evaluation.harness
        return [cls(TaskConfig(name=NAME), setting)] if options.tasks or options.suite else []

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.options.suite:
            told = (f"{one.benchmark} {one.task}" + (f" ({one.note})" if one.note else "") for one in PAPER)
            notes.append(f"The paper's benchmarks as lm-eval has them: {'; '.join(told)}.")
        if self.left_out:
            notes.append(
                f"{' and '.join(self.left_out)} run code that the model writes, and are left out; where such code can do no "
                "harm, evaluation.harness.unsafe_code: true runs them."
            )
        return notes

    @property
    def plan(self) -> str:
        told = ", ".join(f"{one.config.name} ({self._problems(one):,} problems)" for one in self.asked)
        return f"{told}; {'at the end' if self.only_at_end else 'at every evaluation'}"

    def _problems(self, one: Asked) -> int:
        limit = one.config.limit or self.options.limit
        return one.problems if limit is None else min(one.problems, limit * max(1, len(self.index.leaves(one.config.name))))

    def __call__(self, student: Student) -> Figures:
        """Figures of every task, group and tag that is named; of a group its own alone, if it has any.

        Raises:
            RunError: lm-eval failed.
        """
        files = self.options.backend != "transformers"
        figures: Figures = {}
        with (
            student.lend(f"evaluate by lm-eval ({self.options.backend})", len(self.asked), "tasks", files=files) as lent,
            as_it_was(lent.weights),
            allowed_code(self.options.unsafe_code),
            quiet(),
            self._model(lent.weights) as lm,
        ):
            for one in self.asked:
                figures |= {f"{NAME}/{name}": value for name, value in self._run(lm, one).items()}
                lent.advance(1)
        return figures

    def _run(self, lm: Any, one: Asked) -> Figures:
        from lm_eval import simple_evaluate

        options = self.options
        try:
            found = simple_evaluate(
                model=lm,
                tasks=one.loaded,
                num_fewshot=options.num_fewshot if one.config.num_fewshot is None else one.config.num_fewshot,
                limit=one.config.limit or options.limit,
                apply_chat_template=options.chat_template,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
                confirm_run_unsafe_code=options.unsafe_code,
                task_manager=self.index.manager,
            )
        except NpdError:
            raise
        except Exception as error:  # whatever a task, a scorer or a model does
            raise RunError(
                f"lm-eval fails on {foreign(one.config.name, 80)!r} ({type(error).__name__}: {foreign(error, 400)}).",
                "evaluation.harness.options has options of lm-eval's model, such as {max_length: 4096}; "
                "evaluation.harness.max_new_tokens is the length of a response; or leave the task out.",
            ) from error
        assert found is not None, "one process asks"
        figures: Figures = {}
        for name in one.names:
            figures |= figures_of(name, found["results"].get(name, {}))
        if not figures:
            raise RunError(f"lm-eval gave no figures for {foreign(one.config.name, 80)!r}.", "Leave the task out.")
        return figures

    @contextmanager
    def _model(self, weights: Any) -> Iterator[Any]:
        """lm-eval's model around the weights that were lent."""
        options, tokenizer = self.options, self.setting.chat.tokenizer
        if options.backend == "transformers":
            from lm_eval.models.huggingface import HFLM

            # Of a tokenizer it may set the padding token.
            lm = HFLM(weights, tokenizer=copy.deepcopy(tokenizer), batch_size=options.batch_size, **options.options)
            yield _silent(lm)
            return
        from lm_eval.models.vllm_causallms import VLLM
        from vllm.distributed import cleanup_dist_env_and_memory

        trust = self.setting.config.student.trust_remote_code
        lm = VLLM(str(weights), batch_size="auto", trust_remote_code=trust, **options.options)
        try:
            yield _silent(lm)
        finally:
            lm.model.llm_engine.engine_core.shutdown()
            del lm
            cleanup_dist_env_and_memory()


def figures_of(task: str, results: Mapping[str, Any]) -> Figures:
    """A task's figures out of lm-eval's results {"METRIC,FILTER": value, "METRIC_stderr,FILTER": error, ...}.

    Returns:
        TASK/METRIC, and where there is an error TASK/METRIC_stderr, _low and _high.
    """
    figures: Figures = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        figure, error = _number(value), _number(results.get(f"{metric}_stderr,{kind}"))
        if not comma or metric.endswith("_stderr") or figure is None:
            continue
        name = f"{task}/{metric}" + ("" if kind == "none" else f",{kind}")
        figures[name] = figure
        if error is not None:
            figures[f"{name}_stderr"] = error
            figures[f"{name}_low"], figures[f"{name}_high"] = figure - NORMAL * error, figure + NORMAL * error
    return figures


def _number(value: Any) -> float | None:
    """A figure as it is; None for what is none, such as "N/A"."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return float(value) if number and np.isfinite(value) else None


# -- what is checked


def check_installed(options: HarnessConfig) -> None:
    """See that lm-eval is there, and what computes for it.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation.harness needs lm-eval, which is not installed.", "pip install 'npd[eval]'")
    if options.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "evaluation.harness.backend is vllm, which is not installed.",
            "pip install 'npd[vllm]', or set evaluation.harness.backend: transformers.",
        )


def check_placed(config: Config) -> None:
    """See that the backend can take the student as it is.

    Raises:
        UserError: it cannot.
    """
    if config.evaluation.harness.backend != "vllm":
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "evaluation.harness.backend vllm starts vLLM in this process, which is one of several that train together.",
            "Set evaluation.harness.backend: transformers, or ask `npd eval` when the run is finished.",
        )
    if config.student.lora is not None:
        raise UserError(
            "evaluation.harness.backend vllm takes whole weights, but the student is trained by adapters (student.lora).",
            "Set evaluation.harness.backend: transformers.",
        )


# -- tasks


class TaskIndex:
    """Tasks by name: those of a directory of one's own, and lm-eval's where one is named that is not there.

    lm-eval's own are thousands of files, which take seconds to read.
    """

    def __init__(self, include_path: str | None, names: Iterable[str]) -> None:
        from lm_eval.tasks import TaskManager

        self.include_path, names = include_path, list(names)
        if include_path is not None and not Path(include_path).is_dir():
            raise UserError(f"evaluation.harness.include_path is {foreign(include_path, 200)}, which is no directory.")
        with quiet():
            if include_path is not None:
                self.manager = TaskManager(include_path=include_path, include_defaults=False)
                if all(map(self._is_whole, names)):
                    return
            self.manager = TaskManager(include_path=include_path)
        unknown = [name for name in names if name not in self.manager.task_index]
        if unknown:
            near = _near(unknown[0], list(self.manager.task_index))
            raise UserError(
                f"evaluation.harness.tasks has {foreign(unknown[0], 80)!r}, which is no task, group or tag of lm-eval"
                f"{'' if include_path is None else f' or of {foreign(include_path, 120)}'}{near}.",
                "`lm-eval ls tasks` lists lm-eval's; evaluation.harness.include_path brings others.",
            )

    @functools.cached_property
    def offline(self) -> str | None:
        """Why the Hub cannot be reached; None: it can. It is asked once."""
        return why_unreachable()

    def _is_whole(self, name: str) -> bool:
        """Is a name known, and are all that it stands for? A group may have members that are lm-eval's."""
        leaves = self.leaves(name)
        return bool(leaves) and all(leaf in self.manager.task_index for leaf, _ in leaves)

    def leaves(self, name: str) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, options) of every task that a name stands for, before anything is loaded."""
        return list(self._leaves(name, {}, set()))

    def _leaves(self, name: str, over: Mapping[str, Any], seen: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        entry = self.manager.task_index.get(name)
        if entry is None or name in seen:
            return
        if entry.tags and entry.kind.name == "TAG":
            for member in sorted(entry.tags):
                yield from self._leaves(member, over, seen | {name})
            return
        options = {**(entry.cfg or {}), **over}
        yield from self._members(name, options, seen) if entry.kind.name == "GROUP" else [(name, options)]

    def _members(self, name: str, options: Mapping[str, Any], seen: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        members = options.get("task")
        for member in members if isinstance(members, list) else []:
            over = member if isinstance(member, dict) else {}
            inner = over.get("group", over.get("task")) if over else member
            if inner not in self.manager.task_index and isinstance(over.get("task"), list):  # a group inside this one
                yield from self._members(name, over, seen)
            elif inner in self.manager.task_index:
                own = {key: value for key, value in over.items() if key not in ("task", "group")}
                yield from self._leaves(str(inner), own, seen | {name})
            else:
                yield str(inner), {**options, **over}

    def load(self, one: HarnessTaskConfig, max_new_tokens: int | None) -> Asked:
        """A task with its data; a response has `max_new_tokens` at most where the task does not say.

        Raises:
            UserError: it cannot be loaded; without the network that is said, after seconds.
        """
        from lm_eval.api.group import Group

        asks_hub = any(not _is_local(leaf) for _, leaf in self.leaves(one.name))
        why_offline = self.offline if asks_hub else None
        try:
            with unasked_hub() if why_offline else contextlib.nullcontext():
                found = self.manager.load([one.name])
        except Exception as error:  # whatever a task's own code and data make of it
            name, told = foreign(one.name, 80), f"{type(error).__name__}: {foreign(error, 300)}"
            if isinstance(error, ModuleNotFoundError) or isinstance(error.__cause__, ModuleNotFoundError):
                raise UserError(f"lm-eval's task {name!r} needs a package that is not here ({told}).") from error
            if why_offline:
                raise UserError(
                    f"lm-eval's task {name!r} reads its data from the Hub, which cannot be reached ({why_offline}), and they "
                    f"are not in the cache ({told}).",
                    "Load them once where there is a network and bring the cache here (HF_HOME), or write a task file with "
                    "`dataset_path: json` and files of your own (evaluation.harness.include_path).",
                ) from error
            raise UserError(
                f"lm-eval's task {name!r} cannot be loaded ({told}).", "Check its name, its file and its data."
            ) from error
        tasks, groups = found["tasks"], found.get("groups", {})
        for task in tasks.values():
            said = getattr(task.config, "generation_kwargs", None)
            if max_new_tokens is not None and said is not None and not LENGTHS & said.keys():
                task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
        root = groups.get(one.name)
        loaded = [root] if isinstance(root, Group) else list(tasks.values())
        whole = isinstance(root, Group) and root.has_aggregation
        return Asked(one, loaded, [one.name] if whole else list(tasks), sum(len(task.eval_docs) for task in tasks.values()))


def _is_local(options: Mapping[str, Any]) -> bool:
    """Does a task read files of this machine?"""
    path = options.get("dataset_path")
    return (
        isinstance(path, str)
        and (path in LOCAL_DATA or Path(path).exists())
        and "://" not in json.dumps(options.get("dataset_kwargs"), default=str)
    )


def _near(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def why_unreachable() -> str | None:
    """Why the Hub cannot be reached, after a few seconds at most; None: it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:  # of whatever library it asks with
        return foreign(f"{type(error).__name__}: {error}".removesuffix(": "), 120)
    return None


@contextmanager
def unasked_hub() -> Iterator[None]:
    """What is read from the Hub is read from its cache, at once: retries would take minutes."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


# -- what lm-eval does beside computing


@contextmanager
def quiet() -> Iterator[None]:
    """Without its bars and its log, which would run through npd's own display, without processes of its own, and without
    what it finds out about the machine, which takes seconds each time."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api import task
    from tqdm import tqdm

    log, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, before = log.level, os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    theirs = task.tqdm, evaluator.add_env_info, evaluator.get_git_commit_hash
    task.tqdm = functools.partial(tqdm, disable=True)
    evaluator.add_env_info, evaluator.get_git_commit_hash = (lambda results: None), lambda: None
    try:
        yield
    finally:
        task.tqdm, evaluator.add_env_info, evaluator.get_git_commit_hash = theirs
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def allowed_code(allowed: bool) -> Iterator[None]:
    """What Hugging Face's scorer of code asks for, where it is allowed."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ["HF_ALLOW_CODE_EVAL"]


@contextmanager
def as_it_was(weights: Any) -> Iterator[None]:
    """Random numbers and a model that was lent are afterwards as before: lm-eval seeds all there are, and trains nothing."""
    model = weights if isinstance(weights, torch.nn.Module) else None
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    training = model is not None and model.training
    deterministic = torch.backends.cudnn.deterministic
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.backends.cudnn.deterministic = deterministic
            if model is not None:
                model.train(training)


def _silent(lm: Any) -> Any:
    """A model of lm-eval without bars."""
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        asked: Callable[..., Any] = getattr(lm, name)
        setattr(lm, name, functools.partial(asked, disable_tqdm=True))
    return lm
