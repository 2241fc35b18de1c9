from __future__ import annotations

import math
import re
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from npd.config import Config, as_begun, config_tree, differing_keys, leaves, load_config, section_of
from npd.errors import UserError

BASE: dict[str, Any] = {
    "run_dir": "runs/x",
    "student": {"model": "me/student"},
    "teacher": {"model": "me/teacher"},
    "data": {"train": "t.jsonl"},
}

# DESIGN.md's block, whose defaults are METHOD.md's.
DESIGN = """
seed: 0
student: {revision: null, dtype: auto, lora: null}
teacher: {revision: null, dtype: auto}
data: {eval: null, split: train, max_prompt_tokens: 1024, references: given}
schedule: {generations: 2, prompts: all, passes: 5, kl_budget: null, lead: 1.0, references: 0.0}
rollout: {engine: transformers, samples_per_prompt: 1, max_new_tokens: 1024, temperature: 1.0, top_p: 1.0, batch_size: 64}
scoring: {top_k: 10, batch_tokens: 8192}
selection: {rule: delta_ifd, ifd: loss_ratio, lower: 0.0, upper: 0.8}
packing: {length: 32768}
loss: {kd_weight: 0.9, top_k_mass: raw}
training: {batch_tokens: 131072, learning_rate: 1.0e-5, final_learning_rate: 1.0e-6, warmup_ratio: 0.03, weight_decay: 0.0,
           max_grad_norm: 1.0, precision: auto}
checkpoint: {every_steps: 200, keep: 2}
evaluation: {tasks: [], every_passes: 1}
tracking: {trackers: [tensorboard]}
"""


def merged(**sections):
    tree = {**BASE}
    for name, value in sections.items():
        both = isinstance(value, dict) and isinstance(tree.get(name), dict)
        tree[name] = {**tree[name], **value} if both else value
    return tree


def refused(**sections):
    with pytest.raises(UserError) as caught:
        load_config(merged(**sections))
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_defaults_are_the_designs():
    tree = config_tree(load_config(BASE))
    for section, options in yaml.safe_load(DESIGN).items():
        if not isinstance(options, dict):
            assert tree[section] == options, section
            continue
        for key, value in options.items():
            assert tree[section][key] == value, f"{section}.{key}"


def test_every_option_says_what_it_is():
    fields = dict(leaves(Config))
    assert len(fields) > 40
    assert [name for name, field in fields.items() if not field.description] == []


def test_leaves_are_the_keys_of_the_tree():
    """Each leaf can be set by its dotted name: a list of sections is one option, not the options of its items."""
    tree = config_tree(load_config(merged(student={"lora": {}}, evaluation={"tasks": ["chain_sum"]})))

    def paths(node, prefix=""):
        for key, value in node.items():
            yield from paths(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]

    names = {name for name, _ in leaves(Config)} - {"provenance"}
    assert set(paths(tree)) <= names
    assert names - set(paths(tree)) == {"student.lora", "teacher"}  # sections that may be null
    assert "evaluation.tasks" in names


def test_every_section_is_found():
    for name, field in Config.model_fields.items():
        if name == "teachers":  # a dict of sections is one option
            assert section_of(field) is None
            continue
        section = section_of(field)
        assert (section is not None) == isinstance(BASE.get(name, getattr(load_config(BASE), name)), dict | BaseModel)


@pytest.mark.parametrize(
    ("sections", "key", "near"),
    [
        ({"trainin": {}}, "trainin", "training"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat", "training.learning_rate"),
        ({"training": {"lerning_rate": 1}}, "training.lerning_rate", "training.learning_rate"),
        ({"data": {"trian": "x"}}, "data.trian", "data.train"),
        ({"student": {"lora": {"alfa": 1}}}, "student.lora.alfa", "student.lora.alpha"),
        ({"training": {"top_k": 5}}, "training.top_k", "scoring.top_k"),
        ({"learning_rate": 1}, "learning_rate", "training.learning_rate"),
        ({"loss": {"temperature": 2}}, "loss.temperature", "rollout.temperature"),
        ({"evaluation": {"tasks": [{"name": "a", "sizes": 3}]}}, "evaluation.tasks.0.sizes", "evaluation.tasks.0.size"),
    ],
)
def test_unknown_key_names_the_nearest(sections, key, near):
    assert f"unknown key '{key}' (did you mean '{near}'?)" in refused(**sections)


def test_unknown_key_that_is_near_nothing():
    assert "unknown key 'zzzzzzzz'." in refused(zzzzzzzz=1)


def test_all_mistakes_at_once():
    message = refused(training={"learning_rat": 1, "max_grad_norm": "one"}, loss={"kd_weight": 2})
    assert all(part in message for part in ("learning_rat", "max_grad_norm", "loss.kd_weight"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate: input should be a valid number.*but it is 'fast'"),
        ({"training": {"max_steps": 2.5}}, "training.max_steps: input should be a valid integer.*2.5"),
        ({"student": {"model": 3}}, "student.model: input should be a valid string, but it is 3"),
        ({"student": "x"}, "student: input should be a valid dictionary.*'x'"),
        ({"training": None}, "training: input should be a valid dictionary"),
        ({"evaluation": {"tasks": "chain_sum"}}, "evaluation.tasks: input should be a valid list.*'chain_sum'"),
        ({"loss": {"kd_weight": 1.5}}, "loss.kd_weight: input should be less than or equal to 1, but it is 1.5"),
        ({"loss": {"top_k_mass": "all"}}, "loss.top_k_mass: input should be 'raw', 'renormalize' or 'tail'.*'all'"),
        ({"scoring": {"top_k": 0}}, "scoring.top_k: input should be greater than or equal to 1"),
        ({"rollout": {"top_p": 0}}, "rollout.top_p: input should be greater than 0"),
        ({"schedule": {"prompts": 0}}, "schedule.prompts: must be 'all', or from 1 to 100,000,000, but it is 0"),
        ({"schedule": {"prompts": "some"}}, "schedule.prompts.*'all'.*but it is 'some'"),
        ({"schedule": {"generations": 0}}, "schedule.generations: input should be greater than or equal to 1"),
    ],
)
def test_wrong_value(sections, message):
    assert re.search(message, refused(**sections))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("run_dir", "run_dir is missing and has no default"),
        ("student", "student is missing"),
        ("data", "data is missing"),
    ],
)
def test_missing_key(gone, message):
    with pytest.raises(UserError, match=message):
        load_config({key: value for key, value in BASE.items() if key != gone})


def test_missing_key_in_a_section():
    with pytest.raises(UserError, match=r"student\.model is missing and has no default"):
        load_config(BASE | {"student": {"dtype": "auto"}})


def test_teacher_may_be_missing():
    assert load_config({key: value for key, value in BASE.items() if key != "teacher"}).teacher is None


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"selection": {"lower": 1.0, "upper": 0.5}}, ["selection: lower (1.0) is above upper (0.5)"]),
        ({"selection": {"lower": math.nan}}, ["selection.lower is nan"]),
        ({"packing": {"length": 100}}, ["2048 tokens", "data.max_prompt_tokens 1024", "packing.length is 100", "raise"]),
        ({"evaluation": {"samples": 4}}, ["samples above 1", "evaluation.temperature"]),
        ({"schedule": {"passes": 2, "lead": 2.5}}, ["lead (2.5) is above passes (2)"]),
        ({"schedule": {"lead": -0.5}}, ["schedule.lead", "greater than or equal to 0"]),
        ({"schedule": {"kl_budget": 0.0}}, ["schedule.kl_budget", "greater than 0"]),
        ({"schedule": {"references": 1.0}}, ["schedule.references", "less than or equal to 0.99"]),
        ({"selection": {"rule": "adaptive", "lower": 0.1}}, ["adaptive_lower <= lower <= 0 < upper", "0.1"]),
        ({"selection": {"rule": "adaptive", "lower": -0.5}}, ["adaptive_lower <= lower <= 0 < upper", "-0.5"]),
    ],
)
def test_options_that_do_not_go_together(sections, parts):
    message = refused(**sections)
    for part in parts:
        assert part in message


def test_the_schedule_may_go_to_its_bounds():
    schedule = load_config(merged(schedule={"passes": 2, "lead": 2.0, "kl_budget": 0.1, "references": 0.9})).schedule
    assert (schedule.lead, schedule.kl_budget, schedule.references) == (2.0, 0.1, 0.9)
    assert load_config(merged(schedule={"lead": 0})).schedule.lead == 0
    assert load_config(merged(selection={"rule": "adaptive"})).selection.rule == "adaptive"


def test_band_edges_may_meet_and_be_infinite():
    assert load_config(merged(selection={"lower": 0.5, "upper": 0.5})).selection.upper == 0.5
    assert load_config(merged(selection={"upper": math.inf})).selection.upper == math.inf


def test_task_names_become_tasks():
    tasks = load_config(merged(evaluation={"tasks": ["chain_sum", {"name": "answer", "size": 7}]})).evaluation.tasks
    assert [(task.name, task.size) for task in tasks] == [("chain_sum", None), ("answer", 7)]


def test_numbers_as_yaml_reads_them(tmp_path):
    """YAML takes 1e-5, without a dot, for text."""
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(BASE) + "training: {learning_rate: 1e-5}\nschedule: {prompts: 32}\n")
    config = load_config(file)
    assert config.training.learning_rate == 1e-5
    assert config.schedule.prompts == 32


def test_overrides_are_laid_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(merged(training={"learning_rate": 0.5, "weight_decay": 0.25})))
    overrides = {"training.learning_rate": 0.125, "student.lora.r": 8, "scoring.top_k": 3, "seed": 4, "teacher": None}
    config = load_config(str(file), overrides)
    assert (config.training.learning_rate, config.training.weight_decay) == (0.125, 0.25)
    assert config.student.lora is not None
    assert config.student.lora.r == 8
    assert (config.scoring.top_k, config.seed, config.teacher) == (3, 4, None)
    assert load_config(file).training.learning_rate == 0.5


def test_overrides_leave_the_callers_mapping_alone():
    tree = merged(training={"learning_rate": 0.5})
    load_config(tree, {"training.learning_rate": 0.1, "student.lora.r": 4})
    assert tree == merged(training={"learning_rate": 0.5})


def test_override_of_an_unknown_key():
    with pytest.raises(UserError, match=r"unknown key 'scoring.topk' \(did you mean 'scoring.top_k'\?\)"):
        load_config(BASE, {"scoring.topk": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir: [", r"is not valid YAML:.*line \d"),
        ("a: 1\n b: 2", "is not valid YAML"),
        ("- a\n- b", "must hold options as `key: value`, but it holds list"),
        ("", "must hold options as `key: value`"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"There is no configuration file .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_unreadable_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)  # a directory
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00run_dir")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_message_names_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("run_dir: x\n")
    with pytest.raises(UserError, match=r"mine\.yaml is not a valid configuration"):
        load_config(file)


def test_tree_round_trip():
    config = load_config(merged(student={"lora": {"r": 4}}, evaluation={"tasks": ["answer"]}))
    tree = config_tree(config)
    assert load_config(yaml.safe_load(yaml.safe_dump(tree))) == config
    assert "provenance" not in tree


def test_what_npd_writes_into_a_run_can_be_read_back():
    tree = config_tree(load_config(BASE)) | {"provenance": {"command": "distill"}}
    assert config_tree(load_config(tree)) == config_tree(load_config(BASE))


def test_differing_keys():
    old = config_tree(load_config(BASE))
    new = config_tree(load_config(merged(training={"learning_rate": 0.5}, scoring={"top_k": 3}, seed=1)))
    assert differing_keys(old, old) == []
    assert differing_keys(old, new) == ["scoring.top_k: 10 -> 3", "seed: 0 -> 1", "training.learning_rate: 1e-05 -> 0.5"]
    lora = config_tree(load_config(merged(student={"lora": {"r": 4}})))
    assert [line.split(":")[0] for line in differing_keys(old, lora)] == ["student.lora"]


def test_keys_that_change_no_result_may_differ():
    old = config_tree(load_config(BASE))
    free = config_tree(
        load_config(
            merged(
                run_dir="elsewhere",
                checkpoint={"every_steps": 3},
                evaluation={"tasks": ["answer"]},
                tracking={"trackers": []},
                training={"micro_batch_rows": 4},
            )
        )
    )
    assert differing_keys(old, free) == []


def test_where_a_teacher_is_served_may_differ_and_what_the_engine_computes_may_not():
    def tree(**sections):
        return config_tree(load_config(merged(rollout={"engine": "vllm", **sections.pop("rollout", {})}, **sections)))

    old = tree(teachers={"a.b": {"model": "m"}})
    served = tree(
        teachers={"a.b": {"model": "m", "server": "http://x", "concurrency": 3, "tokenizer": "t"}},
        rollout={"vllm": {"gpu_memory_utilization": 0.3}, "check_samples": 1},
    )
    assert differing_keys(old, served) == []
    other = tree(teachers={"a.b": {"model": "n"}}, rollout={"vllm": {"kv_cache_dtype": "fp8"}})
    assert differing_keys(old, other) == ["rollout.vllm.kv_cache_dtype: None -> 'fp8'", "teachers.a.b.model: 'm' -> 'n'"]


def test_a_run_of_a_version_without_the_empty_options_goes_on():
    new = config_tree(load_config(BASE))
    old = {key: value for key, value in new.items() if key != "teachers"}
    old["rollout"] = {
        key: value for key, value in new["rollout"].items() if key not in ("vllm", "check_samples", "check_bound")
    }
    assert differing_keys(old, new) == []


def begun(run: dict, asked: dict) -> tuple[Config, list[str]]:
    """How a run of a tree goes on with what a user asks, and what is refused of that."""
    config = as_begun(load_config(asked), run)
    return config, differing_keys(run, config_tree(config))


def test_a_run_goes_on_as_it_was_begun_where_a_default_has_changed_since():
    new = config_tree(load_config(BASE))
    changed = {key: extra_of(field)["before"] for key, field in leaves(Config) if "before" in extra_of(field)}
    assert changed == {"rollout.batching": "static", "scoring.free": "always", "scoring.verify": False}
    for key, before in changed.items():
        section, name = key.split(".")
        default = new[section][name]
        assert before != default
        older = new | {section: {k: v for k, v in new[section].items() if k != name}}
        then = new | {section: new[section] | {name: before}}
        said = BASE | {section: {name: default}}
        assert getattr(getattr(begun(older, BASE)[0], section), name) == before
        assert getattr(getattr(begun(then, BASE)[0], section), name) == before  # as the older one is written again
        assert getattr(getattr(begun(new, BASE)[0], section), name) == default
        assert begun(older, BASE)[1] == begun(then, BASE)[1] == begun(new, BASE)[1] == []
        assert begun(older, said)[1] == [f"{key}: None -> {default!r}"]
        assert begun(then, said)[1] == [f"{key}: {before!r} -> {default!r}"]
        assert begun(older, BASE | {section: {name: before}})[1] == []


def extra_of(field: Any) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def test_configuration_cannot_be_changed_in_place():
    config = load_config(BASE)
    with pytest.raises(Exception, match="frozen"):
        config.training.learning_rate = 1.0


def test_an_unknown_key_is_named_whatever_it_looks_like():
    for key in ("learning-rate", "int", "1st"):
        with pytest.raises(UserError, match=rf"unknown key 'training\.{key}'"):
            load_config(merged(training={key: 1}))


def test_a_union_is_explained_once_by_its_own_name():
    with pytest.raises(UserError) as caught:
        load_config(merged(schedule={"prompts": "some"}))
    text = str(caught.value)
    assert "schedule.prompts: input should be 'all' or input should be a valid integer" in text
    assert text.count("schedule.prompts") == 1
    assert text.count("but it is 'some'") == 1
