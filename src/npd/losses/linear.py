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

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from npd.errors import UserError, foreign
from npd.losses.chunks import Terms, add_product, compare, in_place, in_two_sweeps, product
from npd.losses.divergences import Divergence
from npd.registry import DIVERGENCES

if TYPE_CHECKING:
    from npd.models import AfterHead

TopKMass = Literal["raw", "renormalize", "tail"]

# Elements of one chunk of logits: 256 MiB in float32. Each chunk also reads and writes the head's whole gradient, which
# small chunks at a large V would do too often.
CHUNK_ELEMENTS = 1 << 26
GPU_CHUNKS = 2048, 4096  # least and most tokens there: fewer leave its multipliers idle
GPU_CHUNK_ELEMENTS = 1 << 28


def chunk_for(vocabulary: int, *, on_cpu: bool) -> int:
    """Tokens whose logits exist at once."""
    if on_cpu:
        return max(16, CHUNK_ELEMENTS // vocabulary)
    least, most = GPU_CHUNKS
    return min(most, max(least, GPU_CHUNK_ELEMENTS // vocabulary))


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
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    fused: bool | None = None,
    compiled: bool = False,
) -> LossOutput:
    """(1 - λ) CE(y) + λ divergence(teacher's top-k, student), summed over response tokens.

    Args:
        hidden: [T, D] hidden states that predict the labels.
        weight: [V, D] language-model head.
        labels: [T] response tokens.
        topk_ids: [T, K] teacher's top-k token ids, all different within a row; K may be 0 if kd_weight is 0.
        topk_logprobs: [T, K] teacher's log-probabilities, natural log. -inf: no entry; its id, which is none of the others,
            counts to the rest. A row without any has cross-entropy alone.
        kd_weight: λ in 0..1.
        top_k_mass: raw (the paper's formula), renormalize (top-k scaled to sum to one), or tail (the teacher's left-over
            mass against the student's, as one extra symbol).
        divergence: a name of `npd.registry.DIVERGENCES`, or a divergence itself.
        bias: [V] of the head.
        after_head: what makes logits of the head's output (soft-capping, a scale); None: they are the logits.
        scale: what `loss`, but neither ce nor kd, is multiplied by. Better here than outside where hidden states are in a
            small type: gradients are scaled before they are rounded to it.
        chunk_tokens: tokens whose logits exist at once; chosen from V by default.
        fused: go over a chunk's logits in as few sweeps as can be; None: on whatever is no CPU. Equal up to rounding.
        compiled: compile those sweeps with torch.compile.

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
    if fused is None:
        fused = hidden.device.type != "cpu"
    if chunk_tokens is None:
        chunk_tokens = chunk_for(weight.shape[0], on_cpu=hidden.device.type == "cpu")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, but it is {chunk_tokens}")
    kind = divergence_of(divergence) if isinstance(divergence, str) else divergence
    return LossOutput(
        *_SparseSoftCrossEntropy.apply(
            hidden,
            weight,
            bias,
            labels.long(),
            topk_ids.long(),
            topk_logprobs,
            top_k_mass,
            Terms(kd_weight, kind, after_head if after_head is not None and after_head.changes else None, scale, compiled),
            chunk_tokens,
            fused,
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
        top_k_mass: TopKMass,
        terms: Terms,
        chunk_tokens: int,
        fused: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (T, K), V = ids_TK.shape, weight_VD.shape[0]
        exact = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        # What is rounded to a smaller type is scaled before; else the gradients are, once, when they are asked for.
        narrow = hidden_TD.dtype != exact
        ctx.scale, scale = (1.0, terms.scale) if narrow else (terms.scale, 1.0)
        # Is there a rest, and does anything hang on what the student gives it?
        outside = getattr(terms.divergence, "on_teacher_support", False)
        terms = replace(terms, scale=scale, rest_counts=0 < K < V and (top_k_mass == "tail" or not outside))
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
            z_CV = product(h_CD, head_VD.T, exact)
            if bias_V is not None:
                z_CV += bias_V
            if terms.after_head is not None:
                z_CV = terms.after_head(z_CV)
            teacher_CS = _teacher_sheet(logprobs_TK[rows].to(exact), top_k_mass, rest_exists=K < V, fine=not outside)
            sweep = in_two_sweeps if fused else in_place
            label_logprob_C, value_CS, g_CV = sweep(
                z_CV, labels_C, ids_CK, teacher_CS, terms, hidden_TD.dtype if differentiate else None
            )
            label_logprobs_T[rows] = label_logprob_C[:, 0]
            ce -= label_logprob_C.sum()
            kd += value_CS[:, :K].contiguous().sum()
            if terms.rest_counts:
                kd += value_CS[:, K:].contiguous().sum()
            del z_CV  # or the next chunk's logits would be made while these still stand
            if g_CV is None:
                continue
            if grad_bias is not None:
                grad_bias += g_CV.sum(0, dtype=exact)
            g_CV = g_CV.to(hidden_TD.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = g_CV @ head_VD
            if grad_weight is not None:
                add_product(grad_weight, g_CV.T, h_CD)
            del g_CV

        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        loss = (1 - terms.kd_weight) * ce + terms.kd_weight * kd
        ctx.mark_non_differentiable(ce, kd, label_logprobs_T)
        return loss if ctx.scale * scale == 1 else loss * (ctx.scale * scale), ce, kd, label_logprobs_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(_scaled(grad, grads[0] * ctx.scale) for grad in ctx.saved_tensors), *([None] * 7)


def _teacher_sheet(logprobs_CK: Tensor, top_k_mass: TopKMass, *, rest_exists: bool, fine: bool = True) -> Tensor:
    """The teacher's log-probabilities [C, K+1] of its top-k and, last, of the rest.

    `fine`: of the rest, to whose logarithm the student's mass there is held, no digit is lost; else its mass alone counts.
    """
    if top_k_mass == "renormalize":  # what has no entry stays so
        logprobs_CK = logprobs_CK.log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    rest_C = logprobs_CK.new_full((len(logprobs_CK), 1), -torch.inf)
    if top_k_mass == "tail" and rest_exists:
        p_CK = (logprobs_CK.double() if fine else logprobs_CK).exp()
        rest_C = (1 - p_CK.sum(-1, keepdim=True)).clamp(min=0).log().to(rest_C.dtype)
    return torch.cat((logprobs_CK, rest_C), -1)


def divergence_of(name: str, options: Mapping[str, Any] | None = None) -> Divergence:
    """A divergence by its name; a class is made with `options`, anything else takes none.

    Raises:
        UserError: there is none of this name, or it does not take these options.
    """
    kind = DIVERGENCES[name]
    try:
        if isinstance(kind, type):
            return cast(Divergence, kind(**(options or {})))
        if options:
            raise TypeError("it takes none")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"loss.options do not fit loss.divergence {name!r}: {foreign(error)}.",
            "docs/objectives.md has each one's options.",
        ) from error
    return cast(Divergence, kind)


def check_divergence(name: str, top_k_mass: TopKMass, options: Mapping[str, Any] | None = None) -> None:
    """See, on two tokens, that a divergence gives what the loss needs: also where the teacher gives a symbol nothing.

    Raises:
        UserError: its values have another shape, do not depend on the student, or are not finite.
    """
    teacher_CK = torch.tensor([[0.6, 0.3], [1.0, 0.0]]).log()
    student_CS = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.3, 0.6]]).log()
    try:
        found = compare(
            divergence_of(name, options), _teacher_sheet(teacher_CK, top_k_mass, rest_exists=True), student_CS, True
        )
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
    if grad.dtype != scale.dtype:
        return (grad * scale if grad.dtype == torch.float64 else grad.to(scale.dtype) * scale).to(grad.dtype)
    return grad * scale if _keeps_graph() else grad.mul_(scale)
