"""Students that train adapters: fresh ones, or one that is there and is gone on with; and one base under several of these."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from npd.config import ModelConfig, StudentConfig
from npd.errors import UserError, foreign
from npd.models.adapters import WEIGHTS, explained_adapter, read_adapter
from npd.models.devices import resolve_dtype
from npd.models.files import read_header
from npd.models.loading import not_finite, shape_of
from npd.models.students import add_lora, check_pattern, check_wrapped, fresh_adapters, prove_merge

Shapes = Mapping[str, tuple[int, ...]]
SHOWN = 3


def check_adapter(config: ModelConfig, known: PreTrainedConfig) -> list[str]:
    """See from files and headers that a model's adapter, if it has one, belongs on it.

    Returns:
        What the user should know.

    Raises:
        UserError: it does not, or `student.lora` describes another one to go on with.
    """
    if config.adapter is None:
        return []
    folder, options = read_adapter(config)
    with explained_adapter(config):
        wrapped = _shape_with(config, known, folder)
        wanted = _shapes(wrapped)
    header = read_header(folder / WEIGHTS)
    there = {name: tuple(said["shape"]) for name, said in header.items() if ".base_layer." not in name}
    if odd := sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name)):
        raise UserError(
            f"The adapter {foreign(folder, 200)} does not belong on {foreign(config.model, 200)}: {len(odd)} of its tensors "
            f"are missing, left over or of another shape ({_told(odd, wanted, there)}).",
            "Give the model that it was trained on.",
        )
    if isinstance(config, StudentConfig) and config.continues and config.lora is not None:
        _check_same(config, known, folder, options, there)
    return []


def _told(odd: list[str], wanted: Shapes, there: Shapes) -> str:
    shown = [
        f"{foreign(name, 120)} is {list(there[name]) if name in there else 'missing'}"
        + (f", not {list(wanted[name])}" if name in wanted and name in there else "" if name in wanted else " and left over")
        for name in odd[:SHOWN]
    ]
    return "; ".join(shown) + ("; ..." if len(odd) > SHOWN else "")


def _check_same(config: StudentConfig, known: PreTrainedConfig, folder: Path, options: dict[str, Any], there: Shapes) -> None:
    assert config.lora is not None
    shape = shape_of(known, trust_remote_code=config.trust_remote_code)
    differing = [] if _shapes(fresh_adapters(shape, config, ())) == dict(there) else ["r or target_modules"]
    if options.get("lora_alpha") != config.lora.alpha or options.get("use_rslora") or options.get("alpha_pattern"):
        differing.append("alpha")
    if differing:
        raise UserError(
            f"student.lora describes another adapter than {foreign(folder, 200)} ({' and '.join(differing)} differ: it has r "
            f"{foreign(options.get('r'), 20)} and lora_alpha {foreign(options.get('lora_alpha'), 20)}), and "
            "student.adapter_mode continue goes on with that one.",
            "Leave student.lora out, or set student.adapter_mode: merge to train a fresh one on top of the merged weights.",
        )


def _shape_with(config: ModelConfig, known: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model without weights, with an adapter without weights."""
    import peft

    options: Any = peft.PeftConfig.from_pretrained(str(folder))
    options.init_lora_weights = True
    shape = shape_of(known, trust_remote_code=config.trust_remote_code, dtype=dtype)
    names = [name for name, _ in shape.named_modules()]
    patterns = [options.layers_pattern] if isinstance(options.layers_pattern, str) else options.layers_pattern or []
    for pattern in (options.target_modules, options.exclude_modules, *patterns):
        check_pattern(pattern, names, f"The adapter's pattern {foreign(repr(pattern), 100)}")
    return peft.get_peft_model(shape, options)


def _shapes(wrapped: nn.Module) -> dict[str, tuple[int, ...]]:
    import peft

    state = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def with_adapters(model: PreTrainedModel, config: StudentConfig) -> nn.Module:
    """A student as it is trained: in the adapter that it goes on with, in fresh ones as `student.lora` says, or as it is.

    Raises:
        UserError: as `add_lora`; or the adapter does not fit, or is damaged.
    """
    if not config.continues:
        return add_lora(model, config) if config.lora is not None else model
    import peft

    folder, _ = read_adapter(config)
    name, head = f"The adapter {foreign(folder, 200)}", model.get_output_embeddings()
    with explained_adapter(config):
        options: Any = peft.PeftConfig.from_pretrained(str(folder))
        if config.lora is not None:
            options.lora_dropout = config.lora.dropout
        wrapped = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=options)
    bad = next(not_finite((each, p) for each, p in wrapped.named_parameters() if p.requires_grad), None)
    if bad is not None:
        raise UserError(f"{name} is damaged: {bad} has values that are not finite.", "Restore it.")
    check_wrapped(wrapped, model, head, name, "Set student.adapter_mode: merge.")
    prove_merge(wrapped, config.model)
    return wrapped


def adapter_bytes(known: PreTrainedConfig, config: StudentConfig, *, half: bool | None = None) -> int:
    """Bytes of a student's adapters at most, from the model's configuration alone; 0 where it trains all weights.

    Args:
        half: as `resolve_dtype`.

    Raises:
        UserError: as `add_lora`.
    """
    if not config.adapts:
        return 0
    dtype = resolve_dtype(config, trained=True, half=half)
    if config.continues:
        wrapped = _shape_with(config, known, read_adapter(config)[0], dtype)
    else:
        wrapped = fresh_adapters(shape_of(known, trust_remote_code=config.trust_remote_code, dtype=dtype), config, ())
    return sum(p.numel() * p.element_size() for p in wrapped.parameters() if p.requires_grad)


class Switchable:
    """One base in memory that is a student with the adapters of its snapshots, and without them what it began as."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self._wrapped: Any = None
        self._off = True  # has the snapshot that was taken last no adapters?

    def take(self, folder: Path) -> None:
        """Be the snapshot whose adapters lie in a folder; where there is none, they have changed nothing yet."""
        import peft

        self._off = not folder.is_dir()
        if not self._off and self._wrapped is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._wrapped = peft.PeftModel.from_pretrained(self.base, str(folder)).eval()
        elif not self._off:
            peft.set_peft_model_state_dict(self._wrapped, load_file(folder / WEIGHTS))
        if self._wrapped is not None:
            switch = "disable_adapter_layers" if self._off else "enable_adapter_layers"
            getattr(self._wrapped.base_model, switch)()

    @contextmanager
    def _disabled(self) -> Iterator[None]:
        with self._wrapped.disable_adapter():
            yield

    def without(self) -> AbstractContextManager[None]:
        """Around what the base computes by itself."""
        return nullcontext() if self._off else self._disabled()
