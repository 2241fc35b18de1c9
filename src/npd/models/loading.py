"""Models, tokenizers and configurations from directories, GGUF files, packages and the Hub."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from npd.config import ModelConfig, StudentConfig
from npd.errors import UserError
from npd.models.devices import device, resolve_dtype
from npd.models.reading import check_model
from npd.models.tokens import named_stops


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


def context_length(config: transformers.PreTrainedConfig) -> int | None:
    """Most tokens a model reads, if its configuration says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context(name: str, config: transformers.PreTrainedConfig, prompt: int, response: int, option: str) -> None:
    """See that a model reads prompts and responses of these tokens; `option` is what bounds a response.

    Raises:
        UserError: together they pass its context.
    """
    context = context_length(config)
    if context is not None and prompt + response > context:
        raise UserError(
            f"The longest prompt ({prompt} tokens) and {option} ({response}) together pass the context of "
            f"{name} ({context} tokens). Lower data.max_prompt_tokens or {option}."
        )


def directory_of(config: ModelConfig) -> Path | None:
    """The directory that holds a model's files here: of a Hub id, what is in the cache; None where there is none, or GGUF."""
    source = _source(config)
    if "gguf_file" in source:
        return None
    name = source["pretrained_model_name_or_path"]
    if Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, "config.json", revision=config.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def parameter_count(config: transformers.PreTrainedConfig, *, trust_remote_code: bool = False) -> int:
    """Parameters of a model, from its configuration alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def stop_ids_of(config: ModelConfig) -> list[int]:
    """The stop tokens that a model's directory names in generation_config.json, or where there is none in config.json.

    `shared_vocabulary` joins what the tokenizer, its chat template and the configurations say.
    """
    source = _source(config)
    if "gguf_file" in source:
        return []
    try:
        source.pop("trust_remote_code")
        found: Any = transformers.GenerationConfig.from_pretrained(source.pop("pretrained_model_name_or_path"), **source)
    except OSError:
        found = load_model_config(config)
    return named_stops(found)


def snapshot_config(config: StudentConfig, path: Path) -> StudentConfig:
    """The same loading options for the weights in `path`, which are whole: adapters are merged."""
    return config.model_copy(update={"model": str(path), "revision": None, "lora": None})
