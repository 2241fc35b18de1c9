"""What the files of a model tell before anything of it is loaded: is it whole, of a kind that npd reads, of which types."""

from __future__ import annotations

import importlib.util
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from npd.errors import UserError, foreign
from npd.inputs import Unreadable, check_file, parse_json, read_json, reason

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
AGAIN = "Fetch or copy it again."
LONGEST_HEADER = 100_000_000  # bytes, as the format has it
LONGEST_CONFIG = 64 << 20  # bytes of a configuration or an index
READ = {".json", ".jinja", ".model", ".txt", ".safetensors", ".gguf", ".py"}  # what libraries open in a model's directory
# Most of what a configuration may ask for: more than any model has, and less than takes long to describe.
LAYERS, EXPERTS, WIDTH = 4096, 1 << 16, (1 << 31) - 1
LAYER_KEYS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"}
EXPERT_KEYS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
SIZE_KEYS = {"hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head", "n_heads", "head_dim"}
WIDE = (
    "_size",
    "_dim",
    "_heads",
    "_embeddings",
    "_experts",
    "_rank",
    "_layers",
    "n_embd",
    "d_model",
    "n_head",
    "n_positions",
)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> {dtype, shape, data_offsets}.

    Raises:
        UserError: it is cut off, or no safetensors file.
    """
    name = foreign(path, 200)
    try:
        size = check_file(path).st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, LONGEST_HEADER):
                raise ValueError("its header is longer than the file, or than any header")
            header: dict[str, Any] = parse_json(file.read(length).decode())
        header.pop("__metadata__", None)
        for tensor, said in header.items():
            begin, end = said["data_offsets"]
            if not all(type(n) is int and 0 <= n < 1 << 62 for n in (begin, end, *said["shape"])) or begin > end:
                raise ValueError(f"{tensor} has no shape or no place")
            if said["dtype"] in PLAIN and math.prod(said["shape"]) * PLAIN[said["dtype"]].itemsize != end - begin:
                raise ValueError(f"{tensor} has another shape than its bytes")
        whole = 8 + length + max((said["data_offsets"][1] for said in header.values()), default=0)
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{name} is no whole safetensors file ({foreign(reason(error))}).", AGAIN) from error
    if size != whole:
        raise UserError(f"{name} has {size:,} bytes, but its header says {whole:,}.", AGAIN)
    return header


def check_config(file: Path) -> None:
    """See that a model's configuration is one, and asks for no model that nobody could describe, let alone hold.

    Raises:
        UserError: it is not, or it does; the key is named.
    """
    name = foreign(file, 200)
    try:
        tree = read_json(file, LONGEST_CONFIG)
    except (FileNotFoundError, Unreadable) as error:
        what = f"The configuration of {foreign(file.parent, 200)} cannot be loaded: {file.name}: {foreign(reason(error))}."
        raise UserError(what, AGAIN) from error
    if not isinstance(tree, dict):
        raise UserError(f"{name} holds {type(tree).__name__}, not an object.", AGAIN)
    kinds = tree.get("architectures")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise UserError(f"{name} says architectures: {foreign(kinds, 60)}, which is no list of names.", AGAIN)
    left = [("", tree)]
    while left:
        prefix, part = left.pop()
        for key, value in part.items():
            where = foreign(f"{prefix}{key}", 100)
            if isinstance(value, dict):
                left.append((f"{where}.", value))
            elif (most := _most(key)) is not None and not _is_size(value, most, exact=key in LAYER_KEYS | SIZE_KEYS):
                raise UserError(
                    f"{name} says {where}: {foreign(repr(value) if isinstance(value, str) else value, 60)}; a model has at "
                    f"least 1 and at most {most:,}.",
                    AGAIN,
                )
        layers = max([n for key in LAYER_KEYS if type(n := part.get(key)) is int], default=1)
        experts = max([n for key in EXPERT_KEYS if type(n := part.get(key)) is int], default=1)
        if layers * experts > 1 << 18:
            raise UserError(f"{name} says {layers:,} layers of {experts:,} experts, which no model has.", AGAIN)


def _most(key: str) -> int | None:
    """The most that an option of a model's configuration may be; None where it is no size."""
    if key in LAYER_KEYS:
        return LAYERS
    if key in EXPERT_KEYS:
        return EXPERTS
    return WIDTH if key in SIZE_KEYS or key.endswith(WIDE) else None


def _is_size(value: Any, most: int, *, exact: bool) -> bool:
    """Is it one? Some options may also be null, a list, a truth or -1 (`exact`: not those that every model has)."""
    if type(value) is int:
        return (1 if exact else -most) <= value <= most
    return value is None or (not exact and not (isinstance(value, float) and abs(value) > most))


def check_ordinary(directory: Path) -> None:
    """See that what libraries will open in a model's directory are files (a pipe, or a device, may never end), and its
    configuration as `check_config` has it.

    Raises:
        UserError: one is something else.
    """
    for path in directory.iterdir():
        if path.suffix in READ:
            try:
                check_file(path)
            except FileNotFoundError:  # a link to nothing: whoever needs it will say so
                continue
            except Unreadable as error:
                raise UserError(f"{foreign(path, 200)} cannot be read: {foreign(error)}.", AGAIN) from error
    if (directory / "config.json").is_file():
        check_config(directory / "config.json")


def check_claims(model: str, files: list[Path], parameters: int, *, quantised: bool) -> None:
    """See that a model's files hold about as many parameters as its configuration describes, before any is allocated.

    Raises:
        UserError: they hold far fewer.
    """
    there = 0
    for path in files:
        for tensor in read_header(path).values():
            begin, end = tensor["data_offsets"]
            there += 16 * (end - begin) if quantised else math.prod(tensor["shape"])
    if parameters > 2 * there + (1 << 20):
        held = "at most " * quantised + f"{there:,}"
        raise UserError(
            f"The config.json of {foreign(model, 200)} describes a model of {parameters:,} parameters, but its files hold "
            f"{held}: they do not belong together.",
            "Restore the directory.",
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model's directory.

    Raises:
        UserError: there are none, or one that the index names is missing; the message says what lies there instead.
    """
    index = directory / INDEX
    if index.is_file() and not (directory / "model.safetensors").is_file():
        try:
            names = sorted(set(read_json(index, LONGEST_CONFIG)["weight_map"].values()))
            outside = next((name for name in names if Path(name).is_absolute() or ".." in Path(name).parts), None)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{foreign(index, 200)} cannot be read ({foreign(reason(error))}).", AGAIN) from error
        if outside is not None:
            raise UserError(
                f"{foreign(index, 200)} names the file {foreign(outside, 100)!r}, outside of its directory.", AGAIN
            )
        gone = [name for name in names if not (directory / name).is_file()]
        if gone:
            raise UserError(
                f"The weights of {foreign(directory, 200)} are not whole: {len(gone)} of {len(names)} files that {INDEX} "
                f"names are missing ({foreign(', '.join(gone[:3]), 200)}).",
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
            "Give the model that they were trained on, and beside it this directory as `adapter`.",
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
    raise UserError(f"{model} holds no weights (no .safetensors file).", AGAIN)


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
        try:
            check_file(gguf)
        except (FileNotFoundError, Unreadable) as error:
            raise UserError(f"{foreign(gguf, 200)} cannot be read: {foreign(reason(error))}.", AGAIN) from error
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"{gguf} needs the package gguf.", "pip install 'npd[gguf]'.")
        with gguf.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{gguf} is no GGUF file.", AGAIN)
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


def check_generation_config(file: Path) -> None:
    """See that a file that transformers would leave out, or stumble over, says what it is there for.

    Raises:
        UserError: it does not.
    """
    if not file.is_file():
        return
    remedy = "Restore it, or delete it: npd asks the tokenizer, its chat template and config.json for stop tokens as well."
    try:
        tree = read_json(file, 1 << 20)
    except Unreadable as error:
        raise UserError(f"{foreign(file, 200)} cannot be read: {foreign(error)}.", remedy) from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds {type(tree).__name__}, not an object.", remedy)
    named = tree.get("eos_token_id")
    for token in named if isinstance(named, list) else [named]:
        if token is not None and (type(token) is not int or token < 0):
            raise UserError(f"{file} names {str(token)[:60]!r} as eos_token_id, which is no token id.", remedy)
    try:
        GenerationConfig.from_dict(tree)
    except Exception as error:  # whatever transformers makes of values of another kind
        raise UserError(f"{foreign(file, 200)} can't be used ({type(error).__name__}: {foreign(error)}).", remedy) from error
