"""What a user types, and what comes back: exit status, one paragraph, no traceback."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from npd import cli
from npd.config import Config, leaves

CONFIG_COMMANDS = ("distill", "sft", "refresh", "eval", "init-student")


@pytest.fixture
def npd(monkeypatch, capsys):
    """Run `npd ARGS` in this process, as the entry point does: (exit status, standard output, standard error)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["npd", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        try:
            cli.entry()
            status: Any = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def config_file(make_tree, tmp_path):
    def write(**sections):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(make_tree(**sections)))
        return path

    return write


def refused(outcome):
    """The one paragraph of a refusal."""
    status, out, err = outcome
    assert status == 2
    assert "Traceback" not in out + err
    assert err.startswith("npd: ")
    assert err.count("\n") == 1
    return err


def squeezed(text):
    """Without white space: help is wrapped, also at hyphens."""
    return "".join(text.split())


# -- help


def test_help_names_every_command(npd):
    status, out, _ = npd("--help")
    assert status == 0
    for command in (*CONFIG_COMMANDS, "demo"):
        assert re.search(rf"^  {command} +\S+", out, re.MULTILINE), command
    assert "npd demo" in out
    assert "Exit status: 0 done; 2 what you gave is wrong" in " ".join(out.split())


@pytest.mark.parametrize("command", CONFIG_COMMANDS)
def test_help_explains_every_key(npd, command):
    status, out, _ = npd(command, "--help")
    assert status == 0
    text = squeezed(out)
    for key, field in leaves(Config):
        if key == "provenance":
            assert "--provenance" not in out
            continue
        assert f"--{key} " in out, key
        assert squeezed(field.description) in text, key


def test_help_shows_defaults_and_what_is_required(npd):
    _, out, _ = npd("distill", "--help")
    text = squeezed(out)
    for shown in (
        "--scoring.top_k INT",
        "(paper: 10, best of its sweep). [default 10]",
        "Peak rate (paper). [default 1.0e-05]",
        "package:NAME/PATH for weights inside an installed Python package. [required]",
        "--dry-run",
        "Exit status",
    ):
        assert squeezed(shown) in text, shown


def test_help_of_the_demo(npd):
    status, out, _ = npd("demo", "--help")
    assert status == 0
    assert all(word in out for word in ("--out", "--seed", "strict on-policy", "no download"))


def test_version(npd):
    status, out, _ = npd("--version")
    assert status == 0
    assert version("npd") in out


# -- refusals


def test_unknown_key_in_the_file(npd, config_file):
    message = refused(npd("distill", config_file(training={"learning_rat": 1})))
    assert "unknown key 'training.learning_rat' (did you mean 'training.learning_rate'?)" in message


def test_missing_configuration_file(npd, tmp_path):
    assert "There is no configuration file" in refused(npd("sft", tmp_path / "gone.yaml"))


def test_missing_data_file(npd, config_file, tmp_path):
    message = refused(npd("distill", config_file(data={"train": str(tmp_path / "gone.jsonl")}), "--dry-run"))
    assert f"There is no data file {tmp_path}/gone.jsonl" in message


def test_missing_model(npd, config_file):
    assert "There is no model directory /gone" in refused(npd("distill", config_file(), "--teacher.model", "/gone"))


def test_bad_value_on_the_command_line(npd, config_file):
    message = refused(npd("distill", config_file(), "--loss.kd_weight", "2"))
    assert "loss.kd_weight: input should be less than or equal to 1, but it is 2" in message


@pytest.mark.parametrize("command", ["distill", "refresh"])
def test_no_teacher(npd, config_file, command):
    message = refused(npd(command, config_file(), "--teacher", "null"))
    assert "needs a teacher; set teacher.model." in message


def test_prompts_past_the_models_context(npd, config_file):
    message = refused(
        npd("distill", config_file(), "--rollout.max_new_tokens", "120", "--packing.length", "999", "--dry-run")
    )
    assert "pass the context of" in message
    assert "(128 tokens)" in message


def test_nothing_to_evaluate(npd, config_file):
    assert "There is nothing to evaluate" in refused(npd("eval", config_file()))


def test_unknown_option_names_a_near_one(npd, config_file):
    status, _, err = npd("distill", config_file(), "--training.learning_rat", "1")
    assert status == 2
    assert "--training.learning_rate" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("args", [("distill",), ("nonsense",), ("distill", "a.yaml", "b.yaml")])
def test_wrong_usage(npd, args):
    status, _, err = npd(*args)
    assert status == 2
    assert "Error:" in err


def test_the_installed_command(config_file):
    """As a process of its own: what the shell sees."""
    done = subprocess.run(
        [sys.executable, "-m", "npd.cli", "distill", str(config_file(training={"top_k": 3}))],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unknown key 'training.top_k' (did you mean 'scoring.top_k'?)" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_npd_cannot_explain_is_no_user_error(npd, config_file, monkeypatch):
    from npd import run

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(run, "distill", broken)
    with pytest.raises(RuntimeError, match="a bug"):  # Python prints it and exits with 1
        npd("distill", config_file())


def test_a_run_that_fails_exits_with_1(npd, config_file):
    status, out, err = npd(
        "refresh", config_file(selection={"rule": "delta_ifd"}), "--selection.lower", "9", "--selection.upper", "9.5"
    )
    assert status == 1
    assert "Selection dropped all 12 responses" in err
    assert "below selection.lower 9.0 (degenerate)" in err
    assert "Traceback" not in out + err


def test_interrupt(npd, config_file, monkeypatch):
    from npd import run

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "distill", interrupted)
    status, _, err = npd("distill", config_file())
    assert status == 130
    assert err.strip() == "npd: stopped. Run the same command again to go on."


# -- overrides


@pytest.fixture
def seen(monkeypatch):
    """Configurations that reach the run."""
    from npd import run

    configs = []
    monkeypatch.setattr(run, "distill", lambda config, display: configs.append(config))
    monkeypatch.setattr("npd.observe.console.show_result", lambda result, display: None)
    return configs


@pytest.mark.parametrize(
    ("args", "section", "expected"),
    [
        (["--training.learning_rate", "1e-4"], "training.learning_rate", 1e-4),
        (["--training.learning_rate=0.25"], "training.learning_rate", 0.25),
        (["--schedule.prompts", "4"], "schedule.prompts", 4),
        (["--schedule.prompts", "all"], "schedule.prompts", "all"),
        (["--selection.lower", "-0.5"], "selection.lower", -0.5),
        (["--tracking.trackers", "[tensorboard, wandb]"], "tracking.trackers", ["tensorboard", "wandb"]),
        (["--training.gradient_checkpointing", "true"], "training.gradient_checkpointing", True),
        (["--student.lora.r", "4"], "student.lora.r", 4),
        (["--student.lora", "null"], "student.lora", None),
        (["--student.lora", "{r: 3}"], "student.lora.r", 3),
        (["--run_dir", "elsewhere"], "run_dir", "elsewhere"),
        (["--seed", "7"], "seed", 7),
        (["--student.revision", "a: b: c"], "student.revision", "a: b: c"),
    ],
)
def test_override(npd, config_file, seen, args, section, expected):
    status, _, err = npd("distill", config_file(), *args)
    assert status == 0, err
    value = seen[0]
    for name in section.split("."):
        value = getattr(value, name)
    assert value == expected


def test_override_of_the_tasks(npd, config_file, seen):
    status, _, err = npd("distill", config_file(), "--evaluation.tasks", "[chain_sum, {name: answer, size: 3}]")
    assert status == 0, err
    assert [(task.name, task.size) for task in seen[0].evaluation.tasks] == [("chain_sum", None), ("answer", 3)]


def test_without_overrides_the_file_stands(npd, config_file, seen):
    npd("distill", config_file(training={"learning_rate": 0.5}))
    assert seen[0].training.learning_rate == 0.5
    assert seen[0].scoring.top_k == 4


# -- plans


@pytest.mark.parametrize("command", ["distill", "sft"])
def test_dry_run_prints_the_plan_and_makes_nothing(npd, config_file, tmp_path, command):
    path = config_file(rollout={"max_new_tokens": 80}, packing={"length": 128})
    before = sorted(tmp_path.rglob("*"))
    status, out, err = npd(command, path, "--dry-run")
    assert (status, err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    plain = " ".join(out.split())
    assert f"npd {command}: the plan" in plain
    assert "12 of 12 rows" in plain
    for said in ("optimiser steps", "GiB", "parameters", "tokens that models share", "disk", "Nothing was run"):
        assert said in plain, said
    assert re.search(rf"generations\W+{2 if command == 'distill' else 1} of 12 responses", plain)


def test_dry_run_counts_what_is_left_out(npd, config_file, data_file, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(data_file.read_text() * 2 + '{"prompt": ""}\n')
    status, out, _ = npd("distill", config_file(data={"train": str(data)}), "--dry-run")
    assert status == 0
    plain = " ".join(out.split())
    assert "12 of 25 rows" in plain
    assert "12 left out, duplicate of an earlier prompt" in plain
    assert "1 left out, empty prompt" in plain


def test_dry_run_checks_the_models(npd, config_file, student_dir, tmp_path):
    other = shutil.copytree(student_dir, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["@"])
    tokenizer.save_pretrained(other)
    message = refused(npd("distill", config_file(teacher={"model": str(other)}), "--dry-run"))
    assert "differ in 1 tokens" in message
    assert "'@' is None / 20" in message


# -- init-student


@pytest.fixture
def cut(npd, config_file, tmp_path):
    target = tmp_path / "cut" / "student"
    path = config_file(student={"model": str(target)})
    return lambda *args: npd("init-student", path, *args), target


@pytest.mark.parametrize(
    ("args", "layers"), [((), [0]), (("--layers", 2), [0, 2]), (("--layers", 3), [0, 1, 2]), (("--keep", "1,2"), [1, 2])]
)
def test_init_student(cut, teacher_dir, args, layers):
    run, target = cut
    status, out, err = run(*args)
    assert status == 0, err
    student, teacher = AutoModelForCausalLM.from_pretrained(target), LlamaForCausalLM.from_pretrained(teacher_dir)
    assert out == (
        f"Kept layers {layers} of 3: {student.num_parameters():,} of {teacher.num_parameters():,} parameters, in {target}.\n"
    )
    assert student.config.num_hidden_layers == len(layers)
    for mine, kept in zip(student.model.layers, layers, strict=True):
        theirs = teacher.model.layers[kept].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.state_dict().items())
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight)
    assert AutoTokenizer.from_pretrained(target)("1+2=")["input_ids"] == [5, 14, 6, 17]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--layers", 4), "--layers is 4, but the teacher has only 3 layers"),
        (("--keep", "0,x"), "--keep must be layer indices such as 0,2,5, but it is '0,x'"),
        (("--keep", "2,0"), "different, ascending and within 0..2, but they are [2, 0]"),
        (("--keep", "0,3"), "within 0..2"),
        (("--teacher", "null"), "set teacher.model"),
    ],
)
def test_init_student_refuses(cut, args, message):
    run, target = cut
    assert message in refused(run(*args))
    assert not target.exists()


def test_init_student_never_overwrites(npd, config_file, student_dir):
    before = {file: file.read_bytes() for file in student_dir.iterdir()}
    message = refused(npd("init-student", config_file()))
    assert f"student.model is {student_dir}, which exists already" in message
    assert {file: file.read_bytes() for file in student_dir.iterdir()} == before


def test_a_cut_student_distils(npd, cut, tmp_path):
    run, _ = cut
    assert run("--layers", 2)[0] == 0
    status, out, err = npd("distill", tmp_path / "config.yaml", "--schedule.generations", 1, "--schedule.passes", 1)
    assert status == 0, err
    assert squeezed(f"The student is in {tmp_path}/run/student.") in squeezed(out)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").config.num_hidden_layers == 2
