"""Distances from teacher to student on what is kept of a teacher: its top-k, and all other tokens as one symbol."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
                raw and renormalize. -inf elsewhere too where a token has no entry: what it contributes is not looked at,
                and its mass is with the rest.
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

FLOOR = -40.0
"""Nats: what the reverse KL takes for the log-probability of a symbol to which the teacher gives nothing (raw and renormalize
leave the rest nothing): the true value, infinity, could not be minimised."""


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """D_KL(student || teacher): Σ p_S (log p_S - log p_T), with log p_T at least `FLOOR` (MiniLLM, arXiv:2306.08543)."""
    return student.exp() * (student - teacher.clamp(min=FLOOR))


@dataclass(frozen=True)
class JensenShannon:
    """β D_KL(teacher || m) + (1 - β) D_KL(student || m), m = β p_T + (1 - β) p_S (GKD, arXiv:2306.13649)."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_inside("beta", self.beta)

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        middle = _mixed(teacher, student, self.beta)
        return self.beta * _weighted(teacher, middle) + (1 - self.beta) * student.exp() * (student - middle)


@dataclass(frozen=True)
class SkewedForwardKL:
    """D_KL(teacher || α p_T + (1 - α) p_S) (DistiLLM, arXiv:2402.03898)."""

    on_teacher_support = True
    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_inside("alpha", self.alpha)

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        return _weighted(teacher, _mixed(teacher, student, self.alpha))


@dataclass(frozen=True)
class SkewedReverseKL:
    """D_KL(student || α p_S + (1 - α) p_T) (DistiLLM, arXiv:2402.03898)."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_inside("alpha", self.alpha)

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        return student.exp() * (student - _mixed(teacher, student, 1 - self.alpha))


def total_variation(teacher: Tensor, student: Tensor) -> Tensor:
    """½ Σ |p_T - p_S|."""
    return (teacher.exp() - student.exp()).abs() / 2


def _check_inside(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both left out, but it is {share}")


def _mixed(teacher: Tensor, student: Tensor, share: float) -> Tensor:
    """log(share p_T + (1 - share) p_S)."""
    return torch.logaddexp(teacher + math.log(share), student + math.log1p(-share))


def _weighted(teacher: Tensor, other: Tensor) -> Tensor:
    """p_T (log p_T - other); 0, not 0 * inf, where p_T is 0."""
    given = teacher > -torch.inf
    return torch.where(given, teacher.exp() * (torch.where(given, teacher, 0) - other), 0)
