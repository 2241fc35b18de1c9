"""Sparse soft-target linear cross-entropy: NPD's training step, and SFT's at kd_weight 0.

Dimensions: T response tokens, D hidden size, V vocabulary, K the teacher's top-k, C tokens in a chunk.

The divergence is a function of the student's log-probabilities on a sheet of K+1 symbols, the top-k and the rest as one. With
f its derivatives there, which autograd gives, its gradient with respect to the logits is
    f_j [j in top-k] + f_rest softmax(z outside the top-k)_j - (Σ f) softmax(z)_j.
For the forward KL, f = -p_T: with q = (1 - λ) onehot(y) + λ p_T restricted to the top-k, the loss is -Σ_c q_c log p_S(c) +
const, and its gradient (Σ q) softmax(z) - q. Where a model changes its logits after the head, that times the slope of the
change is the gradient with respect to the head's output. Nothing of size T x V is kept: logits live a chunk at a time, and
the gradients of hidden states and weight are produced in that same pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from npd.errors import UserError
from npd.losses.divergences import Divergence
from npd.registry import DIVERGENCES

if TYPE_CHECKING:
    from npd.models import AfterHead

TopKMass = Literal["raw", "renormalize", "tail"]

# Elements of one chunk of logits: 256 MiB in float32. Each chunk also reads and writes the head's whole gradient, which
# small chunks at a large V would do too often.
CHUNK_ELEMENTS = 1 << 26


class LossOutput(NamedTuple):
    """Sums over T in nats. Only `loss` carries a gradient."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    label_logprobs: Tensor


def sparse_soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    kd_weight: float,
    top_k_mass: TopKMass = "raw",
    divergence: str | Divergence = DIVERGENCES.default,
    bias: Tensor | None = None,
    after_head: AfterHead | None = None,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """(1 - λ) CE(y) + λ divergence(teacher's top-k, student), summed over response tokens.

    Args:
        hidden: [T, D] hidden states that predict the labels.
        weight: [V, D] language-model head.
        labels: [T] response tokens.
        topk_ids: [T, K] teacher's top-k token ids, all different within a row; K may be 0 if kd_weight is 0.
        topk_logprobs: [T, K] teacher's log-probabilities, natural log.
        kd_weight: λ in 0..1.
        top_k_mass: raw (the paper's formula), renormalize (top-k scaled to sum to one), or tail (the teacher's left-over
            mass against the student's, as one extra symbol).
        divergence: a name of `npd.registry.DIVERGENCES`, or a divergence itself.
        bias: [V] of the head.
        after_head: what makes logits of the head's output (soft-capping, a scale); None: they are the logits.
        chunk_tokens: tokens whose logits exist at once; chosen from V by default.

    Returns:
        loss, ce and kd (the divergence) as scalars and label_logprobs [T], in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes or options that do not fit together.
        UserError: there is no divergence of this name.
    """
    T = len(hidden)
    matrices = all(x.ndim == 2 for x in (hidden, weight, topk_ids))
    if (
        not matrices
        or weight.shape[1] != hidden.shape[1]
        or labels.shape != (T,)
        or topk_ids.shape != topk_logprobs.shape
        or len(topk_ids) != T
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels "
            f"{tuple(labels.shape)}, topk_ids {tuple(topk_ids.shape)}, topk_logprobs {tuple(topk_logprobs.shape)}"
        )
    if not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight must lie in 0..1, but it is {kd_weight}")
    if top_k_mass not in ("raw", "renormalize", "tail"):
        raise ValueError(f"top_k_mass must be raw, renormalize or tail, but it is {top_k_mass!r}")
    if kd_weight > 0 and topk_ids.shape[1] == 0:
        raise ValueError("kd_weight is above 0 but there are no teacher log-probabilities to distil from")
    if chunk_tokens is None:
        chunk_tokens = max(16, CHUNK_ELEMENTS // weight.shape[0])
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, but it is {chunk_tokens}")
    kind: Divergence = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
    return LossOutput(
        *_SparseSoftCrossEntropy.apply(
            hidden,
            weight,
            bias,
            labels.long(),
            topk_ids.long(),
            topk_logprobs,
            kd_weight,
            top_k_mass,
            kind,
            after_head if after_head is not None and after_head.changes else None,
            chunk_tokens,
        )
    )


class _SparseSoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        ids_TK: Tensor,
        logprobs_TK: Tensor,
        kd_weight: float,
        top_k_mass: TopKMass,
        divergence: Divergence,
        after_head: AfterHead | None,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (T, K), V = ids_TK.shape, weight_VD.shape[0]
        # Is there a rest, and does anything hang on what the student gives it?
        rest_counts = 0 < K < V and (top_k_mass == "tail" or not getattr(divergence, "on_teacher_support", False))
        exact = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        head_VD = weight_VD.to(hidden_TD.dtype)
        ce, kd = hidden_TD.new_zeros((), dtype=exact), hidden_TD.new_zeros((), dtype=exact)
        label_logprobs_T = hidden_TD.new_empty(T, dtype=exact)
        # Under inference mode nothing is differentiated, whatever its inputs say.
        need_hidden, need_weight, need_bias = (
            need and not torch.is_inference_mode_enabled() for need in ctx.needs_input_grad[:3]
        )
        grad_hidden = torch.empty_like(hidden_TD) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=exact) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=exact) if need_bias and bias_V is not None else None
        differentiate = need_hidden or need_weight or need_bias

        for start in range(0, T, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            h_CD, labels_C, ids_CK = hidden_TD[rows], labels_T[rows, None], ids_TK[rows]
            z_CV = (h_CD @ head_VD.T).to(exact)
            if bias_V is not None:
                z_CV += bias_V
            slope_CV: Tensor | float = 1.0
            if after_head is not None:
                z_CV = after_head(z_CV)
                slope_CV = after_head.slope(z_CV) if differentiate else 1.0
            z_label_C, z_top_CK = z_CV.gather(1, labels_C), z_CV.gather(1, ids_CK)
            # In one sweep over the logits: softmax(z) = u / s with u = exp(z - max), which takes the place of z.
            u_rest_CV = z_CV.scatter(1, ids_CK, -torch.inf) if rest_counts else None
            max_C = z_CV.amax(-1, keepdim=True)
            u_CV = z_CV.sub_(max_C).exp_()
            s_C = u_CV.sum(-1, keepdim=True)
            lse_C = max_C + s_C.log()
            label_logprob_C = z_label_C - lse_C
            label_logprobs_T[rows] = label_logprob_C[:, 0]
            ce -= label_logprob_C.sum()

            logp_rest_C = torch.full_like(s_C, torch.finfo(exact).min)
            if u_rest_CV is not None:
                # The student's distribution outside the top-k, from logits with a maximum of their own: as a ratio of
                # probabilities it would be 0 / 0 where the student gives the rest less than float32 can hold.
                max_rest_C = u_rest_CV.amax(-1, keepdim=True)
                s_rest_C = u_rest_CV.sub_(max_rest_C).exp_().sum(-1, keepdim=True)
                logp_rest_C = max_rest_C + s_rest_C.log() - lse_C
            teacher_CS = _teacher_sheet(logprobs_TK[rows].to(exact), top_k_mass, rest_exists=K < V)
            student_CS = torch.cat((z_top_CK - lse_C, logp_rest_C), -1)
            value_CS, q_CS = _compare(divergence, teacher_CS, student_CS, differentiate)
            kd += value_CS[:, :K].contiguous().sum()
            if u_rest_CV is not None:
                kd += value_CS[:, K:].contiguous().sum()

            if q_CS is None:
                continue
            # d loss / d z = mass * softmax(z) - q, where the rest's q is spread like softmax(z outside the top-k).
            q_CK, q_rest_C = q_CS[:, :K].contiguous(), q_CS[:, K:]
            mass_C = (1 - kd_weight) + kd_weight * q_CK.sum(-1, keepdim=True)
            if u_rest_CV is not None:
                mass_C = mass_C + kd_weight * q_rest_C
            g_CV = u_CV.mul_(mass_C / s_C)
            if u_rest_CV is not None:
                g_CV.sub_(u_rest_CV.mul_(kd_weight * q_rest_C / s_rest_C))
            g_CV.scatter_add_(1, ids_CK, -kd_weight * q_CK)
            g_CV.scatter_add_(1, labels_C, torch.full_like(label_logprob_C, kd_weight - 1))
            if after_head is not None:
                g_CV.mul_(slope_CV)
            if grad_bias is not None:
                grad_bias += g_CV.sum(0)
            if grad_hidden is not None:
                grad_hidden[rows] = g_CV.to(hidden_TD.dtype) @ head_VD
            if grad_weight is not None:
                if hidden_TD.dtype == exact:
                    grad_weight.addmm_(g_CV.T, h_CD)  # [V, D] is what takes memory: no second one of it
                else:
                    grad_weight += g_CV.to(hidden_TD.dtype).T @ h_CD
            del z_CV, u_CV, g_CV, u_rest_CV, slope_CV  # or the next chunk's logits would be made while these still stand

        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        loss = (1 - kd_weight) * ce + kd_weight * kd
        ctx.mark_non_differentiable(ce, kd, label_logprobs_T)
        return loss, ce, kd, label_logprobs_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(_scaled(grad, grads[0]) for grad in ctx.saved_tensors), *([None] * 8)


def _teacher_sheet(logprobs_CK: Tensor, top_k_mass: TopKMass, *, rest_exists: bool) -> Tensor:
    """The teacher's log-probabilities [C, K+1] of its top-k and, last, of the rest."""
    if top_k_mass == "renormalize":
        logprobs_CK = logprobs_CK.log_softmax(-1)
    rest_C = logprobs_CK.new_full((len(logprobs_CK), 1), -torch.inf)
    if top_k_mass == "tail" and rest_exists:
        rest_C = (1 - logprobs_CK.exp().sum(-1, keepdim=True)).clamp(min=0).log()
    return torch.cat((logprobs_CK, rest_C), -1)


def _compare(
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


def check_divergence(name: str, top_k_mass: TopKMass) -> None:
    """See, on two tokens, that a divergence gives what the loss needs: also where the teacher gives a symbol nothing.

    Raises:
        UserError: its values have another shape, do not depend on the student, or are not finite.
    """
    teacher_CK = torch.tensor([[0.6, 0.3], [1.0, 0.0]]).log()
    student_CS = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.3, 0.6]]).log()
    try:
        found = _compare(DIVERGENCES[name], _teacher_sheet(teacher_CK, top_k_mass, rest_exists=True), student_CS, True)
        if not all(part is None or part.isfinite().all() for part in found):
            raise ValueError("what it gives, or its derivative, is not finite where the teacher gives a symbol nothing")
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"loss.divergence {name!r} cannot be trained with, loss.top_k_mass being {top_k_mass}: {error}.",
            "docs/extending.md says what a divergence is given, and gives.",
        ) from error


# Does the backward pass that runs keep its graph for another one? torch tells only its own compiler.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(grad: Tensor | None, scale: Tensor) -> Tensor | None:
    """A gradient times the upstream one; in place, unless it may be asked for again."""
    if grad is None:
        return None
    scale = scale.to(grad.dtype)
    return grad * scale if _keeps_graph() else grad.mul_(scale)
