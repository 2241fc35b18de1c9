"""A report is made without what trains: it starts quickly, and beside a run it takes no memory from it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import make_run

import npd
from npd import registry

SOURCE = Path(npd.__file__).parent
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "vllm"}

COMMAND = "from npd.cli import main; main(['report', sys.argv[1]], standalone_mode=False)"
COMPARISON = (
    "from npd.cli import main; main(['report', '--compare', sys.argv[1], sys.argv[1], '--out', sys.argv[1] + '/c.html'], "
    "standalone_mode=False)"
)
KEEPER = "import runpy; runpy.run_module('npd.report.keeper', run_name='__main__')"
EVERY_MODULE = (
    "import importlib, pkgutil, npd.observe, npd.report\n"
    "for room in (npd.observe, npd.report):\n"
    "    for module in pkgutil.iter_modules(room.__path__, room.__name__ + '.'): importlib.import_module(module.name)"
)


@pytest.mark.parametrize("code", [COMMAND, COMPARISON, KEEPER, EVERY_MODULE], ids=["command", "compare", "keeper", "modules"])
def test_what_a_report_imports(tmp_path, code):
    run_dir = make_run(tmp_path / "run")
    script = f"import json, sys\n{code}\njson.dump(sorted(sys.modules), open(sys.argv[2], 'w'))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(run_dir), str(tmp_path / "modules")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in json.loads((tmp_path / "modules").read_text())}
    assert not loaded & HEAVY
    assert {"npd", "numpy"} <= loaded
    if code is not EVERY_MODULE:
        assert (run_dir / ("c.html" if code is COMPARISON else "report.html")).is_file()


def imported(file: Path) -> set[str]:
    """Modules of npd that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("npd")}


@pytest.mark.parametrize("room", ["observe", "report"])
def test_reports_and_displays_know_no_stage(room):
    """They know the ground, each other from report to observe, and nothing of what makes a run, unless to name a type."""
    ground = ("config", "errors", "signals", "records", "registry", "schedule", "store", "intervals", "observe", room)
    for file in (SOURCE / room).glob("*.py"):
        for name in imported(file):
            inner = name.split(".")[1] if "." in name else ""
            named = (file.stem, name) in {
                ("console", "npd.result"),
                ("console", "npd.result.DistillResult"),
            }  # for the type checker
            assert inner in ("", *ground) or named, f"{file.name} imports {name}"


@pytest.mark.parametrize("room", ["observe", "report"])
def test_no_kind_is_told_by_its_name(room):
    registries = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
    kinds = {name for kinds in registries for name in kinds}
    assert {"vllm", "adaptive", "served"} <= kinds
    for file in (SOURCE / room).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare | ast.MatchValue):
                texts = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not texts & kinds, f"{file.name}, line {node.lineno}: {texts & kinds}"
