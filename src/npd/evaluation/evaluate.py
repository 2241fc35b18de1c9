"""What a student can do, and how far it is from its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from npd.config import Config, TaskConfig
from npd.errors import UserError
from npd.evaluation.verify import extract_answer, is_correct, pass_at_k, wilson_interval
from npd.losses import sparse_soft_cross_entropy
from npd.models import Vocabulary, head_weight
from npd.observe.display import Display
from npd.prompts import Chat, Prompts, accepted_answers
from npd.rollout import TransformersRollout
from npd.schedule import derive_seed
from npd.scoring import Prefill, Reader

DEFAULT_SIZE = 128

Lists = list[list[int]]


@dataclass(frozen=True)
class Task:
    """Problems, and who says whether a response solves one."""

    name: str
    prompts: pa.Table
    """Column prompt_ids."""
    score: Callable[[int, str], float]
    """(problem index, response text) -> 0..1"""


def load_task(
    config: TaskConfig, tokenizer: PreTrainedTokenizerBase, held_out: Prompts | None, chat: Chat | None = None
) -> Task:
    """A reasoning-gym task by name, or the `answer` column of data.eval.

    Raises:
        UserError: no such task, wrong options, or no answers.
    """
    if config.name == "answer":
        if held_out is None:
            raise UserError("evaluation.tasks has `answer`, which compares with data.eval's answer column; set data.eval.")
        prompts = held_out.table.slice(0, config.size)
        answers = prompts["answer"].to_pylist()
        if None in answers:
            raise UserError(f"evaluation.tasks has `answer`, but row {answers.index(None) + 1} of data.eval has none.")
        return Task("answer", prompts, lambda i, text: float(any(is_correct(text, a) for a in accepted_answers(answers[i]))))

    import reasoning_gym

    size = config.size or DEFAULT_SIZE
    try:
        dataset = reasoning_gym.create_dataset(config.name, size=size, seed=config.seed, **config.options)
        entries: list[Any] = [dataset[i] for i in range(size)]
    except Exception as error:  # unknown names and options raise whatever the task's own checks do
        raise UserError(
            f"evaluation.tasks: {config.name!r} with options {config.options} is no task: {error}. Give a reasoning-gym task "
            "or `answer`."
        ) from error
    chat = chat or Chat(tokenizer)
    questions = [chat.question(entry["question"]) for entry in entries]

    def score(i: int, text: str) -> float:
        whole = "\n" in str(entries[i]["answer"]) and "<answer>" not in text
        said = text.strip() if whole else extract_answer(text).rstrip(".")
        try:
            # Part marks, which some verifiers give for a format, are no solution.
            return float(dataset.score_answer(said, entries[i]) >= 1.0)
        except Exception:  # verifiers parse, and a model may write anything
            return 0.0

    return Task(config.name, pa.table({"prompt_ids": pa.array(questions, pa.list_(pa.int32()))}), score)


class Evaluator:
    """Runs every task and the held-out comparison on a model.

    Args:
        reader: gives what reads with a teacher, by its key in `Config.all_teachers`, when it is needed.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        held_out: Prompts | None,
        tasks: list[Task],
        reader: Callable[[str | None], Reader],
        display: Display,
    ) -> None:
        self.config, self.tokenizer, self.vocabulary, self.display = config, tokenizer, vocabulary, display
        self.held_out, self.tasks, self.reader = held_out, tasks, reader

    def __bool__(self) -> bool:
        return bool(self.tasks) or self._measures_kl

    @property
    def _measures_kl(self) -> bool:
        return self.held_out is not None and self.config.has_teacher and self.config.evaluation.kl_prompts > 0

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Figures by metric name: eval/TASK/accuracy with its interval, eval/TASK/pass@k, eval/kl_to_teacher, ..."""
        was_training = model.training
        model.eval()
        figures: dict[str, float] = {}
        for task in self.tasks:
            figures |= self._task(model, task)
        if self._measures_kl:
            figures |= self._distance(model)
        model.train(was_training)
        return figures

    def of_teacher(self) -> dict[str, float]:
        """The teacher's figures on every task, as teacher/TASK/accuracy, ...: the ceiling that the student aims at."""
        reader = self.reader(None)
        assert isinstance(reader, Prefill), "evaluation.teacher goes only with a teacher that is loaded here"
        figures = {name: value for task in self.tasks for name, value in self._task(reader.model, task).items()}
        return {f"teacher/{name.removeprefix('eval/')}": value for name, value in figures.items()}

    def _rollout(self, model: PreTrainedModel, temperature: float, samples: int) -> TransformersRollout:
        return TransformersRollout(
            model,
            self.vocabulary,
            self.tokenizer.pad_token_id,
            max_new_tokens=self.config.evaluation.max_new_tokens or self.config.rollout.max_new_tokens,
            temperature=temperature,
            batch_size=self.config.rollout.batch_size,
            samples_per_prompt=samples,
        )

    def _task(self, model: PreTrainedModel, task: Task) -> dict[str, float]:
        options = self.config.evaluation
        rollout = self._rollout(model, options.temperature, options.samples)
        with self.display.task(f"evaluate {task.name}", len(task.prompts) * options.samples, "responses") as advance:
            answered = rollout(task.prompts, derive_seed(self.config.seed, "task", task.name), advance)
        texts = self.tokenizer.batch_decode(answered["response_ids"].to_pylist(), skip_special_tokens=True)
        scores = [task.score(i // options.samples, text) for i, text in enumerate(texts)]
        correct = np.asarray(scores).reshape(-1, options.samples).sum(axis=1)
        accuracy = float(correct.mean() / options.samples)
        low, high = wilson_interval(accuracy, len(correct))
        name = f"eval/{task.name}"
        figures = {f"{name}/accuracy": accuracy, f"{name}/accuracy_low": low, f"{name}/accuracy_high": high}
        k = 2
        while k <= options.samples:
            figures[f"{name}/pass@{k}"] = float(np.mean([pass_at_k(options.samples, int(c), k) for c in correct]))
            k *= 2
        return figures

    def _distance(self, model: PreTrainedModel) -> dict[str, float]:
        """KL(teacher || student), in nats per token, and how often both rank the same token first.

        Measured on the student's own samples at temperature 1, over the token ids that both models have. A served teacher
        gives its top-k alone: what is measured then is a lower bound of the KL, and called so.
        """
        assert self.held_out is not None
        prompts = self.held_out.table.slice(0, self.config.evaluation.kl_prompts)
        with self.display.task("evaluate distance to the teacher", len(prompts), "responses") as advance:
            seed = derive_seed(self.config.seed, "held-out")
            answered = self._rollout(model, temperature=1.0, samples=1)(prompts, seed, advance)
        contexts, responses = answered["prompt_ids"].to_pylist(), answered["response_ids"].to_pylist()
        keys = [self.config.teacher_of(source) for source in answered["source"].to_pylist()]
        student = Prefill(model, self.vocabulary, self.tokenizer.pad_token_id, self.config.scoring.batch_tokens)
        kl, agreed, tokens, exact = 0.0, 0, 0, True
        for key in dict.fromkeys(keys):
            mine = [i for i, k in enumerate(keys) if k == key]
            reader = self.reader(key)
            measure = self._exact if isinstance(reader, Prefill) else self._at_least
            exact = exact and isinstance(reader, Prefill)
            for a, b, c in measure(student, reader, [contexts[i] for i in mine], [responses[i] for i in mine]):
                kl, agreed, tokens = kl + a, agreed + b, tokens + c
        name = "eval/kl_to_teacher" if exact else "eval/kl_to_teacher_at_least"
        return {name: kl / tokens, "eval/top1_agreement": agreed / tokens, "eval/kl_tokens": tokens}

    @torch.no_grad()
    def _exact(self, student: Prefill, teacher: Any, contexts: Lists, responses: Lists) -> Iterator[tuple[float, int, int]]:
        """KL, agreements and tokens, chunk by chunk."""
        # Chunks follow from the vocabulary, which the two may pad differently; here they must agree.
        size, chunk = self.vocabulary.size, min(student.chunk_tokens, teacher.chunk_tokens)
        for packed in student.batches(contexts, responses):
            ours, theirs = (prefill.logits(prefill.hidden(packed), chunk) for prefill in (student, teacher))
            for (_, a_CV), (_, b_CV) in zip(ours, theirs, strict=True):
                log_s, log_t = a_CV[:, :size].log_softmax(-1), b_CV[:, :size].log_softmax(-1)
                same = int((log_s.argmax(-1) == log_t.argmax(-1)).sum())
                yield float((log_t.exp() * (log_t - log_s)).sum()), same, len(log_s)

    @torch.no_grad()
    def _at_least(
        self, student: Prefill, teacher: Reader, contexts: Lists, responses: Lists
    ) -> Iterator[tuple[float, int, int]]:
        """As `_exact`, with all that is outside the teacher's top-k as one symbol: joining symbols only lowers a KL."""
        readings = teacher(contexts, responses, self.config.scoring.top_k)
        for packed in student.batches(contexts, responses):
            hidden_TD = student.hidden(packed)
            ids, logprobs = (
                torch.from_numpy(np.concatenate([getattr(readings[i], name) for i in packed.samples])).to(hidden_TD.device)
                for name in ("topk_ids", "topk_logprobs")
            )
            loss = sparse_soft_cross_entropy(
                hidden_TD,
                head_weight(student.model),
                packed.labels.to(hidden_TD.device),
                ids.long(),
                logprobs,
                kd_weight=1.0,
                top_k_mass="tail",
            )
            first = torch.cat([z_CV[:, : self.vocabulary.size].argmax(-1) for _, z_CV in student.logits(hidden_TD)])
            yield float(loss.kd), int((first == ids[:, 0]).sum()), len(ids)
