"""Weights as they are at one moment, and as Hugging Face format on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from npd.errors import RunError
from npd.models.devices import finish_copies, to_host
from npd.models.loading import not_finite, quiet_transformers
from npd.models.reading import base_model
from npd.models.tokens import named_stops, stops_of

ADAPTER = "adapter"  # what a snapshot keeps a student's adapters in, besides the merged weights


class State(NamedTuple):
    """A model's weights at one moment, under the base model's names, and beside them what its adapters are."""

    weights: dict[str, Tensor]
    """Adapters merged; tied weights are one tensor."""
    adapter: dict[str, Tensor] | None = None


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    state: State | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model and its tokenizer in Hugging Face format, with the weights of `state` if given (see `copy_state`).

    Adapters are merged into the weights, and written by themselves to adapter/ as well, as peft has them.

    Args:
        dtype: of the weights in the files; None: as they are.

    Raises:
        RunError: a weight is not finite; nothing is written.
        ValueError: the weights are not whole in this process's memory.
    """
    base = base_model(model)
    stop_at(base, stops_of(tokenizer, ()))
    if state is None:
        state = State(base.state_dict()) if base is model else State(_merged_state(model), _adapter_state(model))
    for tensor in state.weights.values():
        place_of(tensor)
    weights = state.weights if dtype is None else _as_type(base, state.weights, dtype)
    bad = next(not_finite(weights.items()), None)
    if bad is not None:
        other = ", or choose student.dtype bfloat16" if dtype == torch.float16 else ""
        raise RunError(
            f"The student's weights are not finite ({bad}), so {path.name} was not written.",
            f"Lower training.learning_rate{other}; the last checkpoint is whole.",
        )
    with quiet_transformers():
        base.save_pretrained(path, state_dict=weights)
        tokenizer.save_pretrained(path)
    if dtype is not None:
        _declare_type(path / "config.json", dtype)
    if state.adapter is not None:
        options: Any = model.peft_config
        options["default"].save_pretrained(path / ADAPTER)
        save_file(state.adapter, path / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})


def save_adapter(model: nn.Module, path: Path, base: str, revision: str | None = None) -> None:
    """Write a student's adapters alone, as peft has them, for the weights that `base` names."""
    options: Any = copy(model.peft_config["default"])  # type: ignore[index]
    options.base_model_name_or_path, options.revision, options.inference_mode = base, revision, True
    options.save_pretrained(path)
    save_file(_adapter_state(model), path / "adapter_model.safetensors", metadata={"format": "pt"})


def stop_at(model: nn.Module, stop_ids: Sequence[int]) -> None:
    """Make a model's own generation end at these tokens as well; its generation_config.json then says so."""
    base: Any = base_model(model)
    config = getattr(base, "generation_config", None)
    if config is not None:
        size = base.config.get_text_config().vocab_size
        stops = sorted(token for token in {*named_stops(config, base.config), *stop_ids} if token < size)
        config.eos_token_id = stops[0] if len(stops) == 1 else stops


def _as_type(base: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in another type, but for those that transformers keeps in float32; tied ones stay one."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in weights.items():
        key = place_of(tensor)
        if key not in made:
            made[key] = tensor if _stays(base, name, tensor) else tensor.to(dtype)
    return {name: made[place_of(tensor)] for name, tensor in weights.items()}


def place_of(tensor: Tensor) -> tuple[int, torch.Size]:
    """Where a tensor's values lie, by which tied weights are known to be one.

    Raises:
        ValueError: they lie nowhere, as on the meta device, or not all of them here, as in a shard: all such would be one.
    """
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} ({type(tensor).__name__}) has no values of its own here")
    return address, tensor.shape


def _stays(base: Any, name: str, tensor: Tensor) -> bool:
    """Is this weight kept in its type, whatever that of the model?"""
    kept = {*(base._keep_in_fp32_modules or ()), *(base._keep_in_fp32_modules_strict or ())}
    return not tensor.is_floating_point() or any(part in name for part in kept)


def _declare_type(path: Path, dtype: torch.dtype) -> None:
    """transformers writes the type of the model in memory, not that of the weights it is given."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in section:
            section["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_state(model: nn.Module, dtype: torch.dtype | None = None) -> State:
    """A copy in CPU memory of a model's weights as they are now, adapters merged into their base; tied ones stay one.

    `dtype`: what the weights are rounded to, but for those that transformers keeps in float32; None: they are not.

    Raises:
        ValueError: the model is not whole in this process's memory.
    """
    copies: dict[tuple[int, torch.Size], Tensor] = {}

    def copied(tensor: Tensor, stays: bool) -> Tensor:
        key = place_of(tensor)
        if key not in copies:
            copies[key] = to_host(tensor if stays or dtype is None else tensor.to(dtype))
        return copies[key]

    base = base_model(model)
    weights = model.state_dict() if base is model else _merged_state(model)
    adapter = None if base is model else {name: copied(tensor, True) for name, tensor in _adapter_state(model).items()}
    state = State({name: copied(tensor, _stays(base, name, tensor)) for name, tensor in weights.items()}, adapter)
    finish_copies()
    return state


def _adapter_state(model: nn.Module) -> dict[str, Tensor]:
    import peft

    return {name: tensor.contiguous() for name, tensor in peft.get_peft_model_state_dict(model).items()}


def adapted(model: nn.Module) -> Iterator[tuple[Any, nn.Parameter]]:
    """A peft model's adapters, each with the parameter of the base that it is added to."""
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            layer: Any = module
            yield layer, layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight


def merged_weight(layer: Any, parameter: Tensor) -> Tensor:
    """A weight with its adapter added, float32; DoRA then scales each output to the length that it learned."""
    weight, delta = parameter.detach().float(), layer.get_delta_weight("default").detach().float()
    learned = getattr(layer, "lora_magnitude_vector", {})
    if "default" not in learned:
        return weight + delta
    turned = getattr(layer, "fan_in_fan_out", False)
    norm = learned["default"].get_weight_norm(weight.T if turned else weight, delta.T if turned else delta, scaling=1)
    factor = (learned["default"].weight.detach().float() / norm.detach()).view(-1, 1)
    return (factor.T if turned else factor) * (weight + delta)


def _merged_state(model: nn.Module) -> dict[str, Tensor]:
    """A peft model's weights with its adapters added, under the base model's names.

    Merging in place and undoing it would need no second copy, but would round the base weights a little each time.
    """
    layers = {id(parameter): layer for layer, parameter in adapted(model)}
    merged: dict[int, Tensor] = {}
    state = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if "lora_" in key:
            continue
        layer = layers.get(id(value))
        if layer is not None and id(value) not in merged:
            merged[id(value)] = merged_weight(layer, value).to(value.dtype)
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        state[name] = merged.get(id(value), value.detach())
    return state
