"""The kinds of each seam by name: what a configuration may choose, and where each of them stands.

This is the one place besides its own file where a kind is named. A kind's module is imported when it is first asked for, so
that `npd --help` waits for none of them. docs/extending.md shows how to bring kinds of one's own.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npd.errors import UserError, foreign
from npd.inputs import Unreadable, check_file


class Registry(Mapping[str, Any]):
    """The kinds of one seam.

    Args:
        option: the key of the configuration that chooses among them.
        homes: name -> "module:attribute"; the first is the default.
    """

    def __init__(self, option: str, homes: Mapping[str, str]) -> None:
        self.option = option
        self._homes: dict[str, Any] = dict(homes)

    @property
    def default(self) -> str:
        """The name that is chosen where the configuration says nothing."""
        return next(iter(self._homes))

    def register(self, name: str, kind: Any) -> Any:
        """Add a kind, and return it. A name that is taken already is replaced only by the kind of the same module.

        Raises:
            UserError: another kind has this name.
        """
        if name in self._homes and self._module(name) != kind.__module__:
            raise UserError(f"{self.option} has a kind {name!r} already; give yours another name.")
        self._homes[name] = kind
        return kind

    def check(self, name: str) -> str:
        """The name itself, if there is such a kind.

        Raises:
            ValueError: there is none; the message names those that there are.
        """
        if name in self._homes:
            return name
        near = difflib.get_close_matches(name, self._homes, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"must be one of {', '.join(map(repr, self._homes))}{hint}; `plugins` brings others")

    def suiting(self, what: Any) -> Any:
        """The kind that says that it `suits`, where the configuration names none; those of plug-ins are asked first."""
        return next(kind for kind in reversed(list(self.values())) if kind.suits(what))

    def __getitem__(self, name: str) -> Any:
        """The kind itself, its module imported.

        Raises:
            UserError: there is no such kind.
        """
        try:
            kind = self._homes[self.check(name)]
        except ValueError as error:
            raise UserError(f"{self.option} is {name!r}, but it {error}.") from None
        if isinstance(kind, str):
            module, _, attribute = kind.partition(":")
            kind = getattr(importlib.import_module(module), attribute)
        return kind

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __eq__(self, other: object) -> bool:  # a table of its own, whatever it holds
        return self is other

    __hash__ = object.__hash__

    def _module(self, name: str) -> str:
        kind = self._homes[name]
        return kind.partition(":")[0] if isinstance(kind, str) else kind.__module__


ENGINES = Registry(
    "rollout.engine",
    {
        "transformers": "npd.rollout.transformers:TransformersEngine",
        "vllm": "npd.rollout.vllm:VllmEngine",
    },
)
TEACHERS = Registry(
    "teacher.kind",
    {
        "local": "npd.scoring.local:LocalTeacher",
        "served": "npd.scoring.served:ServedTeacher",
        "aligned": "npd.scoring.aligned:AlignedTeacher",
    },
)
PRODUCERS = Registry(
    "placement.rollout",
    {
        "turns": "npd.generations.producer:Turns",
        "workers": "npd.generations.workers:Workers",
        "external": "npd.generations.follower:External",
        "ray": "npd.generations.ray_producer:Ray",
    },
)
RULES = Registry(
    "selection.rule",
    {
        "delta_ifd": "npd.selection.fixed:FixedBand",
        "adaptive": "npd.selection.adaptive:AdaptiveBand",
        "none": "npd.selection.fixed:Everything",
    },
)
DIVERGENCES = Registry(
    "loss.divergence",
    {
        "forward_kl": "npd.losses.divergences:forward_kl",
        "reverse_kl": "npd.losses.divergences:reverse_kl",
        "jensen_shannon": "npd.losses.divergences:JensenShannon",
        "skewed_forward_kl": "npd.losses.divergences:SkewedForwardKL",
        "skewed_reverse_kl": "npd.losses.divergences:SkewedReverseKL",
        "total_variation": "npd.losses.divergences:total_variation",
    },
)
BENCHMARKS = Registry(
    "evaluation.tasks",
    {
        "reasoning_gym": "npd.evaluation.tasks:ReasoningGym",
        "answer": "npd.evaluation.answers:Answers",
        "harness": "npd.evaluation.harness:Harness",
    },
)


def load_plugins(modules: Sequence[str]) -> None:
    """Import the modules that register further kinds: names of installed modules, or paths of .py files.

    Raises:
        UserError: one cannot be imported.
    """
    for name in modules:
        try:
            if not name.endswith(".py"):
                importlib.import_module(name)
                continue
            path = Path(name).resolve()
            known = f"npd_plugin_{path.stem}"
            if known in sys.modules and getattr(sys.modules[known], "__file__", None) == str(path):
                continue
            check_file(path)
            spec = importlib.util.spec_from_file_location(known, path)
            if spec is None or spec.loader is None:
                raise ImportError("no Python file")
            module = sys.modules[known] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever somebody's module raises
            sys.modules.pop(f"npd_plugin_{Path(name).stem}", None)
            if isinstance(error, UserError):  # it says what is wrong
                raise UserError(f"plugins names {name!r}, but {error.what}", error.remedy) from error
            shown = repr(foreign(name, 200))
            missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
            if missing or (isinstance(error, FileNotFoundError | Unreadable) and not _frames(error)):
                raise UserError(
                    f"plugins names {shown}, which cannot be imported ({foreign(error)}).",
                    "Give the name of an installed module, or the path of a .py file.",
                ) from error
            raise UserError(
                f"plugins names {shown}, which cannot be imported: it fails {own_fault(error)}.", "Mend it there."
            ) from error


def own_fault(error: BaseException) -> str:
    """Where somebody's code failed, and with what: "at FILE, line N (ValueError: ...)"."""
    what = f"{type(error).__name__}: {foreign(error)}".removesuffix(": ")
    if isinstance(error, SyntaxError) and error.filename:
        return f"at {foreign(error.filename, 200)}, line {error.lineno} ({type(error).__name__}: {foreign(error.msg)})"
    frames = _frames(error)
    return f"at {foreign(frames[-1].filename, 200)}, line {frames[-1].lineno} ({what})" if frames else f"({what})"


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where an error passed through code that is neither npd's nor Python's own way to import."""
    own = str(Path(__file__).parent)
    return [
        frame
        for frame in traceback.extract_tb(error.__traceback__, limit=-50)
        if not frame.filename.startswith(("<frozen", own)) and Path(frame.filename).name != "pathlib.py"
    ]
