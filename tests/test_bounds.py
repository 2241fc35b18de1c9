"""Hostile and broken input: read, or refused in one paragraph that names it; never another exception, never for ever."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from chats import byte_tokenizer, of_family
from conftest import HANG, save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from npd import cli
from npd.config import Config, SelectionConfig, leaves, load_config
from npd.errors import NpdError, UserError
from npd.models import load_model_config
from npd.models.files import check_claims, check_config, read_header, weight_files
from npd.models.students import check_pattern
from npd.preflight import prepare
from npd.prompts import Chat, load_prompts, turn_end
from npd.prompts.bounded import MOST
from npd.registry import load_plugins
from npd.selection.rules import Judgement, judge

BASE: dict[str, Any] = {
    "run_dir": "runs/x",
    "student": {"model": "me/student", "lora": {}},
    "teacher": {"model": "me/teacher"},
    "data": {"train": "t.jsonl"},
}
KEYS = [key for key, _ in leaves(Config)]
HOSTILE: list[Any] = [
    *(math.inf, -math.inf, math.nan, 10**18, -1, 10**5000, 1e-300, 0.999999999, 1e12, True, None, [], {}, {1: 2}, b"x"),
    *("\0", "x" * 5000, "a" * 300, "\ud800", "\x1b[31m", "(", "(" * 9000, [[1] * 100] * 100, ["\x1b]0;x\x07"]),
]


def paragraph(error: NpdError) -> str:
    """One that a terminal can be given."""
    text = str(error)
    assert 0 < len(text) <= 1200
    assert text.isprintable()
    return text


def outcome(action: Callable[[], Any]) -> str | None:
    """What is refused; None: it is taken. Any other exception is a failure."""
    try:
        action()
    except UserError as error:
        return paragraph(error)
    return None


# -- configuration


@pytest.mark.parametrize("key", KEYS)
def test_every_key_takes_or_refuses_what_is_hostile(key):
    for value in HOSTILE:
        told = outcome(partial(load_config, BASE, {key: value}))
        assert told is None or key.rpartition(".")[2] in told


def test_every_number_is_bounded_above_and_finite():
    """10^18 and infinity, unless the option says that it may be: what separates, and what limits nothing."""
    free = {
        "seed",
        "selection.lower",
        "selection.upper",
        "selection.adaptive_lower",
        "training.max_grad_norm",
        "schedule.kl_budget",
    }
    base = {**BASE, "teacher": {"model": "t", "server": "http://x"}}
    for key, field in leaves(Config):
        if {int, float} & {field.annotation, *getattr(field.annotation, "__args__", ())} and key not in free:
            for value in (10**18, math.inf):
                with pytest.raises(UserError, match=key.rpartition(".")[2]):
                    load_config(base, {key: value})
    assert load_config(BASE, {"training.max_grad_norm": math.inf}).training.max_grad_norm == math.inf


def laughs(first: str, rest: str) -> str:
    """A few lines that are a billion values: each refers to the one before it nine times."""
    steps = zip("abcdefgh", "bcdefghi", strict=True)
    return "\n".join([first, *(f"{c}: &{c} {rest.format(','.join(['*' + before] * 9))}" for before, c in steps)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs("a: &a [1,1,1,1,1,1,1,1,1]", "[{}]"), "with its aliases it has more than"),
        (laughs("a: &a {x: 1}", "{{<<: [{}]}}"), "with its aliases it has more than"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested more than 32 deep"),
        ("a: &a [*a]", "nested more than 32 deep"),
        ("seed: 1\nseed: 2", "has the key 'seed' a second time"),
        ("data: {train: a, train: b}", "has the key 'train' a second time"),
        ("seed: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("seed: 2024-02-31", "day is out of range"),
        ("seed: !!timestamp x", "is not valid YAML"),
        ("seed: " + "9" * 5000, "is not valid YAML"),
        ("# " + "x" * (300 << 10), "more than 262,144 bytes"),
    ],
)  # fmt: skip
def test_yaml_that_is_no_configuration(tmp_path, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    told = outcome(lambda: load_config(file))
    assert told is not None
    assert str(file) in told
    assert words in told


def test_what_is_shared_by_an_alias_is_set_in_one_place(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: r\nstudent: &m {model: s}\nteacher: *m\ndata: {train: t}\n")
    config = load_config(file, {"teacher.model": "t"})
    assert config.teacher is not None
    assert (config.student.model, config.teacher.model) == ("s", "t")


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p)])
def test_what_is_no_file_is_not_opened(tmp_path, tokenizer, student_dir, make):
    for name in ("c.yaml", "d.jsonl", "p.py"):
        make(tmp_path / name)
    assert outcome(lambda: load_config(tmp_path / "c.yaml"))
    assert outcome(lambda: load_prompts(str(tmp_path / "d.jsonl"), tokenizer, max_prompt_tokens=9))
    assert outcome(lambda: load_plugins([str(tmp_path / "p.py")]))
    shutil.copytree(student_dir, tmp_path / "model")
    (tmp_path / "model/config.json").unlink()
    make(tmp_path / "model/config.json")
    assert outcome(lambda: prepare(load_config({**BASE, "student": {"model": str(tmp_path / "model")}}), "distill"))


@settings(max_examples=60)
@given(st.one_of(st.binary(max_size=200), st.text("{}[]&*:-!<|>'\"\n ab1.#?,%@`~", max_size=80).map(str.encode)))
def test_any_bytes_as_a_configuration(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    assert outcome(lambda: load_config(file))


# hypothesis shows what it drew, which Python does not let it of integers of thousands of digits.
VALUES = st.recursive(
    st.one_of(
        st.sampled_from([value for value in HOSTILE if value != 10**5000]), st.text(max_size=5), st.integers(), st.floats()
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_any_options_together(options):
    outcome(lambda: load_config(BASE, options))


def test_options_of_the_command_line(monkeypatch, capsys):
    for text in ("9" * 5000, "[" * 3000, "\x1b[31m", ".inf", "1e999", "!!timestamp x", "\udcff"):
        monkeypatch.setattr(sys, "argv", ["npd", "distill", "/nowhere.yaml", "--seed", text])
        with pytest.raises(SystemExit) as stop:
            cli.entry()
        assert stop.value.code == 2
        assert capsys.readouterr().err.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import npd\n\n1 / 0\n", r"line 3 (ZeroDivisionError: division by zero)"),
        ("import npd\nimport nowhere_at_all\n", "line 2 (ModuleNotFoundError"),
        ("x = (\n", "line 1 (SyntaxError: '(' was never closed)"),
        ("raise ValueError('\\x1b[31m' + 'x' * 9000)", "line 1 (ValueError"),
    ],
)
def test_a_plugin_that_fails_says_where(tmp_path, code, words):
    (tmp_path / "mine.py").write_text(code)
    told = outcome(lambda: load_plugins([str(tmp_path / "mine.py")]))
    assert told is not None
    assert words in told
    assert "installed module" not in told
    assert "installed module" in str(outcome(lambda: load_plugins(["nowhere_at_all.inner"])))


WORDS: Any = [["a"], ["a", 1, "b"], ["a", "b"]]  # for two responses, with no words, and as they should be


@pytest.mark.parametrize("made", [[1], None, *(Judgement(words, None) for words in WORDS[:2]), Judgement(WORDS[2], WORDS)])
def test_a_rule_that_returns_something_else(made):
    class Mine:
        def __call__(self, table, config):
            return made

    with pytest.raises(NpdError, match=r"must return npd\.selection\.Judgement") as caught:
        judge(Mine(), pa.table({"delta_ifd": [0.1, 0.2]}), SelectionConfig())  # type: ignore[arg-type]
    paragraph(caught.value)


# -- data

ROW = '{"prompt": "1="}\n'


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("d.jsonl", ROW + '{"prompt": "1", "answer": "\\ud800"}', "line 2 can't be turned into tokens: `answer` holds half"),
        ("d.jsonl", ROW + '{"prompt": "1", "x": ' + "[" * 3000 + "]" * 3000 + "}", "line 2 cannot be read: it is nested"),
        ("d.jsonl", ROW + '{"prompt": "1", "x": ' + "9" * 5000 + "}", "line 2 cannot be read: it holds an integer"),
        ("d.jsonl", ROW + '{"prompt": "1", "prompt": "2"}', "line 2 cannot be read: it has the key 'prompt' twice"),
        ("d.jsonl", '{"instruction": "a", "history": [["b"]]}', "`history` must be a list of pairs"),
        ("d.jsonl", '{"prompt": [{"role": "user", "content": "a"}], "tools": "' + "[" * 3000 + '"}', "nested more than"),
        ("d.json", "[" * 100_000, "nested more than 100 deep"),
        ("d.csv", "prompt,prompt\n1,2\n", "has the column 'prompt' twice"),
        ("d.jsonl", "\x1b[31m\x07", "line 1 is not valid JSON"),
        ("d.jsonl", '{"\\u001b[31m": 1}', "has neither `prompt` nor `messages`"),
    ],
)
def test_data_that_cannot_be_read_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    told = outcome(lambda: load_prompts(str(tmp_path / name), of_family("chatml"), max_prompt_tokens=99))
    assert told is not None
    assert name in told
    assert words in told


def test_a_line_without_end(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("npd.prompts.readers._lines.__defaults__", (1000,), raising=False)
    (tmp_path / "d.jsonl").write_text(ROW + '{"prompt": "' + "1" * 1000 + '"}')
    told = outcome(lambda: load_prompts(str(tmp_path / "d.jsonl"), tokenizer, max_prompt_tokens=99))
    assert told is not None
    assert "line 2 has more than 1,000 characters" in told


def test_a_file_that_changes_while_it_is_read(tmp_path, tokenizer, monkeypatch):
    import npd.prompts.load as load

    file, real = tmp_path / "d.jsonl", load.read_row
    file.write_text(ROW)

    def slow(*args, **options):
        file.write_text(ROW * 3)
        return real(*args, **options)

    monkeypatch.setattr(load, "read_row", slow)
    told = outcome(lambda: load_prompts(str(file), tokenizer, max_prompt_tokens=99))
    assert told is not None
    assert "changed while it was read" in told


COLUMNS = {
    "timestamp": pa.array([2**62, 5]).view(pa.timestamp("us")),
    "date": pa.array([10**14 * 864, 0]).view(pa.date64()),
    "zone": pa.array([1, 2], pa.timestamp("us", "Nowhere/Land")),
    "duration": pa.array([2**62, 5]).view(pa.duration("s")),
    "nested": pa.array([[[None]], [None]]),
    "binary": pa.array([b"\xff", b""]),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_any_type_are_no_matter_where_they_are_not_read(tmp_path, tokenizer, kind):
    file = tmp_path / "d.parquet"
    pq.write_table(pa.table({"prompt": ["1", "2"], "x": COLUMNS[kind]}), file)
    assert len(load_prompts(str(file), tokenizer, max_prompt_tokens=99)) == 2
    pq.write_table(pa.table({"prompt": ["1", "2"], "answer": COLUMNS[kind]}), file)
    told = outcome(lambda: load_prompts(str(file), tokenizer, max_prompt_tokens=99))
    assert (told is None) == (kind == "dictionary")
    assert told is None or "row 1" in told


@settings(max_examples=120)
@given(
    st.sampled_from(["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz", "d.csv.zst"]),
    st.one_of(
        st.binary(max_size=200),
        st.text('{}[]",:1ae\\u d8\n\r', max_size=80).map(str.encode),
        st.dictionaries(
            st.sampled_from(["prompt", "messages", "answer", "history", "instruction", "tools", "reasoning_gym"]), VALUES
        ).map(
            lambda row: json.dumps(
                {key: str(value) if isinstance(value, dict) else value for key, value in row.items()}, default=str
            ).encode()
        ),
    ),
)
def test_any_bytes_as_data(tmp_path_factory, tokenizer, name, content):
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(content)
    outcome(lambda: load_prompts(str(file), tokenizer, max_prompt_tokens=99))


# -- templates

DOUBLE = "{% set ns = namespace(x=['a'] * 9) %}{% for i in range(60) %}{% set ns.x = MORE %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "computes for more than"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
            "computes for more than",
        ),
        (DOUBLE.replace("MORE", "[ns.x, ns.x]"), "computes for more than"),
        (DOUBLE.replace("MORE", "ns.x + ns.x"), "more than 268,435,456 characters"),
        (DOUBLE.replace("MORE", "ns.x ~ ns.x"), "more than 268,435,456 characters"),
        ("{{ 'x' * 10**10 }}", "more than 268,435,456 characters"),
        ("{% set a = 'x' * 10**7 %}{{ a.replace('x', a) }}", "more than 268,435,456 characters"),
        ("{% set a = 'x' * 10**7 %}{{ range(99999) | join(a) }}", "more than 268,435,456 characters"),
        ("{% set a = 'x' * 10**7 %}{% for i in range(99999) %}{{ a }}{% endfor %}", "more than 268,435,456 characters"),
        ("{{ 'x'.ljust(10**10) }}", "asks `ljust`"),
        ("{{ '%9999999999d' % 1 }}", "asks `format`"),
        ("{{ '{:>{}}'.format('x', 10**10) }}", "asks `format`"),
        (
            "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
            "an integer of more",
        ),
        ("x" * 300_000, "has more than 262,144 characters"),
    ],
)
def test_a_template_without_end_is_stopped(template, words, monkeypatch):
    slow = words.startswith("computes")  # no other one may be stopped for its time, however slow the machine
    monkeypatch.setattr("npd.prompts.bounded.SECONDS", 0.2 if slow else HANG)
    with pytest.raises(UserError, match=f"^The chat template .*{words}") as caught:
        turn_end(byte_tokenizer(template, "</s>"))
    paragraph(caught.value)
    assert MOST == 268_435_456


def test_a_template_that_is_without_end_for_some_rows():
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.content }}{% if m.content == '!!' %}" + loops + "{% endif %}{% endfor %}", "</s>"
    )
    chat = Chat(tokenizer)
    assert chat.ask("row 1", [{"role": "user", "content": "hi"}])[0].text == "hi"
    told = outcome(lambda: chat.ask("row 2", [{"role": "user", "content": "!!"}]))
    assert told is not None
    assert told.startswith("row 2: the chat template computes for more than")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('\x1b[31m\n\n' + 'x' * 9000) }}", "{{ messages.__class__.__mro__ }}", "{% include '/etc/passwd' %}",
     "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ lipsum(9) }}",
     "{% for"],
)  # fmt: skip
def test_a_template_that_fails(template):
    chat = Chat(byte_tokenizer(template, "</s>"))
    assert outcome(lambda: chat.ask("row 1", [{"role": "user", "content": "hi"}]))


# -- models


@pytest.fixture
def copy_of(tmp_path, student_dir):
    def copy(**options: Any) -> Path:
        directory = tmp_path / "copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(student_dir, directory)
        tree = json.loads((directory / "config.json").read_text()) | options
        (directory / "config.json").write_text(json.dumps(tree))
        return directory

    return copy


def prepared(directory: Path, teacher: Path, data: Path) -> str | None:
    tree = {
        "run_dir": str(directory.parent / "run"),
        "student": {"model": str(directory)},
        "teacher": {"model": str(teacher)},
        "data": {"train": str(data), "max_prompt_tokens": 32},
        "rollout": {"max_new_tokens": 12},
        "packing": {"length": 64},
        "scoring": {"top_k": 4},
    }
    return outcome(lambda: prepare(load_config(tree), "distill"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": 2**20}, "describes a model of"),
        ({"hidden_size": -8}, "hidden_size: -8"),
        ({"vocab_size": "many"}, "vocab_size: 'many'"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"architectures": 5}, "architectures: 5"),
        ({"num_hidden_layers": 4000, "num_experts": 60000}, "layers of 60,000 experts"),
    ],
)
def test_a_configuration_that_no_model_has(copy_of, teacher_dir, data_file, options, words):
    told = prepared(copy_of(**options), teacher_dir, data_file)
    assert told is not None
    assert words in told


@settings(max_examples=60)
@given(st.sampled_from(["num_hidden_layers", "hidden_size", "head_dim", "rope_parameters", "architectures", "x"]), VALUES)
def test_any_value_in_a_models_configuration(tmp_path_factory, student_dir, key, value):
    from npd.config import ModelConfig

    directory = tmp_path_factory.getbasetemp() / "any-model"
    if not directory.is_dir():
        shutil.copytree(student_dir, directory)
    tree = json.loads((student_dir / "config.json").read_text())
    try:
        (directory / "config.json").write_text(json.dumps(tree | {key: value}, default=str))
    except TypeError:  # a key that JSON does not have
        return
    outcome(lambda: load_model_config(ModelConfig(model=str(directory))))


@settings(max_examples=40)
@given(st.binary(max_size=100))
def test_any_bytes_as_a_models_files(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_bytes(content)
    assert outcome(lambda: check_config(folder / "config.json")) or isinstance(json.loads(content), dict)
    for start in (b"", struct.pack("<Q", len(content)), struct.pack("<Q", 1 << 62)):
        (folder / "x.safetensors").write_bytes(start + content)
        outcome(lambda: read_header(folder / "x.safetensors"))


@pytest.mark.parametrize("shape", [[-1], [10**30], "x", [1], None])
def test_a_header_that_promises_something_else(tmp_path, shape):
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "no whole safetensors file" in str(outcome(lambda: read_header(tmp_path / "m.safetensors")))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", 5, ["x"], "\0"])
def test_an_index_that_leaves_its_directory(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert outcome(lambda: weight_files(tmp_path))


def test_weights_that_are_links_are_read(tmp_path):
    there = save_model(tmp_path / "there", seed=1)
    here = tmp_path / "here"
    here.mkdir()
    for file in there.iterdir():
        (here / file.name).symlink_to(file)
    held = sum(math.prod(each["shape"]) for each in read_header(weight_files(here)[0]).values())
    check_claims("here", weight_files(here), held, quantised=False)
    assert outcome(lambda: check_claims("here", weight_files(here), 3 * held + (1 << 21), quantised=False))


def test_a_pattern_without_end():
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(9)]
    check_pattern(r"(.*\.)?q_proj", names, "It")
    assert "takes more than 2 seconds" in str(outcome(lambda: check_pattern(r"(\w*\.?)*x!", names, "It")))


def test_a_number_of_processes_that_is_none(make_tree, monkeypatch):
    for said in ("many", "-1", "9" * 50, "", "\x1b"):
        monkeypatch.setenv("WORLD_SIZE", said)
        assert "WORLD_SIZE" in str(outcome(lambda: prepare(load_config(make_tree()), "distill")))
    assert yaml.safe_load("1e-5") == "1e-5"  # which options take as the number that is meant
