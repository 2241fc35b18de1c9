"""Attention over samples that lie end to end: no padding, no mask, and nothing that grows with the square of a row.

`npd_varlen` is registered with transformers. A model under that name behaves as under sdpa (generation, caches, padding on
the left, masks of its own) until it is called with `end_to_end(...)`: then each sample attends to itself alone, by
`torch.nn.attention.varlen` on a GPU that has it and sample by sample elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:  # not every torch has it, and its arguments grow from version to version
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]
TAKEN = frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)

NAME = "npd_varlen"

# Queries of a sliding window that are computed at once: their mask has BLOCK * (BLOCK + window) entries.
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 1024

# Arguments of an attention function that would change what is computed, and what they ask for.
REFUSED = {
    "softcap": "its attention is soft-capped",
    "s_aux": "its attention has sinks",
    "position_bias": "its attention has a bias by position",
    "cache": "it reads from a paged cache",
}


class NotEndToEnd(Exception):
    """Why a model's attention cannot be computed over samples that lie end to end."""


def end_to_end(cu_seq_lens: Tensor, lengths: Sequence[int], *, compiled: bool = False) -> dict[str, Any]:
    """Arguments with which a model under `NAME` reads rows whose samples, padding included, have these lengths in turn.

    Args:
        cu_seq_lens: [S + 1] int32, where they begin in the flat rows, and the end; on the model's device.
        compiled: leave the lengths to `cu_seq_lens`: a compiler would make a program for each list of numbers.
    """
    # transformers hands a mask of four dimensions to every layer as it is: it builds none, and looks at no positions.
    arguments: dict[str, Any] = {
        "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=cu_seq_lens.device),
        "cu_seq_lens_q": cu_seq_lens,
        "max_length_q": max(lengths, default=0),
    }
    return arguments if compiled else arguments | {"sample_lengths": list(lengths)}


def npd_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [R, H, L, D], key and value with as many or fewer heads, to [R, L, H, D].

    Raises:
        NotEndToEnd: it was called with `end_to_end`, and the model drops a part of that or asks for what it cannot do.
    """
    marked = attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[-1] == 0
    cu_seq_lens = options.get("cu_seq_lens_q")
    if not marked and cu_seq_lens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if cu_seq_lens is None:
        raise NotEndToEnd("its layers drop arguments that its attention needs")
    if attention_mask is not None and not marked:
        raise NotEndToEnd("it makes masks of its own")
    for name, reason in REFUSED.items():
        if options.get(name) is not None:
            raise NotEndToEnd(reason)
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotEndToEnd("its attention is not causal")
    if query.shape[2] != key.shape[2]:
        raise NotEndToEnd("its queries and keys are not of the same tokens")

    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary positions leave float32 behind
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window, dropout = options.get("sliding_window"), float(options.get("dropout") or 0.0)
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    kernel = _kernel(query, value, window, dropout)
    if kernel is not None:
        return kernel(query, key, value, cu_seq_lens, options["max_length_q"], window, scale), None
    return by_sample(query, key, value, options.get("sample_lengths"), cu_seq_lens, window, dropout, scale), None


AttentionInterface.register(NAME, npd_varlen)
AttentionMaskInterface.register(NAME, sdpa_mask)  # a name that is not here gets no mask at all, in generation either


# -- on a GPU


@torch.compiler.assume_constant_result
def _capable() -> bool:
    """Has this process's GPU what the kernel takes?"""
    return torch.cuda.get_device_capability() >= (8, 0)


def without_kernel() -> str:
    """Why no kernel of this process's GPU takes all samples at once; nothing where one does."""
    if varlen_attn is None:
        return f"PyTorch {torch.__version__} has no kernel for samples that lie end to end"
    return "" if _capable() else "its kernel for samples that lie end to end needs a GPU of compute capability 8.0 or more"


def _kernel(query: Tensor, value: Tensor, window: int | None, dropout: float) -> Callable[..., Tensor] | None:
    """What computes all samples at once, where something can."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or dropout:
        return None
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256:
        return None
    if varlen_attn is None or (window is not None and "window_size" not in TAKEN):
        return None
    return _by_kernel if _capable() else None


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, longest: int, window: int | None, scale: float
) -> Tensor:
    R, H, L, D = query.shape
    options: dict[str, Any] = {}
    if key.shape[1] != H:
        if "enable_gqa" in TAKEN:
            options["enable_gqa"] = True
        else:
            key, value = _as_many(key, H), _as_many(value, H)
    if "window_size" in TAKEN:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if "scale" in TAKEN:
        options["scale"] = scale
    else:
        query = query * (scale * D**0.5)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if D % 8 and "scale" in TAKEN:
        q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
    out: Any = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, **options)
    attended: Tensor = out[..., :D].unflatten(0, (R, L))
    return attended


# -- everywhere


def _as_many(x: Tensor, heads: int) -> Tensor:
    """[R, K, L, D] with every head as often as makes `heads`."""
    R, K, L, D = x.shape
    return x if heads == K else x[:, :, None].expand(R, K, heads // K, L, D).flatten(1, 2)


@torch.compiler.disable
def by_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int] | None,
    cu_seq_lens: Tensor,
    window: int | None,
    dropout: float,
    scale: float,
) -> Tensor:
    """Causal attention of each sample alone; those that follow each other and are of one length go together."""
    R, H, L, _ = query.shape
    if lengths is None:
        lengths = cu_seq_lens.diff().tolist()
    if query.device.type != "cpu":  # of its kernels, none that takes float32 takes fewer heads of keys
        key, value = _as_many(key, H), _as_many(value, H)
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    if not sizes:
        return query.new_zeros(R, L, H, value.shape[-1])
    # [H, R * L, D] each, without a copy where there is one row
    q, k, v = (x.transpose(0, 1).flatten(1, 2).split(sizes, 1) for x in (query, key, value))
    outputs = []
    for (length, count), a, b, c in zip(runs, q, k, v, strict=True):
        a, b, c = (x.unflatten(1, (count, length)).transpose(0, 1) for x in (a, b, c))
        if window is None or length <= window:
            out = F.scaled_dot_product_attention(
                a, b, c, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=b.shape[1] != a.shape[1]
            )
        else:
            out = _windowed(a, b, c, window, dropout, scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unflatten(0, (R, L))


def _windowed(query: Tensor, key: Tensor, value: Tensor, window: int, dropout: float, scale: float) -> Tensor:
    """Attention [C, H, n, D] of each token to the `window` last ones, itself among them, block of queries by block."""
    n = query.shape[2]
    key, value = (_as_many(x, query.shape[1]) for x in (key, value))  # with a mask, no kernel takes fewer
    block = min(max(window, SMALLEST_BLOCK), LARGEST_BLOCK, n)
    # Keys of a block begin window - 1 tokens before it.
    back = torch.arange(block, device=query.device)[:, None] + window - 1
    back = back - torch.arange(block + window - 1, device=query.device)
    seen = (back >= 0) & (back < window)
    outputs = []
    for start in range(0, n, block):
        end, first = min(start + block, n), max(0, start - window + 1)
        skipped = max(0, window - 1 - start)
        mask = seen[: end - start, skipped : end - start + window - 1]
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=mask,
                dropout_p=dropout,
                scale=scale,
            )
        )
    return torch.cat(outputs, 2)
