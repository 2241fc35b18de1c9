"""Rollouts with models of transformers: by continuous batching where that is proved to hold, else by its generate()."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList

from npd.config import Sampling
from npd.errors import UserError
from npd.models import Continuing, continuing, prompt_batches, writing_note
from npd.rollout import Engine, EngineSetting, Progress, Request, Weights
from npd.rollout.continuous import write_continuously
from npd.store.schema import add_answers


class TransformersEngine(Engine):
    """Answers one request after another: what is computed together, and so every bit, follows from the request alone."""

    exact = True

    def __init__(self, setting: EngineSetting) -> None:
        super().__init__(setting)
        self.model: Any = None
        self._told: set[str] = set()

    def take(self, weights: Weights) -> None:
        self.model = weights.model()

    def stream(
        self, requests: Iterable[Request], sampling: Sampling, progress: Progress | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """As `Engine.stream`."""
        for number, table, seed in requests:
            with self._as_policy(sampling):
                way = self._continuing(table, sampling)
                if way is None:
                    answered = self._answer_in_batches(number, table, sampling, seed, progress)
                else:
                    answered = self._answer_continuously(way, number, table, sampling, seed, progress)
            yield number, answered

    def _continuing(self, table: pa.Table, sampling: Sampling) -> Continuing | None:
        """How a request is answered by continuous batching; None: by generate().

        Raises:
            UserError: rollout.batching asks for what cannot be had.
        """
        batching = self.setting.config.rollout.batching
        if batching == "static" or not len(table):
            return None
        way = continuing(self.model)
        why_not = way.why_not
        if way.longest is not None and why_not is None:
            longest = max(map(len, table["prompt_ids"].to_pylist())) + sampling.max_new_tokens
            if longest > way.longest:
                why_not = f"with its window of {way.longest} tokens it was not proved for sequences of {longest}"
        if why_not is None:
            return way
        if batching == "continuous":
            raise UserError(
                f"rollout.batching is continuous, but {self.setting.model.model} cannot write like that: {why_not}. "
                "Set rollout.batching to auto."
            )
        self._tell(f"Responses of {self.setting.model.model} are written by generate(): {why_not}.")
        return None

    def _tell(self, what: str) -> None:
        """Say it once."""
        if what not in self._told:
            self._told.add(what)
            self.setting.say(what)

    def _answer_continuously(
        self, way: Continuing, number: int, table: pa.Table, sampling: Sampling, seed: int, progress: Progress | None
    ) -> pa.Table:
        responses, logprobs = write_continuously(
            self.model,
            way.windows,
            table["prompt_ids"].to_pylist(),
            sampling,
            seed,
            self.setting.vocabulary,
            self.setting.config.rollout.batch_size,
            None if progress is None else lambda finished: progress(number, finished),
        )
        return add_answers(table, responses, self.setting.vocabulary.stop_ids, logprobs)

    def _answer_in_batches(
        self, number: int, table: pa.Table, sampling: Sampling, seed: int, progress: Progress | None
    ) -> pa.Table:
        """Prompts of similar length in one batch, which ends with its longest response."""
        rows = [i for i in range(len(table)) for _ in range(sampling.samples_per_prompt)]
        prompts: list[list[int]] = table["prompt_ids"].to_pylist()
        lengths = [len(prompts[i]) for i in rows]
        responses: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        if slower := writing_note(self.model):
            self._tell(f"generate() writes with {self.setting.model.model} {slower}: that is what was proved to hold.")
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        batch_size, done = self.setting.config.rollout.batch_size, 0
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for batch, cache in prompt_batches(self.model, lengths, sampling.max_new_tokens, batch_size):
                answered = self._generate([prompts[rows[j]] for j in batch], cache)
                for j, (ids, values) in zip(batch, answered, strict=True):
                    responses[j], logprobs[j] = ids, values
                done += len(batch)
                if progress:
                    progress(number, done)
        return add_answers(table, responses, self.setting.vocabulary.stop_ids, logprobs)

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        sampled = sampling.temperature > 0
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampled,
            temperature=sampling.temperature if sampled else 1.0,
            top_p=sampling.top_p if sampled else 1.0,
            top_k=0 if sampled else 50,
            eos_token_id=list(self.setting.vocabulary.stop_ids),
            pad_token_id=self.setting.pad_id,
            bos_token_id=self.setting.vocabulary.start_id,
        )

    def rest(self) -> None:
        self.model = None

    @contextmanager
    def _as_policy(self, sampling: Sampling) -> Iterator[None]:
        # generate() fills whatever a call leaves open from the model's generation_config, which often carries a top-k or a
        # repetition penalty; the behaviour policy must be the model itself.
        model = self.model
        theirs, model.generation_config = model.generation_config, self._generation_config(sampling)
        training = model.training
        model.eval()
        try:
            yield
        finally:
            model.generation_config = theirs
            model.train(training)

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], cache: bool) -> list[tuple[list[int], list[float]]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.setting.pad_id] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        recorder = _BehaviorLogprobs(self.setting.vocabulary.size)
        out: Any = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **({} if cache else {"use_cache": False}),
            logits_processor=LogitsProcessorList([recorder]),
            stopping_criteria=StoppingCriteriaList([recorder.criterion]),
        )
        tokens = out[:, width:].tolist()
        values = torch.stack(recorder.logprobs, dim=1).tolist()
        stops = set(self.setting.vocabulary.stop_ids)
        answered = []
        for row, row_values in zip(tokens, values, strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            answered.append((row[:end], row_values[:end]))
        return answered


class _BehaviorLogprobs(LogitsProcessor):
    """Keeps log p(y_t) of each sampled token under the model's own distribution, that is at temperature 1.

    generate() can return all logits, but [batch, steps, vocabulary] of them; here one step's worth is alive at a time.
    transformers applies processors passed by the caller before temperature and top-p, so what arrives is raw.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.logprobs: list[Tensor] = []
        self.criterion = _Record(self)
        self._pending: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._pending = scores.float()
        if scores.shape[-1] > self.vocabulary:  # rows that only pad the student's vocabulary: the teacher has no such token
            scores = scores.clone()
            scores[:, self.vocabulary :] = -torch.inf
        return scores

    def record(self, sampled: Tensor) -> None:
        assert self._pending is not None
        chosen = self._pending.gather(1, sampled[:, None])[:, 0]
        self.logprobs.append(chosen - self._pending.logsumexp(-1))


class _Record(StoppingCriteria):
    """Called right after each token is chosen; never stops anything."""

    def __init__(self, recorder: _BehaviorLogprobs) -> None:
        self.recorder = recorder

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.recorder.record(input_ids[:, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
