"""What the files of a model tell before anything of it is loaded: is it whole, of a kind that npd reads, of which types."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from npd.errors import UserError

# Safetensors' names of the types that weights are computed with; all others are packed or scaled.
PLAIN = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Packages of quantisation methods that have one, by the method's name in a configuration.
PACKAGES = {
    "awq": "gptqmodel",
    "gptq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "quanto": "optimum",
    "hqq": "hqq",
    "torchao": "torchao",
    "aqlm": "aqlm",
    "vptq": "vptq",
    "auto-round": "auto_round",
    "mxfp4": "kernels",
}
INDEX = "model.safetensors.index.json"


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> {dtype, shape, data_offsets}.

    Raises:
        UserError: it is cut off, or no safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}).", "Fetch or copy it again.") from error
    if size != end:
        raise UserError(f"{path} has {size:,} bytes, but its header says {end:,}.", "Fetch or copy it again.")
    return header


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model's directory.

    Raises:
        UserError: there are none, or one that the index names is missing; the message says what lies there instead.
    """
    index = directory / INDEX
    if index.is_file() and not (directory / "model.safetensors").is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} cannot be read ({error}).", "Fetch or copy it again.") from error
        gone = [name for name in names if not (directory / name).is_file()]
        if gone:
            raise UserError(
                f"The weights of {directory} are not whole: {len(gone)} of {len(names)} files that {INDEX} names are missing "
                f"({', '.join(gone[:3])}).",
                "Fetch or copy the directory again.",
            )
        return [directory / name for name in names]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    check_names(str(directory), [path.name for path in directory.iterdir()])
    return sorted(directory.glob("*.safetensors"))


def check_names(model: str, names: list[str]) -> None:
    """See from the names of a model's files that there are weights which npd loads.

    Raises:
        UserError: there are none; the message says what there is instead.
    """
    if "adapter_config.json" in names and "config.json" not in names:
        raise UserError(
            f"{model} holds adapters, no model.",
            "Give the model that they were trained on; to start from the two together, merge them first (peft's "
            "merge_and_unload) and save the result.",
        )
    if any(name.endswith(".safetensors") and not name.startswith("adapter") for name in names):
        return
    gguf = next((name for name in sorted(names) if name.endswith(".gguf")), None)
    if gguf is not None:
        raise UserError(f"{model} has its weights as GGUF.", f"Name the file itself: {Path(model) / gguf}.")
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "training_args" not in name]
    if pickled:
        raise UserError(
            f"{model} has its weights as pickled files ({pickled[0]}), which npd does not load: they can run any code.",
            "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(..., use_safetensors=False), then "
            "save_pretrained.",
        )
    raise UserError(f"{model} holds no weights (no .safetensors file).", "Fetch or copy it again.")


def stored_dtype(files: list[Path]) -> torch.dtype | None:
    """The type in which most of the weights are stored; None where most are quantised or there is none."""
    counts: Counter[str] = Counter()
    for path in files:
        for tensor in read_header(path).values():
            size = 1
            for n in tensor["shape"]:
                size *= n
            counts[tensor["dtype"]] += size
    return PLAIN.get(counts.most_common(1)[0][0]) if counts else None


def quantisation_of(config: PreTrainedConfig) -> str | None:
    """The method by which a checkpoint is quantised, as its configuration names it."""
    options = getattr(config, "quantization_config", None)
    if options is None:
        return None
    method = options.get("quant_method") if isinstance(options, dict) else getattr(options, "quant_method", None)
    return str(getattr(method, "value", method) or "bitsandbytes")


def plain_quantisation(config: PreTrainedConfig) -> Any:
    """Options by which transformers loads a quantised checkpoint as plain weights; None where it cannot."""
    options: Any = getattr(config, "quantization_config", None)
    values = dict(options) if isinstance(options, dict) else options.to_dict()
    kind: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(quantisation_of(config) or "")
    try:
        plain: Any = kind.from_dict(values | {"dequantize": True}) if kind is not None else None
    except (TypeError, ValueError):
        return None
    return plain if getattr(plain, "dequantize", False) is True else None


def check_quantisation(model: str, config: PreTrainedConfig, *, trained: bool) -> list[str]:
    """See that a quantised checkpoint can be loaded, and as plain weights where it is trained.

    Returns:
        What the user should know.

    Raises:
        UserError: it can't.
    """
    method = quantisation_of(config)
    if method is None:
        return []
    package = PACKAGES.get(method)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"{model} is quantised ({method}), which needs the package {package}.", f"pip install {package}.")
    if not trained:
        return [f"{model} is quantised ({method}): what it says is that of its quantised weights."]
    if plain_quantisation(config) is None:
        raise UserError(
            f"The student {model} is quantised ({method}), and its weights cannot be trained.",
            "Give the checkpoint that it was made from, or a dequantised copy.",
        )
    return [f"The student {model} is quantised ({method}): it is trained, and saved, as plain weights."]


def check_files(directory: Path | None, gguf: Path | None, model: str, revision: str | None) -> None:
    """See that a model's weights are there and whole, from file lists and headers; a Hub id by its list of files.

    Raises:
        UserError: they are not.
    """
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"{gguf} needs the package gguf.", "pip install 'npd[gguf]'.")
        with gguf.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{gguf} is no GGUF file.", "Fetch or copy it again.")
    elif directory is not None:
        for path in weight_files(directory):
            read_header(path)
    else:
        from huggingface_hub import HfApi

        try:
            names = HfApi().list_repo_files(model, revision=revision)
        except Exception:  # no network: what is in the cache is found, or missed, when it is loaded
            return
        check_names(model, names)
