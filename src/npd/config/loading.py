"""Options read, compared and explained."""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from npd.config.base import Section, check_without_secrets
from npd.config.models import STUDENT, TeacherConfig
from npd.config.sections import Config
from npd.config.trees import copied, read_yaml
from npd.errors import UserError, foreign
from npd.registry import RULES, load_plugins, own_fault

# Keys that may differ when a run is continued: they do not change what is computed.
FREE_KEYS: tuple[tuple[str, ...], ...] = (
    *((key,) for key in ("run_dir", "checkpoint", "placement", "evaluation", "tracking", "plugins", "provenance")),
    ("training", "micro_batch_rows"),
    ("training", "compile"),
    ("training", "gradient_checkpointing"),
    ("training", "shard"),
    ("rollout", "check_samples"),
    ("rollout", "check_bound"),
    *(
        (*teacher, key)
        for teacher in (("teacher",), ("teachers", "*"))
        for key in ("server", "tokenizer", "api", "api_key_env", "concurrency", "timeout", "retry_seconds")
    ),
)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every option of a section as (dotted name, field), nested sections included."""
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield from leaves(section, f"{prefix}{name}.")
        if section is None or type(None) in get_args(field.annotation):
            yield f"{prefix}{name}", field


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names; an empty section is a value."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return out


def section_of(field: FieldInfo, *, items: bool = False) -> type[Section] | None:
    """The section that a field holds (`Section` or `Section | None`; with `items` also a list or dict of them)."""
    inner = get_args(field.annotation) if items or get_origin(field.annotation) not in (list, dict) else ()
    for candidate in (field.annotation, *inner):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file (or take a mapping), lay dotted overrides over it, and check all of it.

    Raises:
        UserError: a missing or unreadable file, an unknown key (the nearest right one is named), a wrong value.
    """
    if isinstance(source, Mapping):
        tree, where = source, "the configuration"
    else:
        tree, where = read_yaml(Path(source)), foreign(source, 200)
    tree = copied(tree, where)
    for key, value in (overrides or {}).items():
        _set(tree, key, copied({key: value}, where)[key])
    try:
        check_without_secrets(tree)
    except ValueError as error:
        raise UserError(f"{where} is not a valid configuration: {error}.") from None
    plugins = tree.get("plugins")
    if isinstance(plugins, list):  # before kinds are looked up by name
        load_plugins([str(name) for name in plugins])
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, where) + _made_by(tree)) from None
    if config.selection.rule != RULES.default:  # which the section checks itself, without importing the rule
        try:
            RULES[config.selection.rule]().check(config.selection)
        except ValueError as error:
            raise UserError(f"{where} is not a valid configuration: selection: {foreign(error, 400)}.") from None
        except Exception as error:
            raise UserError(
                f"selection.rule {config.selection.rule!r} fails {own_fault(error)}.", "Mend it there."
            ) from error
    return config


def _made_by(tree: Mapping[str, Any]) -> str:
    """A sentence on the version of npd that wrote a run's configuration, where that is another one."""
    provenance, mine = tree.get("provenance"), importlib.metadata.version("npd")
    versions = provenance.get("versions") if isinstance(provenance, Mapping) else None
    theirs = versions.get("npd") if isinstance(versions, Mapping) else None
    return "" if theirs in (None, mine) else f" It was written by npd {str(theirs)[:40]}; this is npd {mine}."


def config_tree(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain YAML types."""
    return config.model_dump(mode="json", exclude={"provenance"})


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[str]:
    """Lines "key: old -> new" for options that differ and matter to what is computed.

    A key that an older version did not have yet is what that version did: see `as_begun`.
    """
    old = old if path else {**old, **_named_then(old)}
    lines = []
    for key in sorted(old.keys() | new.keys(), key=str):
        here, a, b = (*path, key), old.get(key), new.get(key)
        if a == b or _is_free(here) or (key not in old and b == _then(here)):
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_keys(a, b, here)
        else:
            lines.append(f"{'.'.join(map(str, here))}: {foreign(repr(a), 200)} -> {foreign(repr(b), 200)}")
    return lines


def as_begun(config: Config, old: Mapping[str, Any]) -> Config:
    """A configuration for a run whose config.yaml holds `old`: where it leaves open an option that changed what is done by
    default, the run goes on as it was begun.

    Such an option has `before` in its json_schema_extra: what versions did that did not have it yet. All other options that
    an older version did not have have the default that it did.
    """
    for key, field in leaves(Config):
        if "before" not in _extra(field):
            continue
        section, name = key.split(".")
        chosen: BaseModel = getattr(config, section)
        if name not in chosen.model_fields_set:
            begun = old.get(section)
            theirs = begun.get(name, _extra(field)["before"]) if isinstance(begun, Mapping) else _extra(field)["before"]
            config = config.model_copy(update={section: chosen.model_copy(update={name: theirs})})
    named = _named_then(old)
    given = {key: getattr(config, key) for key in named}

    def then(teacher: TeacherConfig, theirs: Any) -> TeacherConfig:
        is_directory = isinstance(theirs, Mapping) and theirs.get("model") == f"./{STUDENT}" and teacher.is_student
        return teacher.model_copy(update={"model": f"./{STUDENT}"}) if is_directory else teacher

    if (mine := given.get("teacher")) is not None:
        config = config.model_copy(update={"teacher": then(mine, named["teacher"])})
    if mine := given.get("teachers"):
        config = config.model_copy(
            update={"teachers": {key: then(each, named["teachers"].get(key)) for key, each in mine.items()}}
        )
    return config


def _named_then(old: Mapping[str, Any]) -> dict[str, Any]:
    """The teachers of a run's config.yaml; versions without a key `snapshot` took the model `student` for a directory."""

    def named(teacher: Any) -> Any:
        then = isinstance(teacher, Mapping) and teacher.get("model") == STUDENT and "snapshot" not in teacher
        return {**teacher, "model": f"./{STUDENT}"} if then else teacher

    found: dict[str, Any] = {"teacher": named(old["teacher"])} if "teacher" in old else {}
    if isinstance(several := old.get("teachers"), Mapping):
        found["teachers"] = {key: named(each) for key, each in several.items()}
    return found


def _then(path: tuple[str, ...]) -> Any:
    """What versions did that did not have an option yet."""
    field = _field(path)
    return _extra(field)["before"] if field is not None and "before" in _extra(field) else _default(path)


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}


def _is_free(path: tuple[str, ...]) -> bool:
    """May this key differ when a run is continued?"""
    if any(_matches(path, free) for free in FREE_KEYS):
        return True
    field = _field(path[:-1])
    extra = field.json_schema_extra if field is not None else None
    return isinstance(extra, dict) and path[-1] in extra.get("free", ())  # type: ignore[operator]


def _default(path: tuple[str, ...]) -> Any:
    """An option's default as plain YAML types; never equal to anything where there is no such option."""
    field = _field(path)
    if field is None or field.is_required():
        return object()
    default = field.get_default(call_default_factory=True)
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default


def _field(path: tuple[str, ...]) -> FieldInfo | None:
    """The option that stands at a path of keys; None for what lies inside an option's own value."""
    model: type[BaseModel] | None = Config
    field: FieldInfo | None = None
    named = False  # does the next key name an item of a dict?
    for name in path:
        if named:
            named = False
            continue
        field = model.model_fields.get(name) if model is not None else None
        if field is None:
            return None
        model, named = section_of(field, items=True), get_origin(field.annotation) is dict
    return field


def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(path) == len(pattern) and all(b in ("*", a) for a, b in zip(path, pattern, strict=True))


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        child = tree.get(section)
        if not isinstance(child, dict):
            child = tree[section] = {}
        tree = child
    tree[last] = value


SHOWN = 8  # faults of one configuration that a message names

# pydantic names the branch of a union that failed as a last part of the place, such as "int" or "literal['all']".
_UNION_BRANCH = re.compile(r"(constrained-)?(int|str|float|bool|list|literal)(\[.*\])?")


def _explain(error: ValidationError, where: str) -> str:
    lines: list[str] = []
    wrong: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        location = [foreign(part, 80) for part in item["loc"]]
        if item["type"] not in ("extra_forbidden", "missing") and location and _UNION_BRANCH.fullmatch(location[-1]):
            location.pop()
        location = [part for part in location if "[" not in part or not _UNION_BRANCH.fullmatch(part)]
        name = ".".join(location) or "the options together"
        if item["type"] == "extra_forbidden":
            near = _nearest(location)
            lines.append(f"unknown key {name!r}" + (f" (did you mean {near!r}?)" if near else ""))
        elif item["type"] == "invalid_key":
            lines.append(f"{'.'.join(location[:-1])}: a key is {foreign(repr(item['input']), 80)}, which is no text")
        elif item["type"] == "missing":
            lines.append(f"{name} is missing and has no default")
        else:
            message = foreign(item["msg"].removeprefix("Value error, "), 400)
            given = "" if isinstance(item["input"], dict | BaseModel) else f", but it is {_shown(item['input'])}"
            wrong.setdefault((name, given), []).append(f"{message[0].lower()}{message[1:]}")
    lines += [f"{name}: {' or '.join(messages)}{given}" for (name, given), messages in wrong.items()]
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return foreign(f"{where} is not a valid configuration: {'; '.join(lines[:SHOWN])}{more}.", 1150)


def _shown(value: Any) -> str:
    """A value as Python writes it, if that is short."""
    if isinstance(value, str):
        return repr(foreign(value, 80))
    try:
        return foreign(repr(value), 80)
    except Exception as error:
        return f"a {type(value).__name__} that can't be shown ({type(error).__name__})"


def _nearest(location: list[str]) -> str | None:
    model: type[BaseModel] = Config
    named = False
    for part in location[:-1]:
        if part.isdigit() or named:  # an item of a list or of a dict
            named = False
            continue
        field = model.model_fields.get(part)
        named = field is not None and get_origin(field.annotation) is dict
        section = section_of(field, items=True) if field else None
        if section is None:
            return None
        model = section
    local = difflib.get_close_matches(location[-1], model.model_fields, n=1, cutoff=0.6)
    if local:
        return ".".join([*location[:-1], local[0]])
    # A right name in the wrong section is as common as a misspelt one.
    elsewhere = [name for name, _ in leaves(Config) if name.split(".")[-1] == location[-1]]
    return elsewhere[0] if elsewhere else None
