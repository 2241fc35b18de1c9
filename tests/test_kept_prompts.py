"""prompts.arrow: whole or made again, and the same prompts for as long as a run lasts."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pytest
from chats import of_family
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import npd
from npd.errors import UserError
from npd.prompts import SCHEMA, Chat, Prompts, load_prompts
from npd.store import Store, sha256

ROWS = [{"messages": [{"role": "user", "content": f"{i}+1"}], "source": "ab"[i % 2]} for i in range(5)]


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", ROWS)


def load(file, *, family="llama 3", day=1, **options):
    chat = Chat(of_family(family), now=datetime(2026, 3, day))
    return load_prompts(str(file), chat.tokenizer, chat=chat, **({"max_prompt_tokens": 999} | options))


def begun(store):
    """As a run that has made a part of these prompts."""
    prompts = store.prompts()
    table = pa.table({"sample_id": ["s"], "prompt_id": prompts.table["prompt_id"].slice(0, 1), "verdict": ["proximal"]})
    store.write_part(0, 0, table)


def test_what_is_saved_is_opened(tmp_path, file):
    prompts = load(file)
    prompts.save(tmp_path / "p.arrow")
    opened = Prompts.open(tmp_path / "p.arrow")
    assert opened.table.equals(prompts.table)
    assert vars(opened) | {"table": None} == vars(prompts) | {"table": None}
    assert opened.made_from
    assert opened.date == "2026-03-01T00:00:00"


@settings(max_examples=100)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_other_byte_is_noticed(tmp_path_factory, at, change):
    path = tmp_path_factory.mktemp("p") / "p.arrow"
    table = pa.Table.from_pylist(
        [{"prompt_id": "0", "source": "", "prompt_ids": [1, 2], "completion_ids": None, "answer": None}] * 9, schema=SCHEMA
    )
    Prompts(table, 9, made_from={"data": ["1"]}).save(path)
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= change
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        Prompts.open(path)


def test_prompts_are_those_of_the_day_the_run_began(tmp_path, file):
    store = Store(tmp_path / "run")
    assert store.began is None
    first = store.keep_prompts(load(file))
    begun(store)
    assert store.began == datetime(2026, 3, 1)
    today = load(file, day=2)
    assert not today.table.equals(first.table)  # the template says another date
    assert store.keep_prompts(today).table.equals(first.table)


@pytest.mark.parametrize(
    ("change", "what"),
    [("data", "the data has"), ("tokenizer", "the tokenizer and the options have"), ("options", "the options have")],
)
def test_other_prompts_are_refused_and_it_is_said_what_changed(tmp_path, file, change, what):
    store = Store(tmp_path / "run")
    store.keep_prompts(load(file))
    begun(store)
    if change == "data":
        write_jsonl(file, ROWS[1:])
    family = "smollm3" if change == "tokenizer" else "llama 3"
    now = load(file, family=family, need=None, max_prompt_tokens=998 if change == "options" else 999, day=2)
    with pytest.raises(UserError, match=rf"The prompts are not those that .*run began with \(5 then, \d now\): .*{what}"):
        store.keep_prompts(now)


def test_a_damaged_file_is_made_again(tmp_path, file):
    store = Store(tmp_path / "run")
    first = store.keep_prompts(load(file)).table.to_pylist()
    begun(store)
    path = store.path / "prompts.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"prompts\.arrow is damaged .*its checksum is another one.* it will be made again"):
        store.prompts()
    assert store.began == datetime(2026, 3, 1)
    with pytest.raises(UserError, match="is damaged, and the prompts of today are not those that it held"):
        store.keep_prompts(load(file, day=2))
    assert store.keep_prompts(load(file)).table.to_pylist() == first
    assert store.prompts().table.to_pylist() == first


def test_a_file_of_an_older_version_is_gone_on_with(tmp_path, file):
    """It has no checksum and says nothing of what it was made from."""
    store, prompts = Store(tmp_path / "run"), load(file)
    path = store.path / "prompts.arrow"
    path.parent.mkdir()
    facts = json.dumps({"rows": 5, "dropped": {}, "places": {}})
    with pa.ipc.new_file(str(path), SCHEMA.with_metadata({"npd": facts})) as writer:
        writer.write_table(prompts.table)
    begun(store)
    before = sha256(path)
    assert store.keep_prompts(prompts).table.equals(prompts.table)
    assert sha256(path) == before
    assert store.began == datetime.fromtimestamp(path.stat().st_mtime)
    with pytest.raises(UserError, match="the data or the tokenizer has changed"):
        store.keep_prompts(load(file, day=2))


def test_a_run_with_a_damaged_prompts_file_ends_as_it_would_have(make_tree):
    whole = npd.distill(make_tree("whole"))
    tree = make_tree("run")
    npd.refresh(tree)
    path = Path(tree["run_dir"]) / "prompts.arrow"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    result = npd.distill(tree)
    assert sha256(result.student / "model.safetensors") == sha256(whole.student / "model.safetensors")
    assert path.read_bytes() == (Path(make_tree("whole")["run_dir"]) / "prompts.arrow").read_bytes()
