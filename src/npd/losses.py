"""Sparse soft-target linear cross-entropy: NPD's training step, and SFT's at kd_weight 0.

Dimensions: T response tokens, D hidden size, V vocabulary, K the teacher's top-k, C tokens in a chunk.

METHOD's loss is -Σ_c q_c log p_S(c) + const with q = (1 - λ) onehot(y) + λ p_T restricted to the top-k, and its gradient
with respect to the logits is (Σ q) softmax(z) - q. Nothing of size T x V is kept: logits live a chunk at a time, and the
gradients of hidden states and weight are produced in that same pass.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

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
    chunk_tokens: int | None = None,
) -> LossOutput:
    """(1 - λ) CE(y) + λ KL(teacher's top-k || student), summed over response tokens.

    Args:
        hidden: [T, D] hidden states that predict the labels.
        weight: [V, D] language-model head.
        labels: [T] response tokens.
        topk_ids: [T, K] teacher's top-k token ids, all different within a row; K may be 0 if kd_weight is 0.
        topk_logprobs: [T, K] teacher's log-probabilities, natural log.
        kd_weight: λ in 0..1.
        top_k_mass: raw (the paper's formula), renormalize (top-k scaled to sum to one), or tail (the teacher's left-over
            mass against the student's, as one extra symbol).
        chunk_tokens: tokens whose logits exist at once; chosen from V by default.

    Returns:
        loss, ce and kd as scalars and label_logprobs [T], in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes or options that do not fit together.
    """
    T = len(hidden)
    matrices = all(x.ndim == 2 for x in (hidden, weight, topk_ids))
    if (
        not matrices
        or weight.shape[1] != hidden.shape[1]
        or labels.shape != (T,)
        or topk_ids.shape != topk_logprobs.shape
        or len(topk_ids) != T
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
    return LossOutput(
        *_SparseSoftCrossEntropy.apply(
            hidden, weight, labels.long(), topk_ids.long(), topk_logprobs, kd_weight, top_k_mass, chunk_tokens
        )
    )


class _SparseSoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        ids_TK: Tensor,
        logprobs_TK: Tensor,
        kd_weight: float,
        top_k_mass: TopKMass,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        T = hidden_TD.shape[0]
        exact = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        head_VD = weight_VD.to(hidden_TD.dtype)
        ce, kd = hidden_TD.new_zeros((), dtype=exact), hidden_TD.new_zeros((), dtype=exact)
        label_logprobs_T = hidden_TD.new_empty(T, dtype=exact)
        grad_hidden = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=exact) if ctx.needs_input_grad[1] else None

        for start in range(0, T, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            h_CD, labels_C, ids_CK = hidden_TD[rows], labels_T[rows, None], ids_TK[rows]
            z_CV = (h_CD @ head_VD.T).to(exact)
            z_label_C, z_top_CK = z_CV.gather(1, labels_C), z_CV.gather(1, ids_CK)
            # In one sweep over the logits: softmax(z) = u / s with u = exp(z - max), which takes the place of z.
            u_rest_CV = z_CV.scatter(1, ids_CK, -torch.inf) if top_k_mass == "tail" else None
            max_C = z_CV.amax(-1, keepdim=True)
            u_CV = z_CV.sub_(max_C).exp_()
            s_C = u_CV.sum(-1, keepdim=True)
            lse_C = max_C + s_C.log()
            label_logprob_C = z_label_C - lse_C
            label_logprobs_T[rows] = label_logprob_C[:, 0]
            ce -= label_logprob_C.sum()

            logp_teacher_CK = logprobs_TK[rows].to(exact)
            if top_k_mass == "renormalize":
                logp_teacher_CK = logp_teacher_CK.log_softmax(-1)
            p_teacher_CK = logp_teacher_CK.exp()
            # A teacher probability of 0 contributes 0, not 0 * inf.
            gap_CK = torch.where(p_teacher_CK > 0, logp_teacher_CK - (z_top_CK - lse_C), 0)
            kd += (p_teacher_CK * gap_CK).sum()

            mass_C = (1 - kd_weight) + kd_weight * p_teacher_CK.sum(-1, keepdim=True)
            rest_C = s_rest_C = None
            if u_rest_CV is not None:
                # The student's distribution outside the top-k, from logits with a maximum of their own: as a ratio of
                # probabilities it would be 0 / 0 where the student gives the rest less than float32 can hold.
                max_rest_C = u_rest_CV.amax(-1, keepdim=True)
                max_rest_C = torch.where(max_rest_C.isinf(), 0, max_rest_C)
                s_rest_C = u_rest_CV.sub_(max_rest_C).exp_().sum(-1, keepdim=True)
                lse_rest_C = max_rest_C + s_rest_C.log()
                rest_C = (1 - p_teacher_CK.sum(-1, keepdim=True)).clamp(min=0)
                rest_C = torch.where(s_rest_C > 0, rest_C, 0)  # else the top-k is the whole vocabulary
                gap_C = torch.where(rest_C > 0, rest_C.log() - (lse_rest_C - lse_C), 0)
                kd += (rest_C * gap_C).sum()
                mass_C = mass_C + kd_weight * rest_C

            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d z = mass * softmax(z) - q, and for the tail - λ rest * softmax(z outside the top-k).
            g_CV = u_CV.mul_(mass_C / s_C)
            if u_rest_CV is not None and rest_C is not None and s_rest_C is not None:
                g_CV.sub_(u_rest_CV.mul_(kd_weight * rest_C / torch.where(s_rest_C > 0, s_rest_C, 1)))
            g_CV.scatter_add_(1, ids_CK, -kd_weight * p_teacher_CK)
            g_CV.scatter_add_(1, labels_C, torch.full_like(label_logprob_C, kd_weight - 1))
            if grad_hidden is not None:
                grad_hidden[rows] = g_CV.to(hidden_TD.dtype) @ head_VD
            if grad_weight is not None:
                if hidden_TD.dtype == exact:
                    grad_weight.addmm_(g_CV.T, h_CD)  # [V, D] is what takes memory: no second one of it
                else:
                    grad_weight += g_CV.to(hidden_TD.dtype).T @ h_CD
            del z_CV, u_CV, g_CV, u_rest_CV  # or the next chunk's logits would be made while these still stand

        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        loss = (1 - kd_weight) * ce + kd_weight * kd
        ctx.mark_non_differentiable(ce, kd, label_logprobs_T)
        return loss, ce, kd, label_logprobs_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return _scaled(grad_hidden, grads[0]), _scaled(grad_weight, grads[0]), *([None] * 6)


# Does the backward pass that runs keep its graph for another one? torch tells only its own compiler.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(grad: Tensor | None, scale: Tensor) -> Tensor | None:
    """A gradient times the upstream one; in place, unless it may be asked for again."""
    if grad is None:
        return None
    scale = scale.to(grad.dtype)
    return grad * scale if _keeps_graph() else grad.mul_(scale)


def near_policy_kl(logprobs: Tensor, behavior_logprobs: Tensor) -> Tensor:
    """Per-token estimate, in nats, of D_KL(π_current || π_gen) from tokens that π_gen sampled.

    With r = π_current(y) / π_gen(y), the mean of r log r - r + 1 is unbiased and never negative. Arguments and result [T].
    It holds for samples drawn at temperature 1 without truncation.
    """
    log_r = logprobs - behavior_logprobs
    r = log_r.exp()
    return r * log_r - r + 1
