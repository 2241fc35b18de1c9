"""Models, tokenizers and configurations from directories, GGUF files, packages and the Hub."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from npd.config import ModelConfig, StudentConfig
from npd.errors import UserError, foreign
from npd.models.adapters import merge_adapter
from npd.models.devices import device, resolve_dtype
from npd.models.files import (
    check_claims,
    check_files,
    check_generation_config,
    check_names,
    check_ordinary,
    check_quantisation,
    plain_quantisation,
    quantisation_of,
    stored_dtype,
    weight_files,
)
from npd.models.proof import prove_layout
from npd.models.sources import directory_of, source_of
from npd.models.tokens import named_stops

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
    except BaseException as error:
        # Libraries written in Rust panic with what is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        detail = foreign(error, 500)
        hint = "If it is a Hub id, check its name, your network and `hf auth login`; if a directory, that it is whole."
        if "trust_remote_code" in detail:
            hint = "It needs code of its own; set trust_remote_code: true if you trust its authors."
        raise UserError(
            f"The {what} of {foreign(config.model, 200)} cannot be loaded: {type(error).__name__}: {detail} {hint}"
        ) from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; one without a padding token pads with its end-of-text token.

    Raises:
        UserError: it cannot be loaded, or has no end-of-text token.
    """
    source = source_of(config)
    with _explained(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer("1 + 1?")  # some damage shows here
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of {config.model} has no eos_token, so a response could never stop; set one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: ModelConfig) -> transformers.PreTrainedConfig:
    """A model's own configuration, without its weights.

    Raises:
        UserError: it cannot be loaded, or is that of no model which npd reads.
    """
    source = source_of(config)
    path = Path(source["pretrained_model_name_or_path"])
    if path.is_dir() and "gguf_file" not in source and not (path / "config.json").is_file():
        check_names(config.model, [each.name for each in path.iterdir()])
    directory = directory_of(config)
    if directory is not None and not path.is_dir():  # what the Hub gave
        check_ordinary(directory)
    with _explained(config, "configuration"):
        loaded = AutoConfig.from_pretrained(**source)
    if loaded.is_encoder_decoder:
        raise UserError(
            f"{config.model} ({loaded.model_type}) is an encoder-decoder: it reads a prompt with one half and writes with "
            "the other, which npd does not support.",
            "Choose a decoder-only language model.",
        )
    words = getattr(loaded.get_text_config(), "vocab_size", None)
    if type(words) is not int or words < 1:
        raise UserError(f"The configuration of {foreign(config.model, 200)} has no vocab_size.", "Fetch or copy it again.")
    return loaded


def check_weights(config: ModelConfig, model_config: transformers.PreTrainedConfig, *, trained: bool = False) -> list[str]:
    """See from file lists and headers that a model's weights are there, whole, and of a kind that can be loaded.

    Returns:
        What the user should know.

    Raises:
        UserError: they are not.
    """
    source = source_of(config)
    path = Path(source["pretrained_model_name_or_path"])
    gguf = path / source["gguf_file"] if "gguf_file" in source else None
    check_files(path if path.is_dir() else None, gguf, config.model, config.revision)
    kind = _auto_class(config.model, model_config, trust_remote_code=config.trust_remote_code)
    seen = check_quantisation(config.model, model_config, trained=trained)
    if path.is_dir() and gguf is None and type(model_config) in kind._model_mapping:
        quantised = quantisation_of(model_config) is not None
        check_claims(config.model, weight_files(path), parameter_count(model_config), quantised=quantised)
    return seen


def _auto_class(name: str, model_config: transformers.PreTrainedConfig, *, trust_remote_code: bool) -> Any:
    """The Auto class that makes of a checkpoint what it was saved as: multimodal ones keep what npd does not read.

    Raises:
        UserError: transformers has no model of this type that writes text.
    """
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    autos: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    kinds = [k for k in autos if type(model_config) in k._model_mapping]
    if not kinds:
        raise UserError(
            f"{name} ({model_config.model_type}) is no language model that writes text, as far as transformers "
            f"{transformers.__version__} knows; it can't be used."
        )
    saved_as = (model_config.architectures or [""])[0]
    return next((k for k in kinds if k._model_mapping[type(model_config)].__name__ == saved_as), kinds[0])


# Names of tensors that only quantised checkpoints have.
QUANTISED = re.compile(r"(_scale|_scale_inv|_scales|_blocks|_packed|\.qweight|\.qzeros|\.absmax|\.quant_state\..*)$")


def load_model(config: ModelConfig, *, trained: bool = False, on: str | None = None) -> PreTrainedModel:
    """A language model on a device (default `device()`), with the way to read it found and proved (`layout_of`).

    Args:
        trained: its weights will change: they are plain ones, in the type that training keeps them in.

    Raises:
        UserError: it cannot be loaded, is damaged, or cannot be read as each sample alone.
    """
    # Of a GPU's attention kernels cuDNN's makes a plan for each new shape, and takes up to a second for one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    source = source_of(config)
    model_config = load_model_config(config)
    kind = _auto_class(config.model, model_config, trust_remote_code=config.trust_remote_code)
    check_quantisation(config.model, model_config, trained=trained)
    loading: dict[str, Any] = source | {"dtype": resolve_dtype(config, trained=trained, on=on)}
    if "gguf_file" not in source:
        loading["use_safetensors"] = True
    dequantised = trained and "gguf_file" not in source and quantisation_of(model_config) is not None
    if dequantised:
        loading["quantization_config"] = plain_quantisation(model_config)
    # Some families have an attention of their own, and no other.
    attentions = ("sdpa", "eager") if config.attention in ("auto", "rows") else (config.attention,)
    with _explained(config, "model"):
        for attention in attentions:
            try:
                loaded: Any = kind.from_pretrained(**loading, attn_implementation=attention, output_loading_info=True)
                break
            except ValueError as error:
                if attention == attentions[-1] or "attention implementation" not in str(error):
                    raise
        model, info = loaded
    check_loaded(config.model, model, info)
    if "gguf_file" in source or dequantised:
        _unmark(model)
    mend_generation_config(model)
    if dequantised:
        model = model.to(loading["dtype"])
    if config.adapter is not None and not (trained and isinstance(config, StudentConfig) and config.continues):
        model = merge_adapter(model, config, quantised=quantisation_of(model_config) is not None and not dequantised)
    model = model.to(on or device()).eval()
    prove_layout(model, config.model, varlen=config.attention == "auto")
    return model


def check_loaded(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """See that a model took all of its weights, and that they are finite.

    Raises:
        UserError: they are not.
    """
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise UserError(
            f"The weights of {name} are not whole: {len(missing)} tensors are missing or of another shape than "
            f"config.json says ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Restore the directory."
        )
    quantised = sorted(key for key in map(str, info["unexpected_keys"]) if QUANTISED.search(key))
    if quantised:
        raise UserError(
            f"The weights of {name} are quantised, but its config.json does not say how: {len(quantised)} tensors are left "
            f"over ({', '.join(quantised[:3])}{', ...' if len(quantised) > 3 else ''}), without which the others mean "
            "nothing.",
            "Restore config.json, or give the checkpoint before its quantisation.",
        )
    bad = next(not_finite(model.named_parameters()), None)
    if bad is not None:
        raise UserError(f"The weights of {name} are damaged: {bad} has values that are not finite.", "Restore them.")


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    for name, tensor in tensors:
        if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and tensor.numel():
            low, high = tensor.detach().aminmax()
            if not bool(low.isfinite() & high.isfinite()):
                yield name


def mend_generation_config(model: PreTrainedModel) -> None:
    """Make a model's generation_config one that transformers saves: it refuses options of sampling beside greedy decoding."""
    options = getattr(model, "generation_config", None)
    if options is None or _is_saved(options):
        return
    options.do_sample = True  # what those who give a temperature mean
    if not _is_saved(options):
        kept = {name: getattr(options, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = transformers.GenerationConfig(**kept)


def _is_saved(options: transformers.GenerationConfig) -> bool:
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options.validate(strict=True)
    except ValueError:
        return False
    return True


def _unmark(model: PreTrainedModel) -> None:
    """transformers has dequantised every weight, but would still refuse to save the model as not serialisable."""
    for owner in (model, model.config):
        for mark in ("hf_quantizer", "quantization_config", "quantization_method", "is_quantized"):
            if mark in vars(owner):
                delattr(owner, mark)


def saved_dtype(config: ModelConfig) -> torch.dtype | None:
    """The type in which a model that began as a checkpoint is saved: the one that is named, else the checkpoint's own.

    None where that is not known, or is no type of plain weights: then as it is in memory.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    directory = directory_of(config)
    if directory is not None:
        return stored_dtype(weight_files(directory))
    if config.model.endswith(".gguf"):
        return None
    declared = load_model_config(config).dtype
    return declared if isinstance(declared, torch.dtype) else None


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


def parameter_count(config: transformers.PreTrainedConfig, *, trust_remote_code: bool = False) -> int:
    """Parameters of a model, from its configuration alone."""
    return sum(parameter.numel() for parameter in shape_of(config, trust_remote_code=trust_remote_code).parameters())


def shape_of(
    config: transformers.PreTrainedConfig,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    on: str = "meta",
) -> PreTrainedModel:
    """A model with no weights of a checkpoint, by default without any, on the meta device."""
    kind = _auto_class("a model", config, trust_remote_code=trust_remote_code)
    try:
        with torch.device(on), quiet_transformers():
            model: PreTrainedModel = kind.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
        model.tie_weights()
    except Exception as error:  # whatever a family's code makes of options that do not go together
        raise UserError(
            f"The configuration of a {foreign(config.model_type, 60)} model describes none that can be built "
            f"({type(error).__name__}: {foreign(error)}).",
            "Restore its config.json.",
        ) from error
    return model


def stop_ids_of(config: ModelConfig) -> list[int]:
    """The stop tokens that a model's directory names in generation_config.json, or where there is none in config.json.

    `shared_vocabulary` joins what the tokenizer, its chat template and the configurations say.

    Raises:
        UserError: generation_config.json is there and malformed.
    """
    source = source_of(config)
    if "gguf_file" in source:
        return []
    check_generation_config(Path(source["pretrained_model_name_or_path"]) / "generation_config.json")
    try:
        source.pop("trust_remote_code")
        found: Any = transformers.GenerationConfig.from_pretrained(source.pop("pretrained_model_name_or_path"), **source)
    except OSError:
        found = load_model_config(config)
    return named_stops(found)


def snapshot_config(config: StudentConfig, path: Path) -> StudentConfig:
    """The same loading options for the weights in `path`, which are whole: adapters are merged."""
    return config.model_copy(update={"model": str(path), "revision": None, "lora": None, "adapter": None})
