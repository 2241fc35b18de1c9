"""LoRA adapters as peft writes them: found, looked at before anything is loaded, and merged into the weights below them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from npd.config import ModelConfig, StudentConfig
from npd.errors import UserError, foreign
from npd.inputs import Unreadable, reason
from npd.inputs import read_json as read_bounded
from npd.models.files import AGAIN, LONGEST_CONFIG, check_ordinary, read_header
from npd.models.sources import is_hub_id

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Options of a LoRA adapter that change neither what the merged weights are, nor what is trained.
PLAIN = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights"),
    *("use_rslora", "use_dora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("target_parameters", "ensure_weight_tying"),
}
# What training does not go on with, but merging takes along.
MERGED = {"modules_to_save", "bias", "trainable_token_indices"}
INITS = (True, False, "gaussian", "orthogonal")  # which change no weight of the base


def adapter_directory(config: ModelConfig) -> Path:
    """Where a model's adapter lies here; of a Hub id its two files are fetched.

    Raises:
        UserError: there is none.
    """
    assert config.adapter is not None
    name = config.adapter
    path = Path(name)
    if path.is_dir():
        check_ordinary(path)
        return path
    if not is_hub_id(name):
        raise UserError(
            f"There is no adapter directory {foreign(path, 200)}; give a directory that peft wrote, or a Hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, "adapter_model.bin"]))
    except Exception as error:  # whatever the Hub, or its absence, makes of it
        raise UserError(
            f"The adapter {foreign(name, 200)} cannot be fetched ({type(error).__name__}: {foreign(error)}).",
            "Check its name and your network, or give a directory.",
        ) from error


def read_adapter(config: ModelConfig) -> tuple[Path, dict[str, Any]]:
    """A model's adapter: its directory, and its options as they stand there.

    Raises:
        UserError: it is none, none that npd takes, or has its weights in a pickle.
    """
    folder = adapter_directory(config)
    name = foreign(folder, 200)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name} holds no adapter (no {CONFIG}).", "Give the directory that peft's save_pretrained wrote.")
    try:
        options = read_bounded(folder / CONFIG, LONGEST_CONFIG)
    except Unreadable as error:
        raise UserError(f"{name}/{CONFIG} cannot be read: {foreign(reason(error))}.", AGAIN) from error
    if not isinstance(options, dict) or not isinstance(kind := options.get("peft_type"), str):
        raise UserError(f"{name}/{CONFIG} does not say what kind of adapter it is (peft_type).", AGAIN)
    if kind != "LORA":
        raise UserError(
            f"{name} is a {foreign(kind, 40)} adapter; npd takes LoRA adapters, DoRA and rsLoRA among them.",
            "Merge it (peft's merge_and_unload, then save_pretrained), and give the result as the model.",
        )
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"{name} has its weights as a pickled file (adapter_model.bin), which npd does not load: it can run any code."
            if pickled
            else f"{name} has no weights (no {WEIGHTS}).",
            "Convert it where you trust it: peft's PeftModel.from_pretrained, then save_pretrained." if pickled else AGAIN,
        )
    read_header(folder / WEIGHTS)
    _check_options(name, options, continues=isinstance(config, StudentConfig) and config.continues)
    return folder, options


def _check_options(name: str, options: dict[str, Any], *, continues: bool) -> None:
    import peft

    if options.get("init_lora_weights", True) not in INITS:
        raise UserError(
            f"{name} was begun with init_lora_weights {foreign(repr(options['init_lora_weights']), 60)}, which changes the "
            "weights below it.",
            "Save it with peft's path_initial_model_for_weight_conversion, which makes a plain LoRA adapter of it.",
        )
    usual = peft.LoraConfig().to_dict()
    known = PLAIN if continues else PLAIN | MERGED
    others = sorted(key for key, value in options.items() if key not in known and value and value != usual.get(key))
    if not others:
        return
    if continues and set(others) <= MERGED:
        raise UserError(
            f"{name} has {foreign(', '.join(others), 200)}, and training does not go on with that.",
            "Set student.adapter_mode: merge, which adds the adapter to the weights; a fresh student.lora may then train.",
        )
    raise UserError(
        f"{name} has {foreign(', '.join(others), 200)}, which npd does not know.",
        "Merge it (peft's merge_and_unload, then save_pretrained), and give the result as the model.",
    )


@contextmanager
def explained_adapter(config: ModelConfig) -> Iterator[None]:
    """Whatever peft raises while it loads an adapter, as one paragraph."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The adapter {foreign(config.adapter, 200)} cannot be put on {foreign(config.model, 200)}: "
            f"{type(error).__name__}: {foreign(error, 400)}",
            "Give the model that it was trained on.",
        ) from error


def merge_adapter(model: PreTrainedModel, config: ModelConfig, *, quantised: bool) -> PreTrainedModel:
    """A model with its adapter added to its weights; to quantised ones, which can't hold it, the adapter stays beside them.

    Raises:
        UserError: the adapter does not fit, or changes one of two weights that the model ties.
    """
    import peft

    folder, _ = read_adapter(config)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with explained_adapter(config):
        wrapped: Any = peft.PeftModel.from_pretrained(model, str(folder))
        merged: PreTrainedModel = wrapped.get_base_model() if quantised else wrapped.merge_and_unload(safe_merge=True)
    for parameter in merged.parameters():  # peft leaves them frozen
        parameter.requires_grad_(parameter.is_floating_point())
    if tied and not quantised and merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        raise UserError(
            f"The adapter {foreign(folder, 200)} changes the embedding or the language-model head of "
            f"{foreign(config.model, 200)}, which ties the two: no merged model could hold both.",
            "Train the adapter without them.",
        )
    return merged
