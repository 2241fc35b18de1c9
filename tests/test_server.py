"""A served teacher says what the same weights say here; what goes wrong with servers is survived, or said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import HANG, own_port, save_model
from fake_server import FakeServer, Hanging, changed, cut_short, dropped, malformed, reply, serving, status
from hypothesis import given
from hypothesis import strategies as st

import npd
import npd.preflight
import npd.scoring.served
import npd.scoring.server
from npd.config import ModelConfig, Sampling, TeacherConfig, load_config
from npd.errors import RunError, UserError
from npd.models import Vocabulary, load_model, load_tokenizer
from npd.prompts import Chat
from npd.scoring import Prefill, Question, ScoreTeacher, TeacherSetting
from npd.scoring.routed import Routed
from npd.scoring.served import ServedTeacher, check_server
from npd.scoring.server import _sglang_logprobs, _vllm_logprobs
from npd.store import Store

VOCABULARY = Vocabulary(size=20, stop_ids=(2,), start_id=1)


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def server(request, teacher_dir):
    with serving(teacher_dir, kind=request.param) as server:
        yield server


@pytest.fixture
def hanging():
    """A fault that lasts as long as the test."""
    fault = Hanging()
    yield fault
    fault.go.set()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(npd.scoring.server, "LONGEST_PAUSE", 0.05)
    yield
    while [thread for thread in threading.enumerate() if thread.name.startswith("teacher-")]:  # left behind by an error
        time.sleep(0.01)


def teacher_config(server: FakeServer, **options: Any) -> TeacherConfig:
    return TeacherConfig(
        model="big", server=server.url, **{"concurrency": 4, "timeout": HANG, "retry_seconds": HANG, **options}
    )


def served(server: FakeServer, say: Callable[[str], None] = lambda text: None, **options: Any) -> ServedTeacher:
    """The teacher on a server."""
    return ServedTeacher(teacher_config(server, **options), TeacherSetting(VOCABULARY, 0, "cpu", 64, say))


def pairs(count: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(3, 20, rng.integers(1, 9)).tolist() for _ in range(count)]
    return contexts, [rng.integers(2, 20, rng.integers(1, 9)).tolist() for _ in range(count)]


def assert_alike(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)
        np.testing.assert_array_equal(mine.topk_ids, other.topk_ids)
        np.testing.assert_allclose(mine.topk_logprobs, other.topk_logprobs, atol=1e-4)
        assert [x.dtype for x in mine] == [x.dtype for x in other]


# -- the same values


@pytest.mark.parametrize("top_k", [0, 1, 5, 20])
def test_readings_equal_those_of_the_model_here(server, teacher_dir, top_k):
    local = Prefill(load_model(ModelConfig(model=str(teacher_dir))), VOCABULARY, 0, 64)
    contexts, responses = pairs(9, seed=top_k)
    told: list[int] = []
    ours = served(server)(contexts, responses, top_k, told.append)
    assert_alike(ours, local(contexts, responses, top_k))
    assert sum(told) == sum(map(len, responses))


def test_the_stage_adds_the_same_columns(server, teacher_dir):
    contexts, responses = pairs(6, seed=3)
    table = pa.table({"prompt_ids": contexts, "response_ids": responses})
    local = ScoreTeacher(Prefill(load_model(ModelConfig(model=str(teacher_dir))), VOCABULARY, 0, 64), 4)(table)
    there = ScoreTeacher(served(server), 4)(table)
    assert there.schema == local.schema
    for name in ("teacher_nll", "teacher_nll_free"):
        np.testing.assert_allclose(there[name].to_numpy(), local[name].to_numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_ids_that_only_pad_the_teachers_vocabulary_are_left_out(tmp_path, kind):
    path = save_model(tmp_path / "padded", seed=6, vocabulary=30)
    local = Prefill(load_model(ModelConfig(model=str(path))), VOCABULARY, 0, 64)
    contexts, responses = pairs(6, seed=1)
    with serving(path, kind=kind, cap=30) as padded:
        ours = served(padded)(contexts, responses, 6)
        asked = {body.get("prompt_logprobs", body.get("top_logprobs_num")) for body in padded.bodies}
    assert_alike(ours, local(contexts, responses, 6))
    assert max(asked) > 6  # more than the top-k, or the test would prove nothing


@given(st.data())
def test_parsing_finds_the_best_in_any_answer(data):
    """Whatever the order of the entries, and whether the token itself is among the best or comes besides."""
    size, k = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 9))
    k = min(k, size)
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=6))
    start = data.draw(st.integers(1, len(ids) - 1))
    rows = [data.draw(st.permutations([-0.5 * (i + 1) for i in range(size)])) for _ in ids]
    order = [data.draw(st.permutations(range(size))) for _ in ids]
    best = [sorted(range(size), key=row.__getitem__, reverse=True)[:k] for row in rows]
    entries: list[Any] = [None]
    tops: list[Any] = [None]
    for t in range(1, len(ids)):
        shown = [i for i in order[t] if i in best[t] or i == ids[t]]
        entries.append({str(i): {"logprob": rows[t][i]} for i in shown})
        tops.append([[rows[t][i], i, None] for i in order[t] if i in best[t]])
    own = [[None, ids[start - 1], None], *([rows[t][ids[t]], ids[t], None] for t in range(start, len(ids)))]
    said = _vllm_logprobs({"choices": [{"prompt_logprobs": entries}]}, ids, start, k)
    meta = {"input_token_logprobs": own, "input_top_logprobs": [None, *tops[start:]]}
    assert said == _sglang_logprobs({"meta_info": meta}, ids, start, k)
    assert [token.logprob for token in said] == [rows[t][ids[t]] for t in range(start, len(ids))]
    assert [[i for i, _ in token.top] for token in said] == best[start:]


def test_requests_are_in_flight_together_but_no_more_than_asked_for(server):
    """The first ones are answered only when three of them are there."""
    three = threading.Barrier(3, timeout=HANG)

    def together(handler: Any, answer: dict[str, Any]) -> None:
        three.wait()
        reply(handler, answer)

    server.delay, server.most_at_once, server.faults = 0.05, 0, [together] * 3
    try:
        contexts, responses = pairs(20, seed=5)
        served(server, concurrency=3)(contexts, responses, 2)
    finally:
        server.delay = 0.0
    assert server.most_at_once == 3


def test_references_are_written_by_the_server(server, teacher_dir):
    """In the model's own distribution, whatever the server's defaults, and no further than the first stop token."""
    prompts, _ = pairs(5, seed=8)
    table = pa.table({"prompt_ids": prompts})
    told: list[int] = []
    rows = served(server).write(table, Sampling(10), 3, told.append).to_pylist()
    assert told == [1] * 5
    twice = served(server).write(table, Sampling(10, samples_per_prompt=2), 3).to_pylist()
    assert [row["prompt_ids"] for row in twice] == [prompt for prompt in prompts for _ in range(2)]
    assert twice[::2] == twice[1::2] == rows  # it is greedy, whatever it is asked
    for prompt, row in zip(prompts, rows, strict=True):
        expected = server._written(prompt, {"max_tokens": 10, "max_new_tokens": 10, "stop_token_ids": [2]})
        ids = expected["choices"][0]["token_ids"] if server.kind == "vllm" else expected["output_ids"]
        assert row["response_ids"][: len(ids)] == ids
        assert row["finish_reason"] == ("stop" if row["response_ids"][-1] == 2 else "length")
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}  # or the test would prove half
    asked = server.bodies[-1].get("sampling_params", server.bodies[-1])
    neutral = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    assert asked | neutral | {"frequency_penalty": 0.0} == asked


# -- what goes wrong and passes


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(408), status(429, Retry_After="0"), dropped, cut_short, malformed, None],
    ids=["500", "503", "408", "429", "dropped", "cut short", "malformed", "slow"],
)
def test_what_can_be_asked_again_is(server, teacher_dir, fault, hanging):
    local = Prefill(load_model(ModelConfig(model=str(teacher_dir))), VOCABULARY, 0, 64)
    contexts, responses = pairs(5, seed=9)
    said: list[str] = []
    teacher = served(server, said.append, timeout=HANG if fault else 0.7)  # what is late is asked again, however often
    server.faults = [fault or hanging] * 2
    assert_alike(teacher(contexts, responses, 3), local(contexts, responses, 3))
    assert not server.faults
    assert any("can't be used now" in line for line in said)
    assert any("is back" in line for line in said)


def test_retry_after_is_obeyed(server):
    server.faults = [status(429, Retry_After="1")]
    began = time.monotonic()
    served(server)([[4]], [[5, 2]], 2)
    assert time.monotonic() - began >= 1.0


def test_a_server_that_stays_away_ends_the_run_with_its_words(server):
    server.faults = [status(503, "model is loading")] * 200
    try:
        with pytest.raises(RunError, match="model is loading") as error:
            served(server, retry_seconds=0.3)(*pairs(8, seed=1), 2)
    finally:
        server.faults = []
    assert "run the same command again" in str(error.value)


# -- what goes wrong and does not pass


def test_a_4xx_is_an_error_at_once(server):
    server.faults = [status(400, "this model's context is 12 tokens")]
    reader = served(server, retry_seconds=60)
    with pytest.raises(UserError, match="context is 12 tokens"):
        reader(*pairs(1, seed=2), 2)
    assert not server.faults


def test_the_first_error_ends_the_others(server):
    """Those that wait to ask again do not keep the run from saying what is wrong."""
    server.faults = [status(503)] * 3 + [status(400, "no such thing")]
    reader = served(server, concurrency=8, retry_seconds=600)
    with pytest.raises(UserError, match="no such thing"):
        reader(*pairs(8, seed=2), 2)
    server.faults = []


def without_first(answer: dict[str, Any]) -> None:
    if "choices" in answer:
        answer["choices"][0]["prompt_logprobs"][1] = None
    else:
        answer["meta_info"]["input_token_logprobs"][1][0] = None


def shorter_top_k(answer: dict[str, Any]) -> None:
    if "choices" in answer:
        entry = answer["choices"][0]["prompt_logprobs"][-1]
        for key in list(entry)[2:]:  # the token's own comes first
            del entry[key]
    else:
        answer["meta_info"]["input_top_logprobs"][-1] = answer["meta_info"]["input_top_logprobs"][-1][:2]


def fewer_tokens(answer: dict[str, Any]) -> None:
    if "choices" in answer:
        answer["choices"][0]["prompt_logprobs"].pop()
    else:
        answer["meta_info"]["input_token_logprobs"].pop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_first, "something else than a vLLM or SGLang"),
        (shorter_top_k, "top 2 where top 4 was asked"),
        (fewer_tokens, "something else than a vLLM or SGLang"),
        (lambda answer: answer.clear(), "something else than a vLLM or SGLang"),
    ],
    ids=["first token missing", "top-k short", "tokens missing", "empty"],
)
def test_an_answer_to_another_question_is_refused(server, change, words):
    server.faults = [changed(change)]
    with pytest.raises(UserError, match=words):
        served(server)([[4]], [[5, 6, 2]], 4)


# -- what is seen before anything is generated


def checked(config: TeacherConfig, student_dir: Path, *, top_k: int = 4, tokens: int = 40) -> list[str]:
    tokenizer = load_tokenizer(ModelConfig(model=str(student_dir)))
    question = Question(tokenizer, VOCABULARY, top_k, tokens - 12, 12, "rollout.max_new_tokens")
    return check_server(config, question)


def test_a_good_server_passes(server, student_dir, teacher_dir):
    assert checked(teacher_config(server), student_dir) == []
    assert checked(teacher_config(server, tokenizer=str(teacher_dir)), student_dir) == []
    assert checked(teacher_config(server).model_copy(update={"server": f"{server.url}/v1/"}), student_dir) == []


def test_nothing_there(student_dir):
    with own_port() as port, pytest.raises(UserError, match="nothing answers there"):
        checked(TeacherConfig(model="big", server=f"http://127.0.0.1:{port}"), student_dir)


def test_another_model(server, student_dir):
    with pytest.raises(UserError, match="serves big, not 'small'"):
        checked(teacher_config(server).model_copy(update={"model": "small"}), student_dir)


def test_a_cap_on_top_k_and_how_to_lift_it(teacher_dir, student_dir):
    with serving(teacher_dir, cap=3) as capped, pytest.raises(UserError, match="max allowed: 3") as error:
        checked(teacher_config(capped), student_dir)
    assert "--max-logprobs" in str(error.value)


def test_a_context_that_is_too_short(teacher_dir, student_dir):
    with serving(teacher_dir, context=40) as short:
        with pytest.raises(UserError, match="--max-model-len"):
            checked(teacher_config(short), student_dir, tokens=40)
        assert checked(teacher_config(short), student_dir, tokens=39) == []  # one more token is always written


def test_another_tokenizer(teacher_dir, student_dir):
    with serving(teacher_dir) as other:
        real = other.tokenizer
        other.tokenizer = lambda text: {"input_ids": [*real(text)["input_ids"], 7]}
        with pytest.raises(UserError, match="into different ids"):
            checked(teacher_config(other), student_dir)


def test_the_first_prompt_is_read_as_it_is_sent(student_dir, teacher_dir):
    """A tokenizer that differs only in what the probes do not hold, also where a right one is named; and what is sent."""
    question = Question(load_tokenizer(ModelConfig(model=str(student_dir))), VOCABULARY, 4, 20, 12, "")
    with serving(teacher_dir) as other:
        real = other.tokenizer
        asked = replace(question, prompt_ids=tuple(real("12+34=")["input_ids"]))
        assert check_server(teacher_config(other), asked) == []
        assert other.bodies[-1]["prompt"] == [*asked.prompt_ids, 2]

        def odd(text: str, **options: Any) -> Any:
            ids = real(text, **options)["input_ids"]
            return {"input_ids": [*ids, 7] if text == "12+34=" else ids}

        other.tokenizer = odd
        with pytest.raises(UserError, match=r"The student and big .* the same text '12\+34=' into different ids"):
            check_server(teacher_config(other), asked)
        with pytest.raises(UserError, match=r"teacher\.tokenizer .* and big .* '12\+34=' into different ids"):
            check_server(teacher_config(other, tokenizer=str(teacher_dir)), asked)
        other.tokenizer = real
        other.faults = [changed(lambda answer: answer["choices"][0]["prompt_logprobs"][-1].clear())]
        with pytest.raises(UserError, match="log-probabilities of other tokens"):
            check_server(teacher_config(other), asked)
        other.faults = [changed(lambda answer: answer["choices"][0]["prompt_token_ids"].append(1))]
        with pytest.raises(UserError, match="read other tokens than were sent"):
            served(other).write(pa.table({"prompt_ids": [[4, 5]]}), Sampling(3, temperature=0.0))


def test_another_chat_template_on_the_server_is_told(student_dir, teacher_dir):
    tokenizer = load_tokenizer(ModelConfig(model=str(student_dir)))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}#{% endfor %}"
    question = Question(tokenizer, VOCABULARY, 4, 20, 12, "", chat=Chat(tokenizer))
    with serving(teacher_dir) as other:
        assert check_server(teacher_config(other), question) == []  # a base model has none
        other.tokenizer.chat_template = tokenizer.chat_template
        assert check_server(teacher_config(other), question) == []
        other.tokenizer.chat_template = tokenizer.chat_template.replace("#", ";")
        (note,) = check_server(teacher_config(other), question)
        assert "The chat template of big on " in note
        assert "the student's writes '#" in note
        assert ", the server's ';" in note


def test_a_server_that_does_not_tokenize_is_mentioned(teacher_dir, student_dir):
    with serving(teacher_dir, tokenizes=False) as mute:
        (note,) = checked(teacher_config(mute), student_dir)
        assert "teacher.tokenizer" in note
        assert checked(teacher_config(mute, tokenizer=str(teacher_dir)), student_dir) == []


@pytest.mark.parametrize("key", ["s3cret\r", " s3cret \n"])
def test_white_space_around_a_key_is_no_part_of_it(teacher_dir, student_dir, monkeypatch, key):
    monkeypatch.setenv("NPD_TEACHER_API_KEY", key)
    with serving(teacher_dir, key="s3cret") as locked:
        assert checked(teacher_config(locked), student_dir) == []


@pytest.mark.parametrize("key", ["s3\ncret", "sécret"])
def test_a_key_that_is_none_is_not_shown(teacher_dir, student_dir, monkeypatch, key):
    monkeypatch.setenv("NPD_TEACHER_API_KEY", key)
    with serving(teacher_dir, key="s3cret") as locked, pytest.raises(UserError, match="NPD_TEACHER_API_KEY") as error:
        checked(teacher_config(locked), student_dir)
    assert "cret" not in str(error.value)


def test_a_hanging_request_keeps_no_error_back(server, hanging):
    """Neither an error of another request, nor `stop`: both are there while it still hangs."""
    server.faults = [hanging, status(400, "no such thing")]
    began = time.monotonic()
    with pytest.raises(UserError, match="no such thing"):
        served(server, timeout=2 * HANG)(*pairs(2, seed=2), 2)
    again = Hanging()
    server.faults = [again] * 2
    stopped = served(server, timeout=2 * HANG)

    def stop_once_asked() -> None:
        again.asked.wait(HANG)
        stopped.stop()

    stopper = threading.Thread(target=stop_once_asked)
    stopper.start()
    with pytest.raises(RunError, match="Stopped"):
        stopped(*pairs(2, seed=2), 2)
    assert time.monotonic() - began < HANG  # which is how long it hangs
    again.go.set()
    stopper.join()


def test_a_server_that_does_not_know_how_is_not_asked_again(server):
    server.faults = [status(501, "not implemented")]
    with pytest.raises(UserError, match="not implemented"):
        served(server)(*pairs(1, seed=2), 2)


def test_checks_at_the_start_do_not_wait_for_long(server, student_dir, monkeypatch):
    monkeypatch.setattr(npd.scoring.served, "CHECK_SECONDS", 0.2)
    server.faults = [status(503, "model is loading")] * 100
    try:
        with pytest.raises(UserError, match="model is loading"):
            checked(teacher_config(server, retry_seconds=600), student_dir)
    finally:
        server.faults = []


def test_the_key_comes_from_the_environment_and_stays_there(make_tree, teacher_dir, monkeypatch, student_dir):
    with serving(teacher_dir, key="s3cret") as locked:
        with pytest.raises(UserError, match="NPD_TEACHER_API_KEY"):
            checked(teacher_config(locked), student_dir)
        monkeypatch.setenv("MY_KEY", "s3cret")
        tree = make_tree(teacher={"model": "big", "server": locked.url, "api_key_env": "MY_KEY"})
        npd.refresh(tree)
    files = [file for file in Path(tree["run_dir"]).rglob("*") if file.is_file()]
    assert len(files) > 5
    assert not [file for file in files if b"s3cret" in file.read_bytes()]


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 4},
        {"server": "localhost:8000"},
        {"server": "http://x", "dtype": "bfloat16"},
        {"server": "http://x", "revision": "main"},
    ],
)
def test_options_that_do_not_go_together(options):
    with pytest.raises(ValueError, match="server"):
        TeacherConfig(model="m", **options)


# -- whole runs


def test_a_run_with_a_served_teacher_equals_one_with_it_here(make_tree, server, data_file):
    """The same samples; scores and weights up to rounding. Its distance is at most the true one."""
    evaluation = {"data": {"eval": str(data_file)}}
    local = npd.distill(make_tree("local", **evaluation))
    there = npd.distill(make_tree("there", teacher={"model": "big", "server": server.url}, **evaluation))
    for generation in (0, 1):
        for part in range(3):
            a, b = (Store(run.run_dir).read_part(generation, part) for run in (local, there))
            if generation == 0:
                assert a["response_ids"] == b["response_ids"]
                assert a["behavior_logprobs"] == b["behavior_logprobs"]
                for name in ("teacher_nll", "teacher_nll_free", "delta_ifd"):
                    np.testing.assert_allclose(a[name].to_numpy(), b[name].to_numpy(), atol=1e-3)
            assert a.schema == b.schema
    assert there.before["eval/top1_agreement"] == local.before["eval/top1_agreement"]
    assert 0 < there.before["eval/kl_to_teacher_at_least"] <= local.before["eval/kl_to_teacher"]
    assert there.before["eval/kl_to_teacher_at_least"] == pytest.approx(local.before["eval/kl_to_teacher"], rel=0.5)


def test_a_server_that_restarts_costs_nothing_that_was_finished(make_tree, teacher_dir):
    with serving(teacher_dir) as fragile:
        tree = make_tree(
            teacher={"model": "big", "server": fragile.url, "retry_seconds": HANG}, rollout={"part_size": 3, "batch_size": 4}
        )
        written: dict[str, int] = {}
        away = threading.Event()

        def restart(handler: Any, answer: dict[str, Any]) -> None:
            for part in Path(tree["run_dir"]).rglob("part-*.parquet"):
                written[part.name] = part.stat().st_mtime_ns
            away.set()
            dropped(handler, answer)

        def come_back() -> None:
            away.wait(HANG)
            fragile.stop()
            time.sleep(0.5)
            fragile.start()

        helper = threading.Thread(target=come_back)
        helper.start()
        fragile.faults = [reply] * 15 + [restart]
        generation = npd.refresh(tree)
        helper.join()
    assert generation.manifest["rows"] == 12
    assert written
    for name, at in written.items():
        assert (generation.path / name).stat().st_mtime_ns == at


def test_sequence_level_distillation_from_a_server(make_tree, server):
    tree = make_tree(
        teacher={"model": "big", "server": server.url}, data={"references": "teacher"}, schedule={"generations": 1}
    )
    result = npd.sft(tree)
    for part in range(3):
        for row in Store(result.run_dir).read_part(0, part).to_pylist():
            written = server._written(row["prompt_ids"], {"max_tokens": 12, "max_new_tokens": 12, "stop_token_ids": [2]})
            ids = written["choices"][0]["token_ids"] if server.kind == "vllm" else written["output_ids"]
            assert row["response_ids"][: len(ids)] == ids


def test_a_resumed_run_may_find_its_server_elsewhere(make_tree, server):
    tree = make_tree(teacher={"model": "big", "server": server.url})
    npd.refresh(tree)
    with serving(server.model.name_or_path, kind=server.kind) as other:
        elsewhere = {**tree, "teacher": {"model": "big", "server": other.url, "concurrency": 2}}
        before = len(server.bodies)
        npd.distill(elsewhere)
        assert len(other.bodies) > 20
        assert len(server.bodies) == before
    finished = npd.distill(elsewhere)  # which needs no teacher, and it is gone
    assert finished.steps > 0


# -- several teachers


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20))
def test_routed_rows_keep_their_order(sources):
    def stage(key: str) -> Any:
        def append(table: pa.Table) -> pa.Table:
            return table.append_column("by", pa.array([f"{key}{i}" for i in table["n"].to_pylist()]))

        return append

    table = pa.table({"source": sources, "n": range(len(sources))})
    routed = Routed(lambda source: "x" if source == "a" else "y", stage)(table)
    assert routed["by"].to_pylist() == [f"{'x' if s == 'a' else 'y'}{i}" for i, s in enumerate(sources)]
    assert routed.drop_columns("by").equals(table)


def test_each_source_is_read_by_its_teacher(make_tree, server, teacher_dir, tmp_path):
    """Source b by another model here, source a by the server."""
    other = save_model(tmp_path / "other", seed=9, layers=2)
    tree = make_tree(teacher={"model": "big", "server": server.url}, teachers={"b": {"model": str(other)}})
    generation = npd.refresh(tree)
    assert generation.manifest["teachers"] == {"teacher": 6, "teachers.b": 6}
    readers = {
        source: Prefill(load_model(ModelConfig(model=str(path))), VOCABULARY, 0, 64)
        for source, path in (("a", teacher_dir), ("b", other))
    }
    for part in range(3):
        for row in Store(tree["run_dir"]).read_part(0, part).to_pylist():
            (reading,) = readers[row["source"]]([row["prompt_ids"]], [row["response_ids"]], 4)
            assert row["teacher_nll"] == pytest.approx(-float(reading.logprobs.mean()), abs=1e-4)
            assert row["topk_ids"] == reading.topk_ids.ravel().tolist()


def test_a_source_without_a_teacher_is_named(make_tree, teacher_dir):
    tree = make_tree(teachers={"b": {"model": str(teacher_dir)}})
    tree["teacher"] = None
    with pytest.raises(UserError, match=r"no teacher: 'a' \(6 prompts\)"):
        npd.preflight.prepare(load_config(tree), "distill")


def test_a_run_with_teachers_for_every_source_needs_no_other(make_tree, teacher_dir, data_file):
    tree = make_tree(
        teachers={"a": {"model": str(teacher_dir)}, "b": {"model": str(teacher_dir)}}, data={"eval": str(data_file)}
    )
    both = npd.distill(make_tree("one", data={"eval": str(data_file)}))
    tree["teacher"] = None
    assert npd.distill(tree).after == pytest.approx(both.after, rel=1e-4)


def test_a_teacher_for_no_source_is_mentioned(make_tree, teacher_dir):
    tree = make_tree(teachers={"maths": {"model": str(teacher_dir)}})
    assert any("'maths'" in note for note in npd.preflight.prepare(load_config(tree), "distill").notes)


def test_unknown_keys_of_teachers_are_named(make_tree):
    with pytest.raises(UserError, match=r"teachers\.math\.sever.*teachers\.math\.server"):
        load_config(make_tree(teachers={"math": {"model": "m", "sever": "http://x"}}))
