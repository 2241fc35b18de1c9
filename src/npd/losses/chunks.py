"""From one chunk of logits to its terms of the loss and its gradient: in place on a CPU, in two sweeps elsewhere.

Dimensions as in `linear`: C tokens in a chunk, V vocabulary, K the teacher's top-k, S = K + 1 with the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from npd.losses.divergences import Divergence

if TYPE_CHECKING:
    from npd.models import AfterHead

Chunk = tuple[Tensor, Tensor, Tensor | None]
"""Labels' log-probabilities [C, 1], contributions of the top-k and the rest [C, S], gradient by the head's output [C, V]."""


@dataclass(frozen=True)
class Terms:
    """What the loss is made of."""

    kd_weight: float
    divergence: Divergence
    after_head: AfterHead | None
    """What makes logits of the head's output; None where they are the logits."""
    scale: float
    """What gradients are multiplied by."""
    compiled: bool
    rest_counts: bool = False
    """Does the loss hang on what the student gives what is outside the top-k?"""


def in_place(
    z_CV: Tensor, labels_C: Tensor, ids_CK: Tensor, teacher_CS: Tensor, terms: Terms, dtype: torch.dtype | None
) -> Chunk:
    """A chunk's terms, and its gradient in the logits' type, in the place of the logits; `dtype` None: no gradient."""
    K, kd_weight, scale = ids_CK.shape[1], terms.kd_weight, terms.scale
    slope_CV = terms.after_head.slope(z_CV) if terms.after_head is not None and dtype is not None else 1.0
    z_label_C, z_top_CK = z_CV.gather(1, labels_C), z_CV.gather(1, ids_CK)
    absent_CK = _absent(teacher_CS)
    # In one sweep over the logits: softmax(z) = u / s with u = exp(z - max), which takes the place of z. Where the rest
    # counts it is softmax(z outside the top-k), with a maximum of its own: as a ratio of probabilities it would be 0 / 0
    # where the student gives the rest less than float32 can hold.
    if terms.rest_counts:
        z_CV.scatter_(1, ids_CK, z_top_CK.where(absent_CK, -torch.inf))
    max_C = z_CV.amax(-1, keepdim=True)
    u_CV = z_CV.sub_(max_C).exp_()
    s_C = u_CV.sum(-1, keepdim=True)
    lse_C = max_C + s_C.log()
    logp_rest_C = torch.full_like(s_C, torch.finfo(s_C.dtype).min)
    if terms.rest_counts:
        lse_rest_C = lse_C
        lse_C = torch.logaddexp(lse_rest_C, z_top_CK.masked_fill(absent_CK, -torch.inf).logsumexp(-1, keepdim=True))
        logp_rest_C = lse_rest_C - lse_C
    label_logprob_C, top_logprob_CK = z_label_C - lse_C, z_top_CK - lse_C
    student_CS = torch.cat((top_logprob_CK, logp_rest_C), -1)
    value_CS, q_CS = _compared(terms, teacher_CS, absent_CK, student_CS, dtype)
    if q_CS is None:
        return label_logprob_C, value_CS, None
    # d loss / d z = mass * softmax(z) - q, where the rest's q is spread like softmax(z outside the top-k).
    q_CK, q_rest_C = q_CS[:, :K].contiguous(), q_CS[:, K:]
    mass_C, top_CK = _mass(q_CK, q_rest_C, terms) * scale, -kd_weight * scale * q_CK
    if terms.rest_counts:
        top_CK += (mass_C * top_logprob_CK.exp()).masked_fill(absent_CK, 0)
        mass_C = mass_C * logp_rest_C.exp() - kd_weight * scale * q_rest_C
    g_CV = u_CV.mul_(mass_C / s_C)
    g_CV.scatter_add_(1, ids_CK, top_CK)
    g_CV.scatter_add_(1, labels_C, torch.full_like(label_logprob_C, (kd_weight - 1) * scale))
    if terms.after_head is not None:
        g_CV.mul_(slope_CV)
    return label_logprob_C, value_CS, g_CV


def in_two_sweeps(
    z_CV: Tensor, labels_C: Tensor, ids_CK: Tensor, teacher_CS: Tensor, terms: Terms, dtype: torch.dtype | None
) -> Chunk:
    """As `in_place`, the gradient in `dtype`: one sweep for log Σ exp(z), one that writes the gradient.

    The few entries that are more than a multiple of a softmax are computed by themselves, unrounded, and assigned.
    """
    K, kd_weight, scale = ids_CK.shape[1], terms.kd_weight, terms.scale
    log_sum_exp, spread = _sweeps(compiled=terms.compiled)
    z_label_C, z_top_CK = z_CV.gather(1, labels_C), z_CV.gather(1, ids_CK)
    absent_CK = _absent(teacher_CS)
    lse_rest_C: Tensor | None = None
    rest_C: Tensor | None = None
    if terms.rest_counts:
        lse_rest_C = log_sum_exp(z_CV.scatter_(1, ids_CK, z_top_CK.where(absent_CK, -torch.inf)))
        lse_C = torch.logaddexp(lse_rest_C, z_top_CK.masked_fill(absent_CK, -torch.inf).logsumexp(-1, keepdim=True))
        logp_rest_C = lse_rest_C - lse_C
    else:
        lse_C = log_sum_exp(z_CV)
        logp_rest_C = torch.full_like(lse_C, torch.finfo(lse_C.dtype).min)
    label_logprob_C, top_logprob_CK = z_label_C - lse_C, z_top_CK - lse_C
    student_CS = torch.cat((top_logprob_CK, logp_rest_C), -1)
    value_CS, q_CS = _compared(terms, teacher_CS, absent_CK, student_CS, dtype)
    if q_CS is None:
        return label_logprob_C, value_CS, None
    q_CK, q_rest_C = q_CS[:, :K].contiguous(), q_CS[:, K:]
    mass_C = _mass(q_CK, q_rest_C, terms) * scale
    if terms.rest_counts:
        rest_C = kd_weight * scale * q_rest_C
    after = terms.after_head
    g_CV = spread(z_CV, lse_C, mass_C, lse_rest_C, rest_C, after, dtype)

    top_CK = (
        top_logprob_CK.exp() * mass_C
        - kd_weight * scale * q_CK
        - (1 - kd_weight) * scale * (ids_CK == labels_C).to(lse_C.dtype)
    )
    label_C = label_logprob_C.exp() * mass_C - (1 - kd_weight) * scale
    if lse_rest_C is not None and rest_C is not None:
        label_C = label_C - (z_label_C - lse_rest_C).exp() * rest_C
        top_CK = top_CK - ((z_top_CK - lse_rest_C).exp() * rest_C).where(absent_CK, 0)
    if after is not None:
        top_CK, label_C = top_CK * after.slope(z_top_CK), label_C * after.slope(z_label_C)
    # A label among the top-k is assigned as one of them.
    return label_logprob_C, value_CS, g_CV.scatter_(1, labels_C, label_C.to(dtype)).scatter_(1, ids_CK, top_CK.to(dtype))


def _absent(teacher_CS: Tensor) -> Tensor:
    """[C, K]: is an entry of the top-k not there? Its token belongs to the rest."""
    return teacher_CS[:, :-1] == -torch.inf


def _compared(
    terms: Terms, teacher_CS: Tensor, absent_CK: Tensor, student_CS: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """As `compare`; entries that are not there contribute nothing, nor does the rest where nothing else is there."""
    value_CS, q_CS = compare(terms.divergence, teacher_CS, student_CS, dtype is not None)
    nothing_CS = torch.cat((absent_CK, absent_CK.all(-1, keepdim=True)), -1)
    return value_CS.masked_fill(nothing_CS, 0), None if q_CS is None else q_CS.masked_fill(nothing_CS, 0)


def _mass(q_CK: Tensor, q_rest_C: Tensor, terms: Terms) -> Tensor:
    mass_C = (1 - terms.kd_weight) + terms.kd_weight * q_CK.sum(-1, keepdim=True)
    return mass_C + terms.kd_weight * q_rest_C if terms.rest_counts else mass_C


def _log_sum_exp(z_CV: Tensor) -> Tensor:
    return z_CV.logsumexp(-1, keepdim=True)


def _spread(
    z_CV: Tensor,
    lse_C: Tensor,
    mass_C: Tensor,
    lse_rest_C: Tensor | None,
    rest_C: Tensor | None,
    after: AfterHead | None,
    dtype: torch.dtype,
) -> Tensor:
    """mass * softmax(z) - rest * softmax(z outside the top-k), times the slope of what comes after the head."""
    g_CV = (z_CV - lse_C).exp_().mul_(mass_C)
    if lse_rest_C is not None and rest_C is not None:
        g_CV.sub_((z_CV - lse_rest_C).exp_().mul_(rest_C))
    if after is not None:
        g_CV.mul_(after.slope(z_CV))
    return g_CV.to(dtype)


@cache
def _sweeps(*, compiled: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return (torch.compile(_log_sum_exp), torch.compile(_spread)) if compiled else (_log_sum_exp, _spread)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in a wider type, without rounding in between where the device can do so."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a total in a type that may be wider; without a second tensor of its size, where that can be had."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def compare(
    divergence: Divergence, teacher_CS: Tensor, student_CS: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """The contributions [C, K+1], and how strongly each draws the student: minus the derivative by its log-probability."""
    if teacher_CS.shape[1] == 1:  # no top-k, nothing to compare
        return torch.zeros_like(student_CS), torch.zeros_like(student_CS) if differentiate else None
    with torch.set_grad_enabled(differentiate):
        value_CS = divergence(teacher_CS, student_CS.requires_grad_(differentiate))
        if value_CS.shape != teacher_CS.shape:
            raise ValueError(
                f"a divergence gives what each entry contributes, here {tuple(teacher_CS.shape)}, but this one's result has "
                f"the shape {tuple(value_CS.shape)}"
            )
        if not differentiate:
            return value_CS, None
        (slope_CS,) = torch.autograd.grad(value_CS, student_CS, torch.ones_like(value_CS))
    return value_CS.detach(), -slope_CS
