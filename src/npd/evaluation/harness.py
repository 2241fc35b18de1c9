"""Benchmarks of lm-eval (EleutherAI's harness), on the student's weights, by lm-eval's own models and scoring.

Its figures are eval/harness/TASK/METRIC, with METRIC_stderr as lm-eval computes it and, from that, the ends of a normal 95%
interval. A filter other than "none" is part of the metric's name: exact_match,strict-match.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from npd.config import Config, HarnessConfig, HarnessTaskConfig, TaskConfig
from npd.errors import NpdError, RunError, UserError, foreign
from npd.evaluation import Benchmark, BenchmarkSetting, Figures, Student
from npd.evaluation.harness_tasks import Asked, TaskIndex, allowed_code, quiet

NAME = "harness"
NORMAL = 1.959963984540054  # standard errors to either end of a 95% interval
RESAMPLES = 1000  # for the error of what is no mean, such as an F1 over all problems


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


class Harness(Benchmark):
    """Whatever `evaluation.harness` names. Making it loads tasks and their data."""

    slow = True
    borrows = "evaluation.harness"

    def __init__(self, task: TaskConfig, setting: BenchmarkSetting) -> None:
        super().__init__(task, setting)
        self.options = options = setting.config.evaluation.harness
        self.only_at_end, self.files = options.every == "end", options.backend != "transformers"
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
        figures: Figures = {}
        with (
            student.lend(f"evaluate by lm-eval ({self.options.backend})", len(self.asked), "tasks", files=self.files) as lent,
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
        """lm-eval's model around the weights that were lent.

        Raises:
            RunError: it cannot be made.
        """
        try:
            lm = self._vllm(weights) if self.files else self._hflm(weights)
        except Exception as error:  # whatever its options make of it
            raise RunError(
                f"lm-eval's model for evaluation.harness.backend {self.options.backend} cannot be made "
                f"({type(error).__name__}: {foreign(error, 400)}).",
                "evaluation.harness.options has its options.",
            ) from error
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):  # without bars
            setattr(lm, name, functools.partial(getattr(lm, name), disable_tqdm=True))
        try:
            yield lm
        finally:
            if self.files:
                from vllm.distributed import cleanup_dist_env_and_memory

                lm.model.llm_engine.engine_core.shutdown()
                del lm
                cleanup_dist_env_and_memory()

    def _hflm(self, model: Any) -> Any:
        from lm_eval.models.huggingface import HFLM

        tokenizer = copy.deepcopy(self.setting.chat.tokenizer)  # whose padding token it may set
        return HFLM(model, tokenizer=tokenizer, batch_size=self.options.batch_size, **self.options.options)

    def _vllm(self, path: Path) -> Any:
        from lm_eval.models.vllm_causallms import VLLM

        trust = self.setting.config.student.trust_remote_code
        return VLLM(str(path), batch_size="auto", trust_remote_code=trust, **self.options.options)


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
