"""Tasks of lm-eval by name: found, judged before anything is loaded, loaded with their data, and run without noise."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd.config import HarnessTaskConfig
from npd.errors import UserError, foreign

PROBE_SECONDS = 5.0
LENGTHS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}  # what tasks call a response's length
LOCAL_DATA = ("json", "csv", "parquet", "arrow", "text", "pandas")  # loaders of datasets that read files


@dataclass
class Asked:
    """A task, group or tag, loaded."""

    config: HarnessTaskConfig
    loaded: list[Any]
    """lm-eval's Group, or its Tasks."""
    names: list[str]
    """Under which names of lm-eval's results its figures stand."""
    problems: int


class TaskIndex:
    """Tasks by name: those of a directory of one's own, and lm-eval's where one is named that is not there.

    lm-eval's own are thousands of files, which take seconds to read.
    """

    def __init__(self, include_path: str | None, names: Iterable[str]) -> None:
        from lm_eval.tasks import TaskManager

        self.include_path, names = include_path, list(names)
        if include_path is not None and not Path(include_path).is_dir():
            raise UserError(f"evaluation.harness.include_path is {foreign(include_path, 200)}, which is no directory.")
        with quiet():
            if include_path is not None:
                self.manager = TaskManager(include_path=include_path, include_defaults=False)
                if all(map(self._is_whole, names)):
                    return
            self.manager = TaskManager(include_path=include_path)
        unknown = [name for name in names if name not in self.manager.task_index]
        if unknown:
            near = _near(unknown[0], list(self.manager.task_index))
            raise UserError(
                f"evaluation.harness.tasks has {foreign(unknown[0], 80)!r}, which is no task, group or tag of lm-eval"
                f"{'' if include_path is None else f' or of {foreign(include_path, 120)}'}{near}.",
                "`lm-eval ls tasks` lists lm-eval's; evaluation.harness.include_path brings others.",
            )

    @functools.cached_property
    def offline(self) -> str | None:
        """Why the Hub cannot be reached; None: it can. It is asked once."""
        return why_unreachable()

    def _is_whole(self, name: str) -> bool:
        """Is a name known, and are all that it stands for? A group may have members that are lm-eval's."""
        leaves = self.leaves(name)
        return bool(leaves) and all(leaf in self.manager.task_index for leaf, _ in leaves)

    def leaves(self, name: str) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, options) of every task that a name stands for, before anything is loaded."""
        return list(self._leaves(name, {}, set()))

    def _leaves(self, name: str, over: Mapping[str, Any], seen: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        entry = self.manager.task_index.get(name)
        if entry is None or name in seen:
            return
        if entry.tags and entry.kind.name == "TAG":
            for member in sorted(entry.tags):
                yield from self._leaves(member, over, seen | {name})
            return
        options = {**(entry.cfg or {}), **over}
        yield from self._members(name, options, seen) if entry.kind.name == "GROUP" else [(name, options)]

    def _members(self, name: str, options: Mapping[str, Any], seen: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        members = options.get("task")
        for member in members if isinstance(members, list) else []:
            over = member if isinstance(member, dict) else {}
            inner = over.get("group", over.get("task")) if over else member
            if inner not in self.manager.task_index and isinstance(over.get("task"), list):  # a group inside this one
                yield from self._members(name, over, seen)
            elif inner in self.manager.task_index:
                own = {key: value for key, value in over.items() if key not in ("task", "group")}
                yield from self._leaves(str(inner), own, seen | {name})
            else:
                yield str(inner), {**options, **over}

    def load(self, one: HarnessTaskConfig, max_new_tokens: int | None) -> Asked:
        """A task with its data; a response has `max_new_tokens` at most where the task does not say.

        Raises:
            UserError: it cannot be loaded; without the network that is said, after seconds.
        """
        from lm_eval.api.group import Group

        asks_hub = any(not _is_local(leaf) for _, leaf in self.leaves(one.name))
        why_offline = self.offline if asks_hub else None
        try:
            with unasked_hub() if why_offline else contextlib.nullcontext():
                found = self.manager.load([one.name])
        except Exception as error:  # whatever a task's own code and data make of it
            name, told = foreign(one.name, 80), f"{type(error).__name__}: {foreign(error, 300)}"
            if isinstance(error, ModuleNotFoundError) or isinstance(error.__cause__, ModuleNotFoundError):
                raise UserError(f"lm-eval's task {name!r} needs a package that is not here ({told}).") from error
            if why_offline:
                raise UserError(
                    f"lm-eval's task {name!r} reads its data from the Hub, which cannot be reached ({why_offline}), and they "
                    f"are not in the cache ({told}).",
                    "Load them once where there is a network and bring the cache here (HF_HOME), or write a task file with "
                    "`dataset_path: json` and files of your own (evaluation.harness.include_path).",
                ) from error
            raise UserError(
                f"lm-eval's task {name!r} cannot be loaded ({told}).", "Check its name, its file and its data."
            ) from error
        tasks, groups = found["tasks"], found.get("groups", {})
        for task in tasks.values():
            said = getattr(task.config, "generation_kwargs", None)
            if max_new_tokens is not None and said is not None and not LENGTHS & said.keys():
                task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
        root = groups.get(one.name)
        loaded = [root] if isinstance(root, Group) else list(tasks.values())
        whole = isinstance(root, Group) and root.has_aggregation
        return Asked(one, loaded, [one.name] if whole else list(tasks), sum(len(task.eval_docs) for task in tasks.values()))


def _is_local(options: Mapping[str, Any]) -> bool:
    """Does a task read files of this machine?"""
    path = options.get("dataset_path")
    return (
        isinstance(path, str)
        and (path in LOCAL_DATA or Path(path).exists())
        and "://" not in json.dumps(options.get("dataset_kwargs"), default=str)
    )


def _near(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def why_unreachable() -> str | None:
    """Why the Hub cannot be reached, after a few seconds at most; None: it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:  # of whatever library it asks with
        return foreign(f"{type(error).__name__}: {error}".removesuffix(": "), 120)
    return None


@contextmanager
def unasked_hub() -> Iterator[None]:
    """What is read from the Hub is read from its cache, at once: retries would take minutes."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


# -- what lm-eval does beside computing


@contextmanager
def quiet() -> Iterator[None]:
    """Without its bars and its log, which would run through npd's own display, without processes of its own, and without
    what it finds out about the machine, which takes seconds each time."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api import task
    from tqdm import tqdm

    log, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, before = log.level, os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    theirs = task.tqdm, evaluator.add_env_info, evaluator.get_git_commit_hash
    task.tqdm = functools.partial(tqdm, disable=True)
    evaluator.add_env_info, evaluator.get_git_commit_hash = (lambda results: None), lambda: None
    try:
        yield
    finally:
        task.tqdm, evaluator.add_env_info, evaluator.get_git_commit_hash = theirs
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def allowed_code(allowed: bool) -> Iterator[None]:
    """What Hugging Face's scorer of code asks for, where it is allowed."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ["HF_ALLOW_CODE_EVAL"]
