"""How far a student is from its teacher on given responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from npd.losses import sparse_soft_cross_entropy
from npd.models import after_head_of, head_bias, head_weight
from npd.scoring.prefill import Prefill, Reading

Lists = Sequence[Sequence[int]]


class Distance(NamedTuple):
    """Sums over some response tokens."""

    kl: float
    """KL(teacher || student), nats, over the token ids that both models have."""
    agreed: int
    """Tokens at whose position both rank the same token first."""
    tokens: int
    reverse: float | None = None
    """KL(student || teacher), nats, alike; None where the teacher gives its top-k alone."""


@torch.no_grad()
def exact(
    student: Prefill, teacher: Prefill, contexts: Lists, responses: Lists, told: Lists | None = None
) -> Iterator[Distance]:
    """The KL itself, both ways, chunk by chunk; `told`: what the teacher reads in place of the contexts."""
    # Chunks follow from the vocabulary, which the two may pad differently; here they must agree.
    size, chunk = student.vocabulary.size, min(student.chunk_tokens, teacher.chunk_tokens)
    for packed in student.batches(contexts, responses, beside=[teacher.model]):
        read = teacher.hidden(packed) if told is None else _hidden(teacher, told, responses, packed.samples)
        ours, theirs = student.logits(student.hidden(packed), chunk), teacher.logits(read, chunk)
        for (_, a_CV), (_, b_CV) in zip(ours, theirs, strict=True):
            log_s, log_t = a_CV[:, :size].log_softmax(-1), b_CV[:, :size].log_softmax(-1)
            same = int((log_s.argmax(-1) == log_t.argmax(-1)).sum())
            difference = log_t - log_s
            forward, reverse = float((log_t.exp() * difference).sum()), -float((log_s.exp() * difference).sum())
            yield Distance(forward, same, len(log_s), reverse)


def _hidden(teacher: Prefill, contexts: Lists, responses: Lists, samples: Sequence[int]) -> torch.Tensor:
    """[T, D] hidden states that predict the responses of samples, in the order of these."""
    found: dict[int, torch.Tensor] = {}
    for packed in teacher.batches([contexts[i] for i in samples], [responses[i] for i in samples]):
        lengths = [len(responses[samples[i]]) for i in packed.samples]
        found |= zip(packed.samples, teacher.hidden(packed).split(lengths), strict=True)
    return torch.cat([found[i] for i in range(len(samples))])


@torch.no_grad()
def at_least(student: Prefill, readings: list[Reading], contexts: Lists, responses: Lists) -> Iterator[Distance]:
    """A lower bound, with all that is outside the teacher's top-k as one symbol: joining symbols only lowers a KL."""
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
            bias=head_bias(student.model),
            after_head=after_head_of(student.model),
        )
        first = torch.cat([z_CV[:, : student.vocabulary.size].argmax(-1) for _, z_CV in student.logits(hidden_TD)])
        yield Distance(float(loss.kd), int((first == ids[:, 0]).sum()), len(ids))
