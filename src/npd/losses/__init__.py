"""What is minimised: the chunked head (`linear`) and the distances from teacher to student (`divergences`)."""

from __future__ import annotations

from torch import Tensor

from npd.losses.divergences import Divergence
from npd.losses.linear import LossOutput, TopKMass, check_divergence, chunk_for, divergence_of, sparse_soft_cross_entropy

__all__ = [
    "Divergence", "LossOutput", "TopKMass", "check_divergence", "chunk_for", "divergence_of", "near_policy_kl",
    "sparse_soft_cross_entropy",
]  # fmt: skip


def near_policy_kl(logprobs: Tensor, behavior_logprobs: Tensor) -> Tensor:
    """Per-token estimate, in nats, of D_KL(π_current || π_gen) from tokens that π_gen sampled.

    With r = π_current(y) / π_gen(y), the mean of r log r - r + 1 is unbiased and never negative. Arguments and result [T].
    It holds for samples drawn at temperature 1 without truncation.
    """
    log_r = logprobs - behavior_logprobs
    r = log_r.exp()
    return r * log_r - r + 1
