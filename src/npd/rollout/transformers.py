"""Rollouts with transformers' own generate()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList

from npd.models import Vocabulary
from npd.rollout.answers import add_answers


class TransformersRollout:
    """Stage: answers each prompt, adding response_ids, behavior_logprobs and finish_reason.

    Prompts of similar length share a batch. Rows keep their order, and row i's responses follow each other when there are
    several samples per prompt. The result depends on the table, the options and the seed alone. `progress` is called with
    the number of responses that each batch has finished.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        pad_id: int,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        batch_size: int,
        samples_per_prompt: int = 1,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.samples_per_prompt = samples_per_prompt
        sampled = temperature > 0
        self.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sampled,
            temperature=temperature if sampled else 1.0,
            top_p=top_p if sampled else 1.0,
            top_k=0 if sampled else 50,
            eos_token_id=list(vocabulary.stop_ids),
            pad_token_id=pad_id,
            bos_token_id=vocabulary.start_id,
        )

    def __call__(self, table: pa.Table, seed: int = 0, progress: Callable[[int], None] | None = None) -> pa.Table:
        rows = [i for i in range(len(table)) for _ in range(self.samples_per_prompt)]
        prompts: list[list[int]] = table["prompt_ids"].to_pylist()
        order = sorted(range(len(rows)), key=lambda j: -len(prompts[rows[j]]))
        responses: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._own_generation_config():
            torch.manual_seed(seed)
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                answered = self._generate([prompts[rows[j]] for j in batch])
                for j, (ids, values) in zip(batch, answered, strict=True):
                    responses[j], logprobs[j] = ids, values
                if progress:
                    progress(len(batch))
        return add_answers(table, responses, self.vocabulary.stop_ids, logprobs)

    @contextmanager
    def _own_generation_config(self) -> Iterator[None]:
        # generate() fills whatever a call leaves open from the model's generation_config, which often carries a top-k or a
        # repetition penalty; the behaviour policy must be the model itself.
        theirs, self.model.generation_config = self.model.generation_config, self.generation_config
        try:
            yield
        finally:
            self.model.generation_config = theirs

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        recorder = _BehaviorLogprobs(self.vocabulary.size)
        out: Any = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([recorder]),
            stopping_criteria=StoppingCriteriaList([recorder.criterion]),
        )
        tokens = out[:, width:].tolist()
        values = torch.stack(recorder.logprobs, dim=1).tolist()
        stops = set(self.vocabulary.stop_ids)
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
