from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import npd
from npd.config import load_config
from npd.errors import UserError
from npd.observe.display import Display
from npd.observe.trackers import options_of, start_trackers
from npd.records import Manifest, SelectionLine, SelectionSummary
from npd.store import Store


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, teacher_dir, student_dir, data_file) -> Path:
    """A run with a tracker and everything that is measured."""
    run_dir = tmp_path_factory.mktemp("tracked") / "run"
    npd.distill(
        {
            "run_dir": str(run_dir),
            "student": {"model": str(student_dir)},
            "teacher": {"model": str(teacher_dir)},
            "data": {"train": str(data_file), "eval": str(data_file), "max_prompt_tokens": 32},
            "schedule": {"generations": 2, "passes": 2, "lead": 0.0},
            "rollout": {"max_new_tokens": 12, "part_size": 5},
            "scoring": {"top_k": 4},
            "selection": {"lower": -5, "upper": 5},
            "packing": {"length": 64},
            "training": {"batch_tokens": 128, "learning_rate": 1e-3},
            "evaluation": {"tasks": ["answer"], "kl_prompts": 4, "teacher": True},
            "tracking": {"trackers": ["tensorboard"], "report": False},
        }
    )
    return run_dir


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_trackers_hear_the_figures_of_the_file_under_their_names(tracked):
    events = EventAccumulator(str(tracked / "trackers/npd"))
    events.Reload()
    heard = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    written: dict[str, list[tuple[int, float]]] = {}
    for line in lines_of(tracked):
        for key, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
                written.setdefault(key, []).append((line["step"], value))
    assert heard.keys() == written.keys()
    for key, values in written.items():
        assert [step for step, _ in heard[key]] == [step for step, _ in values]
        assert [value for _, value in heard[key]] == pytest.approx([value for _, value in values], rel=1e-5)


def test_every_name_is_in_the_guide(tracked):
    guide = (Path(__file__).parent.parent / "docs/guide.md").read_text()
    table = guide[guide.index("## Metrics") : guide.index("## Several GPUs")]
    names = {key for line in lines_of(tracked) for key in line}
    names |= {"selection/lower", "selection/upper"}  # of the adaptive rule
    for name in names - {"eval", "teacher", "selection"}:
        short = name.replace("/answer/", "/TASK/")
        ends = [short, f"…/{short.split('/')[-1]}", f"…_{short.split('_')[-1]}"]
        assert any(f"`{end}`" in table for end in ends) or short.startswith("teacher/"), f"{name} is not in the table"


def test_selection_is_logged_once_a_generation(tracked):
    lines = [line for line in lines_of(tracked) if "selection" in line]
    assert [line["selection/generation"] for line in lines] == [0, 1]
    for line in lines:
        manifest = Store(tracked).manifest(line["selection/generation"])
        assert manifest is not None
        counts = manifest.selection.verdicts
        assert line["selection/kept"] == counts.get("proximal", 0) / 12
        assert line["selection/responses"] == 12
        assert line["selection/response_tokens"] == manifest.response_tokens
        steps = [x["step"] for x in lines_of(tracked) if x.get("generation") == manifest.generation and x.get("pass") == 0]
        assert line["step"] == max(steps)


def test_the_teacher_is_asked_once(tracked):
    lines = [line for line in lines_of(tracked) if "teacher" in line]
    assert len(lines) == 1
    assert set(lines[0]) == {"step", "teacher", *(f"teacher/answer/accuracy{end}" for end in ("", "_low", "_high"))}


def test_selection_figures_by_hand():
    verdicts, quantiles = {"proximal": 5, "degenerate": 2, "undefined": 1}, {"0.05": -1.0, "0.5": 0.1, "0.95": 0.9}
    summary = SelectionSummary(8, verdicts, quantiles, bounds=(-0.1, 0.7))
    line = SelectionLine.of(30, Manifest(3, 8, (), 3, summary, response_tokens=80, length_stops=2))
    assert line.step == 30
    assert line.figures == {
        "selection/generation": 3,
        "selection/responses": 8,
        "selection/kept": 0.625,
        "selection/response_tokens": 80,
        "selection/cut_off": 0.25,
        "selection/degenerate": 0.25,
        "selection/disconnect": 0.0,
        "selection/undefined": 0.125,
        "selection/delta_05": -1.0,
        "selection/delta_50": 0.1,
        "selection/delta_95": 0.9,
        "selection/lower": -0.1,
        "selection/upper": 0.7,
    }


def test_options_are_flat_and_plain(make_tree):
    options = options_of(load_config(make_tree(tracking={"trackers": ["tensorboard"]})))
    assert options["tracking.trackers"] == "['tensorboard']"
    assert options["student.lora"] == "None"
    assert options["training.compile"] is False
    assert options["loss.kd_weight"] == 0.9


@pytest.mark.parametrize("teacher", [None, {"server": "http://127.0.0.1:9", "model": "m"}])
def test_only_a_teacher_that_is_loaded_here_can_be_asked(make_tree, teacher):
    tree = make_tree(evaluation={"teacher": True}) | {"teacher": teacher}
    with pytest.raises(UserError, match=r"only one that is loaded here can"):
        load_config(tree)


def test_a_tracker_that_cannot_start_says_so(make_tree, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", broken)
    tree = make_tree(tracking={"trackers": ["tensorboard"]})
    with pytest.raises(
        UserError, match=r"tracking.trackers \['tensorboard'\] cannot start .*api_key not configured.*leave it out"
    ):
        npd.distill(tree)


def test_a_tracker_that_fails_later_is_a_warning(make_tree, monkeypatch, capsys):
    def broken(*_, **__):
        raise ConnectionError("the server is away")

    monkeypatch.setattr("accelerate.Accelerator.log", broken)
    tree = make_tree(tracking={"trackers": ["tensorboard"]})
    npd.distill(tree, display=Display())
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("A tracker failed at step") == 1
    assert "(ConnectionError: the server is away)" in said
    assert len(lines_of(Path(tree["run_dir"]))) > 1


def test_a_resumed_run_is_the_same_run_to_wandb(make_tree, monkeypatch, tmp_path):
    options = []
    monkeypatch.setattr(
        "accelerate.Accelerator.init_trackers", lambda *_, init_kwargs, **__: options.append(init_kwargs["wandb"])
    )
    config = load_config(make_tree(tracking={"trackers": ["tensorboard"]}))
    for folder in ("a", "a", "b"):
        start_trackers(Accelerator(cpu=True), config, tmp_path / folder)
    ids = [o["id"] for o in options]
    assert ids[0] == ids[1] != ids[2]
    assert {o["resume"] for o in options} == {"allow"}
