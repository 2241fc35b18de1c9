"""Teachers that know more than the student: another prompt, a system prompt, template options; and the student as its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chats import of_family
from conftest import save_model, write_jsonl
from transformers import AutoModelForCausalLM

import npd
from npd.config import ModelConfig, TeacherConfig, as_begun, config_tree, differing_keys, load_config
from npd.dataview import describe_rows
from npd.demo.task import make_problems
from npd.errors import UserError
from npd.generations.follower import follow
from npd.models import Vocabulary, load_model
from npd.observe.display import Display
from npd.plan import make_plan, plan_rows
from npd.preflight import DISTILL, prepare
from npd.prompts import SCHEMA, Chat, Prompts, read_data
from npd.prompts.table import TEACHER_PROMPT
from npd.registry import TEACHERS
from npd.scoring import Reading, ScoreTeacher
from npd.scoring.distance import exact
from npd.scoring.prefill import Prefill
from npd.store import Store, sha256
from npd.train.trainer import Trainer

USER, SYSTEM = {"role": "user", "content": "1+1"}, {"role": "system", "content": "be brief"}
HINT = [{"role": "user", "content": "1+1 (it is 2)"}]
COLUMNS = [
    "prompt_ids",
    "response_ids",
    "teacher_nll",
    "teacher_nll_free",
    "topk_ids",
    "topk_logprobs",
    "student_nll",
    "source",
]


# -- what is asked


def told(tmp_path, rows, family="qwen3", command="distill", **teacher):
    """Rows of data.train as a run keeps them, and its prompts."""
    file = write_jsonl(tmp_path / "d.jsonl", rows)
    data = {"train": str(file), "max_prompt_tokens": teacher.pop("longest", 300)}
    tree = {"run_dir": str(tmp_path), "student": {"model": "m"}, "teacher": {"model": "t"} | teacher, "data": data}
    config, chat = load_config(tree), Chat(of_family(family))
    prompts, _ = read_data(config, command, chat)
    assert prompts is not None
    return prompts, [
        (chat.decode(row["prompt_ids"]), ids and chat.decode(ids))
        for row, ids in zip(prompts.table.to_pylist(), read(prompts), strict=True)
    ]


def read(prompts: Prompts) -> list[Any]:
    return prompts.table[TEACHER_PROMPT].to_pylist() if prompts.privileged else [None] * len(prompts)


def test_a_row_may_tell_the_teacher_something_else(tmp_path):
    rows = [
        {"prompt": [USER], "teacher_prompt": HINT},
        {"prompt": [USER | {"content": "2+2"}]},
        {"prompt": "3+3=", "teacher_prompt": "3+3=6, so 3+3="},
        {"prompt": [USER | {"content": "4+4"}], "teacher_prompt": json.dumps(HINT)},
        {"prompt": "5+5=", "teacher_prompt": "5+5="},
        {"prompt": "6+6=", "teacher_prompt": " "},
    ]
    prompts, asked = told(tmp_path, rows)
    hint = Chat(of_family("qwen3")).ask("", HINT)[0].text
    assert [theirs for _, theirs in asked] == [hint, None, "3+3=6, so 3+3=", hint, None, None]
    assert "(it is 2)" not in asked[0][0]
    assert (prompts.privileged, prompts.longest_of_teacher) == (3, len(Chat(of_family("qwen3")).ask("", HINT)[0].ids))
    assert prompts.longest < prompts.longest_of_teacher


def test_a_system_prompt_and_options_of_the_teachers_own(tmp_path):
    think = {"enable_thinking": False}
    rows = [
        {"prompt": [USER]},
        {"prompt": [SYSTEM, USER]},
        {"prompt": [USER], "teacher_prompt": [SYSTEM, *HINT], "chat_template_kwargs": {"enable_thinking": True}},
    ]
    prompts, asked = told(tmp_path, rows, system="you know it", template_options=think)
    both = {"role": "system", "content": "you know it\n\nbe brief"}
    alone = {"role": "system", "content": "you know it"}
    chat = Chat(of_family("qwen3"))
    wanted = [chat.ask("", turns, None, think)[0].text for turns in ([alone, USER], [both, USER], [both, *HINT])]
    assert [theirs for _, theirs in asked] == wanted
    assert all("you know it" not in mine and "</think>" not in mine for mine, _ in asked)
    assert prompts.made_from["options"]["teachers"] == {"": ["you know it", think]}


@pytest.mark.parametrize(
    ("rows", "teacher", "message"),
    [
        ([{"prompt": "1="}], {"system": "x"}, "line 1: a prompt that is a string cannot show teacher.system"),
        ([{"prompt": [USER]}], {"template_options": {"mood": 1}}, "teacher.template_options has mood, but the student's"),
        ([{"prompt": [USER], "tools": [{"name": "f"}], "teacher_prompt": "1"}], {}, "teacher_prompt that is a string cannot"),
        (
            [{"prompt": [USER], "teacher_prompt": [USER | {"name": "ann"}]}],
            {},
            r"The teacher's prompt: .*does not show `name`",
        ),
        ([{"prompt": [USER], "teacher_prompt": 5}], {}, "`teacher_prompt` must be a string or a list of messages"),
    ],
)
def test_what_the_template_cannot_show_is_refused(tmp_path, rows, teacher, message):
    with pytest.raises(UserError, match=message):
        told(tmp_path, rows, **teacher)


def test_without_a_template_a_system_prompt_is_refused_at_the_start(make_tree, teacher_dir):
    tree = make_tree(teacher={"model": str(teacher_dir), "system": "x"})
    with pytest.raises(UserError, match=r"teacher\.system goes through the student's chat template, and .* has none"):
        prepare(load_config(tree), DISTILL)


def test_a_long_prompt_of_the_teacher_is_left_out_and_counted_and_another_hint_is_no_duplicate(tmp_path):
    rows = [{"prompt": "1+1=", "teacher_prompt": hint + "1+1="} for hint in ("a ", "b ", "a ", "c" * 300)]
    rows.append({"prompt": "1+1="})
    prompts, asked = told(tmp_path, rows, longest=99)
    assert asked == [("1+1=", "a 1+1="), ("1+1=", "b 1+1="), ("1+1=", None)]
    assert prompts.dropped == {
        "duplicate of an earlier prompt": 1, "teacher's prompt longer than data.max_prompt_tokens 99": 1
    }  # fmt: skip


def test_without_any_of_it_prompts_are_kept_as_ever(tmp_path):
    """The same bytes, whether a teacher is there, reads the same, or has options that change nothing here."""
    plain: list[dict[str, Any]] = [{"prompt": "1="}, {"prompt": [USER]}]
    prompts, _ = told(tmp_path, plain)
    same, _ = told(tmp_path, [{**row, "teacher_prompt": row["prompt"]} for row in plain])
    assert prompts.table.schema == same.table.schema == SCHEMA
    assert "teachers" not in prompts.made_from["options"]
    prompts.save(tmp_path / "a.arrow")
    same.made_from = prompts.made_from
    same.remarks, same.places = prompts.remarks, prompts.places
    same.save(tmp_path / "b.arrow")
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()
    opened = Prompts.open(tmp_path / "a.arrow")
    assert opened.table.equals(prompts.table)


def test_they_are_kept_with_the_run(tmp_path):
    prompts, _ = told(tmp_path, [{"prompt": "1=", "teacher_prompt": "1=1;1="}, {"prompt": "2="}])
    prompts.save(tmp_path / "p.arrow")
    opened = Prompts.open(tmp_path / "p.arrow")
    assert opened.table.equals(prompts.table)
    assert read(opened) == read(prompts)
    rows = opened.rows_at(np.array([1, 0]))
    assert rows[TEACHER_PROMPT].to_pylist() == read(prompts)[::-1]


def test_it_is_shown(tmp_path):
    rows = [{"prompt": [USER], "teacher_prompt": HINT}, {"prompt": "1=", "teacher_prompt": "2" * 2000}]
    file = write_jsonl(tmp_path / "d.jsonl", rows)
    data = {"train": str(file), "max_prompt_tokens": 300}
    config = load_config({"run_dir": "r", "student": {"model": "m"}, "teacher": {"model": "t"}, "data": data})
    shown, long = describe_rows(config, "distill", Chat(of_family("chatml")), 0, 9)
    at = next(i for i, line in enumerate(shown) if line.startswith("The teacher's prompt, "))
    assert "1+1 (it is 2)" in shown[at + 1]
    assert "It is left out: teacher's prompt longer than data.max_prompt_tokens 300." in long
    given = describe_rows(config, "sft", Chat(of_family("chatml")), 0, 1)  # nobody reads there
    assert not any("teacher's" in line for line in next(given))


# -- what is read


@pytest.fixture
def hints(tmp_path) -> Path:
    """The demo's problems; half of them tell the teacher the answer."""
    rows = [
        {"prompt": p.prompt, "completion": p.completion, "source": "ab"[i % 2], "answer": p.answer}
        | ({"teacher_prompt": f"#{p.answer};{p.prompt}"} if i % 4 < 2 else {})
        for i, p in enumerate(make_problems(12, seed=7))
    ]
    return write_jsonl(tmp_path / "hints.jsonl", rows)


def rows_of(run_dir: str | Path, generation: str) -> list[dict[str, Any]]:
    files = sorted(Path(run_dir).glob(f"generations/{generation}/part-*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=COLUMNS).to_pylist()]


def prompts_read(run_dir: str | Path) -> dict[tuple[int, ...], list[int]]:
    """The teacher's prompt by the student's."""
    table = Store(run_dir).prompts().table.to_pylist()
    return {tuple(row["prompt_ids"]): row.get(TEACHER_PROMPT) or row["prompt_ids"] for row in table}


def logits_of(path: str | Path, context: list[int], response: list[int]) -> np.ndarray:
    """[T, V] float64 log-probabilities of plain transformers, one response alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(path).double()
    with torch.no_grad():
        logits = model(torch.tensor([context + response])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).numpy()


def check_read(row: dict[str, Any], path: str | Path, context: list[int], k: int = 4) -> None:
    """A row's teacher columns by a slow reference."""
    response = row["response_ids"]
    logprobs = logits_of(path, context, response)
    tokens = range(len(response))
    assert row["teacher_nll"] == pytest.approx(-logprobs[tokens, response].mean(), abs=1e-5)
    free = logits_of(path, [1], response)
    assert row["teacher_nll_free"] == pytest.approx(-free[tokens, response].mean(), abs=1e-5)
    best = np.sort(logprobs, axis=1)[:, ::-1][:, :k]
    np.testing.assert_allclose(np.array(row["topk_logprobs"]).reshape(-1, k), best, atol=0.01)  # float16
    ids = np.array(row["topk_ids"]).reshape(-1, k)
    np.testing.assert_allclose(np.take_along_axis(logprobs, ids, 1), best, atol=1e-4)


def test_each_teacher_reads_behind_its_own_prompt(make_tree, hints, teacher_dir, student_dir):
    """Routed: the student itself for one source, another model for the rest; references too."""
    tree = make_tree(
        data={"train": str(hints), "max_prompt_tokens": 99},
        schedule={"references": 0.3, "generations": 1, "passes": 1},
        rollout={"samples_per_prompt": 2, "max_new_tokens": 70, "part_size": 5},
        packing={"length": 200},
        training={"batch_tokens": 400},
    )
    tree["teachers"] = {"b": {"model": "student"}}
    result = npd.distill(tree)
    known = prompts_read(tree["run_dir"])
    assert sum(list(ours) != theirs for ours, theirs in known.items()) == 6
    for generation, count in (("g000", 5), ("references", 3)):
        rows = rows_of(result.run_dir, generation)
        for row in rows[:: max(1, len(rows) // count)]:
            path = student_dir if row["source"] == "b" else teacher_dir
            check_read(row, path, known[tuple(row["prompt_ids"])])
    assert npd.distill(tree).student == result.student  # finished: nothing is read again


def test_the_stage_gives_a_server_the_same_contexts():
    asked: list[Any] = []

    class Asked:
        vocabulary = Vocabulary(20, start_id=1, stop_ids=(2,))

        def __call__(self, contexts: Any, responses: Any, top_k: int = 0, progress: Any = None) -> list[Reading]:
            asked.append(contexts)
            ids = np.arange(3, dtype=np.int32)
            return [
                Reading(-np.ones(len(r), np.float32), np.tile(ids, (len(r), 1)), -np.ones((len(r), 3)) * 2) for r in responses
            ]

    ids = pa.list_(pa.int32())
    table = pa.table(
        {
            "prompt_ids": pa.array([[5], [6, 7]], ids),
            "response_ids": pa.array([[8, 2], [9, 2]], ids),
            TEACHER_PROMPT: pa.array([None, [4, 4]], ids),
        }
    )
    ScoreTeacher(Asked(), 3)(table)
    assert asked == [[[5], [4, 4]], [[1], [1]]]


def test_the_distance_is_between_what_each_makes_of_its_own_prompt(student_dir, teacher_dir):
    rng = np.random.default_rng(0)
    contexts, longer, responses = (
        [rng.integers(4, 20, n).tolist() for n in lengths] for lengths in ((3, 5, 2, 9), (12, 5, 30, 1), (7, 1, 12, 4))
    )
    ours, theirs = (Prefill(load_model(ModelConfig(model=str(path))), Vocabulary(20, start_id=1, stop_ids=(2,)), 0, 40)
                    for path in (student_dir, teacher_dir))  # fmt: skip
    pieces = list(exact(ours, theirs, contexts, responses, longer))
    kl, agreed = 0.0, 0
    for context, other, response in zip(contexts, longer, responses, strict=True):
        s, t = logits_of(student_dir, context, response), logits_of(teacher_dir, other, response)
        kl, agreed = kl + float((np.exp(t) * (t - s)).sum()), agreed + int((s.argmax(1) == t.argmax(1)).sum())
    assert sum(piece.kl for piece in pieces) == pytest.approx(kl, rel=1e-4)
    assert (sum(piece.agreed for piece in pieces), sum(piece.tokens for piece in pieces)) == (agreed, 24)
    same = list(exact(ours, theirs, contexts, responses, contexts)), list(exact(ours, theirs, contexts, responses))
    assert sum(p.kl for p in same[0]) == pytest.approx(sum(p.kl for p in same[1]), rel=1e-5)


def test_references_are_written_behind_what_the_teacher_reads(make_tree, hints, teacher_dir):
    tree = make_tree(data={"train": str(hints), "max_prompt_tokens": 99, "references": "teacher"}, packing={"length": 128})
    tree["rollout"] |= {"temperature": 0.0, "max_new_tokens": 8}
    result = npd.sft(tree)
    known, model = prompts_read(tree["run_dir"]), AutoModelForCausalLM.from_pretrained(teacher_dir)
    for row in rows_of(result.run_dir, "g000")[::3]:
        context = known[tuple(row["prompt_ids"])]
        written: Any = model.generate(torch.tensor([context]), max_new_tokens=8, do_sample=False, eos_token_id=2)  # type: ignore
        assert row["response_ids"] == written[0, len(context) :].tolist()
        assert len(context) >= len(row["prompt_ids"])


# -- the student as its own teacher


def test_with_the_same_prompts_it_says_the_same(make_tree, data_file):
    """Δ and the divergence are 0 where the weights are the same: at the start, and with `latest` in each generation."""
    tree = make_tree("latest", teacher={"model": "student", "snapshot": "latest"}, loss={"top_k_mass": "tail"})
    tree["data"] |= {"eval": str(data_file)}
    tree["evaluation"] = {"kl_prompts": 4}
    notes = prepare(load_config(tree), DISTILL).notes
    assert any("The teacher is each generation's own snapshot and reads the same prompts" in note for note in notes)
    result = npd.distill(tree)
    for generation in ("g000", "g001"):
        for row in rows_of(result.run_dir, generation):
            assert row["teacher_nll"] == pytest.approx(row["student_nll"], abs=1e-5)
    steps = [json.loads(line) for line in Store(tree["run_dir"]).metrics.read_text().splitlines()]
    first = {g: next(line for line in steps if line.get("generation") == g and "kd" in line) for g in (0, 1)}
    assert all(abs(line["kd"]) < 1e-5 for line in first.values())
    assert result.before["eval/kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert result.after["eval/kl_to_teacher"] > 1e-4  # to the snapshot that the generation began with
    _, again = npd.evaluate(tree)
    assert again["eval/kl_to_teacher"] == pytest.approx(result.after["eval/kl_to_teacher"], rel=1e-4)


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 64.0}], ids=["whole", "adapters"])
def test_as_it_started_is_what_it_started_as(make_tree, hints, student_dir, lora, monkeypatch):
    """With adapters it is the base below them: the same as one that is loaded by itself, to 1e-6, and loaded once."""
    tree = make_tree(
        data={"train": str(hints), "eval": str(hints), "max_prompt_tokens": 99},
        student={"model": str(student_dir), "lora": lora},
        teacher={"model": "student"},
        training={"learning_rate": 2e-2},
        packing={"length": 128},
        evaluation={"kl_prompts": 3, "every_passes": 4},
    )
    assert not any("knows no more" in note for note in prepare(load_config(tree), DISTILL).notes)
    loaded: list[str] = []
    real = npd.generations.models.load_model

    def load(config: Any, **options: Any) -> Any:
        loaded.append(Path(config.model).name)
        return real(config, **options)

    monkeypatch.setattr(npd.generations.models, "load_model", load)
    monkeypatch.setattr(npd.models, "load_model", load)
    result = npd.distill(tree)
    per_run = ["v000000", "v000000", "v000001"] if lora is None else ["student"]  # of the others the trainer's own
    assert [name for name in loaded if name != "student" or lora is not None] == per_run + (["student"] if lora else [])
    known = prompts_read(tree["run_dir"])
    moved, apart = 0.0, Prefill(real(ModelConfig(model=str(student_dir))), Vocabulary(20, start_id=1, stop_ids=(2,)), 0, 128)
    for row in rows_of(result.run_dir, "g001")[::2]:
        check_read(row, student_dir, known[tuple(row["prompt_ids"])])
        mine = apart([known[tuple(row["prompt_ids"])]], [row["response_ids"]])[0].logprobs.mean(dtype=np.float64)
        assert row["teacher_nll"] == pytest.approx(-mine, abs=1e-6)
        snapshot = logits_of(result.run_dir / "policy/v000001", row["prompt_ids"], row["response_ids"])
        nll = -snapshot[range(len(row["response_ids"])), row["response_ids"]].mean()
        assert row["student_nll"] == pytest.approx(nll, abs=2e-5)
        start = logits_of(student_dir, row["prompt_ids"], row["response_ids"])
        moved = max(moved, abs(nll + start[range(len(row["response_ids"])), row["response_ids"]].mean()))
    assert moved > 1e-2  # the student is another one by then
    if lora is None:
        _, again = npd.evaluate(tree)  # another student is read; the teacher is still the one that started
        assert again["eval/kl_to_teacher"] == pytest.approx(result.after["eval/kl_to_teacher"], rel=1e-4)


@pytest.mark.parametrize("snapshot", ["start", "latest"])
def test_a_run_that_was_stopped_ends_as_it_would_have(make_tree, hints, student_dir, snapshot, monkeypatch):
    """And its parts are the same whoever makes them."""
    sections = {
        "data": {"train": str(hints), "max_prompt_tokens": 60},
        "rollout": {"max_new_tokens": 64},
        "student": {"model": str(student_dir), "lora": {"r": 2, "dropout": 0.1}},
        "teacher": {"model": "student", "snapshot": snapshot},
        "packing": {"length": 128},
        "schedule": {"references": 0.2, "generations": 2, "passes": 1},
        "training": {"batch_tokens": 128, "learning_rate": 1e-2},
    }
    whole, tree = make_tree("whole", **sections), make_tree("stopped", **sections)
    result = npd.distill(whole)
    steps = result.steps
    real = Trainer.step

    def step(self, samples, rows, tokens, step, progress):
        if step == steps - 1:
            raise KeyboardInterrupt
        return real(self, samples, rows, tokens, step, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            npd.distill(tree)
    lost = Path(tree["run_dir"]) / "generations/g001"
    for part in [*lost.glob("part-00001.parquet"), lost / "manifest.json"]:
        part.unlink()  # made again, by a follower that knows nothing but the directory
    follow(Path(tree["run_dir"]), None, 0, 1, Display(quiet=True), 0.1)
    again = npd.distill(tree)
    assert sha256(again.student / "model.safetensors") == sha256(result.student / "model.safetensors")
    for part in Path(whole["run_dir"]).glob("generations/*/part-*"):
        assert sha256(part) == sha256(again.run_dir / part.relative_to(result.run_dir)), part


# -- the word `student`


def test_the_word_is_the_student_and_a_path_is_a_directory(make_tree, tmp_path, monkeypatch):
    config = load_config(make_tree(teacher={"model": "student"}))
    assert config.all_teachers[None].model == config.student.model
    save_model(tmp_path / "student", seed=5)
    monkeypatch.chdir(tmp_path)
    path = load_config(make_tree(teacher={"model": "./student"}))
    assert path.all_teachers[None].model == "./student"
    assert not TeacherConfig(model="student", server="http://x").is_student
    for wrong, message in (
        ({"model": "student", "dtype": "bfloat16"}, "so dtype are those of `student`"),
        ({"model": "x", "snapshot": "latest"}, "snapshot latest is one of the student's"),
        ({"model": "x", "system": " "}, "system is empty"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(make_tree(teacher=wrong))
    assert TEACHERS.suiting(config.all_teachers[None]) is TEACHERS["local"]


def test_to_a_run_of_an_older_version_it_is_the_directory(make_tree):
    config = load_config(make_tree(teacher={"model": "student"}))
    old = config_tree(config)
    assert differing_keys(old, config_tree(config)) == []
    for key in ("snapshot", "system", "template_options", "adapter"):
        del old["teacher"][key]
    begun = as_begun(config, old)
    assert begun.all_teachers[None].model == "./student"
    assert differing_keys(old, config_tree(begun)) == []
    assert differing_keys(old, config_tree(config)) == ["teacher.model: './student' -> 'student'"]


def test_it_is_said_what_the_filter_does_with_a_teacher_that_knows(make_tree, hints):
    tree = make_tree(data={"train": str(hints), "max_prompt_tokens": 99}, packing={"length": 128})
    tree["selection"] = {"rule": "delta_ifd"}
    notes = [note for note in prepare(load_config(tree), DISTILL).notes if "selection.rule delta_ifd drops" in note]
    assert len(notes) == 1
    assert "6 prompts tell the teacher something else" in notes[0]


def test_the_dry_run_says_who_reads_what(make_tree, hints, student_dir):
    student = {"model": str(student_dir), "lora": {"r": 2}}
    common = {"data": {"train": str(hints), "max_prompt_tokens": 60}, "packing": {"length": 128}, "student": student}
    for teacher, said in (
        ({"model": "student"}, r"the student as it started; .*its adapters off, no memory of its own"),
        ({"model": "student", "snapshot": "latest"}, r"each generation's own snapshot; .*the student is scored with"),
    ):
        setup = prepare(load_config(make_tree(teacher=teacher, **common)), DISTILL)
        rows = dict(plan_rows(setup, make_plan(setup)))
        assert re.search(said, rows["teacher"])
        longest = max(len(ids) for ids in setup.prompts.table[TEACHER_PROMPT].to_pylist() if ids)  # type: ignore[union-attr]
        assert rows["prompts of the teacher's own"] == f"6, the longest {longest} tokens"
