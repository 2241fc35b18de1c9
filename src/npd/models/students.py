"""Students: cut out of a teacher, or wrapped in adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from npd.config import StudentConfig
from npd.errors import UserError
from npd.models.devices import resolve_dtype


def evenly_spaced(layers: int, total: int) -> list[int]:
    """`layers` of `total` layer indices, the first and the last among them."""
    if layers == 1:
        return [0]
    return [round(i * (total - 1) / (layers - 1)) for i in range(layers)]


def cut_student(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """Keep the given decoder layers, in order; everything else stays. Changes `model` and returns it.

    Raises:
        UserError: a layer that does not exist or comes twice, or a model without a plain list of layers.
    """
    config = model.config.get_text_config()
    total = config.num_hidden_layers
    if not keep or any(not 0 <= i < total for i in keep) or list(keep) != sorted(set(keep)):
        raise UserError(f"Layers to keep must be different, ascending and within 0..{total - 1}, but they are {list(keep)}.")
    found = [
        (owner, name)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(found) != 1:
        raise UserError(f"A {config.model_type} model has no single list of {total} decoder layers to cut from.")
    owner, name = found[0]
    setattr(owner, name, nn.ModuleList([getattr(owner, name)[i] for i in keep]))
    for index, layer in enumerate(getattr(owner, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    for key, value in config.to_dict().items():  # per-layer options, such as layer_types
        if isinstance(value, list) and len(value) == total and hasattr(config, key) and not key.endswith("token_id"):
            setattr(config, key, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)
    return model


def add_lora(model: PreTrainedModel, config: StudentConfig) -> nn.Module:
    """Wrap a student in adapters as `student.lora` says; the base weights are frozen."""
    import peft

    assert config.lora is not None
    options = peft.LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # peft takes floats
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    head = model.get_output_embeddings()
    try:
        wrapped = peft.get_peft_model(model, options)
    except ValueError as error:  # peft's own error for modules that do not exist is one
        raise UserError(f"student.lora.target_modules {config.lora.target_modules!r} does not fit: {error}") from error
    if model.get_output_embeddings() is not head:
        raise UserError(
            "student.lora.target_modules names the language-model head, which npd reads as one plain matrix; leave it out."
        )
    return wrapped


def adapter_bytes(known: PreTrainedConfig, config: StudentConfig) -> int:
    """Bytes of a student's adapters, from the model's configuration alone.

    Raises:
        UserError: as `add_lora`.
    """
    dtype = resolve_dtype(config, trained=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known, trust_remote_code=config.trust_remote_code, dtype=dtype)
        model.tie_weights()
        wrapped = add_lora(model, config)
    return sum(p.numel() * p.element_size() for p in wrapped.parameters() if p.requires_grad)
