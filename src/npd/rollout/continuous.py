"""Continuous batching: as a response ends, the next prompt takes its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from npd.config import Sampling
from npd.errors import RunError
from npd.models import Slots, Vocabulary, going_on
from npd.models.slots import PREFILL_TOKENS, Windows
from npd.schedule import derive_seed

REFILL = 1 / 8
"""Share of the slots that are free before prompts are read for them: reading a few costs about as much as one step of all."""
SHRINK = 3 / 4
"""Where nothing waits and no more than this share of the slots is in use, the others are dropped."""


class Sampler:
    """Chooses tokens: response `row` gets what its own random numbers say, whoever else is written beside it."""

    def __init__(self, sampling: Sampling, vocabulary: int, seed: int) -> None:
        self.sampling, self.vocabulary, self.seed = sampling, vocabulary, seed
        self.warpers = LogitsProcessorList()
        if sampling.temperature not in (0.0, 1.0):
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.temperature > 0 and sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def uniforms(self, row: int) -> Tensor:
        """[max_new_tokens] float64 in [0, 1), one for each token that a response may have."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, row))
        return torch.rand(self.sampling.max_new_tokens, generator=generator, dtype=torch.float64)

    def __call__(self, logits_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N], and their log-probabilities [N] at temperature 1 over all of the model's own vocabulary.

        The token is the first whose cumulative probability passes the uniform number.
        """
        scores_NV = logits_NV
        if logits_NV.shape[-1] > self.vocabulary:  # rows that only pad the student's vocabulary: the teacher has none of them
            scores_NV = logits_NV[:, : self.vocabulary]
        if self.sampling.temperature == 0:
            tokens_N = scores_NV.argmax(-1)
        else:
            if self.warpers:
                scores_NV = self.warpers(None, scores_NV)  # type: ignore[arg-type]  # none of them reads ids
            cumulative_NV = scores_NV.softmax(-1).cumsum(-1, dtype=torch.float64)
            # Below the total, whatever it is rounded to: what has no probability at the end is never chosen.
            sought_N = uniform_N * cumulative_NV[:, -1] * (1 - 1e-12)
            tokens_N = torch.searchsorted(cumulative_NV, sought_N[:, None], right=True)[:, 0].clamp_(max=self.vocabulary - 1)
        chosen_N = logits_NV.gather(1, tokens_N[:, None])[:, 0]
        return tokens_N, chosen_N - logits_NV.logsumexp(-1)


@torch.no_grad()
def write_continuously(
    model: Any,
    windows: Windows,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    vocabulary: Vocabulary,
    count: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """`samples_per_prompt` responses to each prompt and their log-probabilities, `count` at a time.

    Args:
        windows: as `continuing` found them.
        progress: is told how many responses are finished, whenever that is another number.

    Raises:
        RunError: the model computes what is not finite.
    """
    with going_on(model):
        return _Writer(model, windows, prompts, sampling, seed, vocabulary, count).write(progress)


class _Writer:
    def __init__(
        self,
        model: Any,
        windows: Windows,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        vocabulary: Vocabulary,
        count: int,
    ) -> None:
        self.prompts, self.sampling = prompts, sampling
        self.prompt_of = [i for i in range(len(prompts)) for _ in range(sampling.samples_per_prompt)]
        self.responses: list[list[int]] = [[] for _ in self.prompt_of]
        self.logprobs: list[list[float]] = [[] for _ in self.prompt_of]
        # The longest prompts first: those that are read together are of like length, and the cache grows early.
        self.waiting = sorted(range(len(self.prompt_of)), key=lambda row: len(prompts[self.prompt_of[row]]))
        self.stops = set(vocabulary.stop_ids)
        self.sampler = Sampler(sampling, vocabulary.size, seed)
        count = min(count, len(self.prompt_of))
        self.slots = Slots(model, count, windows)
        self.holds: list[int | None] = [None] * count
        """The response that each slot is writing."""
        device = self.slots.device
        self.last_S = torch.zeros(count, dtype=torch.long, device=device)
        self.written_S = torch.zeros(count, dtype=torch.long, device=device)
        self.uniform_ST = torch.zeros(count, sampling.max_new_tokens, dtype=torch.float64, device=device)
        self.finished = 0

    def write(self, progress: Callable[[int], None] | None) -> tuple[list[list[int]], list[list[float]]]:
        told = 0
        while self.waiting or self.finished < len(self.responses):
            free = self.holds.count(None)
            if self.waiting and (free >= REFILL * len(self.holds) or free == len(self.holds)):
                self._begin()
            elif self.finished < len(self.responses):
                if not self.waiting and len(self.holds) - free <= SHRINK * len(self.holds):
                    self._shrink()
                self._step()
            if progress and self.finished > told:
                told = self.finished
                progress(told)
        return self.responses, self.logprobs

    def _begin(self) -> None:
        """Read prompts for the free slots, as many as are read at once."""
        rows: list[int] = []
        index: dict[int, int] = {}  # prompts to read: a prompt's samples share what was read
        for _ in range(min(self.holds.count(None), len(self.waiting))):
            prompt = self.prompt_of[self.waiting[-1]]
            longest = len(self.prompts[self.prompt_of[rows[0]]]) if rows else 0
            if prompt not in index and rows and (len(index) + 1) * longest > PREFILL_TOKENS:
                break
            index.setdefault(prompt, len(index))
            rows.append(self.waiting.pop())
        which = [index[self.prompt_of[row]] for row in rows]
        free = [slot for slot, row in enumerate(self.holds) if row is None][: len(rows)]
        hidden = self.slots.read([self.prompts[prompt] for prompt in index])
        self.slots.place(free, which, [len(self.prompts[self.prompt_of[row]]) for row in rows])
        device = self.slots.device
        free_N = torch.tensor(free, device=device)
        for slot, row in zip(free, rows, strict=True):
            self.holds[slot] = row
        self.uniform_ST[free_N] = torch.stack([self.sampler.uniforms(row) for row in rows]).to(device)
        logits = self.slots.logits(hidden)[torch.tensor(which, device=device)]
        tokens, logprobs = self.sampler(logits, self.uniform_ST[free_N, 0])
        self.last_S[free_N], self.written_S[free_N] = tokens, 1
        self._note(free, tokens, logprobs)

    def _step(self) -> None:
        used = [slot for slot, row in enumerate(self.holds) if row is not None]
        longest = max(self._length(slot) for slot in used)
        logits = self.slots.logits(self.slots.step(self.last_S, longest))
        at_S = self.written_S.clamp(max=self.sampling.max_new_tokens - 1)
        self.last_S, logprobs = self.sampler(logits, self.uniform_ST.gather(1, at_S[:, None])[:, 0])
        self.written_S = self.written_S + 1
        self._note(range(len(self.holds)), self.last_S, logprobs)

    def _length(self, slot: int) -> int:
        row = self.holds[slot]
        assert row is not None
        return len(self.prompts[self.prompt_of[row]]) + len(self.responses[row])

    def _note(self, slots: Sequence[int], tokens: Tensor, logprobs: Tensor) -> None:
        """Keep what was chosen, and free the slots whose responses have ended."""
        chosen, values = torch.stack([tokens.double(), logprobs.double()]).tolist()  # one synchronisation
        for slot, token, value in zip(slots, chosen, values, strict=True):
            row = self.holds[slot]
            if row is None:
                continue
            if not math.isfinite(value):
                raise RunError(
                    f"The model gave a token that it wrote the log-probability {value}: its weights, or what it computes "
                    "with them in their type, are not finite. Nothing that was finished is lost."
                )
            self.responses[row].append(int(token))
            self.logprobs[row].append(value)
            if int(token) in self.stops or len(self.responses[row]) >= self.sampling.max_new_tokens:
                self.holds[slot] = None
                self.finished += 1

    def _shrink(self) -> None:
        used = [slot for slot, row in enumerate(self.holds) if row is not None]
        index = torch.tensor(used, device=self.slots.device)
        self.slots.keep(used)
        self.holds = [self.holds[slot] for slot in used]
        self.last_S, self.written_S, self.uniform_ST = self.last_S[index], self.written_S[index], self.uniform_ST[index]
