"""Where a model lies: directories, GGUF files, packages and the Hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from npd.config import ModelConfig
from npd.errors import UserError, foreign
from npd.models.files import check_ordinary


def source_of(config: ModelConfig) -> dict[str, Any]:
    """Arguments of from_pretrained that name the weights.

    Raises:
        UserError: there is nothing of that name.
    """
    name = config.model
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"{foreign(name, 200)} names the Python package {foreign(package, 80)!r}, which is not installed; "
                "pip install it."
            )
        name = str(Path(next(iter(spec.submodule_search_locations))) / inner)
        if not Path(name).exists():
            raise UserError(f"{foreign(config.model, 200)}: the package {package!r} holds no {foreign(inner, 100)!r}.")
    path = Path(name)
    common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"There is no GGUF file {path}.")
        return common | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if not is_hub_id(name) and not path.is_dir():
        raise UserError(
            f"There is no model directory {foreign(path, 200)}; give a directory, a .gguf file, or a Hub id (owner/name)."
        )
    if path.is_dir():
        check_ordinary(path)
    return common | {"pretrained_model_name_or_path": name}


def is_hub_id(name: str) -> bool:
    """May it be one? Two words with a slash, unless the first is a directory here."""
    path = Path(name)
    return not (path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.parent.is_dir())


def directory_of(config: ModelConfig) -> Path | None:
    """The directory that holds a model's files here: of a Hub id, what is in the cache; None where there is none, or GGUF."""
    source = source_of(config)
    if "gguf_file" in source:
        return None
    name = source["pretrained_model_name_or_path"]
    if Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, "config.json", revision=config.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def name_of(config: ModelConfig) -> str:
    """What other programs know a model by: an absolute path, or its id on the Hub."""
    source = source_of(config)
    name = source["pretrained_model_name_or_path"]
    path = Path(name)
    return str((path / source["gguf_file"] if "gguf_file" in source else path).resolve()) if path.exists() else name


def whole_directory_of(config: ModelConfig) -> Path | None:
    """As `directory_of`; also None where an adapter is to be added to what lies there."""
    return directory_of(config) if config.adapter is None else None


def no_directory(config: ModelConfig, by: str, who: str = "") -> UserError:
    """What to say of a model that is to write by means that read a directory of weights, where `whole_directory_of` has none.

    Args:
        by: the option that chooses those means.
        who: what it is to the run.
    """
    what = "has an adapter beside it" if config.adapter is not None else "is none"
    return UserError(
        f"{who or 'The model'} {foreign(config.model, 200)} is to write, but {by} needs a directory of weights for that, and "
        f"it {what}.",
        "Name one (of an adapter, the merged model), or choose another engine.",
    )
