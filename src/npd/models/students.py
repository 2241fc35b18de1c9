"""Students: cut out of a teacher, or wrapped in adapters."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from npd.config import ModelConfig, StudentConfig
from npd.errors import UserError, foreign
from npd.models.files import stored_dtype, weight_files
from npd.models.layout import layout_of, probe_ids
from npd.models.loading import load_model
from npd.models.proof import prove_layout
from npd.models.reading import backbone, base_model, hidden_states
from npd.models.saving import adapted, merged_weight


def evenly_spaced(layers: int, total: int) -> list[int]:
    """`layers` of `total` layer indices, the first and the last among them."""
    if layers == 1:
        return [0]
    return [round(i * (total - 1) / (layers - 1)) for i in range(layers)]


MATCH = """import json, re, signal, sys
pattern, names = json.load(sys.stdin)
signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
signal.setitimer(signal.ITIMER_VIRTUAL, float(sys.argv[1]))
[re.fullmatch(pattern, name) for name in names]"""
MATCH_SECONDS = 2  # of a processor: a machine that is busy is no fault of the pattern's

# Options that name layers by their indices, and those that say how many of the first are of another kind.
INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids", "no_rope_layer_ids")
FIRST = ("first_k_dense_replace", "num_dense_layers")
# Lists that may by chance be as long as there are layers.
OTHER = ("time_step_limit", "mlp_multipliers", "ssm_multipliers")


def cut_student(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """Keep the given decoder layers, in order; everything else stays. Changes `model` and returns it.

    Raises:
        UserError: a layer that does not exist or comes twice, or a model whose configuration cannot say which layers are
            left; `model` is of no use then.
    """
    config: Any = model.config.get_text_config()
    total = config.num_hidden_layers
    if not keep or any(not 0 <= i < total for i in keep) or list(keep) != sorted(set(keep)):
        raise UserError(f"Layers to keep must be different, ascending and within 0..{total - 1}, but they are {list(keep)}.")
    decoder = backbone(model)
    found = [
        (owner, name)
        for owner in decoder.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    own = [(owner, name) for owner, name in found if owner is decoder]
    if len(own or found) != 1:
        raise UserError(f"A {config.model_type} model has no single list of {total} decoder layers to cut from.")
    owner, name = (own or found)[0]
    setattr(owner, name, nn.ModuleList([getattr(owner, name)[i] for i in keep]))
    for index, layer in enumerate(getattr(owner, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    try:
        _keep_options(config, keep, total)
        differing = _rebuilt_otherwise(model)
    except Exception as error:  # the configuration's own checks, or the model's
        differing = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if differing is not None:
        raise _uncut(model, f"its configuration cannot say which layers are left, and would make another model ({differing})")
    try:
        prove_layout(model, "the student")
    except UserError as error:
        raise _uncut(model, error.what) from error
    return model


def _uncut(model: PreTrainedModel, why: str) -> UserError:
    return UserError(
        f"This {model.config.model_type} model cannot be cut like this: {why}.",
        "Keep other layers, such as the first ones, or choose another teacher to cut from.",
    )


def _keep_options(config: Any, keep: Sequence[int], total: int) -> None:
    """Make a configuration's options per layer those of the layers that are kept."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is not None and step > 1:  # every step-th layer is a mixture of experts: as a list, it can be kept
        dense = {i for i in range(total) if (i + 1) % step} | set(config.mlp_only_layers or ())
        config.decoder_sparse_step, config.mlp_only_layers = 1, sorted(dense)
    for key, value in config.to_dict().items():
        if not hasattr(config, key) or key in OTHER or key.endswith("token_id"):
            continue
        if key in INDICES and isinstance(value, list):
            setattr(config, key, [keep.index(i) for i in value if i in keep])
        elif key in FIRST and isinstance(value, int):
            setattr(config, key, sum(i < value for i in keep))
        elif isinstance(value, list) and len(value) == total:  # such as layer_types
            setattr(config, key, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)


def _rebuilt_otherwise(model: PreTrainedModel) -> str | None:
    """A tensor that a model's configuration makes differently, or not at all; None where there is none."""
    with torch.device("meta"):
        rebuilt = type(model)(type(model.config).from_dict(model.config.to_dict()))
    made = {name: value.shape for name, value in rebuilt.state_dict().items()}
    differing = sorted(name for name, value in model.state_dict().items() if made.pop(name, None) != value.shape)
    return next(iter([*differing, *sorted(made)]), None)


@torch.no_grad()
def check_saved(model: PreTrainedModel, path: Path) -> None:
    """See that what was written computes what the model does.

    Raises:
        UserError: it cannot be loaded, or computes something else.
    """
    ids = probe_ids(model, 24)[None]
    positions = torch.arange(24, device=model.device)[None]
    mine = hidden_states(model, ids, positions).float()
    try:
        again = load_model(ModelConfig(model=str(path), dtype="float32"), on=str(model.device))
    except UserError as error:
        raise _uncut(model, f"what was written cannot be loaded ({error.what})") from error
    theirs = hidden_states(again, ids, positions).float()
    rounded = stored_dtype(weight_files(path)) != torch.float32
    difference = float((mine - theirs).norm() / mine.norm())
    if not difference <= (0.05 if rounded else 1e-4):
        raise _uncut(
            model,
            f"loaded again, the student computes something else (hidden states differ by {difference:.0%}): what its layers "
            "do hangs on their number",
        )


def add_lora(model: PreTrainedModel, config: StudentConfig) -> nn.Module:
    """Wrap a student in adapters as `student.lora` says; the base weights are frozen.

    Raises:
        UserError: the model has no such modules, they include the language-model head or what is tied to it, or what the
            adapters do would not be in the merged weights.
    """
    wrapped = fresh_adapters(model, config, [*unread_modules(model), *_routers(model)])
    prove_merge(wrapped, config.model)
    return wrapped


def check_pattern(pattern: Any, names: Sequence[str], what: str) -> None:
    """See that a pattern is soon done with a model's modules: some try every way to divide a name, which takes for ever.

    Python cannot be interrupted while it matches, so another one tries, which its own timer kills.

    Raises:
        UserError: it is not.
    """
    if not isinstance(pattern, str) or not re.search(r"[*+{?]", pattern):
        return
    command = [sys.executable, "-I", "-S", "-c", MATCH, str(MATCH_SECONDS)]
    tried = subprocess.run(command, input=json.dumps([pattern, list(names)]).encode(), capture_output=True)
    if tried.returncode == -signal.SIGVTALRM:
        raise UserError(
            f"{what} takes more than {MATCH_SECONDS} seconds to be compared with the {len(names):,} names of the model's "
            "modules.",
            "Write it without repetitions inside of repetitions, or give a list of names.",
        )


def fresh_adapters(model: PreTrainedModel, config: StudentConfig, unread: Sequence[str]) -> nn.Module:
    """A model in new adapters as `student.lora` says, none of them on modules that are `unread`.

    Raises:
        UserError: as `add_lora`, but that merging is not proved.
    """
    import peft

    assert config.lora is not None
    given = f"student.lora.target_modules {foreign(repr(config.lora.target_modules), 100)}"
    check_pattern(config.lora.target_modules, [name for name, _ in model.named_modules()], given)
    options = peft.LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # peft takes floats
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        exclude_modules=list(unread) or None,
        task_type="CAUSAL_LM",
    )
    head = model.get_output_embeddings()
    try:
        with warnings.catch_warnings():  # of tied embeddings, which are refused below
            warnings.simplefilter("ignore", UserWarning)
            wrapped = peft.get_peft_model(model, options)
    except ValueError as error:  # peft's own error for modules that do not exist is one
        raise UserError(f"{given} does not fit: {foreign(error)}") from error
    check_wrapped(wrapped, model, head, "student.lora.target_modules", "Leave it out.")
    return wrapped


def check_wrapped(wrapped: nn.Module, model: PreTrainedModel, head: nn.Module, what: str, remedy: str) -> None:
    """See that adapters leave the language-model head, which was `head` before them, alone.

    Raises:
        UserError: they don't.
    """
    if model.get_output_embeddings() is not head:
        raise UserError(f"{what} names the language-model head, which npd reads as one plain matrix.", remedy)
    if any(parameter is head.weight for _, parameter in adapted(wrapped)):
        raise UserError(
            f"{what} names the embedding, which this model ties to its language-model head: adapters would change the one "
            "and not the other, and no merged model could hold both.",
            remedy,
        )


def _routers(model: PreTrainedModel) -> list[str]:
    """Names of linear layers that a family gives a meaning of its own, such as routers: an adapter would not know it."""
    own = type(model).__module__
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__ == own and type(module).forward is not nn.Linear.forward
    ]


@torch.no_grad()
def prove_merge(model: nn.Module, name: str) -> None:
    """See that merged weights compute what weights and adapters do, with adapters that do something.

    Raises:
        UserError: they don't.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    started = [p.clone() for p in learned]
    ids = probe_ids(base_model(model), 12)[None]
    positions = torch.arange(12, device=ids.device)[None]
    training = model.training
    model.eval()
    changed: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with model.disable_adapter():  # type: ignore[operator]
            plain = hidden_states(model, ids, positions).float()
        for parameter in learned:
            if not parameter.any():  # peft starts one of the two matrices of an adapter at zero
                parameter.copy_(0.1 * torch.sin(torch.arange(parameter.numel(), device=parameter.device)).view_as(parameter))
        theirs = hidden_states(model, ids, positions).float()
        for layer, parameter in adapted(model):
            changed.append((parameter, parameter.to("cpu", copy=True)))
            parameter.copy_(merged_weight(layer, parameter))
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
            f"Adapters like those of the student would not reach what is saved of {name}: with them merged into the "
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
