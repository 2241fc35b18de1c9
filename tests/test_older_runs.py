"""Run directories that an older version made are continued as it would have continued them, bit for bit.

tests/data/runs-VERSION holds, for that version: models, prompts, configurations, runs that were interrupted, and how that
version finished them. Floating-point sums differ between processors, and with them what is sampled; where this one does not
compute what that one did, the run must still be continued to its end, with what was done before left as it was.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import npd
from npd.store import sha256

DATA = Path(__file__).parent / "data"
TIMED = ("tokens_per_second", "publish_seconds")
AS_THEN: dict[str, dict[str, Any]] = {"rollout": {"batching": "static"}, "scoring": {"free": "always", "verify": False}}
"""What those versions did without being asked; a run that they began goes on with it by itself."""
VERSIONS = sorted(DATA.glob("runs-*"))


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def as_then(tree: dict[str, Any]) -> dict[str, Any]:
    rows = {model: tree[model] | {"attention": "rows"} for model in ("student", "teacher") if model in tree}
    return tree | rows | {section: tree[section] | options for section, options in AS_THEN.items()}


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda path: path.name)
def made(request, tmp_path_factory) -> tuple[Path, dict[str, Any], bool]:
    """A version's files, what came of them there, and whether this processor computes the same bits."""
    folder = tmp_path_factory.mktemp("older") / request.param.name
    shutil.copytree(request.param, folder)
    expected = json.loads((folder / "expected.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tree = yaml.safe_load((folder / "distill.yaml").read_text())
        npd.refresh(as_then(tree))  # from nothing: its parts tell
    run_dir = folder / tree["run_dir"]
    known = {**expected["distill"]["parts"]}
    here = {str(part.relative_to(run_dir)): sha256(part) for part in run_dir.glob("generations/references/part-*")}
    shutil.rmtree(run_dir)
    return folder, expected, all(known[name] == digest for name, digest in here.items())


@pytest.mark.parametrize("interrupted", [True, False], ids=["continued", "anew"])
@pytest.mark.parametrize("command", ["distill", "sft"])
def test_it_ends_as_it_would_have_ended_then(made, monkeypatch, command, interrupted):
    folder, expected, same_bits = made
    monkeypatch.chdir(folder)
    tree = yaml.safe_load(Path(f"{command}.yaml").read_text())
    run_dir, wanted = Path(tree["run_dir"]), expected[command]
    shutil.rmtree(run_dir, ignore_errors=True)
    if interrupted:
        shutil.copytree(Path("interrupted") / run_dir.name, run_dir)
    result = getattr(npd, command)(tree if interrupted else as_then(tree))
    lines = metrics_of(run_dir)
    ended = [line["generation"] for line in lines if "generation_ended" in line]
    assert ended == [line["generation"] for line in wanted["metrics"] if "generation_ended" in line]
    weights, theirs = load_file(result.student / "model.safetensors"), load_file(f"{command}.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in theirs.items()}
    if not same_bits:
        if interrupted:  # what was done then stands as it was
            done = metrics_of(Path("interrupted") / run_dir.name)
            assert lines[: len(done)] == done
        return
    assert getattr(npd, command)(tree if interrupted else as_then(tree)).student == result.student  # once more, as before
    kept = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert all(kept[section][name] == value for section, options in AS_THEN.items() for name, value in options.items())
    assert lines == wanted["metrics"]
    parts = {str(part.relative_to(run_dir)): sha256(part) for part in sorted(run_dir.glob("generations/*/part-*"))}
    assert parts == wanted["parts"]
    assert sha256(result.student / "model.safetensors") == wanted["student"]
