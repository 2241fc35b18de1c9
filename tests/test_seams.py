"""Engines, teachers, producers and benchmarks that a user brings: each one file, named in `plugins`; docs/extending.md shows
them as they are. Divergences and rules have tests of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import npd
from npd.config import load_config
from npd.errors import RunError, UserError
from npd.generations.follower import follow
from npd.losses import check_divergence
from npd.observe.display import Display
from npd.observe.events import read_events
from npd.registry import BENCHMARKS, DIVERGENCES, ENGINES, PRODUCERS, RULES, TEACHERS, Registry, load_plugins
from npd.rollout.transformers import TransformersEngine
from npd.store import Store

FOLDER = Path(__file__).parent / "plugins"
DOCUMENTATION = Path(__file__).parent.parent / "docs/extending.md"
VOCABULARY = 20


def plugin(name: str) -> list[str]:
    return [str(FOLDER / f"{name}.py")]


def parts_of(run_dir: str | Path, generation: int) -> pa.Table:
    files = sorted(Path(run_dir).glob(f"generations/g{generation:03d}/part-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


@pytest.mark.parametrize("lead", [0.0, 1.0], ids=["turns", "workers"])
def test_an_engine_writes_rollouts_evaluation_and_references(make_tree, data_file, lead):
    """Also in a worker, which is another process and learns of the plug-in from the run's configuration."""
    tree = make_tree(
        rollout={"engine": "scripted", "options": {"says": [5, 6, 7]}},
        data={"train": str(data_file), "eval": str(data_file), "references": "teacher"},
        schedule={"lead": lead, "generations": 2, "references": 0.3},
        evaluation={"tasks": ["answer"]},
    )
    result = npd.distill(tree | {"plugins": plugin("engines")})
    stop = Store(result.run_dir).read_part(0, 0)["response_ids"][0].as_py()[-1]
    for generation in (0, 1):
        rows = parts_of(result.run_dir, generation)
        assert {tuple(ids) for ids in rows["response_ids"].to_pylist()} == {(5, 6, 7, stop)}
        assert set(rows["student_nll"].to_pylist()) == {1.0}
    references = pq.read_table(next(result.run_dir.glob("generations/references/part-*")))
    assert {tuple(ids) for ids in references["response_ids"].to_pylist()} == {(5, 6, 7, stop)}
    assert result.after["eval/answer/accuracy"] == 0.0


def table_file(folder: Path) -> Path:
    rows = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY))
    logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    file = folder / "bigrams.json"
    file.write_text(json.dumps(logprobs.tolist()))
    return file


def test_a_teacher_is_read_with(make_tree, data_file, tmp_path):
    file = table_file(tmp_path)
    tree = make_tree(data={"train": str(data_file), "eval": str(data_file)}, evaluation={"kl_prompts": 4})
    tree["teacher"] = {"kind": "bigrams", "model": str(file)}
    result = npd.distill(tree | {"plugins": plugin("teachers")})
    table = np.array(json.loads(file.read_text()))
    for row in parts_of(result.run_dir, 0).to_pylist():
        context, response = row["prompt_ids"], row["response_ids"]
        said = [table[a, b] for a, b in zip([context[-1], *response[:-1]], response, strict=True)]
        assert row["teacher_nll"] == pytest.approx(-np.mean(said), rel=1e-5)
        assert row["topk_ids"][:4] == np.argsort(-table[context[-1]])[:4].tolist()
    assert result.after["eval/kl_to_teacher_at_least"] >= 0
    with pytest.raises(UserError, match=r"references: teacher has the teacher .*bigrams.json write, which a teacher of its"):
        npd.sft(tree | {"run_dir": str(tmp_path / "sft"), "data": tree["data"] | {"references": "teacher"}})


def test_a_producer_makes_what_turns_make(make_tree):
    """Without a lead every snapshot is that of the generation's beginning, so that the whole run is the same."""
    turns = npd.distill(make_tree("turns", schedule={"lead": 0.0}))
    tree = make_tree("other", schedule={"lead": 0.0}, placement={"rollout": "one_by_one"})
    other = npd.distill(tree | {"plugins": plugin("producers")})
    for file in ("student/model.safetensors", "policy/v000001/model.safetensors", "generations/g001/manifest.json"):
        assert (turns.run_dir / file).read_bytes() == (other.run_dir / file).read_bytes()
    # What tells them apart: the other one trains on a generation whose last part is not made yet.
    names = [event.name for event in read_events(other.run_dir / "events.jsonl") if event.name in ("part", "train")]
    assert names.index("train") < 3


def test_a_benchmark_is_run_and_shown(make_tree, data_file, tmp_path):
    tree = make_tree(data={"train": str(data_file), "eval": str(data_file)}, evaluation={"tasks": ["stops"], "kl_prompts": 0})
    result = npd.distill(tree | {"plugins": plugin("benchmarks")})
    for figures in (result.before, result.after):
        assert 0 <= figures["eval/stops/share_low"] <= figures["eval/stops/share"] <= figures["eval/stops/share_high"] <= 1
        assert 1 <= figures["eval/stops/length"] <= 12
    del tree["data"]["eval"]
    with pytest.raises(UserError, match=r"set data\.eval"):
        npd.distill(tree | {"run_dir": str(tmp_path / "other"), "plugins": plugin("benchmarks")})


def test_the_command_line_takes_plugins(make_tree, tmp_path):
    """In a fresh process: the file is found from the configuration, its name is checked, its kind planned."""
    config = tmp_path / "run.yaml"
    tree = make_tree(rollout={"engine": "scripted", "options": {"says": [5]}}) | {"plugins": plugin("engines")}
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "npd.cli", "distill", str(config), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "scripted" in done.stdout
    config.write_text(yaml.safe_dump(tree | {"plugins": []}))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        "rollout.engine: must be one of 'transformers', 'vllm'; `plugins` brings others, but it is 'scripted'" in done.stderr
    )
    config.write_text(yaml.safe_dump(tree | {"plugins": ["nowhere.py"]}))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "plugins names 'nowhere.py', which cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


class Careless(TransformersEngine):
    """Answers some other requests than it is asked, or with other rows."""

    def stream(self, requests, sampling, progress=None):
        how = self.setting.config.rollout.options["how"]
        if how == "none":
            return
        for number, table in super().stream(requests, sampling, progress):
            yield number + (how == "another"), table.slice(how == "fewer")


@pytest.mark.parametrize(
    ("how", "words"),
    [("none", "0 responses to part 0"), ("another", "4 responses to part 1"), ("fewer", "3 responses to part 0")],
)
def test_an_engine_that_answers_something_else_ends_the_run(make_tree, monkeypatch, how, words):
    monkeypatch.setitem(ENGINES._homes, "careless", Careless)
    tree = make_tree(rollout={"engine": "careless", "options": {"how": how}, "check_samples": 0})
    with pytest.raises(RunError, match=f"rollout.engine careless gave {words} of generation 0"):
        npd.distill(tree)


@pytest.mark.parametrize(
    ("divergence", "mass", "words"),
    [
        (lambda teacher, student: (student.exp() * student).sum(-1), "raw", "has the shape"),
        (lambda teacher, student: (student.exp() * student).detach(), "raw", "does not require grad"),
        (lambda teacher, student: teacher.exp() * (teacher - student), "tail", "is not finite where the teacher gives"),
        (lambda student: student, "raw", "positional argument"),
    ],
)
def test_a_divergence_that_cannot_be_trained_with_is_refused_at_once(make_tree, monkeypatch, divergence, mass, words):
    monkeypatch.setitem(DIVERGENCES._homes, "mine", divergence)
    tree = make_tree(loss={"divergence": "mine", "top_k_mass": mass})
    with pytest.raises(UserError, match=f"loss.divergence 'mine' cannot be trained with, .*{words}"):
        npd.distill(tree)
    assert not Path(tree["run_dir"]).exists()


@pytest.mark.parametrize("mass", ["raw", "renormalize", "tail"])
def test_divergences_that_are_trained_with_are_not_refused(mass):
    load_plugins(plugin("divergences"))
    for name in ("forward_kl", "reverse_kl", "jensen_shannon"):
        check_divergence(name, mass)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("from npd.registry import RULES\nRULES.register('adaptive', Exception)", "but selection.rule has a kind 'adaptive'"),
        ("raise SystemExit(3)", r"which cannot be imported: it fails at .*failing\.py, line 1 \(SystemExit: 3\)"),
        ("raise RuntimeError('no')", r"which cannot be imported: it fails at .*failing\.py, line 1 \(RuntimeError: no\)"),
    ],
)
def test_a_plugin_that_fails_is_named(make_tree, tmp_path, code, words):
    file = tmp_path / "failing.py"
    file.write_text(code)
    with pytest.raises(UserError, match=f"plugins names '{file}', {words}"):
        load_plugins([str(file)])


def test_a_run_is_followed_with_plugins_that_lie_elsewhere(make_tree, tmp_path):
    here, there = tmp_path / "here.py", tmp_path / "there.py"
    here.write_text("import npd\n")
    tree = make_tree(schedule={"generations": 1}) | {"plugins": [str(here)]}
    npd.refresh(tree)
    here.rename(there)
    run_dir = Path(tree["run_dir"])
    config = load_config(run_dir / "config.yaml", {"run_dir": str(run_dir), "plugins": [str(there)]})
    follow(run_dir, None, 0, 1, Display(quiet=True), 0.1, config=config)  # all is made, and it ends
    sys.modules.pop("npd_plugin_here", None)
    with pytest.raises(UserError, match=r"here\.py', which cannot be imported"):
        follow(run_dir, None, 0, 1, Display(quiet=True), 0.1)


def test_a_name_is_taken_once():
    registry = Registry("some.option", {"one": "npd.errors:UserError"})
    assert registry["one"] is UserError
    with pytest.raises(UserError, match=r"some\.option has a kind 'one' already"):
        registry.register("one", type("Other", (), {"__module__": "elsewhere"}))
    with pytest.raises(UserError, match=r"some\.option is 'on', but it must be one of 'one' \(did you mean 'one'\?\)"):
        registry["on"]


@pytest.mark.parametrize("registry", [ENGINES, TEACHERS, PRODUCERS, RULES, DIVERGENCES, BENCHMARKS], ids=lambda r: r.option)
def test_every_kind_is_where_the_registry_says(registry):
    for name in registry:
        assert registry[name] is not None


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda f: f.name)
def test_the_documentation_shows_plugins_as_they_are_and_they_are_short(file):
    text = file.read_text()
    assert text in DOCUMENTATION.read_text(), f"docs/extending.md shows another {file.name}"
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r'\s*("""|#|import |from )', line)]
    assert len(lines) < 40
    load_plugins([str(file)])
