"""Distances from teacher to student on what is kept of a teacher: its top-k, and all other tokens as one symbol."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Divergence(Protocol):
    """A kind of `loss.divergence`: a function, or an object that can be called like one.

    If it has an attribute `on_teacher_support` that is true, an entry to which the teacher gives nothing contributes nothing,
    whatever the student's is. The student's mass outside the top-k is then not computed where the teacher has none there.
    """

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        """What each symbol contributes to the divergence, in nats.

        Args:
            teacher: [C, K+1] log-probabilities of C tokens' top-k, as `top_k_mass` has them, and last of the rest: -inf for
                raw and renormalize. -inf elsewhere too where the teacher gives a token of its top-k nothing.
            student: [C, K+1] log-probabilities of the same symbols, always finite. The rest is the type's lowest number
                where there is none (the top-k are the whole vocabulary) or where it is not computed.

        Returns:
            [C, K+1], of the student's type and differentiable in `student`; its sum is the divergence. The gradient with
            respect to the logits follows from the derivatives on this sheet.
        """
        ...


class ForwardKL:
    """D_KL(teacher || student): Σ p_T (log p_T - log p_S)."""

    on_teacher_support = True

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        top = teacher[:, :-1].contiguous().exp()
        # The rest is what the top-k leave of 1: its logarithm and back would round it.
        rest = torch.where(teacher[:, -1:] > -torch.inf, (1 - top.sum(-1, keepdim=True)).clamp(min=0), 0)
        p = torch.cat((top, rest), -1)
        # A teacher probability of 0 contributes 0, not 0 * inf.
        return p * torch.where(p > 0, teacher - student, 0)


forward_kl = ForwardKL()
