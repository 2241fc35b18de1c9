"""Scoring by packed prefill with a model in this process.

Causal shift: the hidden state at position t predicts token t + 1, so a response of R tokens behind P prompt tokens is
predicted by positions P - 1 .. P + R - 2. Nothing predicts the first token of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from npd.losses import chunk_for
from npd.models import Vocabulary, after_head_of, batches_for, head_bias, head_weight, hidden_states
from npd.packing import Packed, pack_tokens


class Reading(NamedTuple):
    """What a model says about one response of T tokens."""

    logprobs: np.ndarray
    """[T] float32, natural log."""
    topk_ids: np.ndarray
    """[T, K] int32, best first; K is 0 if no top-k was asked for."""
    topk_logprobs: np.ndarray
    """[T, K] float32; of a teacher with another tokenizer -inf where there is nothing, and the id then matters to nobody."""


class AlignedReading(Reading):
    """What a teacher with another tokenizer says about a response of T of the student's tokens."""

    kinds: np.ndarray
    """[T] what became of each position (see `npd.scoring.alignment`)."""

    @classmethod
    def of(cls, reading: Reading, kinds: np.ndarray) -> AlignedReading:
        aligned = cls(*reading)
        aligned.kinds = kinds
        return aligned


class Prefill:
    """Reads responses behind their contexts, in rows as the model takes them; the head runs on response positions alone.

    Args:
        autocast: type of the matrix products; None: that of the weights.
        around: context in which the decoder computes, for instance with its adapters off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        pad_id: int,
        batch_tokens: int,
        autocast: torch.dtype | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.autocast, self.around = model, autocast, around
        self.vocabulary = vocabulary
        self.pad_id = pad_id
        self.batch_tokens = batch_tokens

    def batches(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], beside: Sequence[PreTrainedModel] = ()
    ) -> Iterator[Packed]:
        """All samples, longest first, in batches of at most `batch_tokens` tokens, or of one sample.

        `beside`: other models that read the same batches.
        """
        sizes = [len(c) + len(r) for c, r in zip(contexts, responses, strict=True)]
        for rows, length in batches_for([self.model, *beside], sizes, self.batch_tokens):
            yield pack_tokens(contexts, responses, rows, length, self.pad_id)

    @property
    def chunk_tokens(self) -> int:
        """Positions whose logits exist at once."""
        return chunk_for(len(head_weight(self.model)), on_cpu=self.model.device.type == "cpu")

    @torch.no_grad()
    def hidden(self, packed: Packed) -> Tensor:
        """[T, D] hidden states that predict the packed responses."""
        device = self.model.device
        with self.around(), torch.autocast(device.type, self.autocast) if self.autocast is not None else nullcontext():
            hidden_RLD = hidden_states(
                self.model,
                packed.input_ids.to(device),
                packed.position_ids.to(device),
                cu_seq_lens=packed.cu_seq_lens.to(device),
                lengths=packed.lengths,
            )
        hidden_TD = hidden_RLD.flatten(0, 1)[packed.predictors.to(device)]
        return hidden_TD if self.autocast is None else hidden_TD.to(self.autocast)

    @torch.no_grad()
    def logits(self, hidden_TD: Tensor, chunk: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Float32 logits [C, V] of a chunk of positions at a time."""
        weight_VD, bias_V, after_head = head_weight(self.model), head_bias(self.model), after_head_of(self.model)
        if self.autocast is not None:
            weight_VD = weight_VD.to(self.autocast)
        chunk = chunk or self.chunk_tokens
        for start in range(0, len(hidden_TD), chunk):
            rows = slice(start, min(start + chunk, len(hidden_TD)))
            x_CV = (hidden_TD[rows] @ weight_VD.T).float()
            yield rows, after_head(x_CV if bias_V is None else x_CV.add_(bias_V))

    @torch.no_grad()
    def __call__(
        self,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        top_k: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[Reading]:
        """Log-probabilities of every response token, and the model's top-k at its position.

        Probabilities are over the model's whole vocabulary; top-k ids are those that both models have.
        """
        readings: list[Reading | None] = [None] * len(responses)
        for packed in self.batches(contexts, responses):
            hidden_TD = self.hidden(packed)
            labels_T = packed.labels.to(hidden_TD.device)
            T = len(labels_T)
            logprobs = np.empty(T, np.float32)
            ids, values = np.empty((T, top_k), np.int32), np.empty((T, top_k), np.float32)
            for rows, z_CV in self.logits(hidden_TD):
                lse_C = z_CV.logsumexp(-1)
                logprobs[rows] = (z_CV.gather(1, labels_T[rows, None])[:, 0] - lse_C).cpu().numpy()
                if top_k:
                    best = z_CV[:, : self.vocabulary.size].topk(top_k, dim=-1)
                    ids[rows] = best.indices.int().cpu().numpy()
                    values[rows] = (best.values - lse_C[:, None]).cpu().numpy()
            at = 0
            for sample in packed.samples:
                end = at + len(responses[sample])
                readings[sample] = Reading(logprobs[at:end], ids[at:end], values[at:end])
                at = end
            if progress:
                progress(T)
        return readings  # type: ignore[return-value]
