"""Load and save models, check that teacher and student fit each other, cut a student out of a teacher."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from npd.config import ModelConfig, StudentConfig
from npd.errors import UserError

# Numerical agreement asked of a packed row at load. Attention that leaks across samples differs by 0.3 and more.
PACKED_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.25, torch.float16: 0.05}

ADAPTER = "adapter"  # what a snapshot keeps a student's adapters in, besides the merged weights

PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  leading, doubled  spaces\n\n\ttabs and lines\r\n",
    "def f(x: int) -> str:\n    return f'{x!r}'  # café",
    "3.14159 + 2718 = 1000000; 50% of $20 [1/2]",
    "你好，世界。Привет, мир! こんにちは 👩‍🚀 مرحبا",
    "<b>not & markup</b> \\frac{a}{b}",
)


_placed: torch.device | None = None


def place_on(name: str | None) -> None:
    """Make this process's models run on a device; None: the first CUDA device if there is one, else the CPU."""
    global _placed
    _placed = None if name is None else torch.device(name)
    if _placed is not None and _placed.type == "cuda":
        torch.cuda.set_device(_placed)


def device() -> torch.device:
    """The device that models run on where nothing else is said."""
    return _placed or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bfloat16(on: str | None = None) -> bool:
    """Has a device (default `device()`) bfloat16 arithmetic of its own? Older GPUs only emulate it."""
    return torch.device(on or device()).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_dtype(config: ModelConfig, *, trained: bool, on: str | None = None) -> torch.dtype:
    """The type of a model's weights. `auto` takes bfloat16 only where the device is fast at it, so never on a CPU."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    frozen_base = isinstance(config, StudentConfig) and config.lora is not None
    return torch.bfloat16 if fast_bfloat16(on) and (frozen_base or not trained) else torch.float32


def _source(config: ModelConfig) -> dict[str, Any]:
    """Arguments of from_pretrained that name the weights."""
    name = config.model
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{name} names the Python package {package!r}, which is not installed; pip install it.")
        name = str(Path(next(iter(spec.submodule_search_locations))) / inner)
        if not Path(name).exists():
            raise UserError(f"{config.model}: the package {package!r} holds no {inner!r}.")
    path = Path(name)
    common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"There is no GGUF file {path}.")
        return common | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Two words with a slash may be a Hub id, unless the first is a directory here.
    local = path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.parent.is_dir()
    if local and not path.is_dir():
        raise UserError(f"There is no model directory {path}; give a directory, a .gguf file, or a Hub id (owner/name).")
    return common | {"pretrained_model_name_or_path": name}


_quiet_lock = threading.Lock()
_quiet_users: list[tuple[list[int], bool]] = []


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No advice and no bar for every file from transformers and its kin: npd has its own progress and errors.

    Threads may be in it at once: the first one in silences, the last one out restores.
    """
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "accelerate")]
    bars = transformers.utils.logging
    with _quiet_lock:
        before = _quiet_users[0] if _quiet_users else ([logger.level for logger in loggers], bars.is_progress_bar_enabled())
        _quiet_users.append(before)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        bars.disable_progress_bar()
    try:
        yield
    finally:
        with _quiet_lock:
            levels, enabled = _quiet_users.pop()
            if not _quiet_users:
                for logger, level in zip(loggers, levels, strict=True):
                    logger.setLevel(level)
                if enabled:
                    bars.enable_progress_bar()


@contextmanager
def _explained(config: ModelConfig, what: str) -> Iterator[None]:
    """Whatever transformers raises while it loads, as one paragraph."""
    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split())[:500]
        hint = "If it is a Hub id, check its name, your network and `hf auth login`; if a directory, that it is whole."
        if "trust_remote_code" in detail:
            hint = "It needs code of its own; set trust_remote_code: true if you trust its authors."
        raise UserError(f"The {what} of {config.model} cannot be loaded: {type(error).__name__}: {detail} {hint}") from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; one without a padding token pads with its end-of-text token.

    Raises:
        UserError: it cannot be loaded, or has no end-of-text token.
    """
    source = _source(config)
    with _explained(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of {config.model} has no eos_token, so a response could never stop; set one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: ModelConfig) -> transformers.PreTrainedConfig:
    """A model's own configuration, without its weights."""
    source = _source(config)
    with _explained(config, "configuration"):
        return AutoConfig.from_pretrained(**source)


def load_model(config: ModelConfig, *, trained: bool = False, on: str | None = None) -> PreTrainedModel:
    """A causal language model on a device (default `device()`), checked to read packed rows sample by sample.

    Raises:
        UserError: it cannot be loaded, changes its logits after the head, or mixes packed samples.
    """
    source = _source(config)
    attention = "sdpa" if config.attention == "auto" else config.attention
    with _explained(config, "model"):
        loading: dict[str, Any] = source | {
            "dtype": resolve_dtype(config, trained=trained, on=on),
            "attn_implementation": attention,
        }
        if "gguf_file" not in source:
            loading["use_safetensors"] = True
        loaded: Any = AutoModelForCausalLM.from_pretrained(**loading, output_loading_info=True)
        model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise UserError(
            f"The weights of {config.model} are not whole: {len(names)} tensors are missing or of another shape than "
            f"config.json says ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). Restore the directory."
        )
    if "gguf_file" in source and getattr(model, "hf_quantizer", None) is not None:
        # transformers has dequantised every weight, but would still refuse to save the model as not serialisable.
        del model.hf_quantizer
        for owner in (model, model.config):
            for mark in ("quantization_config", "quantization_method", "is_quantized"):
                if mark in vars(owner):
                    delattr(owner, mark)
    model = model.to(on or device()).eval()
    check_model(model, config.model)
    return model


def hidden_states(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, decoder: Callable[..., Any] | None = None
) -> Tensor:
    """Last hidden states [R, L, D] of packed rows [R, L]; `position_ids` restart at 0 with each sample.

    transformers separates packed samples only with no mask and no cache: with either, attention leaks in silence.
    `decoder` is called in place of the model's own, for instance a compiled one.
    """
    return (decoder or backbone(model))(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
    ).last_hidden_state


def check_compiler() -> None:
    """See that torch.compile works on this machine, which needs a compiler for C++, or Triton on a GPU.

    Raises:
        UserError: it does not.
    """
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device()))
    except Exception as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"training.compile is true, but torch.compile does not work here ({type(error).__name__}: {detail}). Install "
            f"{'Triton' if device().type == 'cuda' else 'a C++ compiler (g++ or clang)'}, or set training.compile: false."
        ) from error


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its head."""
    inner = base_model(model)
    return getattr(inner, inner.base_model_prefix)


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a peft model (adapters stay in place), or the model itself."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped


def head_weight(model: nn.Module) -> Tensor:
    """The language-model head's weight [V, D]."""
    return model.get_output_embeddings().weight  # type: ignore[operator]


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not hidden @ head.T, or whose packed rows differ from their samples alone."""
    ids = torch.arange(24, device=model.device) * 7 % min(model.config.get_text_config().vocab_size, 997)
    first, second = ids[:9], ids[9:]
    positions = torch.cat([torch.arange(9), torch.arange(15)]).to(ids)
    try:
        # Two rows: some attention implementations keep samples apart in a single row only.
        rows = hidden_states(model, torch.stack([ids.flip(0), ids]), torch.stack([positions, positions]))
        packed = rows[1] @ head_weight(model).T
    except (AttributeError, TypeError) as error:
        raise UserError(f"{name} is not a decoder with a plain language-model head ({error}); it can't be used.") from error
    alone = [model(input_ids=part[None], use_cache=False).logits[0] for part in (first, second)]
    tolerance = PACKED_TOLERANCE.get(model.dtype, 0.25) * max(1.0, float(alone[0].float().std()))
    differences = [
        float((mine.float() - theirs.float()).abs().max()) for mine, theirs in zip(packed.split([9, 15]), alone, strict=True)
    ]
    if differences[0] > tolerance:
        raise UserError(
            f"{name} ({model.config.model_type}) changes its logits after the language-model head (soft-capping, scaling "
            f"or a bias: they differ by {differences[0]:.2g}), which npd's loss does not support."
        )
    if differences[1] > tolerance:
        raise UserError(
            f"{name} ({model.config.model_type}, attention {model.config._attn_implementation}) mixes samples that share a "
            f"row: logits differ by {differences[1]:.2g} from the sample read alone. Choose another attention implementation."
        )


def context_length(config: transformers.PreTrainedConfig) -> int | None:
    """Most tokens a model reads, if its configuration says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def parameter_count(config: transformers.PreTrainedConfig, *, trust_remote_code: bool = False) -> int:
    """Parameters of a model, from its configuration alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Vocabulary:
    """What teacher and student share."""

    size: int
    """Token ids below this exist in both models and their tokenizers agree on them."""
    stop_ids: tuple[int, ...]
    """Ids that end a response."""
    start_id: int
    """The one token in front of a response that is read without its prompt: BOS, else EOS."""


def check_compatible(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """Refuse two tokenizers that would give the same ids another meaning; padded vocabularies are no difference.

    Raises:
        UserError: with the first few differences.
    """
    remedy = (
        "NPD compares the two models token by token, so they must share a tokenizer: choose models of one family, or save "
        "the teacher's tokenizer into the student's directory if only special tokens differ."
    )
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=str)
        shown = ", ".join(f"{t!r} is {ours.get(t)} / {theirs.get(t)}" for t in different[:3])
        raise UserError(
            f"The tokenizers of {names[0]} and {names[1]} differ in {len(different)} tokens (student's id / teacher's id: "
            f"{shown}). {remedy}"
        )
    for role in ("bos_token", "eos_token", "unk_token"):
        mine, other = getattr(student, role), getattr(teacher, role)
        if mine != other:
            raise UserError(
                f"{names[0]} and {names[1]} treat special tokens differently: {role} is {mine!r} / {other!r}. {remedy}"
            )
    for text in PROBES:
        mine, other = student(text)["input_ids"], teacher(text)["input_ids"]
        if mine != other:
            raise UserError(
                f"{names[0]} and {names[1]} turn the same text {text!r} into different ids ({mine[:8]} / {other[:8]} ...). "
                f"{remedy}"
            )


def shared_vocabulary(
    tokenizer: PreTrainedTokenizerBase, *configs: transformers.PreTrainedConfig, stop_ids: Sequence[int] = ()
) -> Vocabulary:
    """The ids that every model has, and the tokens that start and end a response."""
    size = min(config.get_text_config().vocab_size for config in configs)
    eos: list[int] = [tokenizer.eos_token_id, *stop_ids]
    highest = max(tokenizer.get_vocab().values())
    if highest >= size:
        raise UserError(
            f"The tokenizer has token id {highest}, but one of the models has only {size} embeddings: "
            "model and tokenizer do not belong together."
        )
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Vocabulary(size, tuple(sorted(set(eos))), int(start))


def stop_ids_of(config: ModelConfig) -> list[int]:
    """Further stop tokens from a model's generation_config.json, as chat models have them."""
    source = _source(config)
    if "gguf_file" in source:
        return []
    try:
        source.pop("trust_remote_code")
        ids = transformers.GenerationConfig.from_pretrained(
            source.pop("pretrained_model_name_or_path"), **source
        ).eos_token_id
    except OSError:
        return []
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


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
    if state is None and base is not model:
        state = State(_merged_state(model), _adapter_state(model))
    with quiet_transformers():
        base.save_pretrained(path, **({} if state is None else {"state_dict": state.weights}))
        tokenizer.save_pretrained(path)
    if state is not None and state.adapter is not None:
        options: Any = model.peft_config
        options["default"].save_pretrained(path / ADAPTER)
        save_file(state.adapter, path / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})


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


def snapshot_config(config: StudentConfig, path: Path) -> StudentConfig:
    """The same loading options for the weights in `path`, which are whole: adapters are merged."""
    return config.model_copy(update={"model": str(path), "revision": None, "lora": None})
