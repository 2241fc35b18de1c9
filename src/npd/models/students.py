"""Students: cut out of a teacher, or wrapped in adapters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from npd.config import StudentConfig
from npd.errors import UserError
from npd.models.layout import layout_of
from npd.models.reading import backbone, base_model, hidden_states
from npd.models.saving import adapted


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
    """Wrap a student in adapters as `student.lora` says; the base weights are frozen.

    Raises:
        UserError: the model has no such modules, they include the language-model head or what is tied to it, or what the
            adapters do would not be in the merged weights.
    """
    import peft

    assert config.lora is not None
    options = peft.LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # peft takes floats
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        exclude_modules=unread_modules(model) or None,
        task_type="CAUSAL_LM",
    )
    head = model.get_output_embeddings()
    try:
        with warnings.catch_warnings():  # of tied embeddings, which are refused below
            warnings.simplefilter("ignore", UserWarning)
            wrapped = peft.get_peft_model(model, options)
    except ValueError as error:  # peft's own error for modules that do not exist is one
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"student.lora.target_modules {config.lora.target_modules!r} does not fit: {detail}") from error
    if model.get_output_embeddings() is not head:
        raise UserError(
            "student.lora.target_modules names the language-model head, which npd reads as one plain matrix; leave it out."
        )
    if any(parameter is head.weight for _, parameter in adapted(wrapped)):
        raise UserError(
            "student.lora.target_modules names the embedding, which this model ties to its language-model head: adapters "
            "would change the one and not the other, and no merged model could hold both. Leave it out."
        )
    _prove_merge(wrapped, config.model)
    return wrapped


@torch.no_grad()
def _prove_merge(model: nn.Module, name: str) -> None:
    """See that merged weights compute what weights and adapters do, with adapters that do something.

    Raises:
        UserError: they don't.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    started = [p.clone() for p in learned]
    at = torch.arange(12, device=learned[0].device)
    ids, positions = (at * 7 % 13)[None], at[None]
    training = model.training
    model.eval()
    changed: list[tuple[nn.Parameter, Tensor]] = []
    try:
        plain = hidden_states(model, ids, positions).float()
        for parameter in learned:
            if not parameter.any():  # peft starts one of the two matrices of an adapter at zero
                parameter.copy_(0.1 * torch.sin(torch.arange(parameter.numel(), device=parameter.device)).view_as(parameter))
        theirs = hidden_states(model, ids, positions).float()
        for layer, parameter in adapted(model):
            changed.append((parameter, parameter.to("cpu", copy=True)))
            parameter.copy_(parameter.float() + layer.get_delta_weight("default").float())
        with model.disable_adapter():  # type: ignore[operator]
            mine = hidden_states(model, ids, positions).float()
    finally:
        for parameter, value in changed:
            parameter.copy_(value)
        for parameter, value in zip(learned, started, strict=True):
            parameter.copy_(value)
        model.train(training)
    missing, effect = float((mine - theirs).norm()), float((theirs - plain).norm())
    if not missing <= 0.1 * effect:
        raise UserError(
            f"Adapters as student.lora describes them would not reach what is saved of {name}: with them merged into the "
            f"weights, hidden states miss {missing / max(effect, 1e-30):.0%} of what the adapters do. Choose other "
            "target_modules."
        )


def unread_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that reading text does not go through, such as those of a multimodal model's images."""
    decoder, head = backbone(model), model.get_output_embeddings()
    layout = layout_of(model)
    read = {id(module) for part in (decoder, head) for module in part.modules()}
    if layout.parts.before_head is not None:
        read |= {id(module) for module in model.get_submodule(layout.parts.before_head).modules()}
    return [name for name, module in model.named_modules() if not any(id(m) in read for m in module.modules())]


def freeze_unread(model: PreTrainedModel) -> None:
    """Leave as it is what learning from text does not reach."""
    for name in unread_modules(model):
        model.get_submodule(name).requires_grad_(False)


def learning_mode(model: nn.Module, *, dropout: bool) -> None:
    """Make a model ready for a training step in which, without `dropout`, nothing is random but the dropout of adapters.

    Random are dropout, layers that are left out, and the routers of some mixtures of experts, which draw in training.
    """
    base = base_model(model)
    if dropout:
        model.train()
        return
    # Code from elsewhere may compute without gradients in evaluation mode.
    foreign = type(base).__module__.startswith("transformers_modules")
    model.train(foreign)
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # it asks for this itself; what it calls does not see it
        if module.training:
            _switch_off_dropout(module)
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            module.train()


def _switch_off_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        module.p = 0.0
    for name, value in list(vars(module).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(module, name, 0.0)
