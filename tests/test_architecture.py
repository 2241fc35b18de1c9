"""Rules of docs/architecture.md that code can break without any other test noticing."""

from __future__ import annotations

import ast
import itertools
from functools import cache
from pathlib import Path

import pytest

from npd import prompts
from npd.registry import BENCHMARKS, DIVERGENCES, ENGINES, PRODUCERS, RULES, TEACHERS
from npd.store import schema as store_schema

SOURCE = Path(__file__).parent.parent / "src"

# From the ground up: a room imports only from rooms of lower floors, and from itself.
FLOORS = (
    ("errors", "ram", "signals", "threads"),
    ("inputs",),
    ("registry",),
    ("config",),
    ("attention", "intervals", "packing", "schedule", "prompts", "records", "result"),
    ("verifying", "answers"),
    ("models", "store", "verifiers"),
    ("losses",),
    ("observe",),
    ("rollout", "scoring", "selection", "evaluation"),
    ("placement", "report", "hardware", "mirror"),
    ("generations", "train"),
    ("preflight",),
    ("growth",),
    ("plan", "measures", "dataview"),
    ("run", "forecast"),
    ("rewards", "splits"),
    ("costs",),
    ("demo", "trial", "fits"),
    ("dryrun",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST = 430  # lines of a module


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in sorted((SOURCE / "npd").rglob("*.py")):
        name = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports(name: str, *, deferred: bool = False) -> set[str]:
    """Modules of the package that a module imports when it is imported itself, or with `deferred` at any time."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not deferred:
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not deferred:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in modules())
        if isinstance(node, ast.ImportFrom) and node.module in modules():
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(modules()[name])
    return found - {name}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_every_room_has_its_floor():
    rooms = {room(name) for name in modules()} - {""}
    assert rooms <= FLOOR.keys(), f"new rooms need a floor: {rooms - FLOOR.keys()}"


@pytest.mark.parametrize("name", [name for name in modules() if room(name)])
def test_arrows_point_down(name):
    """Also those that wait inside a function; the registry's are looked up by name, and drawn from kind to seam."""
    here = room(name)
    for other in imports(name, deferred=True):
        there = room(other)
        if there and there != here:
            assert FLOOR[there] < FLOOR[here], f"{name} imports {other}"


def test_no_circle_of_imports():
    remaining = {name: imports(name) for name in modules()}
    while True:
        free = [name for name, needs in remaining.items() if not needs & remaining.keys()]
        if not free:
            break
        for name in free:
            del remaining[name]
    assert not remaining, f"these import each other, or what does: {sorted(remaining)}"


KINDS = [(registry, name) for registry in (ENGINES, TEACHERS, PRODUCERS, RULES, DIVERGENCES, BENCHMARKS) for name in registry]
# Words that mean something else there: (kind, module).
OTHER_MEANINGS = {
    ("transformers", "npd.models.loading"),  # a logger
    ("transformers", "npd.store.provenance"),  # a package whose version is kept
    ("vllm", "npd.config.models"),  # what a teacher's server runs
    ("vllm", "npd.scoring.server"),
    *(
        (engine, f"npd.{room}.harness") for engine in ("transformers", "vllm") for room in ("config", "evaluation")
    ),  # lm-eval's
    ("reasoning_gym", "npd.config.sections"),  # a column of data
    ("reasoning_gym", "npd.prompts.layouts"),
    ("reasoning_gym", "npd.rewards"),
    ("answer", "npd.evaluation.ahead"),  # a column of prompts
    ("none", "npd.selection"),  # no quantiles
    ("none", "npd.dataview"),  # no teacher
    ("none", "npd.evaluation.harness"),  # no filter
    ("none", "npd.config.sections"),  # training.shard
    ("none", "npd.train.memory"),
    ("local", "npd.generations.ray_cluster"),  # a cluster of this machine alone, as Ray calls it
}
COLUMNS = {*store_schema.SCHEMA.names, *prompts.SCHEMA.names}


def names_of(tree: ast.Module, name: str) -> list[int]:
    """Lines that say a word; of a word that is a column as well, those that compare with it."""
    sides = [side for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)]
    compared = {
        id(one) for side in sides for one in (side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side])
    }
    said = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value == name]
    return [node.lineno for node in said if name not in COLUMNS or id(node) in compared]


@pytest.mark.parametrize(("registry", "name"), KINDS, ids=[f"{r.option}-{n}" for r, n in KINDS])
def test_a_kinds_name_stands_in_its_own_file_and_the_registry(registry, name):
    home = registry[name].__module__
    if not home.startswith("npd."):
        return  # a plug-in's, which another module of tests has loaded
    for module, tree in modules().items():
        # The demo writes configurations, as users do.
        if module in (home, "npd.registry") or room(module) == "demo" or (name, module) in OTHER_MEANINGS:
            continue
        said = names_of(tree, name)
        assert not said, f"{module} names {registry.option} {name!r} in line {said[0]}"


def test_the_loop_alone_moves_the_position():
    from dataclasses import fields

    from npd.train.loop import Position

    names = {field.name for field in fields(Position)}
    for module, tree in modules().items():
        if module == "npd.train.loop":
            continue
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in itertools.chain.from_iterable(t.elts if isinstance(t, ast.Tuple) else [t] for t in targets):
                if isinstance(target, ast.Attribute) and target.attr in names:
                    owner = ast.unparse(target.value)
                    assert not owner.endswith(("at", "position")), f"{module} sets {owner}.{target.attr}"


@pytest.mark.parametrize("name", modules())
def test_a_module_is_read_in_one_sitting(name):
    path = SOURCE.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST
