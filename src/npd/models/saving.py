"""Weights as they are at one moment, and as Hugging Face format on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from npd.models.loading import quiet_transformers
from npd.models.reading import base_model
from npd.models.tokens import named_stops, stops_of

ADAPTER = "adapter"  # what a snapshot keeps a student's adapters in, besides the merged weights


class State(NamedTuple):
    """A model's weights at one moment, under the base model's names, and beside them what its adapters are."""

    weights: dict[str, Tensor]
    """Adapters merged; tied weights are one tensor."""
    adapter: dict[str, Tensor] | None = None


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path, state: State | None = None) -> None:
    """Write a model and its tokenizer in Hugging Face format, with the weights of `state` if given (see `copy_state`).

    Adapters are merged into the weights, and written by themselves to adapter/ as well, as peft has them.
    """
    base = base_model(model)
    stop_at(base, stops_of(tokenizer, ()))
    if state is None and base is not model:
        state = State(_merged_state(model), _adapter_state(model))
    with quiet_transformers():
        base.save_pretrained(path, **({} if state is None else {"state_dict": state.weights}))
        tokenizer.save_pretrained(path)
    if state is not None and state.adapter is not None:
        options: Any = model.peft_config
        options["default"].save_pretrained(path / ADAPTER)
        save_file(state.adapter, path / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})


def stop_at(model: nn.Module, stop_ids: Sequence[int]) -> None:
    """Make a model's own generation end at these tokens as well; its generation_config.json then says so."""
    base: Any = base_model(model)
    config = getattr(base, "generation_config", None)
    if config is not None:
        size = base.config.get_text_config().vocab_size
        stops = sorted(token for token in {*named_stops(config, base.config), *stop_ids} if token < size)
        config.eos_token_id = stops[0] if len(stops) == 1 else stops


def copy_state(model: nn.Module) -> State:
    """A copy in CPU memory of a model's weights as they are now, adapters merged into their base; tied ones stay one."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        key = tensor.data_ptr()
        if key not in copies or copies[key].shape != tensor.shape:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    base = base_model(model)
    weights = model.state_dict() if base is model else _merged_state(model)
    adapter = None if base is model else {name: copy(tensor) for name, tensor in _adapter_state(model).items()}
    return State({name: copy(tensor) for name, tensor in weights.items()}, adapter)


def _adapter_state(model: nn.Module) -> dict[str, Tensor]:
    import peft

    return {name: tensor.contiguous() for name, tensor in peft.get_peft_model_state_dict(model).items()}


def _merged_state(model: nn.Module) -> dict[str, Tensor]:
    """A peft model's weights with its adapters added, under the base model's names.

    Merging in place and undoing it would need no second copy, but would round the base weights a little each time.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    deltas = {name: m.get_delta_weight("default") for name, m in modules.items() if hasattr(m, "get_delta_weight")}
    state = {}
    for key, value in model.state_dict().items():
        if "lora_" not in key:
            name = key.removesuffix(".base_layer.weight")
            if name != key and name in deltas:
                value = (value.float() + deltas[name].float()).to(value.dtype)
            state[key.removeprefix("base_model.model.").replace(".base_layer.", ".")] = value
    return state
