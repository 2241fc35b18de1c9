"""What a training step takes of a device's memory, from a model's configuration alone."""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from npd.models.files import EXPERT_KEYS
from npd.models.layout import decoder_names
from npd.models.loading import shape_of
from npd.models.reading import blocks

PROBED = 128, 256  # tokens; what grows between them is taken as what a token takes


CHOSEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "experts_per_token")
COUNTED = "npd_counted"  # attention as a GPU's kernels keep it: without masks, and with each key once


def _counted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(COUNTED, _counted)
AttentionMaskInterface.register(COUNTED, lambda *args, **options: None)


def _counted_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """One expert for all tokens, each as often as it chooses one: the same products, without values to choose by."""

    def through(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            weight = weight.to(torch.get_autocast_dtype("cpu"))  # all of it
        return F.linear(tokens, weight[0].T if self.is_transposed else weight[0], None if bias is None else bias[0])

    up = "gate_up_proj" if self.has_gate else "up_proj"
    biases = (f"{up}_bias", "down_proj_bias") if self.has_bias else ("", "")
    each = hidden_states.repeat_interleave(top_k_index.shape[-1], 0)
    inside = through(each, getattr(self, up), getattr(self, biases[0], None))
    inside = self._apply_gate(inside) if self.has_gate else self.act_fn(inside)
    out = through(inside, self.down_proj, getattr(self, biases[1], None)) * top_k_weights.reshape(-1, 1)
    return out.view(len(hidden_states), -1, out.shape[-1]).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(COUNTED, _counted_experts)


class Activations(NamedTuple):
    """Bytes that a decoder keeps for the backward pass."""

    token: float
    """For each token of a micro-batch, of all layers."""
    fixed: float
    """However many they are: weights as autocast has rounded them."""
    layers: int
    width: int

    def bytes(self, tokens: int, *, checkpointing: bool) -> float:
        """Most at once. With checkpointing layers keep what they are given, in float32, and one is computed again; the
        gradients of a layer's activations stand beside them."""
        layer = tokens * self.token / self.layers
        kept = 4.0 * tokens * self.width * self.layers + layer if checkpointing else tokens * self.token
        return self.fixed + kept + layer


def activations(known: PreTrainedConfig, *, bfloat16: bool, trust_remote_code: bool = False) -> Activations | None:
    """Counted on a forward pass without values or memory; attention keeps its inputs and its output, but no scores.

    Args:
        bfloat16: matrix products in bfloat16, as autocast has them, with weights in float32.

    Returns:
        None for a model that cannot be called without values.
    """
    known = copy.deepcopy(known)
    known._attn_implementation = COUNTED
    known._experts_implementation = COUNTED
    log = logging.getLogger("torch._subclasses.fake_tensor")
    said, log.disabled = log.disabled, True  # what cannot be counted is said by None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = shape_of(known, trust_remote_code=trust_remote_code, on="cpu")
            decoder = model.get_submodule(next(iter(decoder_names(model)))).train()
            few, many = (_kept(decoder, tokens, bfloat16=bfloat16) for tokens in PROBED)
    except Exception:  # whatever a model does with values that are not there
        return None
    finally:
        log.disabled = said
    token = (many - few) / (PROBED[1] - PROBED[0])
    text = known.get_text_config()
    return Activations(token, max(0.0, few - token * PROBED[0]), text.num_hidden_layers, text.hidden_size)


def block_parameters(known: PreTrainedConfig, *, trust_remote_code: bool = False) -> tuple[int, int]:
    """Parameters of a model's largest block (see `blocks`), and those outside of all of them."""
    model = shape_of(known, trust_remote_code=trust_remote_code)
    inside = [{id(p): p.numel() for p in block.parameters()} for block in blocks(model)]
    every = {key: size for block in inside for key, size in block.items()}
    return max([0, *(sum(block.values()) for block in inside)]), sum(p.numel() for p in model.parameters()) - sum(
        every.values()
    )


def expert_parameters(known: PreTrainedConfig, *, trust_remote_code: bool = False) -> tuple[int, float]:
    """Parameters of a model's experts, and the share of them that a token goes through; 0 and 1 of a model without."""
    text = known.get_text_config()
    experts, chosen = (
        next((n for key in keys if type(n := getattr(text, key, None)) is int and n > 0), 0)
        for keys in (sorted(EXPERT_KEYS), CHOSEN_KEYS)
    )
    if not experts or not 0 < chosen < experts:
        return 0, 1.0
    model = shape_of(known, trust_remote_code=trust_remote_code)
    inside = {id(p): p.numel() for name, p in model.named_parameters() if "experts" in name.split(".")}
    return sum(inside.values()), chosen / experts


def _kept(decoder: nn.Module, tokens: int, *, bfloat16: bool) -> int:
    """Bytes kept for the backward pass by a decoder that reads one row, weights aside."""
    weights = {p.untyped_storage()._cdata for p in decoder.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        decoder(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())
